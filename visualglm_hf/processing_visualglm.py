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

from collections.abc import Sequence

from transformers import BatchFeature, ProcessorMixin
from transformers.utils import auto_docstring

from .conversation import CHAT_TEMPLATE, IMAGE_MARK, clean_response, expand_images


def group_images(images, texts: list[str]) -> tuple[list, list[int]]:
    """Flatten `images` and count them per text.

    Args:
        images: None, one picture, a flat list of pictures for all texts in the order of their places, or one list of
            pictures per text.

    Raises:
        ValueError: lists that are not one per text.
    """
    if images is None:
        return [], [0] * len(texts)
    if not isinstance(images, (list, tuple)):
        images = [images]
    if any(isinstance(row, (list, tuple)) for row in images):
        if len(images) != len(texts):
            raise ValueError(f"images has {len(images)} lists of pictures for {len(texts)} text(s); give one per text.")
        rows = [list(row) if isinstance(row, (list, tuple)) else [row] for row in images]
        return [image for row in rows for image in row], [len(row) for row in rows]
    if len(texts) == 1:
        return list(images), [len(images)]
    wanted = [text.count(IMAGE_MARK) for text in texts]
    if sum(wanted) != len(images):
        raise ValueError(f"The texts have {wanted} image placeholders for {len(images)} image(s) in all.")
    return list(images), wanted


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

    @auto_docstring(
        custom_intro="""
        Prepare a batch: `input_ids` and `attention_mask` [B, S] with each placeholder expanded, and `pixel_values`
        [images, 3, 224, 224] if there are pictures. Text is text: `<sop>` typed by a user is no special token. Raises a
        `ValueError` for neither text nor pictures, for placeholders that do not match them, and for bad pictures.
        """
    )
    def __call__(
        self, images=None, text: str | Sequence[str] | None = None, videos=None, audio=None, **kwargs
    ) -> BatchFeature:
        if videos is not None or audio is not None:
            raise ValueError("VisualGLM understands pictures and text, no video or audio.")
        if text is None and images is None:
            raise ValueError("Give text, images or both.")
        return_tensors = kwargs.pop("return_tensors", None)
        images_kwargs, text_kwargs = kwargs.pop("images_kwargs", {}), kwargs.pop("text_kwargs", {})
        data = {}
        if text is not None:
            is_single = isinstance(text, str)
            texts = [text] if is_single else list(text)
            flat_images, counts = group_images(images, texts)
            expanded = [expand_images(one, n, self.num_query_tokens) for one, n in zip(texts, counts, strict=True)]
            options = {"split_special_tokens": True, "return_attention_mask": True, **kwargs, **text_kwargs}
            is_truncated = options.get("truncation") not in (None, False, "do_not_truncate")
            encoded = self.tokenizer(expanded, **options)
            if is_truncated and flat_images:
                self.check_no_image_was_cut(encoded["input_ids"], counts)
            data.update(encoded)
            if is_single and return_tensors is None and not options.get("return_tensors"):
                data = {name: rows[0] for name, rows in data.items()}
        else:
            flat_images = images
        if images is not None and len(flat_images if isinstance(flat_images, list) else [flat_images]):
            data.update(self.image_processor(flat_images, return_tensors=return_tensors, **images_kwargs))
        return BatchFeature(data, tensor_type=return_tensors)

    def check_no_image_was_cut(self, input_ids: list[list[int]], counts: list[int]) -> None:
        for row, (ids, count) in enumerate(zip(input_ids, counts, strict=True)):
            found = list(ids).count(self.image_token_id)
            if found != count * self.num_query_tokens:
                raise ValueError(
                    f"Truncation cut the pictures of text {row}: {found} of {count * self.num_query_tokens} image "
                    "tokens are left. Raise max_length or shorten the text."
                )

    def post_process_image_text_to_text(
        self, generated_outputs, skip_special_tokens: bool = True, **kwargs
    ) -> list[str]:
        """Decode generated ids [B, S] and finish the answers as the original did."""
        texts = self.tokenizer.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)
        return [clean_response(text) for text in texts]

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]


__all__ = ["VisualGLMProcessor"]
