"""The easy questions that the tiny model's image encoder is asked while it learns, through heads that are thrown away.

Not here: how much their loss counts (`train.py`), and the examination of the whole model (`exam.py`).
"""

import torch
import torch.nn.functional as F
from torch import nn

from tools.tiny import world
from tools.tiny.data import BACKGROUNDS, COLOURS, POSITIONS, SHAPES
from tools.tiny.lessons import NONE, PAIRS
from tools.tiny.model import PATCHES_PER_SIDE
from visualglm_hf import VisualGLMConfig


CENTRE_WEIGHT = 20.0  # centres are rare
PAIR_WEIGHT = 8.0  # and so is each pair of colour and shape
BACKDROP_WEIGHT = 10.0  # squares of differences of colours are small
SLOTS = len(SHAPES) + len(COLOURS)  # soft prompts that have one thing to tell of


class Examiner(nn.Module):
    """Linear heads that ask the image encoder simple questions while it learns; not part of the model.

    Each patch is asked whether an object's centre is in it and, inside an object, for shape, colour and position;
    the mean of the soft prompt is asked for shape, colour, count, background and position.
    """

    names = ("shape", "colour", "count", "background", "position")

    def __init__(self, config: VisualGLMConfig):
        super().__init__()
        width, prompt_width = config.vision_config.hidden_size, config.text_config.hidden_size
        self.centre = nn.Linear(width, 1)
        self.patches = nn.ModuleList(nn.Linear(width, len(names)) for names in (SHAPES, COLOURS, POSITIONS))
        sizes = (len(SHAPES), len(COLOURS), world.MAX_COUNT, len(BACKGROUNDS), len(POSITIONS))
        self.pictures = nn.ModuleList(nn.Linear(prompt_width, size) for size in sizes)

    def forward(
        self, vision_states: torch.Tensor, soft_prompt: torch.Tensor, batch: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the summed loss, and the share of right answers about whole pictures [5].

        Args:
            vision_states: [B, 257, C] of the ViT.
            soft_prompt: [B, 32, C] for the decoder.
            batch: `patch_labels` [B, 256], 0 outside, 1 inside an object, 2 at its centre; `picture_labels` [B, 5],
                indices of shape, colour, count, background and position.
        """
        patch_labels, labels = batch["patch_labels"], batch["picture_labels"]
        patches, inside = vision_states[:, 1:], patch_labels > 0
        is_centre = (patch_labels == 2).float()
        weight = torch.tensor(CENTRE_WEIGHT)
        loss = F.binary_cross_entropy_with_logits(self.centre(patches)[..., 0], is_centre, pos_weight=weight)
        for index, head in zip((0, 1, 4), self.patches, strict=True):
            target = labels[:, index, None].expand_as(inside)[inside]
            loss = loss + F.cross_entropy(head(patches[inside]), target)
        answers = [head(soft_prompt.mean(1)) for head in self.pictures]
        loss = loss + sum(F.cross_entropy(answer, labels[:, index]) for index, answer in enumerate(answers))
        right = torch.stack([answer.argmax(-1) for answer in answers], dim=1) == labels
        return loss, right.float().mean(0)


class SecondExaminer(nn.Module):
    """The same for pictures of several kinds of objects: each patch is asked for the object that it is in.

    The mean of the soft prompt is asked which pairs of colour and shape there are, how many objects, for the
    background, and whether there is a sign.
    """

    names = ("pairs", "count", "background", "sign")

    def __init__(self, config: VisualGLMConfig):
        super().__init__()
        width, prompt_width = config.vision_config.hidden_size, config.text_config.hidden_size
        self.centre = nn.Linear(width, 1)
        self.patches = nn.ModuleList(nn.Linear(width, len(names)) for names in (SHAPES, COLOURS))
        self.pairs = nn.Linear(prompt_width, len(PAIRS))
        sizes = (world.MAX_COUNT + 1, len(BACKGROUNDS), 2)
        self.pictures = nn.ModuleList(nn.Linear(prompt_width, size) for size in sizes)
        self.patch_pairs = nn.Linear(width, len(PAIRS))

    def forward(
        self, vision_states: torch.Tensor, soft_prompt: torch.Tensor, batch: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the summed loss, and the share of right answers about whole pictures [4].

        Args:
            vision_states: [B, 257, C] of the ViT.
            soft_prompt: [B, 32, C] for the decoder.
            batch: `patch_labels` [B, 3, 256] of `lessons.patch_labels`; `pairs` [B, 40], 1 for those that are there;
                `picture_labels` [B, 3], count and indices of background and sign; later in the training
                `patch_pairs` [B, 256], which pair a patch is in: shape and colour together, as one thing.
        """
        patches, labels = vision_states[:, 1:], batch["picture_labels"]
        where, *kinds = batch["patch_labels"].unbind(1)
        weight = torch.tensor(CENTRE_WEIGHT)
        loss = F.binary_cross_entropy_with_logits(self.centre(patches)[..., 0], (where == 2).float(), pos_weight=weight)
        for target, head in zip(kinds, self.patches, strict=True):
            loss = loss + known_loss(head(patches), target)
        if "patch_pairs" in batch:
            loss = loss + known_loss(self.patch_pairs(patches), batch["patch_pairs"])
        prompt = soft_prompt.mean(1)
        pairs, weight = self.pairs(prompt), torch.tensor(PAIR_WEIGHT)
        loss = loss + 4 * F.binary_cross_entropy_with_logits(pairs, batch["pairs"], pos_weight=weight)
        answers = [head(prompt) for head in self.pictures]
        loss = loss + sum(F.cross_entropy(answer, labels[:, index]) for index, answer in enumerate(answers))
        right = [((pairs > 0) == (batch["pairs"] > 0)).all(1)]
        right += [answer.argmax(-1) == labels[:, index] for index, answer in enumerate(answers)]
        return loss, torch.stack(right, dim=1).float().mean(0)


class ThirdExaminer(SecondExaminer):
    """Asks for places as well: each patch in an object, and the mean of the soft prompt for each shape."""

    names = (*SecondExaminer.names, "sides")

    def __init__(self, config: VisualGLMConfig):
        super().__init__(config)
        places = len(world.POSITIONS) + 1  # or absent
        self.patch_sides = nn.Linear(config.vision_config.hidden_size, places)
        self.sides = nn.Linear(config.text_config.hidden_size, len(SHAPES) * places)

    def forward(
        self, vision_states: torch.Tensor, soft_prompt: torch.Tensor, batch: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As that of `SecondExaminer`, with a share for places; `sides` [B, 5] of the batch are those of the shapes."""
        loss, right = super().forward(vision_states, soft_prompt, batch)
        sides, shapes = batch["sides"], batch["patch_labels"][:, 1]
        wanted = torch.where(shapes == NONE, NONE, sides.gather(1, shapes.clamp(min=0)))
        loss = loss + known_loss(self.patch_sides(vision_states[:, 1:]), wanted)
        answers = self.sides(soft_prompt.mean(1)).unflatten(1, (len(SHAPES), -1))
        loss = loss + 2 * known_loss(answers, sides)
        return loss, torch.cat((right, known_share(answers, sides)[None]))


class FourthExaminer(ThirdExaminer):
    """Asks single soft prompts, too: one for each shape, one for each colour, so that a word finds what it is about.

    The first five say of a shape which colour it has and where it is, the next eight of a colour which shape has it.
    The mean of all is asked for the background's colour.
    """

    names = (*ThirdExaminer.names, "colour of", "shape of")

    def __init__(self, config: VisualGLMConfig):
        super().__init__(config)
        width = config.text_config.hidden_size
        self.colour_of, self.side_of = nn.Linear(width, len(COLOURS) + 1), nn.Linear(width, len(world.POSITIONS) + 1)
        self.shape_of = nn.Linear(width, len(SHAPES) + 1)
        self.backdrop = nn.Linear(width, 3)

    def forward(
        self, vision_states: torch.Tensor, soft_prompt: torch.Tensor, batch: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As that of `ThirdExaminer`, with a share for colours of shapes and for shapes of colours."""
        loss, right = super().forward(vision_states, soft_prompt, batch)
        pairs = batch["pairs"].unflatten(1, (len(COLOURS), len(SHAPES)))
        of_shapes, of_colours = soft_prompt[:, : len(SHAPES)], soft_prompt[:, len(SHAPES) : SLOTS]
        asked = (
            (self.colour_of(of_shapes), only_one(pairs.transpose(1, 2))),
            (self.shape_of(of_colours), only_one(pairs)),
            (self.side_of(of_shapes), batch["sides"]),
        )
        for answers, wanted in asked:
            loss = loss + 2 * known_loss(answers, wanted)
        backdrop = mean_outside(batch["pixels"], batch["patch_labels"][:, 0])
        loss = loss + BACKDROP_WEIGHT * F.mse_loss(self.backdrop(soft_prompt.mean(1)), backdrop)
        shares = [known_share(*each) for each in asked[:2]]
        return loss, torch.cat((right, torch.stack(shares)))


def mean_outside(pixels: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Return [B, 3], the mean red, green and blue, 0 to 1, of the patches without a subject.

    Args:
        pixels: [B, 224, 224, 3] of 0 to 255.
        where: [B, 256], 0 for such patches.
    """
    side = pixels.shape[1] // PATCHES_PER_SIDE
    patches = pixels.unflatten(1, (-1, side)).unflatten(3, (-1, side)).float().mean((2, 4)).flatten(1, 2) / 255
    outside = (where == 0).float()
    return (patches * outside[..., None]).sum(1) / outside.sum(1, keepdim=True)


def only_one(table: torch.Tensor) -> torch.Tensor:
    """For each row of [..., N], 1 for what is there: its number, or N for nothing, or `NONE` where several are."""
    count = table.sum(-1)
    numbers = torch.where(count == 0, table.shape[-1], table.argmax(-1))
    return torch.where(count > 1, NONE, numbers)


def known_loss(answers: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy of answers [..., N] where something is wanted [...], and 0 where that is nowhere."""
    if (wanted == NONE).all():
        return answers.new_zeros(())
    return F.cross_entropy(answers.flatten(0, -2), wanted.flatten(), ignore_index=NONE)


def known_share(answers: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The share of pictures of which all answers [B, M, N] are right where something is wanted [B, M]."""
    return ((answers.argmax(-1) == wanted) | (wanted == NONE)).all(1).float().mean()
