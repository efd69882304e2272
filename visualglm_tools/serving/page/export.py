"""A conversation as files to keep: Markdown with its pictures beside it, in one archive.

What was said is text there, too: nothing in it becomes a heading, a link, a picture or HTML.
"""

import base64
import io
import re
import string
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from visualglm_tools.serving.page.uploads import Upload


PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}]")
# Four of them would make code of what follows; a last line of others, which readers strip, text of the `\` before it.
BLANKS = re.compile(r"^\s+")
# What every browser shows, by the bytes it begins with.
SUFFIXES = {rb"\x89PNG": ".png", rb"\xff\xd8\xff": ".jpg", rb"GIF8": ".gif", rb"RIFF[\s\S]{4}WEBP": ".webp"}
MAP = re.compile(r'src="data:image/png;base64,([^"]+)"')  # in what `Look` shows


def pack(
    turns: Sequence[tuple[str, str]],
    told: str,
    upload: Upload | None,
    view: Image.Image | None,
    look: str,
    words: Mapping[str, str],
) -> bytes:
    """An archive (.zip) with `conversation.md` and its pictures.

    Args:
        turns: questions and answers.
        told: what was read in the picture, "" for nothing.
        upload: the picture; as it was sent, if it is still here and browsers show such.
        view: what the model saw of it, for another.
        look: the map over the picture as HTML, "" for none.
        words: the texts of a language.
    """
    files = picture_file(upload, view)
    shown = [picture_line(Path(upload.path).stem.replace("_", " "), name) for name in files]
    if found := MAP.search(look):
        files["look.png"] = base64.b64decode(found[1])
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as folder:
        folder.writestr("conversation.md", to_markdown(turns, told, shown, "look.png" in files, words))
        for name, content in files.items():
            folder.writestr(name, content)
    return archive.getvalue()


def picture_file(upload: Upload | None, view: Image.Image | None) -> dict[str, bytes]:
    """The picture's file by its name, none if there is no picture."""
    if upload is None:
        return {}
    try:
        content = upload.read()
    except ValueError:  # it was deleted
        content = b""
    for start, suffix in SUFFIXES.items():
        if re.match(start, content):
            return {f"picture{suffix}": content}
    if view is None:
        return {}
    file = io.BytesIO()
    view.save(file, "PNG")
    return {"picture.png": file.getvalue()}


def to_markdown(
    turns: Sequence[tuple[str, str]], told: str, shown: Sequence[str], has_map: bool, words: Mapping[str, str]
) -> str:
    """The conversation, in paragraphs; `shown` are those that show the picture."""
    paragraphs = ["# VisualGLM-6B", *shown]
    if told:
        paragraphs.append(escape(f"[{told}]"))
    for question, answer in turns:
        paragraphs += [f"**{words['asked']}**", escape(question), f"**{words['answered']}**", escape(answer)]
    if has_map:
        paragraphs.append(picture_line(words["look"], "look.png"))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph) + "\n"


def picture_line(text: str, name: str) -> str:
    return f"![{escape(text)}]({name})"


def escape(text: str) -> str:
    """Any text as one paragraph of CommonMark that shows it, line by line, and nothing else."""
    lines = PUNCTUATION.sub(r"\\\g<0>", text.strip("\r\n")).splitlines()
    spaced = (BLANKS.sub(lambda blanks: "".join(f"&#{ord(each)};" for each in blanks[0]), line) for line in lines)
    return "\\\n".join(spaced)
