"""The model that is measured: built with random weights, and what one of its tokens costs at least."""

from typing import Any

import torch

from visualglm_hf import VisualGLMConfig, VisualGLMForConditionalGeneration
from visualglm_hf.cpu_runtime import make_empty
from visualglm_hf.quantization import QuantizedLinear, record
from visualglm_tools.benchmarking.timing import GIB, digits, free_memory


# A geometry with every part of the real one, for tests.
TINY = {
    "text_config": {
        "vocab_size": 256,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "max_position_embeddings": 512,
        "mask_token_id": 250,
        "gmask_token_id": 251,
        "bos_token_id": 254,
        "eos_token_id": 255,
    },
    "vision_config": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": 56,
    },
    "qformer_config": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "num_query_tokens": 8,
        "encoder_hidden_size": 32,
    },
}
GEOMETRIES = {"full": {}, "tiny": TINY}
# A prime, so that the rows of a matrix filled with copies of the block start at different places and are not equal.
BLOCK_LENGTH = 1_048_573
BLOCKS = 4096  # so many tensors start with different values
WEIGHT_STD = 0.02
LARGEST_BYTE = 127
CODE_STD = {4: 4.6, 8: 73.3}  # of codes that are as likely as each other
SPARE_MEMORY = 1.1  # times the weights: imports, activations, cache


