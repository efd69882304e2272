"""Folders of pictures with captions, and files in other encodings."""

import json

import pytest
from PIL import Image

from visualglm_tools.training.dataset import read_dataset
from visualglm_tools.training.sources import LONGEST_CAPTION


CAPTIONS = {"a": "蓝天下的海。", "b": "A red beach.", "c": "一片草地。"}


@pytest.fixture
def pictures(tmp_path):
    """A folder of three pictures with captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for (name, caption), ending in zip(CAPTIONS.items(), (".png", ".JPG", ".webp"), strict=True):
        Image.new("RGB", (8, 8), (200, 30, 30)).save(folder / f"{name}{ending}")
        (folder / f"{name}.txt").write_text(f"{caption}\n", encoding="utf-8-sig")
    return folder


def read(place, **options):
    lines = []
    return read_dataset([place], say=lines.append, **options), lines


def test_a_folder_of_pictures_with_captions_is_rows(pictures):
    (pictures / ".hidden.txt").touch()
    conversations, [line] = read(pictures)
    assert [(each.question, each.answer) for each in conversations] == [
        ("描述这张图片。", CAPTIONS["a"]),
        ("Describe the image.", CAPTIONS["b"]),
        ("描述这张图片。", CAPTIONS["c"]),
    ]
    assert [each.pictures[0].name for each in conversations] == ["a.png", "b.JPG", "c.webp"]
    assert [each.source for each in conversations][1] == "pictures, row 2 (b.JPG)"
    assert line == (
        "pictures: 3 rows, captions; a caption is the answer to 描述这张图片。 or Describe the image., by its language."
    )


def test_a_text_without_a_picture_is_named(pictures):
    (pictures / "README.txt").touch()
    assert "1 text(s) have no picture beside them: README.txt" in read(pictures)[1][0]


def test_what_is_in_folders_of_a_folder_is_said_to_be_left_out(pictures):
    (pictures / "night").mkdir()
    (pictures / ".cache").mkdir()
    conversations, [line] = read(pictures)
    assert len(conversations) == 3 and "what is in its folders is left out: night; give these as well" in line


def test_a_link_to_a_picture_that_is_gone_is_a_bad_row(pictures):
    (pictures / "d.png").symlink_to("gone.png")
    (pictures / "d.txt").write_text("海。", encoding="utf-8")
    with pytest.raises(ValueError, match=r"^1 bad row(.|\n)*pictures, row 4 \(d.png\): there is no picture 'd.png'"):
        read(pictures)


def test_a_folder_may_have_its_rows_in_metadata(pictures):
    rows = [{"file_name": "b.JPG", "text": "A beach."}]
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    [conversation], _ = read(pictures)
    assert (conversation.answer, conversation.pictures) == ("A beach.", (pictures / "b.JPG",))


def test_pictures_without_captions_are_asked_for_them(pictures):
    for text in pictures.glob("*.txt"):
        text.unlink()
    conversations, _ = read(pictures, needs_answers=False)
    assert [each.is_answered for each in conversations] == [False] * 3
    with pytest.raises(ValueError, match=r"has 3 picture\(s\) and no captions. Write what each shows into .*, a.txt"):
        read(pictures)


BAD_CAPTIONS = {
    "missing": (None, "its caption is missing, b.txt beside it"),
    "blank": (b" \n", "text is empty"),
    "GBK": ("海。".encode("gbk") * 9, "b.txt cannot be read: it is not UTF-8 .*; it seems to be GBK. Save it as UTF-8"),
    "endless": (b"x" * (LONGEST_CAPTION + 1), "b.txt is no caption: it has 1,048,577 bytes"),
    "of another format": (b"\x00\x01", "NUL"),
}


@pytest.mark.parametrize("kind", BAD_CAPTIONS)
def test_a_caption_that_is_none_is_named_with_its_row(kind, pictures):
    content, message = BAD_CAPTIONS[kind]
    (pictures / "b.txt").unlink()
    if content is not None:
        (pictures / "b.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^1 bad row(.|\n)*pictures, row 2 \(b.JPG\): .*{message}") as caught:
        read(pictures)
    assert len(str(caught.value)) < 1000


def test_a_damaged_picture_of_a_folder_is_named_with_its_row(pictures):
    (pictures / "a.png").write_bytes((pictures / "a.png").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"pictures, row 1 \(a.png\): .*a.png"):
        read(pictures)


def test_a_folder_of_something_else_says_what_to_give(tmp_path):
    with pytest.raises(ValueError, match="is empty. Give a file of rows, or a folder of pictures with captions"):
        read(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match="no pictures, but folders. Give those that have some: train"):
        read(tmp_path)
    (tmp_path / "notes.md").touch()
    with pytest.raises(ValueError, match="has no pictures"):
        read(tmp_path)
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "table.parquet").touch()
    with pytest.raises(ValueError, match=r"but files of rows. Give those that you mean: .*table.parquet .*rows.jsonl"):
        read(tmp_path)


def test_a_picture_in_the_place_of_a_file_of_rows_is_called_one(pictures):
    with pytest.raises(ValueError, match=r"b.JPG is a picture. Give the folder that it is in"):
        read(pictures / "b.JPG")


@pytest.mark.parametrize(
    ("encoding", "guess"), [("gbk", "; it seems to be GBK"), ("utf-16", "; it seems to be UTF-16"), ("latin-1", "")]
)
def test_the_encoding_of_a_file_is_guessed(encoding, guess, tmp_path):
    text = "café " * 9 if encoding == "latin-1" else "这张图片的背景里有什么内容？“蓝天，白云。”"
    (tmp_path / "rows.json").write_bytes(
        json.dumps([{"prompt": text, "label": text}], ensure_ascii=False).encode(encoding)
    )
    with pytest.raises(ValueError, match=rf"it is not UTF-8 \(.*\){guess}. Save it as UTF-8"):
        read(tmp_path / "rows.json")
