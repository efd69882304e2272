# SPDX-License-Identifier: Apache-2.0
"""What the options of `generate` mean for this model: which one wins, and which cannot be kept.

Not here: prompts and answers (`chat.py`), guidance (`guidance.py`), how tokens are chosen (transformers' `generate`).
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from transformers.generation import GenerationConfig, LogitsProcessor
from transformers.utils import is_hqq_available, is_optimum_quanto_available


MOVED = "transformers has moved its code to the Hub. Leave it out, or name that code as custom_generate."
NO_START = "the answer begins behind <sop>, with which every prompt ends. Leave it out."
# What cannot be right here, and why. None, False and 0 are the same as leaving an option out.
REFUSED = {
    "prefill_chunk_size": "the context of a prefix-LM must be seen as a whole. Leave it out.",
    "continuous_batching_config": "continuous batching hides parts of the context from earlier ones. Leave it out.",
    "token_healing": "a prompt ends with [gMASK] and <sop>, not with a word that could be healed. Leave it out.",
    "assistant_early_exit": (
        "only the last layer was trained to speak to the head. Draft with assistant_model or prompt_lookup_num_tokens."
    ),
    "use_mtp": "this model predicts one token at a time. Draft with assistant_model or prompt_lookup_num_tokens.",
    "speculation_type": "this model has no such draft. Draft with assistant_model or prompt_lookup_num_tokens.",
    "decoder_start_token_id": NO_START,
    "forced_bos_token_id": NO_START,
}
REFUSED_WITHOUT_CODE = (
    "penalty_alpha",
    "low_memory",
    "dola_layers",
    "constraints",
    "force_words_ids",
    "num_beam_groups",
    "diversity_penalty",
)
QUANTIZED_CACHES = {
    "quanto": (is_optimum_quanto_available, "optimum-quanto"),
    "hqq": (is_hqq_available, "hqq"),
}
# The defaults of the original's `chat`, which its signature shows.
ORIGINAL_OPTIONS = {
    "do_sample": True,
    "top_p": 0.4,
    "top_k": 100,
    "temperature": 0.8,
    "repetition_penalty": 1.2,
}
ORIGINAL_MAX_LENGTH, ORIGINAL_MIN_LENGTH = 1024, 100  # tokens, prompt included
# Two ways to say one thing: with the prompt, and without.
OTHER_LENGTHS = {
    "max_length": "max_new_tokens",
    "max_new_tokens": "max_length",
    "min_length": "min_new_tokens",
    "min_new_tokens": "min_length",
}
# What `chat` hands on to `generate` beside the options of a generation config.
CHAT_KEYWORDS = {
    "tokenizer",
    "cache",
    "past_key_values",
    "compile",
    "streamer",
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "synced_gpus",
    "assistant_model",
    "assistant_tokenizer",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
    "custom_generate",
    "trust_remote_code",
}
# The values that change nothing, where that is not 0 or False.
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "num_beam_groups": 1}


def options_of(config: GenerationConfig) -> dict[str, Any]:
    """The options that a generation config sets; None leaves one open.

    Raises:
        ValueError: it is no generation config, or has an option that this release of transformers does not know.
    """
    if not isinstance(config, GenerationConfig):
        raise ValueError(f"generation_config must be a GenerationConfig of transformers, found {config!r}.")
    options = {
        name: value
        for name, value in vars(config).items()
        if value is not None and not name.startswith("_") and name != "transformers_version"
    }
    check_names(options, "A generation config", vars(GenerationConfig()))
    return options


def check_names(options: dict[str, Any], owner: str, known: Iterable[str]) -> None:
    """Raise a `ValueError` for options that their owner does not have."""
    unknown = sorted(options.keys() - set(known))
    if unknown:
        raise ValueError(
            f"{owner} has no option {', '.join(map(repr, unknown))} in transformers {transformers.__version__}. Check "
            "the spelling, or leave it out."
        )


def resolve_options(defaults: GenerationConfig, config: GenerationConfig | None, keywords: dict) -> dict[str, Any]:
    """What holds for a call of `generate`: its keywords, else its generation config, else the model's, `defaults`.

    Raises:
        ValueError: as in `options_of`.
    """
    return options_of(defaults) | ({} if config is None else options_of(config)) | keywords


def is_on(options: dict[str, Any], name: str) -> bool:
    """Whether an option changes anything."""
    value = options.get(name)
    return value is not None and value != NEUTRAL.get(name, 0) and value != []


def check_options(options: dict[str, Any]) -> None:
    """Raise a `ValueError` for an option, or two options, that `generate` cannot keep with this model.

    Args:
        options: all that hold for the call, see `resolve_options`, and its other keywords.
    """
    for name, reason in REFUSED.items():
        if is_on(options, name):
            raise ValueError(f"{name}={options[name]!r} cannot be used: {reason}")
    if options.get("custom_generate") is None:
        for name in filter(lambda name: is_on(options, name), REFUSED_WITHOUT_CODE):
            raise ValueError(f"{name}={options[name]!r} cannot be used: {MOVED}")
    check_cache_implementation(options)
    check_drafts(options)
    if is_on(options, "num_beams") and options.get("streamer") is not None:
        raise ValueError(
            f"num_beams={options['num_beams']} cannot be streamed: which beam wins is known at the end. Leave it "
            "out, or use chat() or generate() without a streamer."
        )
    stops = options.get("stop_strings")
    if stops == "" or ("" in (stops or ()) and not isinstance(stops, str)):
        raise ValueError("An empty string among stop_strings would stop every answer at once. Leave it out.")
    if stops and options.get("tokenizer") is None:
        raise ValueError(f"stop_strings={stops!r} need the tokenizer: give generate(tokenizer=...).")
    if options.get("negative_prompt_ids") is not None and options.get("guidance_scale") is None:
        raise ValueError("negative_prompt_ids do nothing without guidance_scale. Give both, or leave them out.")


def check_cache_implementation(options: dict[str, Any]) -> None:
    """Raise a `ValueError` for a cache that is not this model's, or that needs a package that is not installed."""
    implementation = options.get("cache_implementation") or ""
    if implementation == "paged":
        raise ValueError(
            "cache_implementation='paged' cannot be used: continuous batching hides later parts of the context from "
            "earlier ones. Leave it out; generate() takes batches that are padded on the left."
        )
    if implementation.startswith("offloaded") and not torch.accelerator.is_available():
        raise ValueError(
            f"cache_implementation={implementation!r} cannot be used: there is no accelerator to offload it from. "
            "Leave it out."
        )
    if implementation == "quantized":
        backend = (options.get("cache_config") or {}).get("backend", "quanto")
        is_available, package = QUANTIZED_CACHES.get(str(backend).lower(), (lambda: True, ""))
        if not is_available():
            raise ValueError(
                f"cache_implementation='quantized' needs a package that is not installed (pip install {package})."
            )


