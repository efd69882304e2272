"""Messages and pictures -> a prompt, ready for the model; all that can be checked without the model is checked here.

What a prompt looks like is `visualglm_hf.conversation`'s. What a server may open is decided here: pictures come as
data, never as paths or addresses.
"""

import asyncio
import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from jinja2 import TemplateError
from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from visualglm_hf import VisualGLMImageProcessor, VisualGLMProcessor
from visualglm_hf.conversation import check_text, is_english, quote_reading
from visualglm_hf.image_processing_visualglm import data_uri_bytes, name_of_uri, open_picture
from visualglm_hf.text_in_pictures import is_wanted, load_reader, read_picture
from visualglm_hf.tokenization_chatglm import MAX_BLANKS
from visualglm_hf.zooming import count_looks
from visualglm_tools.checkpoints.picture_size import image_size_of
from visualglm_tools.serving.engine.picture_pool import PicturePool


ROLES = ("user", "assistant")
QUESTIONS = ("描述这张图片。", "Describe the image.")  # about a picture without a text; the first is the original's
# A picture that is read or zoomed into, as a size for `PicturePool`: 2,240 pixels a side are 15 MB, and ten times what
# the model sees. The reader makes it smaller still, for its own memory.
WHOLE = (2240, 0)
SHORT_TEXT = 10_000  # characters, which take milliseconds
REMEMBERED_READINGS = 64  # of pictures: clients send the same conversation again with each question
NO_PATH = "A picture must be a data: URI or the data itself; no path or address is opened here."


class PictureTooLarge(ValueError):
    """An encoded picture has more bytes than the server takes."""


