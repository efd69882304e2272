"""The model card of a folder that is written here, its `README.md`: what it is, of what, how and by which version it
was made, and under which licence the weights are.

What is known of the weights comes from the card beside those that they were made of, whose text is kept below. Where
that is silent, a model with the numbers of VisualGLM-6B is taken for it or a descendant; of others nothing is said that
is not known.

Not here: what an adapter learned (`training`), and which files there are (`manifest.py`).
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData

from visualglm_hf.configuration_visualglm import VisualGLMConfig
from visualglm_tools.checkpoints.files import Entry
from visualglm_tools.printing import one_line
from visualglm_tools.versions import versions


CARD_FILE = "README.md"
LONGEST_CARD = 1024**2  # bytes of one whose text is kept
ORIGINAL = "THUDM/visualglm-6b"
LICENCE_OF_ORIGINAL = {
    "license": "other",  # its model licence, which is no licence of software, and not that of the code
    "license_name": "visualglm-6b-model-license",
    "license_link": "https://github.com/THUDM/VisualGLM-6B/blob/main/MODEL_LICENSE.txt",
}
KEPT = ("base_model", "license", "license_name", "license_link")  # of the card of what a folder is made of
COMMON = {"language": ["zh", "en"], "pipeline_tag": "image-text-to-text", "tags": ["visualglm"]}
TRANSFORMERS, PEFT, SAT = "transformers", "peft", "SwissArmyTransformer"

LOADING = {
    TRANSFORMERS: """```python
from transformers import AutoModel, AutoTokenizer

FOLDER = "path/to/this/folder"  # or its name on a hub, and then with revision="…", the commit that you have looked at
tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
answer, history = model.chat(tokenizer, "picture.png", "描述这张图片。", history=[])
```""",
    PEFT: "`visualglm chat --model BASE --adapter FOLDER`, or PEFT's `PeftModel.from_pretrained(base, FOLDER)`.",
    SAT: "With SwissArmyTransformer, as a checkpoint of VisualGLM.",
}


def write_card(folder: Path, data: dict, body: str) -> None:
    """Write a folder's model card.

    Args:
        folder: which has none yet.
        data: what stands before the text for programs, as the fields of `huggingface_hub.ModelCardData`.
        body: the text, in Markdown.
    """
    card = ModelCard(f"---\n{ModelCardData(**data).to_yaml()}\n---\n\n{body.strip()}\n")
    (folder / CARD_FILE).write_text(str(card), encoding="utf-8")


# ---------------------------------------------------------------- what a folder is made of


@dataclass(frozen=True)
class Origin:
    """What is known of the weights in a folder.

    Args:
        name: of the folder.
        data: fields of a card: `base_model`, and the licence.
        text: of the card in it; "" without one.
    """

    name: str
    data: dict[str, str] = field(default_factory=dict)
    text: str = ""


def read_origin(folder: Path, config: VisualGLMConfig) -> Origin:
    """What a folder's card says of its weights, and where it is silent, what their numbers do."""
    data, text = read_card(folder / CARD_FILE)
    kept = {key: only(data.get(key)) for key in KEPT}
    kept = {key: value for key, value in kept.items() if isinstance(value, str)}
    if has_numbers_of_original(config):
        kept = {"base_model": ORIGINAL, **({} if "license" in kept else LICENCE_OF_ORIGINAL), **kept}
    return Origin(one_line(folder.resolve().name).replace("|", r"\|"), kept, text)


