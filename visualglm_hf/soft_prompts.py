# SPDX-License-Identifier: Apache-2.0
"""The pictures of a call: what must be refused of them, their soft prompts, and a prompt with these in their places.

Not here: how a picture is encoded (`modeling_image_encoder.py`) and remembered (`feature_cache.py`), and where in a
prompt the places are (`glm_prompts.py`).

Shapes: B batch, S length, C hidden size.
"""

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling


class SoftPromptMixin:
    """From `pixel_values` or `image_embeds` to `inputs_embeds`, for a model that has `get_image_features`."""

    def interpolates(self, interpolate_pos_encoding: bool | None) -> bool:
        """Whether pictures may have another size than the positions: as a call says, else as the config does."""
        if interpolate_pos_encoding is None:
            return self.config.vision_config.preferred_image_size is not None
        return bool(interpolate_pos_encoding)

    def check_pixel_values(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool | None = None) -> None:
        """Raise a `ValueError` unless `pixel_values` are [images, 3, image_size, image_size].

        With `interpolate_pos_encoding` their height and width are any that `check_image_size` of the config takes.
        """
        vision = self.config.vision_config
        expected = (vision.num_channels, vision.image_size, vision.image_size)
        shape = tuple(pixel_values.shape)
        is_larger = len(shape) == 4 and shape[1] == vision.num_channels and shape[1:] != expected
        if is_larger and self.interpolates(interpolate_pos_encoding):
            vision.check_image_size(*shape[2:])
        elif len(shape) != 4 or shape[1:] != expected:
            remedy = "Pass pixel_values[None]." if shape == expected else "The image processor makes them."
            if is_larger:
                remedy += " Or say interpolate_pos_encoding=True, with which the model sees other sizes, too."
            raise ValueError(f"pixel_values must be [images, {str(expected)[1:-1]}], found {list(shape)}. {remedy}")

    def check_image_embeds(self, image_embeds: torch.Tensor) -> None:
        """Raise a `ValueError` unless `image_embeds` are [images, num_query_tokens, C]."""
        expected = (self.config.qformer_config.num_query_tokens, self.config.text_config.hidden_size)
        shape = tuple(image_embeds.shape)
        if len(shape) != 3 or shape[1:] != expected:
            remedy = "Pass image_embeds[None]." if shape == expected else "They are get_image_features' pooler_output."
            raise ValueError(f"image_embeds must be [images, {str(expected)[1:-1]}], found {list(shape)}. {remedy}")

    def count_images(
        self,
        pixel_values: torch.Tensor | None,
        image_embeds: torch.Tensor | None,
        interpolate_pos_encoding: bool | None = None,
    ) -> int | None:
        """How many pictures there are, [images, ...] both; None if there are none.

        Raises:
            ValueError: they were given twice, or have another shape than `encode_images` takes.
        """
        if pixel_values is not None and image_embeds is not None:
            raise ValueError("Give pixel_values or image_embeds, not both: they are the same pictures.")
        if pixel_values is not None:
            self.check_pixel_values(pixel_values, interpolate_pos_encoding)
        elif image_embeds is not None:
            self.check_image_embeds(image_embeds)
        pictures = pixel_values if image_embeds is None else image_embeds
        return None if pictures is None else len(pictures) or None

    def encode_pictures(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool | None = None) -> torch.Tensor:
        """The soft prompts of pictures, of which the last few are remembered in evaluation without gradients.

        `image_cache.clear()` forgets them, `image_cache.capacity` is how many they are (0: none). They are forgotten by
        themselves when the weights or the adapters of the image encoder change. `get_image_features` always encodes.

        Args:
            pixel_values: [images, 3, image_size, image_size]
            interpolate_pos_encoding: see `check_pixel_values`; None as the config says.

        Returns:
            [images, num_query_tokens, C]

        Raises:
            ValueError: another shape.
        """
        self.check_pixel_values(pixel_values, interpolate_pos_encoding)
        options = {"interpolate_pos_encoding": interpolate_pos_encoding}
        return self.image_cache.encode(
            self.image_encoder,
            pixel_values,
            lambda pixels: self.get_image_features(pixels, return_dict=True, **options).pooler_output,
        )

    def embed(
        self,
        input_ids: torch.Tensor | None,
        image_embeds: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embed a prompt with the soft prompts of its pictures in the places of its image tokens.

        Args:
            input_ids: [B, S] with `num_query_tokens` times `config.image_token_id` for each picture.
            image_embeds: [images, num_query_tokens, C], in the order of their places, row by row; None for no picture.
            inputs_embeds: [B, S, C], the prompt with its image tokens embedded like all others, instead of `input_ids`.

        Returns:
            [B, S, C]

        Raises:
            ValueError: the pictures do not fill the places.
        """
        is_image = None if image_embeds is None else self.find_places(input_ids, inputs_embeds)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if image_embeds is None:
            return inputs_embeds
        self.check_places(is_image, len(image_embeds))
        is_image = is_image[..., None].to(inputs_embeds.device)
        return inputs_embeds.masked_scatter(is_image, image_embeds.to(inputs_embeds.device, inputs_embeds.dtype))

    def encode_images(
        self,
        pixel_values: torch.Tensor | None,
        image_embeds: torch.Tensor | None,
        interpolate_pos_encoding: bool | None = None,
        **recorded: bool,
    ) -> BaseModelOutputWithPooling:
        """The soft prompts of a prompt's pictures, `pooler_output`, however they were given.

        Args:
            pixel_values: [images, 3, image_size, image_size]
            image_embeds: [images, num_query_tokens, C], instead of `pixel_values`.
            interpolate_pos_encoding: see `check_pixel_values`; None as the config says.
            recorded: what else of `get_image_features` is wanted, such as `output_hidden_states`; pictures are then not
                remembered.
        """
        if pixel_values is None:
            return BaseModelOutputWithPooling(pooler_output=image_embeds)
        if recorded:
            recorded["interpolate_pos_encoding"] = interpolate_pos_encoding
            return self.get_image_features(pixel_values, return_dict=True, **recorded)
        return BaseModelOutputWithPooling(pooler_output=self.encode_pictures(pixel_values, interpolate_pos_encoding))
