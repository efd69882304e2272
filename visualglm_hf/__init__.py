"""VisualGLM-6B on today's transformers."""

from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .configuration_visualglm import (
        VisualGLMConfig,
        VisualGLMQFormerConfig,
        VisualGLMTextConfig,
        VisualGLMVisionConfig,
    )
    from .image_processing_visualglm import VisualGLMImageProcessor
    from .modeling_visualglm import VisualGLMForConditionalGeneration
    from .processing_visualglm import VisualGLMProcessor
    from .quantization import LowBitConfig
    from .tokenization_chatglm import ChatGLMTokenizer


__all__ = [
    "ChatGLMTokenizer",
    "LowBitConfig",
    "VisualGLMConfig",
    "VisualGLMForConditionalGeneration",
    "VisualGLMImageProcessor",
    "VisualGLMProcessor",
    "VisualGLMQFormerConfig",
    "VisualGLMTextConfig",
    "VisualGLMVisionConfig",
    "register",
]

# Public name -> the file that has it, imported when the name is first used: torch and transformers take seconds.
_FILE_OF = {
    "ChatGLMTokenizer": "tokenization_chatglm",
    "LowBitConfig": "quantization",
    "VisualGLMConfig": "configuration_visualglm",
    "VisualGLMForConditionalGeneration": "modeling_visualglm",
    "VisualGLMImageProcessor": "image_processing_visualglm",
    "VisualGLMProcessor": "processing_visualglm",
    "VisualGLMQFormerConfig": "configuration_visualglm",
    "VisualGLMTextConfig": "configuration_visualglm",
    "VisualGLMVisionConfig": "configuration_visualglm",
}


def __getattr__(name: str) -> type:
    if name not in _FILE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(f".{_FILE_OF[name]}", __name__), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def register() -> None:
    """Let the Auto* classes of this process load `model_type` "chatglm" with this package, without remote code.

    Not done at import: ChatGLM2-6B and ChatGLM3-6B have the same `model_type` and are other models.
    """
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoProcessor,
        AutoTokenizer,
    )

    from .configuration_visualglm import VisualGLMConfig
    from .image_processing_visualglm import VisualGLMImageProcessor
    from .modeling_visualglm import VisualGLMForConditionalGeneration
    from .processing_visualglm import VisualGLMProcessor
    from .tokenization_chatglm import ChatGLMTokenizer

    AutoConfig.register("chatglm", VisualGLMConfig, exist_ok=True)
    for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
        auto_class.register(VisualGLMConfig, VisualGLMForConditionalGeneration, exist_ok=True)
    AutoTokenizer.register(VisualGLMConfig, slow_tokenizer_class=ChatGLMTokenizer, exist_ok=True)
    AutoImageProcessor.register(VisualGLMConfig, slow_image_processor_class=VisualGLMImageProcessor, exist_ok=True)
    AutoProcessor.register(VisualGLMConfig, VisualGLMProcessor, exist_ok=True)
