"""What is trained is what is saved, loaded and merged: every method of PEFT, on full and on low-bit weights."""

import copy
import itertools
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.helpers import SMALL_CONFIG
from visualglm_hf import VisualGLMConfig, VisualGLMForConditionalGeneration
from visualglm_hf.adapters import find_adapted, is_tied
from visualglm_hf.quantization import find_quantized


peft = pytest.importorskip("peft")

TEXT_CONFIG = {
    **SMALL_CONFIG["text_config"],
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "mask_token_id": 60,
    "gmask_token_id": 61,
    "bos_token_id": 62,
    "eos_token_id": 63,
}
CONFIG = {**SMALL_CONFIG, "text_config": TEXT_CONFIG}
IDS = torch.tensor([[5, 6, 7, 8, 61, 62, 9, 10], [9, 6, 5, 8, 61, 62, 5, 11]])
TOLERANCE = 2e-4  # of the largest logit

DENSE = r"transformer\.layers\.0\.attention\.dense"
PLACES = {
    "layers": {"target_modules": r"transformer\.layers\.\d\.(attention\.query_key_value|mlp\.dense_4h_to_h)"},
    "head": {"target_modules": ["lm_head"]},
    "embeddings": {"target_modules": ["word_embeddings"]},
    "whole head": {"target_modules": DENSE, "modules_to_save": ["lm_head"]},
    "whole embeddings": {"target_modules": DENSE, "modules_to_save": ["word_embeddings"]},
}

# Methods of PEFT that are not in the table below, and why.
OTHERS = {
    "ADAMSS": "needs scikit-learn",
    "ADAPTION_PROMPT": "knows the layers of LLaMA alone",
    "POLY": "asks for task ids in every call",
    "XLORA": "mixes adapters that are there",
    "SHADOW": "asks for a second model",
    "TRAINABLE_TOKENS": "has places of its own, see below",
    # Tokens before the prompt: nothing of the model's own is trained.
    "PROMPT_TUNING": "prompt",
    "MULTITASK_PROMPT_TUNING": "prompt",
    "P_TUNING": "prompt",
    "PREFIX_TUNING": "prompt, see test_prefix_tuning.py",
    "CPT": "prompt",
    "CARTRIDGE": "prompt",
}
# What makes a method fit matrices of 64 to 192 rows.
SETTINGS = {
    "LORA": {"r": 4},
    "ADALORA": {"total_step": 10, "init_r": 4, "target_r": 2},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 32},
    "FOURIERFT": {"n_frequency": 20},
    "FROD": {"progressbar": False},
    "GRALORA": {"r": 8},
    "HIRA": {"r": 4},
    "LILY": {"r": 4},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 16},
    "OSF": {"effective_rank": 4},
    "PEANUT": {"r": 4},
    "PSOFT": {"r": 4},
    "PVERA": {"r": 8},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 16},
    "SHIRA": {"r": 2},
    "VBLORA": {"vector_length": 32, "num_vectors": 8},
    "VERA": {"r": 8},
    "WAVEFT": {"n_frequency": 20},
}
INSTALLED = {method.value for method in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING}
METHODS = [*sorted(INSTALLED - OTHERS.keys()), "LORA with DoRA"]

# What cannot be. Of these, PEFT itself refuses the place ...
ADAPTS_EMBEDDINGS = {"LORA", "LORA with DoRA", "OFT", "HIRA", "TINYLORA"}
ADAPTS_NO_SUBCLASSES = {"GLORA"}  # of nn.Linear, which the head is
# ... these need the full weights ...
READS_WEIGHTS = {"LORA with DoRA", "DEFT", "DELORA", "FROD", "GLORA", "HIRA", "HRA", "OSF", "PEANUT", "PSOFT", "SHIRA"}
READS_WEIGHTS |= {"SUPERTUNING", "TINYLORA", "UNILORA"}
READS_SHAPES = {"LOHA", "LOKR"}
FAILS_AT_ONCE = {"DEFT", "FROD", "TINYLORA"}  # with an error of torch's, before our model is told of the adapter
# ... and these cannot be merged, the last with whole layers beside it.
NEVER_MERGED = {"LILY"}
ADDS_TO_A_BIAS = {"BEFT"}
LEAVES_WHOLE_LAYERS = {"LN_TUNING"}