@dataclass(frozen=True)
class OpenedPicture:
    """A picture as the model sees it, and what else was asked for.

    Args:
        image: as the model sees it, or in more pixels, which then are made fewer.
        reading: what was read in all its pixels, "" for nothing; None where that was not asked for.
        whole: all its pixels, but at most `WHOLE`; None where nobody looks into it.
    """

    image: Image.Image
    reading: str | None = None
    whole: Image.Image | None = None


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for its next answer.

    Args:
        token_ids: the whole prompt, a picture being `num_query_tokens` image tokens.
        pixel_values: [pictures, 3, height, width] in the order of their places, or None.
        readings: what was read in each picture, "" for nothing; none where that was not asked for.
        looks: how often to look into the last picture before the answer.
        is_shown: whether to tell where in it the model looks when it begins to answer.
        picture: that one in its own pixels, but at most `WHOLE`, for either.
    """

    token_ids: tuple[int, ...]
    pixel_values: torch.Tensor | None = None
    readings: tuple[str, ...] = ()
    looks: int = 0
    is_shown: bool = False
    picture: Image.Image | None = None


class PromptBuilder:
    """Builds prompts for one model; may be called from several threads.

    Args:
        max_pictures: per conversation.
        max_picture_bytes: of one encoded picture.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_pictures: int,
        max_picture_bytes: int,
    ):
        config = model.config
        side = image_size_of(config)
        self.processor = VisualGLMProcessor(
            VisualGLMImageProcessor(size={"height": side, "width": side}),
            tokenizer,
            num_query_tokens=config.qformer_config.num_query_tokens,
        )
        self.tokenizer = tokenizer
        self.readings: OrderedDict[bytes, str] = OrderedDict()  # by the pixels; the last one used is last
        self.reading = threading.Lock()
        self.context_length = config.text_config.max_position_embeddings
        self.longest_piece = max(map(len, tokenizer.get_vocab()))
        self.pictures, self.size = PicturePool(), (side, side)
        self.max_pictures, self.max_picture_bytes = max_pictures, max_picture_bytes
        self.short_ones = ThreadPoolExecutor(2, "short-prompts")
        self.long_ones = ThreadPoolExecutor(1, "long-prompts")  # one by one, so that they leave others their time

    def build(
        self,
        messages: Sequence[Mapping],
        english: bool | None = None,
        read_text: bool = False,
        zoom: bool | int = False,
        is_shown: bool = False,
    ) -> Prompt:
        """The prompt that asks the last of the `messages`; see `Engine.prepare`."""
        conversation, pictures = self.separate(messages, english)
        looks, read_text = check_looks(zoom, pictures), is_wanted(read_text)
        is_whole = whole_ones(pictures, looks or is_shown)
        opened = [self.open(picture, read_text, each) for picture, each in zip(pictures, is_whole, strict=True)]
        return self.finish(conversation, opened, english, looks, is_shown)

    async def build_async(
        self,
        messages: Sequence[Mapping],
        english: bool | None = None,
        fetch: Callable[[str], Awaitable[bytes]] | None = None,
        read_text: bool = False,
        zoom: bool | int = False,
    ) -> Prompt:
        """`build` beside the event loop; with `fetch`, which reads what is behind an address, for addresses too."""
        conversation, pictures = self.separate(messages, english)
        looks, read_text = check_looks(zoom, pictures), is_wanted(read_text)
        is_whole = whole_ones(pictures, looks)
        # One after the other: an encoded picture is much larger than what the model sees of it.
        opened = [
            await self.open_async(picture, fetch, read_text, each)
            for picture, each in zip(pictures, is_whole, strict=True)
        ]
        threads = self.short_ones if count_characters(conversation) <= SHORT_TEXT else self.long_ones
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(threads, self.finish, conversation, opened, english, looks)

    async def build_text_async(self, text: str, is_context: bool = True, fits: bool = True) -> Prompt:
        """A prompt that is a text as it stands, without `问：` and `答：`, beside the event loop.

        Args:
            text: typed special tokens in it are text.
            is_context: whether it is followed by the two tokens behind which the model answers.
            fits: whether it must leave room for an answer.

        Raises:
            ValueError: an empty text, one with reserved characters, or more tokens than the model takes.
        """
        check_text(text, "The prompt")
        if not text:
            raise ValueError("The prompt is empty.")
        if (tokens := self.least_tokens([text])) > self.context_length:
            raise ValueError(f"The prompt is at least {tokens} tokens long; the model takes {self.context_length}.")
        threads = self.short_ones if len(text) <= SHORT_TEXT else self.long_ones
        return await asyncio.get_running_loop().run_in_executor(threads, self.of_text, text, is_context, fits)

    def of_text(self, text: str, is_context: bool, fits: bool) -> Prompt:
        tokens = self.tokenizer(text, add_special_tokens=is_context, split_special_tokens=True)["input_ids"]
        if fits and len(tokens) >= self.context_length:
            raise ValueError(
                f"The prompt is {len(tokens)} tokens long; the model takes {self.context_length}, answer included. "
                "Shorten it."
            )
        return Prompt(tuple(tokens))

    def close(self) -> None:
        self.pictures.close()
        self.short_ones.shutdown(wait=False)
        self.long_ones.shutdown(wait=False)

    def separate(self, messages: Sequence[Mapping], english: bool | None) -> tuple[list[dict], list]:
        """The conversation as the chat template takes it, and its pictures; its counts and lengths are checked."""
        if isinstance(messages, Sequence) and count_parts(messages) > self.context_length:
            raise ValueError(
                f"The conversation has more than {self.context_length} messages and parts; the model takes "
                f"{self.context_length} tokens in all. Shorten it."
            )
        conversation, pictures = separate_pictures(messages)
        if len(pictures) > self.max_pictures:
            raise ValueError(f"The conversation has {len(pictures)} pictures; at most {self.max_pictures} are taken.")
        if (tokens := self.least_tokens(texts_of(conversation))) > self.context_length:
            raise ValueError(
                f"The conversation is at least {tokens} tokens long; the model takes {self.context_length}, answer "
                "included. Shorten it."
            )
        return arrange(conversation, english), pictures

    def least_tokens(self, texts: Sequence[str]) -> int:
        """How many tokens these texts take at least, without tokenizing them: each is one of the longest."""
        characters, blanks = sum(map(len, texts)), sum(text.count(" ") for text in texts)
        return blanks // MAX_BLANKS + (characters - blanks) // self.longest_piece

    def finish(
        self,
        conversation: list[dict],
        opened: Sequence[OpenedPicture],
        english: bool | None,
        looks: int = 0,
        is_shown: bool = False,
    ) -> Prompt:
        """The prompt of a conversation and its open pictures."""
        readings, images = [each.reading for each in opened], [each.image for each in opened]
        if any(readings):
            english = is_english("\n".join(texts_of(conversation[-1:]))) if english is None else english
            conversation = with_readings(conversation, readings, english)
        try:
            text = self.processor.apply_chat_template(
                conversation, add_generation_prompt=True, tokenize=False, english=english
            )
        except TemplateError as error:
            raise ValueError(str(error)) from error
        inputs = self.processor(images=images or None, text=[text], return_tensors="pt")
        token_ids = inputs["input_ids"][0].tolist()
        if len(token_ids) >= self.context_length:
            raise ValueError(
                f"The conversation is {len(token_ids)} tokens long; the model takes {self.context_length}, answer "
                "included. Shorten it."
            )
        told = tuple(each or "" for each in readings) if any(each is not None for each in readings) else ()
        looked_into = (opened[-1].whole or opened[-1].image) if opened and (looks or is_shown) else None
        return Prompt(tuple(token_ids), inputs.get("pixel_values"), told, looks, is_shown, looked_into)

    def open(self, picture, read_text: bool = False, is_whole: bool = False) -> OpenedPicture:
        """A picture given as an image, bytes, an array or a `data:` URI; a `ValueError` for paths and addresses."""
        if isinstance(picture, OpenedPicture):
            return picture
        refuse_path(picture)
        if isinstance(picture, str):
            return self.decode(self.uri_bytes(picture), name_of_uri(picture), read_text, is_whole)
        if isinstance(picture, bytes):
            return self.decode(picture, None, read_text, is_whole)
        image = open_picture(picture)
        return OpenedPicture(image, self.read(image) if read_text else None, image if is_whole else None)

    def read(self, image: Image.Image) -> str:
        """What is written in a picture; one at a time, and not again in one that was read lately."""
        load_reader()  # that it is missing is said before anything waits
        key = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
        with self.reading:
            if key not in self.readings:
                self.readings[key] = read_picture(image, self.count_tokens)
            self.readings.move_to_end(key)
            while len(self.readings) > REMEMBERED_READINGS:
                self.readings.popitem(last=False)
            return self.readings[key]

    def count_tokens(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    async def open_async(
        self, picture, fetch: Callable[[str], Awaitable[bytes]] | None, read_text: bool, is_whole: bool
    ) -> OpenedPicture:
        """`open` beside the event loop, for addresses too where they are fetched."""
        refuse_path(picture)
        loop, name = asyncio.get_running_loop(), None
        if isinstance(picture, str) and fetch is not None and picture[:8].lower().startswith(("http://", "https://")):
            picture = await fetch(picture)
        elif isinstance(picture, str):
            name = name_of_uri(picture)
            picture = await loop.run_in_executor(self.long_ones, self.uri_bytes, picture)
        if not isinstance(picture, bytes):
            return await loop.run_in_executor(self.long_ones, self.open, picture, read_text, is_whole)
        self.check_bytes(len(picture))
        small = await self.pictures.decode_async(picture, self.size, self.resample, name)
        if not read_text and not is_whole:
            return OpenedPicture(small)
        whole = await self.pictures.decode_async(picture, WHOLE, self.resample, name)
        reading = await loop.run_in_executor(self.long_ones, self.read, whole) if read_text else None
        return OpenedPicture(small, reading, whole if is_whole else None)

    def uri_bytes(self, uri: str) -> bytes:
        if uri[:5].lower() != "data:":
            raise ValueError(NO_PATH)
        self.check_bytes(len(uri) * 3 // 4)  # base64
        return data_uri_bytes(uri)

    @property
    def resample(self) -> int:
        return self.processor.image_processor.resample

    def decode(
        self, data: bytes, name: str | None = None, read_text: bool = False, is_whole: bool = False
    ) -> OpenedPicture:
        """An encoded picture as the model sees it, and in its own pixels; see `Engine.decode_picture`."""
        self.check_bytes(len(data))
        small = self.pictures.decode(data, self.size, self.resample, name)
        if not read_text and not is_whole:
            return OpenedPicture(small)
        whole = self.pictures.decode(data, WHOLE, self.resample, name)
        return OpenedPicture(small, self.read(whole) if read_text else None, whole if is_whole else None)

    def check_bytes(self, size: int) -> None:
        if size > self.max_picture_bytes:
            raise PictureTooLarge(f"A picture of {size} bytes is too large, the limit is {self.max_picture_bytes}.")


def check_looks(zoom: bool | int, pictures: Sequence) -> int:
    """How many looks into the last picture `zoom` asks for; a `ValueError` if there is none."""
    looks = count_looks(zoom)
    if looks and not pictures:
        raise ValueError("There is no picture to zoom into. Send one, or leave zoom out.")
    return looks


def whole_ones(pictures: Sequence, is_looked_into: bool | int) -> list[bool]:
    """Of which pictures all pixels are needed: of the last, if it is looked into."""
    return [bool(is_looked_into) and index == len(pictures) - 1 for index in range(len(pictures))]


def refuse_path(picture) -> None:
    """Raise a `ValueError` for what names a file in another way than text does."""
    if isinstance(picture, (os.PathLike, Mapping)):
        raise ValueError(NO_PATH)


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
        if message["role"] != "user" and pictures_of(parts):
            raise ValueError(f"messages[{index}], of {message['role']!r}, has a picture; only the user's may have one.")
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


def count_parts(messages: Sequence) -> int:
    """How many messages, and parts beyond their first, there are; whatever they are."""
    contents = [message.get("content") for message in messages if isinstance(message, Mapping)]
    parts = sum(len(content) for content in contents if isinstance(content, (list, tuple)))
    return max(len(messages), parts)


def count_characters(conversation: Iterable[Mapping]) -> int:
    return sum(map(len, texts_of(conversation)))


def texts_of(conversation: Iterable[Mapping]) -> list[str]:
    return [part["text"] for message in conversation for part in parts_of(message) if part["type"] == "text"]


def parts_of(message: Mapping) -> list[dict]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def pictures_of(content: str | list[dict]) -> list[dict]:
    return [] if isinstance(content, str) else [part for part in content if part["type"] == "image"]


def arrange(conversation: Sequence[Mapping], english: bool | None) -> list[dict]:
    """The conversation as the chat template takes it: what OpenAI's API takes, and people send, is more.

    System messages are joined in front, neighbours of one role with each other. Before an answer that comes first, such
    as a greeting, stands an empty question; a picture without a text is asked the demo's question, in the language of
    the conversation.
    """
    system = [message for message in conversation if message["role"] == "system"]
    joined: list[dict] = []
    for message in [*system, *(message for message in conversation if message["role"] != "system")]:
        if joined and joined[-1]["role"] == message["role"]:
            joined[-1] = {"role": message["role"], "content": parts_of(joined[-1]) + parts_of(message)}
        else:
            joined.append(dict(message))
    first = 1 if system else 0
    if joined[first:] and joined[first]["role"] == "assistant":
        joined.insert(first, {"role": "user", "content": ""})
    is_in_english = is_english("\n".join(texts_of(joined))) if english is None else english
    return [with_question(message, QUESTIONS[is_in_english]) for message in joined]


def with_readings(conversation: Sequence[dict], readings: Sequence[str | None], english: bool) -> list[dict]:
    """The conversation with what was read in each picture at the head of the message that has it."""
    left, messages = iter(readings), []
    for message in conversation:
        pictures = pictures_of(message["content"])
        quoted = [quote_reading(next(left) or "", english).removesuffix("\n") for _ in pictures]
        read = [{"type": "text", "text": text} for text in quoted if text]
        messages.append({**message, "content": [*read, *parts_of(message)]} if read else message)
    return messages


def with_question(message: dict, question: str) -> dict:
    """The message, which asks `question` if it is a picture and nothing more."""
    pictures = pictures_of(message["content"])
    if message["role"] != "user" or not pictures or "".join(texts_of([message])).strip():
        return message
    return {"role": "user", "content": [*pictures, {"type": "text", "text": question}]}