def fill(tensor: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """Fill `tensor` in place with copies of `block`, the last one cut short."""
    flat = tensor.view(-1)
    whole = flat.numel() // len(block) * len(block)
    flat[:whole].view(-1, len(block)).copy_(block)
    flat[whole:].copy_(block[: flat.numel() - whole])
    return tensor


def random_block(device: torch.device, seed: int = 0) -> torch.Tensor:
    """Return normal numbers as large as weights are, for `fill`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BLOCK_LENGTH + BLOCKS, generator=generator).mul_(WEIGHT_STD).to(device)


def random_codes(device: torch.device) -> torch.Tensor:
    """Return random bytes, for `fill`: one code of 8 bits each, or two of 4."""
    generator = torch.Generator().manual_seed(0)
    bounds, shape = (-LARGEST_BYTE, LARGEST_BYTE + 1), (BLOCK_LENGTH + BLOCKS,)
    return torch.randint(*bounds, shape, generator=generator, dtype=torch.int8).to(device)


def empty_like(parameter: torch.nn.Parameter, device: torch.device) -> torch.Tensor:
    """Room for a parameter, of codes as quantizing makes it."""
    if device.type == "cpu" and not parameter.is_floating_point():
        return make_empty(*parameter.shape, dtype=parameter.dtype)
    return torch.empty_like(parameter.detach(), device=device)


def materialise(model: torch.nn.Module, device: torch.device) -> None:
    """Give the meta parameters of `model` random values in their own dtype, one tensor at a time; ties are kept."""
    numbers, codes = random_block(device), random_codes(device)
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in made:
                start, block = len(made) % BLOCKS, numbers if parameter.is_floating_point() else codes
                filled = fill(empty_like(parameter, device), block[start : start + BLOCK_LENGTH])
                if isinstance(module, torch.nn.LayerNorm) and name == "weight":
                    filled += 1
                made[id(parameter)] = torch.nn.Parameter(filled, requires_grad=False)
            setattr(module, name, made[id(parameter)])
        if isinstance(module, QuantizedLinear):
            scale = WEIGHT_STD / CODE_STD[module.bits]
            module.weight_scale = torch.full_like(module.weight_scale, scale, device=device)


def build_model(
    geometry: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    bits: int | None = None,
    image_encoder: bool = False,
) -> VisualGLMForConditionalGeneration:
    """Build a model with random weights, which never exist in another format.

    Args:
        bits: 4 or 8 for a decoder of random codes, None for full precision.
        image_encoder: with `bits`, random codes of 8 bits for the image encoder, too.

    Raises:
        ValueError: the weights do not fit into the free memory.
    """
    config = VisualGLMConfig(**geometry)
    if bits:
        record(config, bits, None, lm_head=False, image_encoder=image_encoder)
    with torch.device("meta"):
        model = VisualGLMForConditionalGeneration(config).to(dtype)
    needed, free = sum(tensor.nbytes for tensor in tensors_of(model)) * SPARE_MEMORY, free_memory(device)
    if needed > free:
        raise ValueError(f"the model needs {needed / GIB:.1f} GiB in {dtype}, but only {free / GIB:.1f} GiB are free.")
    materialise(model, device)
    return model


def tensors_of(*modules: torch.nn.Module) -> list[torch.Tensor]:
    """Return the parameters and buffers of the modules, each once."""
    found = {id(tensor): tensor for module in modules for tensor in (*module.parameters(), *module.buffers())}
    return list(found.values())


def token_bytes(model: VisualGLMForConditionalGeneration) -> int:
    """Return the bytes of weights that one token reads: the blocks, the last LayerNorm and lm_head."""
    parts = (model.transformer.layers, model.transformer.final_layernorm, model.lm_head)
    return sum(tensor.nbytes for tensor in tensors_of(*parts))


def cache_bytes(model: VisualGLMForConditionalGeneration) -> int:
    """Return the bytes of keys and values that a token leaves in the cache."""
    config = model.config.text_config
    return 2 * config.num_hidden_layers * config.hidden_size * model.dtype.itemsize


def block_flop(model: VisualGLMForConditionalGeneration) -> int:
    """Return the multiplications and additions of the blocks' matrices for one token; attention is left out."""
    config = model.config.text_config
    per_layer = 4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size
    return 2 * config.num_hidden_layers * per_layer


def head_flop(model: VisualGLMForConditionalGeneration) -> int:
    """Return the multiplications and additions of lm_head, which only the last token of a prompt needs."""
    config = model.config.text_config
    return 2 * config.hidden_size * config.vocab_size


def picture_flop(model: VisualGLMForConditionalGeneration) -> int:
    """Return the multiplications and additions of a picture's matrices and attention: ViT, Q-Former and projection."""
    vision, qformer, text = (getattr(model.config, name) for name in ("vision_config", "qformer_config", "text_config"))
    tokens, queries = vision.num_positions, qformer.num_query_tokens
    patch = vision.num_channels * vision.patch_size**2
    vit = (tokens - 1) * patch * vision.hidden_size + vision.num_hidden_layers * encoder_layer(vision, tokens, tokens)
    crossing = 2 * tokens * vision.hidden_size * qformer.hidden_size  # keys and values of what the ViT gave
    crossing += 2 * queries * qformer.hidden_size * (qformer.hidden_size + tokens)
    looking = qformer.num_hidden_layers * encoder_layer(qformer, queries, queries)
    looking += len(qformer.cross_attention_layers) * crossing
    return 2 * (vit + looking + queries * qformer.hidden_size * text.hidden_size)


def encoder_layer(config: Any, queries: int, keys: int) -> int:
    """Return the multiplications of a layer that attends to itself."""
    matrices = 4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size
    return queries * (matrices + 2 * keys * config.hidden_size)


def model_figures(model: VisualGLMForConditionalGeneration) -> dict[str, Any]:
    """Return the sizes from which rates follow. Quantized weights count as parameters one by one, not as bytes."""
    config = model.config.text_config
    plain = sum(tensor.numel() for tensor in model.parameters())
    packed = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    unpacked = sum(layer.in_features * layer.out_features - layer.weight.numel() for layer in packed)
    return {
        "parameters": plain + unpacked,
        "weights_gib": digits(sum(tensor.nbytes for tensor in tensors_of(model)) / GIB),
        "token_gb": digits(token_bytes(model) / 1e9),
        "cache_gb_per_token": digits(cache_bytes(model) / 1e9),
        "block_gflop": digits(block_flop(model) / 1e9),
        "head_gflop": digits(head_flop(model) / 1e9),
        "picture_gflop": digits(picture_flop(model) / 1e9),
        "layers": config.num_hidden_layers,
    }
