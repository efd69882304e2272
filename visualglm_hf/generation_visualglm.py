# SPDX-License-Identifier: Apache-2.0
"""What transformers' `generate` asks of the model: its options, caches, positions and masks of each step, and guidance.

Not here: what the model computes (`modeling_visualglm.py`), which options there are (`generation_options.py`), how a
step is compiled (`compilation.py`), and how tokens are chosen (transformers).

Shapes: B batch, S length, T key length, C hidden size.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, StaticCache
from transformers.generation import CompileConfig, GenerationConfig, GenerationMixin, LogitsProcessorList
from transformers.modeling_utils import PreTrainedModel

from .cache_naming import CACHE_NAME, OLD_NAME, takes_cache
from .compilation import GRAPHS_ALONE, bucket_length, compile_call, resolve_compile_config
from .configuration_visualglm import VisualGLMConfig, count_processes
from .generation_options import SuppressUnknown, check_options, resolve_options
from .glm_positions import build_glm_position_ids
from .growing_cache import lengthen, make_cache
from .guidance import Guidance, guidance_options


DEFAULT_NEW_TOKENS = 20  # of `generate`


class Prompt(NamedTuple):
    """What `generate` is to continue: ids or embeddings, and pictures either way; None is what was not given."""

    input_ids: torch.Tensor | None
    inputs_embeds: torch.Tensor | None
    pixel_values: torch.Tensor | None
    image_embeds: torch.Tensor | None
    interpolate_pos_encoding: bool | None  # of `pixel_values`

    @property
    def tokens(self) -> torch.Tensor | None:
        """[B, S] or [B, S, C]"""
        return self.inputs_embeds if self.input_ids is None else self.input_ids

    @property
    def length(self) -> int:
        return 0 if self.tokens is None else self.tokens.shape[1]


def wants_dynamic_cache(options: dict) -> bool:
    """Whether `generate` with these `options` would make a dynamic cache that nobody but it knows of."""
    return (
        options.get("use_cache") is not False
        and options.get("cache_implementation") is None
        and not options.get("is_assistant")
    )


def compile_options(
    model: "VisualGLMGenerationMixin", compile: bool | CompileConfig, prompt_length: int, options: dict
) -> dict:
    """What to add to the `options` of `generate` for a compiled decode step.

    Args:
        compile: `generate`'s.
        prompt_length: in tokens.
        options: all that hold for the call.

    Raises:
        ValueError: no compiler, weights that come and go, or options that the cache of a compiled step contradicts.
    """
    setting = options.get
    compile_config = resolve_compile_config(compile, model.device)
    compiled_call = model.compile_step(compile_config)
    for name in ("assistant_model", "prompt_lookup_num_tokens", CACHE_NAME):
        if setting(name) is not None:
            raise ValueError(f"compile has a cache of its own and steps of one token: leave it or {name} out.")
    if setting("use_cache") is False or setting("cache_implementation") not in (None, "static"):
        raise ValueError("compile needs the static cache: leave use_cache and cache_implementation out.")
    length = prompt_length + (setting("max_new_tokens") or DEFAULT_NEW_TOKENS)
    if setting("max_new_tokens") is None:
        length = setting("max_length") or length
    # If nothing is compiled for its length, it begins short, and `prepare_inputs_for_generation` lengthens it.
    grows = compile_config.backend == GRAPHS_ALONE and setting("cache_implementation") is None
    limit = model.config.text_config.max_position_embeddings
    length = max(bucket_length(prompt_length + 1 if grows else length, limit), setting("max_cache_len") or 0)
    cache = {"cache_implementation": "static", "max_cache_len": length}
    if grows:
        cache = {CACHE_NAME: StaticCache(config=model.config.text_config, max_cache_len=length)}
    return {
        **cache,
        "compiled_call": compiled_call,
        "disable_compile": True,  # transformers' own way, which there is on CUDA alone
    }


class VisualGLMGenerationMixin(GenerationMixin):
    """`generate` with pictures in the prompt and GLM's positions, for a `VisualGLMForConditionalGeneration`."""

    @takes_cache
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        *args,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_embeds: torch.FloatTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        cache: Cache | None = None,
        compile: bool | CompileConfig | Callable = False,
        interpolate_pos_encoding: bool | None = None,
        **kwargs,
    ):
        """[`GenerationMixin.generate`] after the pictures are in place.

        The pictures are encoded once, whatever the number of beams and return sequences, and travel as `prompt_embeds`,
        which `generate` repeats row by row: a row with two pictures stays right.

        Args:
            inputs: [B, S], the same as `input_ids`.
            generation_config, logits_processor: as in transformers; rows beyond the tokens are never chosen.
            input_ids: [B, S], left-padded.
            pixel_values: [images, 3, image_size, image_size]
            image_embeds: [images, num_query_tokens, C], instead of `pixel_values`.
            inputs_embeds: [B, S, C], instead of `input_ids`; pictures replace what equals the image token's embedding.
            cache: of a context that was processed before, by this or its older name, past_key_values.
            compile: True to compile the step from token to token, with CUDA graphs on CUDA, on a CPU with its C++
                compiler; or how, as transformers' `CompileConfig`. The first answer waits for the compiler, and so does
                the first with a longer cache: of 256, 512, 1,024 and 2,048 tokens, as `max_length` needs. The backend
                "cudagraphs" only records, and its cache grows with the answer. Or what `compile_step` returned, with a
                static `cache`: what was compiled or recorded for it goes on to hold.
            interpolate_pos_encoding: True for `pixel_values` of other sizes than `image_size`, such as 392 x 392; None
                as the config says, and so does an assistant model.
            kwargs: the other options; a `tokenizer` among them says which tokens there are, else the config does.

        Raises:
            ValueError: as in `forward`; also for an option that cannot be kept, such as a prompt that is processed in
                chunks, which would hide later parts of the context from earlier ones, and if the step cannot be
                compiled here or with the other options.
        """
        options = resolve_options(self.generation_config, generation_config, kwargs)
        check_options(options)
        input_ids = inputs if input_ids is None else input_ids
        prompt = Prompt(input_ids, inputs_embeds, pixel_values, image_embeds, interpolate_pos_encoding)
        prompt = self.share_pictures(prompt, kwargs)
        num_images = self.check_given(prompt, kwargs.get("attention_mask"))
        if cache is None and not compile and wants_dynamic_cache(options):
            cache = make_cache(self.config.text_config, self.input_device)
        kwargs |= self.cache_options(cache, compile, prompt.length, options)
        num_tokens = self.count_tokens(kwargs.get("tokenizer"))
        prompt_ids = self.check_answerable(prompt, num_images, cache, num_tokens, kwargs)
        kwargs |= self.embed_prompt(prompt, prompt_ids, num_images)
        kwargs |= self.guide_options(prompt, options)
        logits_processor = self.suppress_unknown(logits_processor, num_tokens)
        return super().generate(None, generation_config, logits_processor, *args, **kwargs)

    def share_pictures(self, prompt: Prompt, options: dict) -> Prompt:
        """Let a model and its assistant each see the pictures its own way.

        Args:
            prompt: as it was given.
            options: of `generate`, in which the pictures go to the assistant, and are taken out there.

        Returns:
            The prompt of this model.
        """
        if options.get("assistant_pixel_values") is not None:  # this is an assistant
            options.pop("prompt_embeds")
            pixel_values = options.pop("assistant_pixel_values")
            return prompt._replace(pixel_values=pixel_values, interpolate_pos_encoding=None)
        if options.get("assistant_model") is not None:
            self.check_assistant(options["assistant_model"], prompt.image_embeds, prompt.inputs_embeds)
            options["assistant_pixel_values"] = prompt.pixel_values
        return prompt

    def check_assistant(
        self, assistant: PreTrainedModel, image_embeds: torch.Tensor | None, inputs_embeds: torch.Tensor | None
    ) -> None:
        """Raise a `ValueError` if a model cannot draft answers to a prompt that is embedded already."""
        width, other = (model.config.get_text_config().hidden_size for model in (self, assistant))
        if width != other and (image_embeds is not None or inputs_embeds is not None):
            raise ValueError(
                f"The assistant model is {other} wide and cannot read embeddings of {width}. Give generate() the "
                "prompt as input_ids and pixel_values, or an assistant of the same width, such as a quantized copy."
            )

    def check_given(self, prompt: Prompt, attention_mask: torch.Tensor | None) -> int | None:
        """How many pictures a prompt has, None for none; a `ValueError` if one of its tensors has another shape."""
        num_images = self.count_images(prompt.pixel_values, prompt.image_embeds, prompt.interpolate_pos_encoding)
        if prompt.tokens is not None:
            self.check_shapes(prompt.input_ids, prompt.inputs_embeds, attention_mask)
        return num_images

    def compile_step(self, compile: bool | CompileConfig = True) -> Callable:
        """A decode step that is compiled or recorded once, for all calls of `generate` that continue one static cache.

        Args:
            compile: `generate`'s.

        Raises:
            ValueError: no compiler, or weights that come and go.
        """
        places = {str(place) for place in getattr(self, "hf_device_map", {}).values()}
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise ValueError("A model that is partly offloaded cannot be compiled. Leave compile out.")
        is_divided = len(places) > 1 or count_processes(self.config) > 1
        return compile_call(resolve_compile_config(compile, self.device), self.device, is_divided)

    def cache_options(
        self, cache: Cache | None, compile: bool | CompileConfig | Callable, prompt_length: int, options: dict
    ) -> dict:
        """What to add to the `options` of `generate` for a cache, or for a compiled decode step; see there."""
        added = {} if cache is None else {CACHE_NAME: cache}
        if callable(compile):
            if not isinstance(cache, StaticCache):
                raise ValueError(
                    f"What compile_step() returned continues a StaticCache, found {type(cache).__name__}. Give one as "
                    "cache, or compile=True, which makes its own."
                )
            added |= {"compiled_call": compile, "disable_compile": True}
        elif compile:
            added |= compile_options(self, compile, prompt_length, options | {CACHE_NAME: cache})
        return added

    def count_tokens(self, tokenizer) -> int:
        """How many tokens may be generated: those of the tokenizer, if there is one, else of the config."""
        text_config = self.config.text_config
        return text_config.num_tokens if tokenizer is None else min(len(tokenizer), text_config.vocab_size)

    def check_answerable(
        self, prompt: Prompt, num_images: int | None, cache: Cache | None, num_tokens: int, options: dict
    ) -> torch.Tensor | None:
        """The ids [B, S] that `check_generation` returns; None, and nothing is asked, if there are no tokens at all."""
        if prompt.tokens is not None:
            return self.check_generation(prompt.input_ids, prompt.inputs_embeds, num_images, cache, num_tokens, options)
        if num_images is not None:
            raise ValueError("Pictures need input_ids or inputs_embeds that say where they belong.")
        return None

    @torch.no_grad()
    def embed_prompt(self, prompt: Prompt, prompt_ids: torch.Tensor | None, num_images: int | None) -> dict:
        """What of a prompt transformers' `generate` gets, with the pictures in their places, and P-tuning's prefix.

        Args:
            prompt: was checked.
            prompt_ids: [B, S], as `know_ids` gives them.
            num_images: None for no picture.
        """
        input_ids, inputs_embeds = prompt.input_ids, prompt.inputs_embeds
        embedded = {}
        if input_ids is not None:
            embedded["input_ids"] = input_ids = input_ids.to(self.input_device)
        elif inputs_embeds is not None:
            embedded["prompt_ids"] = prompt_ids
        if num_images is not None:
            name = "prompt_embeds" if inputs_embeds is None else "inputs_embeds"
            pictures = (prompt.pixel_values, prompt.image_embeds, prompt.interpolate_pos_encoding)
            image_embeds = self.encode_images(*pictures).pooler_output
            embedded[name] = self.embed(input_ids, image_embeds, inputs_embeds)
        elif inputs_embeds is not None:
            embedded["inputs_embeds"] = inputs_embeds
        # In an assistant, instead of the other model's.
        embedded["prefix_key_values"] = self.transformer.compute_prefix(self.input_device)
        return embedded

    def guide_options(self, prompt: Prompt, options: dict) -> dict:
        """What to add to the `options` of `generate` for guidance, if they ask for it."""
        if options.get("guidance_scale") in (None, 1) or prompt.tokens is None:
            return {}
        length = 0 if prompt.input_ids is None else prompt.input_ids.shape[1]
        return guidance_options(self, options, len(prompt.tokens), length)

    def suppress_unknown(
        self, logits_processor: LogitsProcessorList | None, num_tokens: int
    ) -> LogitsProcessorList | None:
        """Add to the caller's processors that rows of the head beyond the tokens are never chosen."""
        if num_tokens >= self.config.text_config.vocab_size:
            return logits_processor
        # Also behind the caller's own, which may give such rows a chance again.
        last = [SuppressUnknown(num_tokens)] if logits_processor else []
        return LogitsProcessorList([SuppressUnknown(num_tokens), *(logits_processor or ()), *last])

    @takes_cache
    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_ids: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        compiled_call: Callable | None = None,
        assistant_pixel_values: torch.Tensor | None = None,
        guidance: Guidance | None = None,
        tokenizer=None,
        **kwargs,
    ) -> dict:
        """Derive the positions from the whole sequence at every step.

        They are no state of `generate`, which would add 1 to both rows and repeat them along the wrong dimension; so
        beams, rollbacks and continued caches are right by construction. An assistant has seen its pictures,
        `assistant_pixel_values` [images, 3, image_size, image_size], when its `generate` began. Of a prompt that is
        embeddings, `prompt_ids` [B, S] are those that `know_ids` found. The `tokenizer`, which `generate` hands to
        every step, is for stop strings.
        """
        length = input_ids.shape[1] + (0 if prompt_ids is None else prompt_ids.shape[1])
        if compiled_call is not None and length > cache.layers[0].max_cache_len:
            lengthen(cache, bucket_length(length, self.config.text_config.max_position_embeddings))
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **{CACHE_NAME: cache},
            **kwargs,
        )
        if CACHE_NAME in model_inputs:  # PEFT looks for the prefix of prefix tuning under the older name
            model_inputs[OLD_NAME] = model_inputs.pop(CACHE_NAME)
        if guidance is not None:
            model_inputs["guide"] = partial(guidance.guide, self, input_ids)
        if prompt_ids is not None:
            input_ids = torch.cat((prompt_ids, input_ids), dim=1)
        current = model_inputs.get("inputs_embeds")
        current = model_inputs["input_ids"] if current is None else current
        glm_position_ids = build_glm_position_ids(input_ids, attention_mask, self.config.text_config)
        model_inputs["glm_position_ids"] = glm_position_ids[..., -current.shape[1] :].contiguous()
        if prompt_embeds is not None:
            model_inputs |= self.place_prompt(prompt_embeds, input_ids.shape[1] - current.shape[1], cache)
        is_static = cache is not None and cache.is_compileable
        if compiled_call is not None and is_static and current.shape[1] == 1:  # prompts have all lengths
            model_inputs["compiled_call"] = compiled_call
        return model_inputs

    def place_prompt(self, prompt_embeds: torch.Tensor, start: int, cache: Cache | None) -> dict:
        """What of `prompt_embeds` [B, S, C] belongs to the tokens from `start` on."""
        if start >= prompt_embeds.shape[1]:
            return {}
        # Prefix tuning keeps its cache where none was wanted, and will cut the input down to its last token.
        is_cached = start == 0 and cache is not None and cache.get_seq_length() > 0
        return {} if is_cached else {"prompt_embeds": prompt_embeds[:, start:]}

    @staticmethod
    @takes_cache
    def create_masks_for_generate(
        config: VisualGLMConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: Cache,
        **kwargs,
    ) -> torch.Tensor | None:
        """The mask of a step with a static cache. `generate`'s own would make the context causal.

        A prompt keeps its two-dimensional mask, to which `forward` adds the context; one token gets a ready mask
        [B, 1, 1, T] of constant shape, so that a compiled step is compiled once.
        """
        batch_size, query_length = inputs_embeds.shape[:2]
        if query_length > 1:
            return attention_mask
        past_length, key_length = cache.get_seq_length(), cache.layers[0].max_cache_len
        mask = torch.arange(key_length, device=inputs_embeds.device).expand(batch_size, -1) <= past_length
        if attention_mask is not None:
            mask = mask & F.pad(attention_mask != 0, (0, key_length - attention_mask.shape[1]))
        return mask[:, None, None]

    def init_continuous_batching(self, *args, **kwargs):
        """Not for this model: see the error.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "Continuous batching (generate_batch) cannot be used: it hides later parts of the context from earlier "
            "ones. Give generate() a batch that is padded on the left, or start visualglm serve, which batches."
        )
