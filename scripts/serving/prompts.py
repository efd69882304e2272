"""Messages and pictures -> a prompt, ready for the model; all that can be checked without the model is checked here.

What a prompt looks like is `visualglm_hf.conversation`'s. What a server may open is decided here: pictures come as
data, never as paths or addresses.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jinja2 import TemplateError
from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from visualglm_hf import VisualGLMImageProcessor, VisualGLMProcessor
from visualglm_hf.image_processing_visualglm import data_uri_bytes, open_picture

from .picture_pool import PicturePool


ROLES = ("user", "assistant")


class PictureTooLarge(ValueError):
    """An encoded picture has more bytes than the server takes."""


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for its next answer.

    Args:
        token_ids: the whole prompt, a picture being `num_query_tokens` image tokens.
        pixel_values: [pictures, 3, height, width] in the order of their places, or None.
    """

    token_ids: tuple[int, ...]
    pixel_values: torch.Tensor | None = None


class PromptBuilder:
    """Builds prompts for one model; may be called from several threads.

    Args:
        pictures: decodes what strangers send.
        max_pictures: per conversation.
        max_picture_bytes: of one encoded picture.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pictures: PicturePool,
        max_pictures: int,
        max_picture_bytes: int,
    ):
        config = model.config
        side = config.vision_config.image_size
        self.processor = VisualGLMProcessor(
            VisualGLMImageProcessor(size={"height": side, "width": side}),
            tokenizer,
            num_query_tokens=config.qformer_config.num_query_tokens,
        )
        self.context_length = config.text_config.max_position_embeddings
        self.pictures, self.size = pictures, (side, side)
        self.max_pictures, self.max_picture_bytes = max_pictures, max_picture_bytes

    def build(self, messages: Sequence[Mapping], english: bool | None = None) -> Prompt:
        """The prompt that asks the last of the `messages`; see `Engine.prepare`."""
        conversation, pictures = separate_pictures(messages)
        if len(pictures) > self.max_pictures:
            raise ValueError(f"The conversation has {len(pictures)} pictures; at most {self.max_pictures} are taken.")
        try:
            text = self.processor.apply_chat_template(
                conversation, add_generation_prompt=True, tokenize=False, english=english
            )
        except TemplateError as error:
            raise ValueError(str(error)) from error
        images = [self.open(picture) for picture in pictures]
        inputs = self.processor(images=images or None, text=[text], return_tensors="pt")
        token_ids = inputs["input_ids"][0].tolist()
        if len(token_ids) >= self.context_length:
            raise ValueError(
                f"The conversation is {len(token_ids)} tokens long; the model takes {self.context_length}, answer "
                "included. Shorten it."
            )
        return Prompt(tuple(token_ids), inputs.get("pixel_values"))

    def open(self, picture) -> Image.Image:
        """A picture given as an image, bytes, an array or a `data:` URI; a `ValueError` for paths and addresses."""
        if isinstance(picture, bytes):
            return self.decode(picture)
        if not isinstance(picture, str):
            return open_picture(picture)
        if picture[:5].lower() != "data:":
            raise ValueError("A picture must be a data: URI or the data itself; no path or address is opened here.")
        self.check_bytes(len(picture) * 3 // 4)  # base64
        return self.decode(data_uri_bytes(picture), f"<data URI of {len(picture)} characters>")

    def decode(self, data: bytes, name: str | None = None) -> Image.Image:
        """An encoded picture as the model sees it; see `Engine.decode_picture`."""
        self.check_bytes(len(data))
        return self.pictures.decode(data, self.size, self.processor.image_processor.resample, name)

    def check_bytes(self, size: int) -> None:
        if size > self.max_picture_bytes:
            raise PictureTooLarge(f"A picture of {size} bytes is too large, the limit is {self.max_picture_bytes}.")


def conversation_messages(turns: Iterable[Sequence[str]], question: str, picture=None) -> list[dict]:
    """The messages that ask `question` after (question, answer) `turns`; the picture stands in front."""
    texts = [(role, text) for turn in turns for role, text in zip(ROLES, turn, strict=True)]
    messages = [{"role": role, "content": text} for role, text in [*texts, ("user", question)]]
    if picture:
        first = {"type": "text", "text": messages[0]["content"]}
        messages[0]["content"] = [{"type": "image", "image": picture}, first]
    return messages


def separate_pictures(messages: Sequence[Mapping]) -> tuple[list[dict], list]:
    """The messages with bare places for their pictures, as the chat template wants them, and the pictures.

    Raises:
        ValueError: not the shape of messages, or the last one is not the user's. Roles and their order are the
            template's to check.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise ValueError('messages must be a list such as [{"role": "user", "content": "Hello"}].')
    conversation, pictures = [], []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"messages[{index}] must have a role and a content.")
        parts = message.get("content")
        if not isinstance(parts, str):
            parts = [place_of(part, f"messages[{index}]", pictures) for part in as_list(parts, f"messages[{index}]")]
        conversation.append({"role": message["role"], "content": parts})
    if conversation[-1]["role"] != "user":
        raise ValueError(f"The last message must be the user's question, found one of {conversation[-1]['role']!r}.")
    return conversation, pictures


def as_list(content, name: str) -> Sequence:
    if isinstance(content, (bytes, Mapping)) or not isinstance(content, Sequence):
        raise ValueError(f"{name}'s content must be a text or a list of parts, found {type(content).__name__}.")
    return content


def place_of(part: Mapping, name: str, pictures: list) -> dict:
    """A part as the chat template wants it; a picture goes to the end of `pictures`."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "image" and part.get("image") is not None:
        pictures.append(part["image"])
        return {"type": "image"}
    raise ValueError(
        f'{name} has a part that is neither {{"type": "text", "text": ...}} nor {{"type": "image", "image": ...}}.'
    )