def check_drafts(options: dict[str, Any]) -> None:
    """Raise a `ValueError` for what does not go together with tokens that are drafted, several at a time."""
    if options.get("is_assistant") and not (options.get("return_dict_in_generate") and options.get("output_scores")):
        raise ValueError("is_assistant is set for a model that drafts for another: give that one assistant_model.")
    drafts = [name for name in ("assistant_model", "prompt_lookup_num_tokens") if options.get(name)]
    if drafts and is_on(options, "num_beams"):
        raise ValueError(f"{drafts[0]} drafts for one sequence: leave it or num_beams={options['num_beams']} out.")
    if drafts and options.get("stop_strings"):
        raise ValueError(
            f"{drafts[0]} accepts several tokens at a time and would run past "
            f"stop_strings={options['stop_strings']!r}. Leave one of them out."
        )


def resolve_chat_options(given: dict[str, Any], defaults: GenerationConfig) -> dict[str, Any]:
    """The keywords of `generate` for a call of `chat`.

    What was given holds, else what its `generation_config` sets, else the original's defaults, else the model's own
    generation config, which `generate` looks up itself.

    Args:
        given: the options of the call; a length of None is left open.
        defaults: `model.generation_config`.
    """
    given = {name: value for name, value in given.items() if value is not None or name not in OTHER_LENGTHS}
    config = given.pop("generation_config", None)
    config = {} if config is None else options_of(config)
    config = {name: value for name, value in config.items() if OTHER_LENGTHS.get(name) not in given}
    options = ORIGINAL_OPTIONS | resolve_lengths(config | given, defaults)
    if not options["do_sample"]:
        options.update(top_p=None, top_k=None, temperature=None)
    return options


def resolve_lengths(options: dict[str, Any], defaults: GenerationConfig) -> dict[str, Any]:
    """`options` with the original's lengths where they and `defaults` say nothing, and each length given in one way.

    The other way is None, so that it is not taken from `defaults`.
    """
    options = dict(options)
    if "max_new_tokens" in options:
        options["max_length"] = None
    elif "max_length" in options or defaults.max_new_tokens is None:
        options = {"max_length": ORIGINAL_MAX_LENGTH, **options, "max_new_tokens": None}
    if "min_new_tokens" in options:
        options["min_length"] = None
    elif "min_length" in options:
        options["min_new_tokens"] = None
    elif defaults.min_length is not None:
        options["min_length"] = defaults.min_length
    elif defaults.min_new_tokens is None and options.get("max_length") is not None:
        options["min_length"] = min(ORIGINAL_MIN_LENGTH, options["max_length"])
    return options


def check_chat_options(options: dict[str, Any], defaults: GenerationConfig) -> None:
    """Raise a `ValueError` for an option that `chat` does not have or cannot keep.

    Args:
        options: `generate`'s keywords.
        defaults: `model.generation_config`.
    """
    if options.get("custom_generate") is None:
        check_names(options, "chat()", [*vars(GenerationConfig()), *CHAT_KEYWORDS])
    options = resolve_options(defaults, None, options)
    if is_on(options, "num_return_sequences"):
        raise ValueError("chat() gives one answer; use generate() for num_return_sequences > 1.")
    if options.get("is_assistant"):
        raise ValueError("is_assistant is set for a model that drafts for another. Leave it out.")
    for name in ("cache", "past_key_values"):
        if options.get(name) is not None and options[name].get_seq_length():
            raise ValueError(f"chat() reads its whole prompt anew: {name} must be empty. Leave it out.")
    check_options(options)


class SuppressUnknown(LogitsProcessor):
    """Never choose a row beyond the tokens: the model has some that no tokenizer can decode."""

    def __init__(self, num_tokens: int):
        self.num_tokens = num_tokens

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        rest = scores.shape[1] - self.num_tokens
        return F.pad(scores[:, : self.num_tokens], (0, rest), value=-torch.inf) if rest > 0 else scores
