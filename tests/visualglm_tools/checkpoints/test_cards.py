"""Model cards: what is written says what it is, of what, how and by which version, and whose licence it is under."""

from importlib.metadata import version
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.commands import convert, merge, quantize
from tests.paths import TINY
from visualglm_hf import VisualGLMConfig
from visualglm_tools.checkpoints.cards import Card, read_origin, write_card


def card_in(folder: Path) -> tuple[dict, str]:
    """What a hub reads of a card, and its text."""
    card = ModelCard.load(folder / "README.md")
    return card.data.to_dict(), card.text


@pytest.fixture(scope="module")
def made(tiny_original, golden_dir, tmp_path_factory) -> dict[str, Path]:
    """What the commands write, one of it made of the other."""
    place = tmp_path_factory.mktemp("made")
    lora, vocabulary = golden_dir / "sat_lora", ("--tokenizer", tiny_original)
    assert convert(lora, place / "converted", *vocabulary) == 0
    assert merge(place / "converted", place / "converted" / "adapter", place / "merged") == 0
    assert quantize(place / "merged", place / "quantized", "--bits", 4, "--group-size", 32) == 0
    assert convert(tiny_original, place / "for sat", "--to", "sat") == 0
    return {path.name: path for path in place.iterdir()}


def test_every_card_says_what_the_folder_is_and_what_loads_it(made):
    folders = {**made, "adapter": made["converted"] / "adapter"}
    fields = {name: card_in(folder)[0] for name, folder in folders.items()}
    libraries = {name: data["library_name"] for name, data in fields.items()}
    transformers = dict.fromkeys(("converted", "merged", "quantized"), "transformers")
    assert libraries == {**transformers, "for sat": "SwissArmyTransformer", "adapter": "peft"}
    for data in fields.values():
        assert data["pipeline_tag"] == "image-text-to-text"
        assert data["language"] == ["zh", "en"]
        assert "visualglm" in data["tags"]
    assert "4-bit" in fields["quantized"]["tags"] and "4-bit" not in fields["merged"]["tags"]
    assert "lora" in fields["adapter"]["tags"]


def test_a_card_says_how_the_folder_was_made_and_by_which_versions(made):
    commands = {
        "converted": "visualglm convert sat_lora converted --tokenizer tiny-original",
        "merged": "visualglm merge converted adapter merged",
        "quantized": "visualglm quantize merged quantized --bits 4 --group-size 32",
        "for sat": "visualglm convert tiny-original 'for sat' --to sat",
    }
    for name, command in commands.items():
        text = (made[name] / "README.md").read_text(encoding="utf-8")
        assert f"```\n{command}\n```" in text
        versions = (f"{package} {version(package)}" for package in ("visualglm-hf", "transformers", "torch"))
        assert ", ".join(versions) in text


def test_a_card_says_in_which_numbers_the_weights_are(made):
    assert "| weights | float16 |" in card_in(made["converted"])[1]
    expected = "4 bits: the linear layers of the decoder, a scale for 32 columns; float16: all others"
    assert f"| weights | {expected} |" in card_in(made["quantized"])[1]
    assert "adapter `adapter` (LORA) merged into its weights" in card_in(made["merged"])[1]


def test_a_card_tells_no_path_of_this_machine(made):
    for folder in made.values():
        for card in folder.rglob("README.md"):
            assert str(folder.parent) not in card.read_text(encoding="utf-8")


# ---------------------------------------------------------------- whose weights


def test_weights_with_the_numbers_of_the_original_have_its_model_licence(tmp_path):
    data = read_origin(tmp_path, VisualGLMConfig()).data
    assert data["base_model"] == "THUDM/visualglm-6b"
    assert data["license"] == "other" and data["license_link"].endswith("MODEL_LICENSE.txt")
    card = Card(
        "x", "A VisualGLM.", read_origin(tmp_path, VisualGLMConfig()), "visualglm convert", relation="quantized"
    )
    assert card.data()["base_model_relation"] == "quantized"
    assert "[visualglm-6b-model-license](https://" in card.body()


