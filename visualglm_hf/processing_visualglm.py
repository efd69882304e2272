# Copyright 2026 The visualglm-hf authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Messages and pictures to model inputs: the image processor and the tokenizer behind transformers' one call.

The prompt grammar, the chat template included, is `conversation.py`'s.
"""

from collections.abc import Container, Sequence
from os import PathLike

from transformers import BatchFeature, ProcessorMixin
from transformers.image_utils import ImageInput
from transformers.processing_utils import TextKwargs
from transformers.utils import auto_docstring, to_py_obj

from .code_links import replace_links
from .conversation import CHAT_TEMPLATE, IMAGE_MARK, brief, clean_response, expand_images
from .fetching import fetch_picture


OPTION_GROUPS = ("images_kwargs", "text_kwargs", "common_kwargs")


def group_images(images, texts: list[str]) -> tuple[list, list[int]]:
    """Flatten `images` and count them per text.

    Args:
        images: None, one picture, an array [B, H, W, C] of pictures, a flat list of pictures for all texts in the order
            of their places, or one list of pictures per text, None for one without.

    Raises:
        ValueError: lists that are not one per text.
    """
    if images is None:
        return [], [0] * len(texts)
    is_several = isinstance(images, (list, tuple)) or getattr(images, "ndim", None) == 4
    images = list(images) if is_several else [images]
    if any(row is None or isinstance(row, (list, tuple)) for row in images):
        rows = [list(row or ()) if row is None or isinstance(row, (list, tuple)) else [row] for row in images]
        if texts and len(rows) != len(texts):
            raise ValueError(f"images has {len(rows)} lists of pictures for {len(texts)} text(s); give one per text.")
        return [image for row in rows for image in row], [len(row) for row in rows]
    if len(texts) == 1:
        return images, [len(images)]
    wanted = [text.count(IMAGE_MARK) for text in texts]
    if texts and sum(wanted) != len(images):
        raise ValueError(f"The texts have {wanted} image placeholders for {len(images)} image(s) in all.")
    return images, wanted


def list_texts(text) -> list[str]:
    """A text as a list of one, None as a list of none; a `ValueError` for what is no text and no list of texts."""
    texts = [] if text is None else [text] if isinstance(text, str) else text
    if not isinstance(texts, Sequence) or not all(isinstance(each, str) for each in texts):
        raise ValueError(
            f"text must be a string or a list of strings, found {brief(text)}. Messages go to "
            "apply_chat_template; words that are split already must be joined."
        )
    return list(texts)


def split_options(options: dict, image_options: Container[str]) -> tuple[dict, dict, str | None]:
    """Sort the options of a call: those of the image processor, those of the tokenizer, and `return_tensors`.

    Args:
        options: names of both, and `images_kwargs`, `text_kwargs` and `common_kwargs` that hold more of them.
        image_options: names of those of the image processor; `return_tensors` is both's.

    Raises:
        ValueError: an option that is given twice.
    """
    images_kwargs, text_kwargs, common = (dict(options.get(group) or {}) for group in OPTION_GROUPS)
    flat = {name: value for name, value in options.items() if name not in OPTION_GROUPS}
    for name, value in {**common, **flat}.items():
        group = images_kwargs if name in image_options else text_kwargs
        if name in group and name != "return_tensors":
            raise ValueError(f"{name} is given twice, by itself and in images_kwargs or text_kwargs. Give it once.")
        group[name] = value
    tensors = [group.pop("return_tensors", None) for group in (text_kwargs, images_kwargs)]
    return images_kwargs, text_kwargs, tensors[0] or tensors[1]


def split_answer(token_ids: list[int], start: int) -> tuple[list[int], list[int]]:
    """The ids of a prompt up to `start`, the id of `<sop>`, and those of its answer; without `start` all are answer."""
    length = token_ids.index(start) + 1 if start in token_ids else 0
    return token_ids[:length], token_ids[length:]


@auto_docstring(custom_intro="Makes `input_ids`, `attention_mask` and `pixel_values` of texts and pictures.")
class VisualGLMProcessor(ProcessorMixin):
    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, num_query_tokens: int = 32, **kwargs):
        r"""
        num_query_tokens (`int`, *optional*, defaults to 32):
            Soft prompt embeddings per picture.
        """
        self.num_query_tokens = num_query_tokens
        self.image_token = IMAGE_MARK
        self.image_token_id = tokenizer.unk_token_id
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        if self.tokenizer.chat_template is None:
            self.tokenizer.chat_template = self.chat_template

    def save_pretrained(self, save_directory: str | PathLike, *args, **kwargs) -> list[str]:
        """Save all parts as [`ProcessorMixin.save_pretrained`] does, with the code that loads them."""
        replace_links(save_directory)
        for part in (self, self.image_processor):
            part.register_for_auto_class()
        return super().save_pretrained(save_directory, *args, **kwargs)

    @auto_docstring(
        custom_intro="""
        Prepare a batch: `input_ids` and `attention_mask` [B, S] with each placeholder expanded, and `pixel_values`
        [images, 3, height, width] if there are pictures, 224 unless `size` says otherwise; without `return_tensors`
        they are lists of B rows, of one row for a single text. Text is text: `<sop>` typed by a user is no special
        token. Raises a `ValueError` for neither text nor pictures, for placeholders that do not match them, and for bad
        pictures.
        """
    )
    def __call__(
        self, images: ImageInput | None = None, text: str | Sequence[str] | None = None, **kwargs
    ) -> BatchFeature:
        others = {name: kwargs.pop(name, None) for name in ("videos", "audio")}
        if any(other is not None for other in others.values()):
            raise ValueError("VisualGLM understands pictures and text, no video or audio.")
        if text is None and images is None:
            raise ValueError("Give text, images or both.")
        images_kwargs, text_kwargs, return_tensors = split_options(
            kwargs, self.image_processor.valid_kwargs.__annotations__
        )
        texts = list_texts(text)
        flat_images, counts = group_images(images, texts)
        data = {}
        if texts:
            data.update(self.tokenize(texts, counts, **text_kwargs))
        if flat_images:
            pictures = [fetch_picture(image) for image in flat_images]
            data.update(self.image_processor(pictures, return_tensors=return_tensors, **images_kwargs))
        return BatchFeature(data, tensor_type=return_tensors)

    def tokenize(self, texts: list[str], num_images: list[int], **kwargs) -> dict[str, list[list[int]]]:
        """Tokenize prompts with their placeholders expanded; a `ValueError` if truncation would cut a picture."""
        expanded = [
            expand_images(text, number, self.num_query_tokens) for text, number in zip(texts, num_images, strict=True)
        ]
        saved = {name: self.tokenizer.init_kwargs.get(name) for name in TextKwargs.__annotations__}
        saved = {name: value for name, value in saved.items() if value is not None}
        options = {**saved, "split_special_tokens": True, "return_attention_mask": True, **kwargs}
        encoded = self.tokenizer(expanded, **options)
        for row, (text, ids) in enumerate(zip(expanded, encoded["input_ids"], strict=True)):
            needed, found = text.count(IMAGE_MARK), list(ids).count(self.image_token_id)
            if found != needed:
                raise ValueError(
                    f"Truncation cut the pictures of text {row}: {found} of {needed} image tokens are left. Raise "
                    "max_length or shorten the text."
                )
        return dict(encoded)

    def post_process_image_text_to_text(
        self, generated_outputs, skip_special_tokens: bool = True, **kwargs
    ) -> list[str]:
        """Decode generated ids [B, S], or one row [S], and finish the answers as the original did.

        Ids that begin with the prompt give its text and, right behind it, the answer as it is without the prompt.
        """
        rows = to_py_obj(generated_outputs)
        if rows and isinstance(rows[0], int):
            rows = [rows]
        parts = [split_answer(row, self.tokenizer.bos_token_id) for row in rows]
        options = {"skip_special_tokens": skip_special_tokens, **kwargs}
        return ["".join(clean_response(self.tokenizer.decode(part, **options)) for part in row) for row in parts]

    @property
    def model_input_names(self) -> list[str]:
        """What the model takes of what this returns."""
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]


__all__ = ["VisualGLMProcessor"]
