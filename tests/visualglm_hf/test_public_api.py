"""What `visualglm_hf` exports: its names, a docstring for each of them, and the shape of every tensor."""

import inspect
import re
from collections.abc import Iterator
from types import FunctionType

import pytest

import visualglm_hf
from tests.commands import HEAVY, modules_after


FORWARD = visualglm_hf.VisualGLMForConditionalGeneration.forward  # methods that share its arguments refer to it


def members(public: type) -> Iterator[tuple[str, object]]:
    """Public methods and properties that this package has written for a class."""
    for base in public.__mro__:
        if base.__module__.startswith("visualglm_hf"):
            for name, member in vars(base).items():
                if not name.startswith("_") and isinstance(member, (FunctionType, property, staticmethod, classmethod)):
                    yield name, getattr(public, name)


METHODS = [
    pytest.param(member, id=f"{name}.{method}")
    for name in visualglm_hf.__all__
    if inspect.isclass(public := getattr(visualglm_hf, name))
    for method, member in members(public)
]


def test_the_package_has_its_public_names_and_no_others():
    assert set(visualglm_hf.__all__) <= set(dir(visualglm_hf))
    for name in visualglm_hf.__all__:
        assert getattr(visualglm_hf, name).__name__ == name
    with pytest.raises(AttributeError, match="'visualglm_hf' has no attribute 'VisualGLMModel'"):
        _ = visualglm_hf.VisualGLMModel


@pytest.mark.parametrize("name", visualglm_hf.__all__)
def test_every_public_name_says_what_it_is(name):
    assert len(inspect.getdoc(getattr(visualglm_hf, name))) > 20


@pytest.mark.parametrize("method", METHODS)
def test_every_public_method_says_what_it_does(method):
    assert inspect.getdoc(method)


@pytest.mark.parametrize("method", METHODS)
def test_every_tensor_has_a_shape(method):
    function = method.fget if isinstance(method, property) else method
    signature = inspect.signature(function)
    tensors = [name for name, each in signature.parameters.items() if "Tensor" in str(each.annotation)]
    text = f"{inspect.getdoc(method)}\n{inspect.getdoc(FORWARD)}"
    for name in tensors:
        assert re.search(rf"\b{name}\b[^\n]*(\[|of shape)", text), name
    if "Tensor" in str(signature.return_annotation):
        assert re.search(r"\[[\w, ]+\]", inspect.getdoc(method))


def test_the_package_imports_a_library_when_it_is_first_needed():
    modeling = {"visualglm_hf.modeling_visualglm", "transformers.modeling_utils"}
    assert not modules_after("import visualglm_hf; dir(visualglm_hf)") & HEAVY
    assert not modules_after("from visualglm_hf import VisualGLMConfig") & modeling
