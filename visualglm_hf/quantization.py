# SPDX-License-Identifier: Apache-2.0
"""Low-bit linear layers: quantizing a matrix, the layer, and putting it in the place of `nn.Linear`, in any module.

Not here: how codes are chosen (`lowbit_codes.py`, `cpu_quantizing.py`), the format's bytes (`lowbit_format.py`) and how
to multiply with them (`lowbit_products.py`). Weights are quantized once and never trained; gradients flow through the
layer to whatever is before it.

Two ways lead here, and the results are alike: `quantize_model` on a model in memory, and
`from_pretrained(folder, quantization_config=LowBitConfig(...))`, which never holds more than one full matrix.

Shapes: N outputs, K inputs, G columns of a group, n = K / G groups of a row.
"""

import sys
from collections.abc import Collection

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .adapters import find_adapted, record_untied, unwrap
from .cpu_quantizing import CPU_QUANTIZING, quantizing_obstacle
from .lowbit_codes import LARGEST_CODE, quantize_naive
from .lowbit_format import dequantize_naive
from .lowbit_products import (
    Product,
    Tell,
    choose_half_way,
    choose_lowbit_way,
    half_linear,
    half_obstacle,
    packed_matrices,
    quantized_linear,
)
from .mapped_files import find_mappings, read_as, release_mappings, release_pages, stored_dtypes


QUANT_METHOD = "lowbit"
DEFAULT_GROUP_SIZE = 64  # of 4 bits: 0.25 bits of scale per weight
PER_ROW = -1  # the group size of the original
CHUNK = 2**16  # elements quantized at a time on a CPU, so that all intermediate results stay in its cache
DEVICE_CHUNK = 2**24  # elements
PRODUCTS = (torch.ops.visualglm.quantized_matmul, torch.ops.visualglm.quantized_matmul.default)
# What is refused of codes even among integers: arithmetic, and rows that would be a token's.
REFUSED = {"add", "radd", "sub", "rsub", "mul", "rmul", "mm", "matmul", "linear", "getitem"}
REFUSED |= {"norm", "linalg_norm", "linalg_vector_norm"}
# PEFT's methods that change what goes into a layer or comes out of it, and of the layer itself read its sizes alone;
OVERLAYS = {"LORA", "ADALORA", "VERA", "PVERA", "VBLORA", "RANDLORA", "GRALORA", "LILY", "MISS"}
OVERLAYS |= {"IA3", "BEFT", "BOFT", "OFT", "ROAD", "FOURIERFT", "WAVEFT", "C3A"}
# or the shape of the stored weight, too, which with 8 bits is the matrix's.
OVERLAYS_OF_THE_SHAPE = {"LOHA", "LOKR"}
CODES_ARE_NO_NUMBERS = (
    "The codes of quantized weights are no numbers to calculate with: an adapter that reads or changes weights, or is "
    "merged into them, a layer that is trained itself, and a trainer that multiplies by lm_head itself, as TRL's do, "
    "need them in full. Load the model without quantization, or for TRL without lm_head=True, train or merge there, "
    "and quantize the result; or keep an adapter such as LoRA beside the quantized model."
)


def resolve_group_size(bits: int, group_size: int | None) -> int | None:
    """Check the arguments of `quantize`; returns the group size, or None for one scale per row."""
    if isinstance(bits, bool) or bits not in LARGEST_CODE:
        raise ValueError(f"Weights can be quantized to 4 or 8 bits, not to {bits!r}.")
    if group_size == PER_ROW or group_size is None and bits == 8:
        return None
    if bits == 8:
        raise ValueError(f"8 bits have one scale per row, not group_size={group_size!r}. Leave group_size out.")
    if group_size is None:
        return DEFAULT_GROUP_SIZE
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 2 or group_size % 2:
        raise ValueError(
            f"group_size must be an even number of columns, such as {DEFAULT_GROUP_SIZE}, or {PER_ROW} for one scale "
            f"per row; found {group_size!r}."
        )
    return group_size


def check_columns(in_features: int, group_size: int | None) -> None:
    if group_size is not None and in_features % group_size:
        raise ValueError(
            f"{in_features} columns cannot be divided into groups of {group_size}. Choose a group_size that divides "
            f"them, or {PER_ROW} for one scale per row."
        )