def is_refused(method: str, place: str, bits: int) -> bool:
    if place == "embeddings" and method not in ADAPTS_EMBEDDINGS:
        return True
    if place == "head" and method in ADAPTS_NO_SUBCLASSES:
        return True
    is_low = bits and "embeddings" != place != "head"
    return bool(is_low) and (method in READS_WEIGHTS or method in READS_SHAPES and bits == 4)


@cache
def make_base(bits: int, tied: bool) -> VisualGLMForConditionalGeneration:
    torch.manual_seed(0)
    model = VisualGLMForConditionalGeneration(VisualGLMConfig(**copy.deepcopy(CONFIG), tie_word_embeddings=tied)).eval()
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.quantize(bits) if bits else model


def copy_of_base(bits: int = 0, tied: bool = True) -> VisualGLMForConditionalGeneration:
    return copy.deepcopy(make_base(bits, tied))


def in_full(model: VisualGLMForConditionalGeneration) -> VisualGLMForConditionalGeneration:
    """The same model with the matrices that its codes stand for."""
    for name in find_quantized(model):
        codes = model.get_submodule(name)
        layer = nn.Linear(codes.in_features, codes.out_features)
        layer.weight.data, layer.bias = codes.dequantize(), codes.bias
        model.set_submodule(name, layer)
    return model


def make_config(method: str, place: str) -> peft.PeftConfig:
    kind, _, variant = method.partition(" with ")
    options = SETTINGS.get(kind, {}) | PLACES[place] | ({"use_dora": True} if variant else {})
    if kind == "IA3":
        options["feedforward_modules"] = []
    if kind == "LN_TUNING":
        options["target_modules"] = ["input_layernorm"]
    return peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)](**options)


def train(model, config: peft.PeftConfig, seed: int = 1) -> peft.PeftModel:
    """Put an adapter on a model, and move all that it trains, as training would."""
    adapted = peft.get_peft_model(model, config)
    random = torch.Generator().manual_seed(seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=random)
    return adapted.eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


