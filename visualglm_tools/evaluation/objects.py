"""Objects that a caption names, and which of them are not in the picture: CHAIR (Rohrbach et al., arXiv 1809.02156).

The synonyms are read as CHAIR's authors publish them, a line for each object with its own name first:

    person, girl, boy, man, woman
    cat, kitten, 猫, 小猫

Longer names go before shorter ones, so that a hot dog is no dog; English words are found in singular and plural. What
is in a picture is said by the row's "objects", or by COCO's `instances_*.json` in place of rows. Not here: what many
captions say (`results.py`).
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from visualglm_tools.evaluation.scoring import WORD_PART, normalise


QUESTION = "Please describe this image in detail."  # with which LLaVA and its successors are measured
IRREGULAR = {
    "people": "person",
    "men": "man",
    "women": "woman",
    "children": "child",
    "mice": "mouse",
    "geese": "goose",
    "feet": "foot",
    "teeth": "tooth",
    "oxen": "ox",
    "buses": "bus",
    "glasses": "glasses",
    "skis": "skis",
}
# Of a plural's end: what stands there in the singular, tried one after the other.
ENDINGS = (("ies", "y"), ("ves", "f"), ("ves", "fe"), ("es", ""), ("s", ""))


@dataclass(frozen=True)
class Mentions:
    """What a caption says of a picture.

    Args:
        named: each object as often as it is named.
        invented: those of them that are not in the picture.
        present: the picture's objects, each once.
    """

    named: tuple[str, ...]
    invented: tuple[str, ...]
    present: tuple[str, ...]

    @property
    def found(self) -> int:
        """How many of the picture's objects are named."""
        return len(set(self.named) & set(self.present))


class Vocabulary:
    """Names to objects.

    Args:
        names: of each object, under the one that it goes by.
    """

    def __init__(self, names: dict[str, Sequence[str]]):
        self.object_of = {normalise(name): key for key, synonyms in names.items() for name in (key, *synonyms)}
        self.object_of.pop("", None)
        longest = sorted(self.object_of, key=len, reverse=True)
        alternatives = "|".join(map(pattern_of, longest))
        self.pattern = re.compile(alternatives) if alternatives else None

    def named_in(self, text: str) -> tuple[str, ...]:
        """The objects that a text names, in its order, each as often as it does."""
        words = normalise(text)
        matches = self.pattern.finditer(words) if self.pattern else ()
        return tuple(self.object_called(match.group()) for match in matches)

    def object_called(self, name: str) -> str | None:
        """The object of a name in singular or plural; None if there is none."""
        return next((self.object_of[each] for each in singulars(normalise(name)) if each in self.object_of), None)

    def judge(self, caption: str, present: Iterable[str]) -> Mentions:
        """What a caption says, next to the objects that are in the picture, by any of their names."""
        known = tuple(dict.fromkeys(filter(None, map(self.object_called, present))))
        named = self.named_in(caption)
        return Mentions(named, tuple(each for each in named if each not in known), known)


def pattern_of(name: str) -> str:
    """A regular expression for a name, as a whole word; the last word in singular or plural."""
    if not re.search(WORD_PART, name[-1]):
        return re.escape(name)
    head, last = name[: -len(name.split()[-1])], name.split()[-1]
    forms = sorted(plurals(last) | {last}, key=len, reverse=True)
    before = f"(?<!{WORD_PART})" if re.match(WORD_PART, name) else ""
    return f"{before}{re.escape(head)}(?:{'|'.join(map(re.escape, forms))})(?!{WORD_PART})"


def plurals(word: str) -> set[str]:
    """What may be a word's plural; some are no words."""
    found = {word + end for end in ("s", "es")} | {many for many, one in IRREGULAR.items() if one == word}
    found |= {word[: -len(one)] + many for many, one in ENDINGS[:3] if word.endswith(one)}
    return found


def singulars(name: str) -> list[str]:
    """A name, and what it may be the plural of."""
    head, last = name[: -len(name.split()[-1])] if name else "", name.split()[-1] if name else ""
    ones = [IRREGULAR[last]] if last in IRREGULAR else []
    ones += [last[: -len(many)] + one for many, one in ENDINGS if last.endswith(many)]
    return [name, *(head + one for one in ones)]


def read_vocabulary(path: Path) -> Vocabulary:
    """The synonyms of a file; a `ValueError` if it cannot be read, or has none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the synonyms in {str(path)!r}: {error}.") from error
    names = [[name.strip() for name in re.split("[,，、]", line) if name.strip()] for line in lines]
    vocabulary = Vocabulary({first: rest for first, *rest in filter(None, names)})
    if vocabulary.pattern is None:
        raise ValueError(f"{str(path)!r} names no objects. Write a line for each: its name, and its synonyms.")
    return vocabulary


def rows_of_coco(path: Path) -> list[dict] | None:
    """Rows for the pictures of COCO's `instances_*.json`; None if the file has another layout.

    Raises:
        ValueError: it has this layout, and something is missing in it.
    """
    if path.suffix.lower() != ".json":
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # whoever reads rows will say so
        return None
    if not isinstance(content, dict) or not {"images", "annotations", "categories"} <= content.keys():
        return None
    try:
        names = {each["id"]: each["name"] for each in content["categories"]}
        objects: dict[int, dict[str, None]] = {each["id"]: {} for each in content["images"]}
        for each in content["annotations"]:
            objects[each["image_id"]][names[each["category_id"]]] = None
        return [
            {"id": each["id"], "text": QUESTION, "image": each["file_name"], "objects": list(objects[each["id"]])}
            for each in content["images"]
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} is not as COCO's instances are: {error} is missing in it.") from error
