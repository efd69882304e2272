# SPDX-License-Identifier: Apache-2.0
"""What a model must know of the adapters that PEFT puts on it: where they are, and what they do to tied embeddings.

Not here: PEFT, which wraps a layer into one of its own with the layer as `base_layer` (what calculates with it) or
`original_module` (what takes its place); and low bits (`quantization.py`).
"""

from torch import nn


WRAPPED = ("base_layer", "original_module")


def find_wrapped(module: nn.Module) -> nn.Module | None:
    """The layer inside one of PEFT's, which may have another inside; None for any other module."""
    children = dict(module.named_children())
    return next((children[name] for name in WRAPPED if name in children), None)


def unwrap(module: nn.Module) -> nn.Module:
    """The layer itself, without the adapters around it."""
    while (inner := find_wrapped(module)) is not None:
        module = inner
    return module


def find_adapted(model: nn.Module) -> dict[str, nn.Module]:
    """The layers with an adapter, as PEFT has wrapped them, by name; of several around one, the outermost."""
    adapted = {}
    for name, module in model.named_modules():
        if find_wrapped(module) is not None and not any(name.startswith(f"{outer}.") for outer in adapted):
            adapted[name] = module
    return adapted


def remove_adapters(model: nn.Module) -> None:
    """Put every layer back where it was before it got an adapter."""
    for name, module in find_adapted(model).items():
        model.set_submodule(name, unwrap(module))


def check_plain(model: nn.Module) -> None:
    """Raise a `ValueError` if layers have adapters: their weights would be saved under names that nothing loads."""
    adapted = list(find_adapted(model))
    if adapted:
        raise ValueError(
            f"{adapted[0]} and {len(adapted) - 1} more layers have an adapter, so the weights have names that nothing "
            "loads. Save PEFT's model, which writes the adapter, or what its merge_and_unload() returns. (Of LN tuning "
            "with modules_to_save it leaves the latter behind: such an adapter can only be kept beside the model.)"
        )


# Tied embeddings


def is_tied(model: nn.Module) -> bool:
    """Whether the output layer and the input embeddings are one matrix."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    return unwrap(head).weight is unwrap(embeddings).weight


def untie(model: nn.Module) -> None:
    """Give the output layer a matrix of its own, with the same numbers."""
    head = unwrap(model.get_output_embeddings())
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    record_untied(model)


def record_untied(model: nn.Module) -> None:
    """Say that a transformers model's output layer has a matrix of its own, where saving and loading look it up."""
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def adapts_embeddings(model: nn.Module) -> bool:
    """Whether an adapter of one of them alone calculates with the output layer or the input embeddings.

    Merged, it would be in both. A layer that is trained as a whole is put into its place, and trained tokens that both
    share are written twice, alike.
    """
    ends = model.get_output_embeddings(), model.get_input_embeddings()
    layers = [getattr(end, "token_adapter", end) for end in ends]
    is_shared = getattr(layers[0], "tied_adapter", None) is not None
    return not is_shared and any("base_layer" in dict(layer.named_children()) for layer in layers)


def check_tied_adapters(adapters: dict) -> None:
    """Raise a `ValueError` if PEFT tied an adapter of the output layer to one of the embeddings, see `LoraConfig`.

    It would not do so when it loads the adapter, since it knows embeddings by other names than the original's.
    """
    if any(getattr(config, "target_modules_to_tie", None) for config in adapters.values()):
        raise ValueError(
            "ensure_weight_tying cannot be used with an adapter of lm_head or of the word embeddings: PEFT would lose "
            "one of the two when it loads them. Leave it out; each may be a target, and both."
        )
