"""VisualGLM-6B on today's transformers."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

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


def register() -> None:
    """Let the Auto* classes of this process load `model_type` "chatglm" with this package, without remote code.

    Not done at import: ChatGLM2-6B and ChatGLM3-6B have the same `model_type` and are other models.
    """
    AutoConfig.register("chatglm", VisualGLMConfig, exist_ok=True)
    for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
        auto_class.register(VisualGLMConfig, VisualGLMForConditionalGeneration, exist_ok=True)
    AutoTokenizer.register(VisualGLMConfig, slow_tokenizer_class=ChatGLMTokenizer, exist_ok=True)
    AutoImageProcessor.register(VisualGLMConfig, slow_image_processor_class=VisualGLMImageProcessor, exist_ok=True)
    AutoProcessor.register(VisualGLMConfig, VisualGLMProcessor, exist_ok=True)