def test_of_other_weights_without_a_card_no_licence_is_made_up(made):
    data, text = card_in(made["quantized"])
    assert not {"license", "license_name", "license_link", "base_model", "base_model_relation"} & data.keys()
    assert "have no card that names it" in text


def test_the_licence_in_the_sources_card_stays_that_of_its_weights(tmp_path):
    assert convert(TINY, tmp_path / "converted") == 0
    data, text = card_in(tmp_path / "converted")
    assert data["license"] == "apache-2.0"
    assert "# visualglm-tiny" in text.partition("## What the card of visualglm-tiny said")[2]


@pytest.mark.parametrize("fields", ["license: mit\nbase_model: me/mine", "license: [mit]\nbase_model:\n- me/mine"])
def test_what_a_source_says_of_itself_counts_more_than_its_numbers(tmp_path, fields):
    (tmp_path / "README.md").write_text(f"---\n{fields}\n---\n\n# Mine\n", encoding="utf-8")
    assert read_origin(tmp_path, VisualGLMConfig()).data == {"license": "mit", "base_model": "me/mine"}
    (tmp_path / "README.md").write_text("---\nlanguage: [zh, en]\n---\n\n# Like the original's\n", encoding="utf-8")
    assert read_origin(tmp_path, VisualGLMConfig()).data["license_name"] == "visualglm-6b-model-license"


# ---------------------------------------------------------------- the card that was there


READMES = {
    "a card": b"---\nlicense: mit\ntags: [x]\n---\n\n# Mine\n\nWith `code`, --- and | bars.\n",
    "no fields": "# 我的模型\n".encode(),
    "fields that are no YAML": b"---\nlicense: [\n---\n\n# Mine\n",
    "fields that are a list": b"---\n- a\n---\n\n# Mine\n",
    "strange fields": b"---\nlicense: {a: 1}\nbase_model: [1, 2]\nmodel-index: 3\n---\n\n# Mine\n",
    "lines of Windows": b"---\r\nlicense: mit\r\n---\r\n\r\n# Mine\r\n",
    "another encoding": "# 我的模型 # Mine".encode("gb18030"),
    "nothing": b"",
}


def card_of(source: Path, out: Path) -> tuple[dict, str]:
    """The card of a folder that is made of another one."""
    out.mkdir()
    Card("out", "A VisualGLM.", read_origin(source, VisualGLMConfig()), "visualglm convert").write(out)
    return card_in(out)


@pytest.mark.parametrize("content", READMES.values(), ids=READMES)
def test_a_readme_in_the_source_is_kept_below(tmp_path, content):
    (source := tmp_path / "source").mkdir()
    (source / "README.md").write_bytes(content)
    data, text = card_of(source, tmp_path / "out")
    assert (source / "README.md").read_bytes() == content
    assert data["library_name"] == "transformers"
    if content:
        assert text.index("# out") < text.index("## What the card of source said")
        wanted = content.decode("utf-8", errors="replace").replace("\r\n", "\n").rpartition("\n---\n")[2].strip()
        assert wanted in text.partition("## What the card of source said")[2]
    else:
        assert "What the card of" not in text


def test_a_readme_of_megabytes_is_not_repeated_and_that_is_said(tmp_path):
    (tmp_path / "README.md").write_bytes(b"x" * (1024**2 + 1))
    assert read_origin(tmp_path, VisualGLMConfig()).text == "It has 1,048,577 bytes, too many to be repeated here."


@pytest.mark.parametrize("name", ["a | b", "`a`", "模型 1", "- a", "'a'"])
def test_names_of_folders_break_no_card(tmp_path, name):
    (source := tmp_path / name).mkdir()
    (row,) = (line for line in card_of(source, tmp_path / "out")[1].splitlines() if line.startswith("| made of"))
    assert row.replace(r"\|", "").count("|") == 3


def test_a_card_is_written_as_it_is_given(tmp_path):
    data = {"license": "other", "base_model": "a/b", "tags": ["x"], "library_name": "peft", "seen": 3}
    write_card(tmp_path, data, "\n# Title\n\n---\n\nText.\n\n")
    assert card_in(tmp_path) == (data, "\n# Title\n\n---\n\nText.\n")