def quantize_tensor(
    weight: torch.Tensor, bits: int, group_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a matrix, on its own device, a few rows at a time.

    Args:
        weight: [N, K], floating point.
        bits: 4 or 8.
        group_size: columns that share a scale, for 4 bits; None for the default (64; per row for 8 bits), -1 for the
            original's rounding with one scale per row.

    Returns:
        The codes, int8 [N, K] or [N, ceil(K / 2)], and the scales, float16 [N] or [N, n].

    Raises:
        ValueError: other bits, a group size that does not fit, or weights that are not finite or too large for
            float16 scales.
    """
    group_size = resolve_group_size(bits, group_size)
    check_columns(weight.shape[1], group_size)
    weight = weight.detach()
    if quantizing_obstacle(weight, group_size) is None:
        codes, scales = CPU_QUANTIZING.kernels.quantize(weight, bits, group_size)
    else:
        step = max(1, (CHUNK if weight.device.type == "cpu" else DEVICE_CHUNK) // weight.shape[1])
        parts = [quantize_naive(rows, bits, group_size) for rows in weight.split(step)]
        codes, scales = (torch.cat(part) for part in zip(*parts, strict=True))
    if not scales.isfinite().all():
        raise ValueError("The weights are not finite, or too large for a scale in float16.")
    return codes, scales


class LowBitCodes(nn.Parameter):
    """The codes of a low-bit matrix, which nobody takes for its numbers.

    They are moved, copied, compared, written and saved like any other parameter. To calculate with them is refused:
    PEFT knows our layer as an `nn.Linear`, would add to the codes or multiply by them, and round the result to codes.
    `detach()` gives the bare tensor.

    Raises:
        ValueError: in any operation with floating-point numbers among its arguments or results, and in arithmetic.
    """

    def __new__(cls, data: torch.Tensor, requires_grad: bool = False):
        return torch.Tensor._make_subclass(cls, data.detach(), requires_grad)

    def __deepcopy__(self, memo: dict) -> "LowBitCodes":
        return memo.setdefault(id(self), LowBitCodes(self.detach().clone()))

    def __reduce_ex__(self, protocol):
        return nn.Parameter, (self.detach(), False)  # a file of weights names no class of ours

    def requires_grad_(self, requires_grad: bool = True) -> "LowBitCodes":
        if requires_grad:
            raise ValueError(CODES_ARE_NO_NUMBERS)
        return self

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in PRODUCTS:
            return super().__torch_function__(func, types, args, kwargs)
        if func.__name__.strip("_") in REFUSED or any(map(is_float, (*args, *kwargs.values()))):
            raise ValueError(CODES_ARE_NO_NUMBERS)
        result = super().__torch_function__(func, types, args, kwargs)
        if is_float(result):
            raise ValueError(CODES_ARE_NO_NUMBERS)
        is_codes = isinstance(result, torch.Tensor) and result.dtype == torch.int8 and func is not torch.Tensor.detach
        return LowBitCodes(result) if is_codes and type(result) is torch.Tensor else result


def is_float(value) -> bool:
    """Whether a value is a tensor of floating-point numbers, or the name of their format."""
    if isinstance(value, LowBitCodes):
        return False
    dtype = value.dtype if isinstance(value, torch.Tensor) else value
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


class QuantizedLinear(nn.Linear):
    """A linear layer with a 4- or 8-bit matrix. Its bias, its output and its gradients keep the activations' dtype.

    State: `weight` int8 [N, K] or [N, ceil(K / 2)], `weight_scale` float16 [N] or [N, n], `bias` [N]. Casting the
    layer casts the bias alone: the scales belong to the codes, and rounding them again would change the matrix.

    A subclass of `nn.Linear` so that adapters find it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """Make a layer of zeros; `group_size` as in `quantize_tensor`, `dtype` is that of the bias."""
        super(nn.Linear, self).__init__()  # past nn.Linear, which would allocate the full matrix
        group_size = resolve_group_size(bits, group_size)
        check_columns(in_features, group_size)
        self.in_features, self.out_features, self.bits, self.group_size = in_features, out_features, bits, group_size
        columns = in_features if bits == 8 else (in_features + 1) // 2
        codes = torch.zeros(out_features, columns, dtype=torch.int8, device=device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        scales = (out_features,) if group_size is None else (out_features, in_features // group_size)
        self.register_buffer("weight_scale", torch.zeros(scales, dtype=torch.float16, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None
        self._is_hf_initialized = True  # random codes would be no sensible start

    @classmethod
    def empty_like(cls, linear: nn.Linear, bits: int, group_size: int | None = None) -> "QuantizedLinear":
        """Make a layer of zeros for the weights of `linear`, on its device."""
        weight = linear.weight
        return cls(
            linear.in_features,
            linear.out_features,
            bits,
            group_size,
            linear.bias is not None,
            weight.device,
            weight.dtype,
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear, bits: int, group_size: int | None = None) -> "QuantizedLinear":
        """Quantize `linear`; the new layer shares its bias."""
        return cls.from_codes(linear, *quantize_tensor(linear.weight, bits, group_size), bits, group_size)

    @classmethod
    def from_codes(
        cls,
        linear: nn.Linear,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        bits: int,
        group_size: int | None = None,
    ) -> "QuantizedLinear":
        """Make a layer of codes and scales for the weights of `linear`, whose bias it shares."""
        with torch.device("meta"):
            quantized = cls(linear.in_features, linear.out_features, bits, group_size, bias=False)
        quantized.weight = nn.Parameter(weight, requires_grad=False)
        quantized.weight_scale = weight_scale
        quantized.bias = linear.bias
        return quantized.train(linear.training)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        if name == "weight":
            self._protect_codes()

    def _protect_codes(self) -> None:
        weight = self._parameters["weight"]
        if type(weight) is nn.Parameter and weight.dtype == torch.int8:  # not while full weights are on their way here
            weight.__class__ = LowBitCodes  # in place, as torch turns its parameters without a size into others

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._protect_codes()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return quantized_linear(x, self.weight, self.weight_scale, self.bits, self.in_features, self.bias)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Compute the matrix [N, K] that this layer multiplies with."""
        return dequantize_naive(self.weight, self.weight_scale, self.bits, self.in_features, dtype)

    def find_way(self, dtype: torch.dtype, rows: int, tell: Tell) -> str:
        """Say which way a product with so many rows of activations goes, and `tell` why not each faster one."""
        product = Product(dtype, rows, self.weight, self.weight_scale, self.bits, self.in_features)
        return choose_lowbit_way(product, tell).name

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        """Take full weights, too: PEFT saves those below an adapter of the head with it."""
        key = f"{prefix}weight"
        if key in state_dict and state_dict[key].is_floating_point():
            group_size = self.group_size or PER_ROW
            state_dict[key], state_dict[f"{key}_scale"] = quantize_tensor(state_dict[key], self.bits, group_size)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def reset_parameters(self) -> None:
        """Do nothing: codes come from weights, not from chance."""

    def _apply(self, fn, recurse: bool = True):
        scale = self.weight_scale
        packed_matrices.forget(self.weight)
        if type(self.weight) is LowBitCodes:
            self.weight.__class__ = nn.Parameter  # of which `nn.Module` makes new ones
        super()._apply(fn, recurse)
        self._protect_codes()
        if self.weight_scale.dtype != scale.dtype:
            self.weight_scale = scale.to(self.weight_scale.device)
        return self

    def extra_repr(self) -> str:
        scales = "row" if self.group_size is None else f"{self.group_size} columns"
        return f"{super().extra_repr()}, bits={self.bits}, one scale per {scales}"


class HalfLinear(nn.Linear):
    """A linear layer whose matrix is read at the speed of memory when a CPU decodes in half precision.

    It is for the output layer, which stays in half precision when the others have few bits, and then is a third of the
    work. In all other cases it is an `nn.Linear`.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if half_obstacle(x.dtype, self.weight) is None:
            return half_linear(x, self.weight, self.bias)
        return super().forward(x)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        """Take 8-bit weights, too, which PEFT saved with an adapter of a low-bit head."""
        key = f"{prefix}weight"
        if key in state_dict and state_dict[key].dtype == torch.int8:
            scale = state_dict.pop(f"{key}_scale")
            state_dict[key] = dequantize_naive(state_dict[key], scale, 8, self.in_features, self.weight.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def find_way(self, dtype: torch.dtype, rows: int, tell: Tell) -> str:
        """Say which way a product goes, as [`QuantizedLinear`] does."""
        product = Product(dtype, rows, self.weight, None, self.weight.dtype, self.in_features)
        return choose_half_way(product, tell).name


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module is an `nn.Linear`, or one of this package's that merely knows another way to the same result."""
    return type(module) is nn.Linear or getattr(type(module), "is_plain", False) and isinstance(module, nn.Linear)


def find_linears(module: nn.Module, skip: Collection[str] = ()) -> dict[str, nn.Linear]:
    """Find the plain linear layers by name, but those in `skip` and below."""
    return {
        name: child
        for name, child in module.named_modules()
        if is_plain_linear(child) and not any(name == other or name.startswith(f"{other}.") for other in skip)
    }


def quantize_(module: nn.Module, bits: int, group_size: int | None = None, skip: Collection[str] = ()) -> nn.Module:
    """Put a [`QuantizedLinear`] in the place of each plain `nn.Linear` in a module, one after the other.

    Memory: the module and one more matrix at most; the full matrix is freed before the next one is quantized.

    Args:
        module: any module that is no `nn.Linear` itself.
        bits: 4 or 8.
        group_size: see `quantize_tensor`.
        skip: names of submodules to leave as they are.

    Returns:
        The same module.

    Raises:
        ValueError: other bits, or a group size that does not fit a layer; nothing was replaced. Also weights that
            cannot be quantized, or are not in memory.
    """
    check_layers(find_linears(module, skip), bits, group_size)
    for name in list(find_linears(module, skip)):
        replace_(module, name, bits, group_size)
    return module


def replace_(module: nn.Module, name: str, bits: int, group_size: int | None) -> None:
    """Put a [`QuantizedLinear`] in the place of one plain linear layer."""
    linear = module.get_submodule(name)
    try:
        quantized = QuantizedLinear.from_linear(linear, bits, group_size)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    module.set_submodule(name, quantized)
    release_pages(linear.weight)


def check_layers(linears: dict[str, nn.Linear], bits: int, group_size: int | None) -> None:
    group_size = resolve_group_size(bits, group_size)
    for name, linear in linears.items():
        if linear.weight.is_meta:
            raise ValueError(f"The weights of {name} are not in memory. Load the model without offloading first.")
        try:
            check_columns(linear.in_features, group_size)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def prepare_(module: nn.Module, bits: int, group_size: int | None = None, skip: Collection[str] = ()) -> nn.Module:
    """Replace as `quantize_` does, but with layers of zeros that wait for their weights."""
    for name, linear in find_linears(module, skip).items():
        try:
            module.set_submodule(name, QuantizedLinear.empty_like(linear, bits, group_size))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return module


def find_quantized(module: nn.Module) -> list[str]:
    """Names of the low-bit layers."""
    return [name for name, child in module.named_modules() if isinstance(child, QuantizedLinear)]


def check_mergeable(module: nn.Module) -> None:
    """Raise a `ValueError` if the module has low-bit layers, into which an adapter cannot be merged.

    To be asked before PEFT is: it refuses most such merges with an error of torch's, but `safe_merge=True` would add
    the adapter to 8-bit codes, rounded to nothing.
    """
    quantized = find_quantized(module)
    if quantized:
        raise ValueError(
            f"An adapter cannot be merged into quantized weights ({quantized[0]} and {len(quantized) - 1} more). Load "
            "the model without quantization, merge there, and quantize the result; or keep the adapter beside the "
            "quantized model."
        )


def check_adapters(module: nn.Module, methods: Collection[str]) -> None:
    """Raise a `ValueError` if adapters of these methods of PEFT stand on low-bit layers and count on full weights.

    Some of them would notice the codes themselves; others take the codes' shape or number format for the weights', and
    compute nonsense or nothing.
    """
    for name, layer in find_adapted(module).items():
        bits = getattr(unwrap(layer), "bits", None) if isinstance(unwrap(layer), QuantizedLinear) else None
        known = OVERLAYS if bits != 8 else OVERLAYS | OVERLAYS_OF_THE_SHAPE
        counting = [str(getattr(method, "value", method)) for method in methods if bits and method not in known]
        if counting:
            raise ValueError(
                f"{counting[0]} is not known to work beside weights of {bits} bits ({name}): it may read them. Take "
                "LoRA (without DoRA) or another method that leaves them alone, or load the model without quantization."
            )


# Whole models: a decoder, an output layer, and a config that remembers


def check_unquantized(model: nn.Module) -> None:
    """Raise a `ValueError` if the model is quantized already, in whatever way, or has adapters in the way."""
    bits = getattr(model.config, "quantization_bit", 0)
    method = getattr(model, "quantization_method", None)
    if bits or find_quantized(model):
        raise ValueError(f"The weights have {bits or 'few'} bits already. Load the full weights to quantize them anew.")
    if method not in (None, QUANT_METHOD):
        raise ValueError(f"The model was quantized with {method} while loading. Load it without quantization_config.")
    for name in find_adapted(model):
        raise ValueError(f"{name} has an adapter. Merge or remove it first, or quantize before you add it.")


def quantize_model(
    model: nn.Module, bits: int, group_size: int | None = None, lm_head: bool = False, image_encoder: bool = False
) -> nn.Module:
    """Quantize the linear layers of a transformers model's decoder; if asked, to 8 bits, of image encoder and head.

    Afterwards `config.quantization_bit` and its companions say what was done. See `quantize_` for arguments and errors.
    """
    check_unquantized(model)
    check_layers(find_linears(model.get_decoder()), bits, group_size)
    if image_encoder:
        quantize_(model.get_encoder("image"), bits=8)
    quantize_(model.get_decoder(), bits, group_size)
    if lm_head:
        quantize_output_embeddings_(model)
    record(model.config, bits, group_size, lm_head, image_encoder)
    return model


def quantize_output_embeddings_(model: nn.Module) -> None:
    """Quantize the output layer to 8 bits, and so untie it from the input embeddings."""
    model.set_output_embeddings(QuantizedLinear.from_linear(model.get_output_embeddings(), bits=8))
    record_untied(model)


def record(config, bits: int, group_size: int | None, lm_head: bool, image_encoder: bool = False) -> None:
    """Write into a model's config how its weights are quantized."""
    config.quantization_bit = bits
    config.quantization_group_size = resolve_group_size(bits, group_size)
    config.quantization_lm_head = lm_head
    config.quantization_image_encoder = image_encoder


def prepare_model(model: nn.Module) -> None:
    """Make room for the low-bit weights that a config announces; to be called at the end of a model's `__init__`."""
    config = model.config
    prepare_(model.get_decoder(), config.quantization_bit, config.quantization_group_size or PER_ROW)
    if config.quantization_image_encoder:
        prepare_(model.get_encoder("image"), bits=8)
    if config.quantization_lm_head:
        model.set_output_embeddings(QuantizedLinear.empty_like(model.get_output_embeddings(), bits=8))


# While loading, through the registry of transformers


class LowBitConfig(QuantizationConfigMixin):
    """What to pass to `from_pretrained` as `quantization_config` to quantize while loading.

    Args:
        bits: 4 or 8.
        group_size: see `quantize_tensor`.
        lm_head: whether to quantize the output layer too, to 8 bits.
        image_encoder: whether to quantize the image encoder too, to 8 bits.

    Raises:
        ValueError: other bits, or an impossible group size.
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int | None = None,
        lm_head: bool = False,
        image_encoder: bool = False,
        **kwargs,
    ):
        resolve_group_size(bits, group_size)
        unknown = sorted(set(kwargs) - {"quant_method"})
        if unknown:
            known = "bits, group_size, lm_head and image_encoder"
            raise ValueError(f"{type(self).__name__} takes {known}, not {', '.join(unknown)}.")
        self.quant_method = QUANT_METHOD
        self.bits, self.group_size = bits, group_size
        self.lm_head, self.image_encoder = lm_head, image_encoder


class QuantizeWhileLoading(ConversionOps):
    """Turn one full weight of the checkpoint into codes and scales, as the layer that it is for has them."""

    def convert(
        self, input_dict: dict, full_layer_name: str | None = None, model: nn.Module | None = None, **kwargs
    ) -> dict[str, torch.Tensor]:
        weight = next(iter(input_dict.values()))
        weight = weight[0] if isinstance(weight, list) else weight
        layer = model.get_submodule(full_layer_name.rpartition(".")[0])
        codes, scales = quantize_tensor(weight, layer.bits, layer.group_size or PER_ROW)
        return {full_layer_name: codes, f"{full_layer_name}_scale": scales}


class LowBitQuantizer(HfQuantizer):
    """Quantizes tensor by tensor while transformers loads, and leaves a model as `quantize_model` makes it.

    Where weights are mapped from their files, transformers only maps them all, as they are stored. Then they are read
    one after the other, and what has been read is released. Elsewhere transformers hands over one weight after the
    other, on the device where it shall be.
    """

    requires_calibration = False
    is_trainable = True
    is_compileable = True

    def __init__(self, quantization_config: LowBitConfig, **kwargs):
        super().__init__(quantization_config, **kwargs)
        self.files: list[str] = []  # that are mapped
        self.mapped_before: set[tuple[int, int]] = set()  # of the same files, for other models
        self.dtypes: dict[str, torch.dtype] = {}  # of mapped parameters, as they shall be

    @property
    def quantized_element_size(self) -> float:
        return self.quantization_config.bits / 8

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(
        self,
        model: nn.Module,
        device_map: dict | str | None = None,
        checkpoint_files: list[str] | None = None,
        **kwargs,
    ) -> None:
        check_unquantized(model)
        # transformers casts the checkpoint's tensors to the dtypes that it finds in the model.
        if checkpoint_files and are_mapped(device_map):
            self.files, self.mapped_before = checkpoint_files, find_mappings(checkpoint_files)
            self.expect_stored(model, stored_dtypes(checkpoint_files))
            return
        for part, bits, group_size in self.parts(model):
            prepare_(part, bits, group_size)
        for name in find_quantized(model):
            layer = model.get_submodule(name)
            shape = (layer.out_features, layer.in_features)
            layer.weight = nn.Parameter(torch.empty(shape, dtype=model.dtype, device="meta"), requires_grad=False)

    def expect_stored(self, model: nn.Module, stored: dict[str, torch.dtype]) -> None:
        """Let a model without weights expect them in the dtypes in which they are stored."""
        parameters = dict(model.named_parameters(remove_duplicate=False))  # two that are tied may turn out to differ
        floating = {name for name in parameters.keys() & stored.keys() if stored[name].is_floating_point}
        self.dtypes = {name: parameters[name].dtype for name in floating}
        for name in floating:
            parameters[name].data = parameters[name].data.to(stored[name])

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs) -> bool:
        path, _, name = param_name.rpartition(".")
        return name == "weight" and isinstance(model.get_submodule(path), QuantizedLinear)

    def get_quantize_ops(self) -> ConversionOps:
        return QuantizeWhileLoading()

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs) -> None:
        config = self.quantization_config
        if self.files:
            release_mappings(find_mappings(self.files) - self.mapped_before)  # matrices that may be tied were compared
            self.quantize_mapped(model)
        if config.lm_head:
            quantize_output_embeddings_(model)
        record(model.config, config.bits, config.group_size, config.lm_head, config.image_encoder)
        self.remove_quantization_config(model)  # the fields just recorded say it all, and are what is saved

    def parts(self, model: nn.Module) -> list[tuple[nn.Module, int, int | None]]:
        """What is quantized of a model, each with its bits and the size of its groups."""
        config = self.quantization_config
        decoder = (model.get_decoder(), config.bits, config.group_size)
        return [decoder, (model.get_encoder("image"), 8, None)] if config.image_encoder else [decoder]

    def quantize_mapped(self, model: nn.Module) -> None:
        """Quantize the matrices that shall be, and read what stays, in the dtype that it shall have."""
        for part, bits, group_size in self.parts(model):
            check_layers(find_linears(part), bits, group_size)
            prefix = next(name for name, module in model.named_modules() if module is part)
            for name in list(find_linears(part)):  # names alone: what is replaced shall be freed
                self.read(model, [f"{prefix}.{name}.weight"])
                replace_(part, name, bits, group_size)
        self.read(model, self.dtypes)

    def read(self, model: nn.Module, names: Collection[str]) -> None:
        """Read parameters that are mapped, unless they are in the right dtype as they are."""
        for name in names:
            parameter, dtype = model.get_parameter(name), self.dtypes.get(name)
            if parameter.is_floating_point() and dtype not in (None, parameter.dtype):
                parameter.data = read_as(parameter.data, dtype)


def are_mapped(device_map: dict | str | None) -> bool:
    """Whether transformers maps weights that go to these places, and does not read them into memory."""
    places = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
    return sys.platform != "win32" and places <= {None, "cpu", torch.device("cpu")}


# Plain assignment: the registering functions refuse a second import of this file, one for each checkpoint folder.
AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = LowBitConfig
AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = LowBitQuantizer