def are_equal(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return (actual - expected).abs().max() < TOLERANCE * expected.abs().max()


def save(adapted: peft.PeftModel, folder: Path) -> Path:
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


def load(model, folder: Path) -> peft.PeftModel:
    return peft.PeftModel.from_pretrained(model, folder).eval()


def reload(merged: VisualGLMForConditionalGeneration, folder: Path) -> VisualGLMForConditionalGeneration:
    merged.save_pretrained(folder)
    model, info = VisualGLMForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval()


def cases() -> list:
    """Method, place, bits, whether head and embeddings are tied; in seconds, or all of them under `-m slow`."""
    product = itertools.product(METHODS, PLACES, (0, 8, 4), (True, False))
    return [
        pytest.param(*case, marks=() if is_telling(*case) else pytest.mark.slow) for case in product if exists(*case)
    ]


def exists(method: str, place: str, bits: int, tied: bool) -> bool:
    has_no_place = method == "LN_TUNING" and place in ("head", "embeddings")
    has_no_effect = method == "OSF" and place == "embeddings"  # PEFT's layer looks its base layer up alone
    return not (has_no_place or has_no_effect)


def is_telling(method: str, place: str, bits: int, tied: bool) -> bool:
    """Whether another case does not go the same way: most methods differ in their own layers alone."""
    if method in ("LORA", "OFT"):
        return bits == 0 or (tied and bits == 4) or place == "layers"
    return tied and (place == "layers" or bits == 0 and place in ("head", "whole head"))


def name(value) -> str:
    return {True: "tied", False: "untied"}[value] if isinstance(value, bool) else str(value)


def test_the_table_knows_every_method_and_no_other():
    named = OTHERS.keys() | SETTINGS.keys() | ADAPTS_EMBEDDINGS | READS_WEIGHTS | READS_SHAPES | NEVER_MERGED
    assert {method.partition(" with ")[0] for method in named} <= INSTALLED


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("method", "place", "bits", "tied"), cases(), ids=name)
def test_an_adapter_is_what_was_trained_saved_loaded_and_merged_or_refused(method, place, bits, tied, tmp_path):
    base = copy_of_base(bits, tied)
    plain = logits(base)
    if is_refused(method, place, bits):
        errors = (ValueError, TypeError, NotImplementedError, *([RuntimeError] if method in FAILS_AT_ONCE else []))
        with pytest.raises(errors):
            logits(peft.get_peft_model(base, make_config(method, place)))
        return
    adapted = train(base, make_config(method, place))
    trained = logits(adapted)
    assert not are_equal(trained, plain)
    folder = save(adapted, tmp_path / "adapter")
    loaded = load(copy_of_base(bits, tied), folder)
    assert are_equal(logits(loaded), trained)
    is_low = find_quantized_below(loaded)
    if is_low:  # beside the codes it does what it does beside the matrices that they stand for
        assert are_equal(logits(load(in_full(copy_of_base(bits, tied)), folder)), trained)
    if method in NEVER_MERGED or (method in ADDS_TO_A_BIAS and place == "head"):
        with pytest.raises((NotImplementedError, ValueError)):
            loaded.merge_and_unload()
    elif is_low and method not in ADDS_TO_A_BIAS:
        for safe_merge in (True, False):
            with pytest.raises(ValueError, match="without quantization"):
                loaded.merge_and_unload(safe_merge=safe_merge)
        assert are_equal(logits(loaded), trained)  # nothing was written
    else:
        merged = loaded.merge_and_unload(safe_merge=True)
        assert are_equal(logits(merged), trained)
        if method in LEAVES_WHOLE_LAYERS and "whole" in place:
            with pytest.raises(ValueError, match="LN tuning"):
                merged.save_pretrained(tmp_path / "merged")
        elif place != "layers" or method == "LORA":
            assert are_equal(logits(reload(merged, tmp_path / "merged")), trained)


def find_quantized_below(adapted: nn.Module) -> list[str]:
    """The adapted layers that have few bits."""
    return [name for name, layer in find_adapted(adapted).items() if find_quantized(layer)]


# Other doors than merge_and_unload()


def test_an_adapter_of_a_tied_head_is_merged_and_unmerged_in_its_place():
    adapted = train(copy_of_base(), make_config("LORA", "head"))
    trained, plain = logits(adapted), logits(copy_of_base())
    assert not is_tied(adapted.get_base_model())
    adapted.merge_adapter()
    assert are_equal(logits(adapted), trained)
    adapted.unmerge_adapter()
    assert are_equal(logits(adapted), trained)
    assert are_equal(logits(adapted.unload()), plain)


@pytest.mark.filterwarnings("ignore")
def test_a_second_adapter_of_the_head_unties_it_too(tmp_path):
    """PEFT tells the model of the first adapter alone."""
    adapted = train(copy_of_base(), make_config("LORA", "layers"))
    adapted.add_adapter("of the head", make_config("LORA", "head"))
    adapted.set_adapter("of the head")
    for name, parameter in adapted.named_parameters():
        if name.endswith("lm_head.lora_B.of the head.weight"):
            parameter.data += 0.1
    trained = logits(adapted)
    assert are_equal(logits(reload(adapted.merge_and_unload(), tmp_path)), trained)


@pytest.mark.filterwarnings("ignore")
def test_weighted_adapters_are_merged_as_they_are_computed(tmp_path):
    adapted = train(copy_of_base(), make_config("LORA", "head"))
    adapted.load_adapter(save(train(copy_of_base(), make_config("LORA", "head"), seed=2), tmp_path / "other"), "other")
    adapted.add_weighted_adapter(["default", "other"], [0.7, 0.4], "both", combination_type="linear")
    adapted.set_adapter("both")
    trained = logits(adapted)
    assert are_equal(logits(reload(adapted.merge_and_unload(), tmp_path / "merged")), trained)