def only(value: object) -> object:
    """What is in a list of one, as hubs have many a field; else the value."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def read_card(file: Path) -> tuple[dict, str]:
    """The fields and the text of a card; of what is not written as one, the text alone."""
    if not file.is_file():
        return {}, ""
    if file.stat().st_size > LONGEST_CARD:
        return {}, f"It has {file.stat().st_size:,} bytes, too many to be repeated here."
    content = file.read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n").strip()
    if not content.startswith("---"):
        return {}, content
    try:
        card = ModelCard(content, ignore_metadata_errors=True)
    except (ValueError, TypeError, yaml.YAMLError):
        return {}, content
    return card.data.to_dict(), card.text.strip()


def has_numbers_of_original(config: VisualGLMConfig) -> bool:
    """Whether a model is as large as VisualGLM-6B in every part, with its vocabulary."""
    original = VisualGLMConfig()
    sizes = [
        [(getattr(each, part).hidden_size, getattr(each, part).num_hidden_layers) for part in each.sub_configs]
        for each in (config, original)
    ]
    return sizes[0] == sizes[1] and config.text_config.vocab_size == original.text_config.vocab_size


def describe_weights(config: VisualGLMConfig, entries: Iterable[Entry]) -> str:
    """The number formats of weights, in a sentence without a full stop."""
    sizes = Counter()
    for entry in entries:
        sizes[entry.dtype] += entry.num_bytes
    names = [str(dtype).removeprefix("torch.") for dtype, _ in sizes.most_common() if dtype != torch.int8]
    if not (bits := config.quantization_bit):
        return ", ".join(names)
    group = config.quantization_group_size
    scales = f"a scale for {group} columns" if group else "a scale for each row"
    more = "; 8 bits: those of the image encoder" if config.quantization_image_encoder else ""
    more += "; 8 bits: the output layer" if config.quantization_lm_head else ""
    return f"{bits} bits: the linear layers of the decoder, {scales}{more}; {', '.join(names)}: all others"


# ---------------------------------------------------------------- what is said of it


@dataclass(frozen=True)
class Card:
    """What a card says.

    Args:
        title: the folder's name.
        summary: what is in it, in a sentence.
        origin: what it is made of.
        weights: their number formats; "" to say nothing of them.
        command: how it was made.
        bits: of the weights, if they are low.
        library: that loads it.
        relation: to its base model, as hubs call it: "quantized", "finetune", "adapter"; None for the same weights.
        tags: beside those that all have.
    """

    title: str
    summary: str
    origin: Origin
    command: str
    weights: str = ""
    bits: int | None = None
    library: str = TRANSFORMERS
    relation: str | None = None
    tags: tuple[str, ...] = ()

    def data(self) -> dict:
        """The fields for programs."""
        bits = [f"{self.bits}-bit"] if self.bits else []
        known = {**COMMON, **self.origin.data, "library_name": self.library}
        known["tags"] = [*COMMON["tags"], *bits, *self.tags]
        if self.relation and "base_model" in known:
            known["base_model_relation"] = self.relation
        return known

    def body(self) -> str:
        """The text for people."""
        made_by = ", ".join(f"{package} {version}" for package, version in versions().items())
        rows = {"made of": f"`{self.origin.name}`", "base model": self.origin.data.get("base_model", "not known")}
        rows |= {"weights": self.weights} if self.weights else {}
        rows |= {"languages": "Chinese, English", "made by": made_by}
        table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
        return "\n\n".join(
            [
                f"# {one_line(self.title)}",
                one_line(self.summary),
                f"| | |\n|---|---|\n{table}",
                f"```\n{self.command}\n```",
                f"## How to load it\n\n{LOADING[self.library]}",
                "## Whether it is what was written\n\n`visualglm check --verify FOLDER` compares every file with "
                "`manifest.json`, and the code with that of the release that is installed.",
                f"## Licence of the weights\n\n{describe_licence(self.origin)}",
                *([f"## What the card of {self.origin.name} said\n\n{self.origin.text}"] * bool(self.origin.text)),
            ]
        )

    def write(self, folder: Path) -> None:
        write_card(folder, self.data(), self.body())


def describe_licence(origin: Origin) -> str:
    """Under which licence the weights are, as far as that is known."""
    code = "The code beside them is under Apache-2.0, which says nothing about the weights."
    name, link = origin.data.get("license"), origin.data.get("license_link")
    if name is None:
        return f"That of the weights in `{origin.name}`, which have no card that names it. {code}"
    name = origin.data.get("license_name", name)
    is_address = link is not None and link.startswith("https://") and not set(link) & set(" ()[]<>")
    shown = f"[{name}]({link})" if is_address else name
    return f"That of the weights that they were made of: {shown}. Read it before you pass them on. {code}"