def test_a_model_with_adapters_is_not_saved_under_names_that_nothing_loads(tmp_path):
    adapted = train(copy_of_base(), make_config("LORA", "layers"))
    with pytest.raises(ValueError, match="merge_and_unload"):
        adapted.get_base_model().save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def lora(**options) -> peft.LoraConfig:
    return peft.LoraConfig(**{"target_modules": DENSE, **options})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "config",
    [
        lora(modules_to_save=["dense_h_to_4h"]),
        lora(modules_to_save=["lm_head"]),
        lora(trainable_token_indices={"lm_head": [5, 6]}),
        lora(target_modules=[], target_parameters=["attention.dense.weight"]),
        peft.TrainableTokensConfig(token_indices=[5, 6], target_modules=["lm_head"]),
    ],
    ids=["a whole layer", "the whole head", "tokens of the head", "a parameter", "tokens alone"],
)
def test_codes_are_not_trained(config):
    model = copy_of_base().quantize(4, lm_head=True)
    with pytest.raises(ValueError, match="codes of quantized weights"):
        logits(peft.get_peft_model(model, config))


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_refused_leaves_the_model_as_it_was(bits):
    model = copy_of_base(bits)
    method = "UNILORA" if bits == 8 else "LOHA"
    with pytest.raises(ValueError, match=rf"{method} is not known to work beside weights of {bits} bits.*Take LoRA"):
        peft.get_peft_model(model, make_config(method, "layers"))
    assert not find_adapted(model)
    assert not hasattr(model, "peft_config")
    assert torch.equal(logits(model), logits(make_base(bits, True)))
    assert not are_equal(logits(train(model, make_config("LORA", "layers"))), logits(make_base(bits, True)))


@pytest.mark.filterwarnings("ignore")
def test_adapters_that_peft_would_tie_and_then_lose_are_refused():
    with pytest.raises(ValueError, match="ensure_weight_tying"):
        peft.get_peft_model(copy_of_base(), lora(target_modules=["lm_head"], ensure_weight_tying=True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ends", [(0, 0), (0, 8), (8, 0), (8, 8)], ids=str)
def test_head_weights_that_peft_saves_with_an_adapter_are_read_into_a_head_of_other_bits(ends, tmp_path):
    """It saves those below an adapter of lm_head unasked."""
    before, after = (copy_of_base().quantize(8, lm_head=bool(bits)) for bits in ends)
    adapted = train(before, make_config("LORA", "head"))
    adapted.save_pretrained(tmp_path)
    loaded = load(after, tmp_path)
    assert (logits(loaded) - logits(adapted)).abs().max() < 0.01 * logits(adapted).abs().max()


# Tokens


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("place", [None, ["lm_head"]], ids=["embeddings", "head"])
def test_trained_tokens_are_saved_loaded_and_merged(bits, tied, place, tmp_path):
    config = peft.TrainableTokensConfig(token_indices=[5, 6], target_modules=place)
    adapted = train(copy_of_base(bits, tied), config)
    trained = logits(adapted)
    assert not are_equal(trained, logits(copy_of_base(bits, tied)))
    loaded = load(copy_of_base(bits, tied), save(adapted, tmp_path / "adapter"))
    assert are_equal(logits(loaded), trained)
    assert are_equal(logits(reload(loaded.merge_and_unload(), tmp_path / "merged")), trained)


@pytest.mark.parametrize("tokens", [[5, 6], [0]])
def test_tokens_beside_lora_are_refused_in_words(tokens):
    """PEFT would train rows of the image encoder, too, whose tables have names that end alike."""
    with pytest.raises(ValueError, match="TrainableTokensConfig"):
        peft.get_peft_model(copy_of_base(), lora(trainable_token_indices=tokens))
