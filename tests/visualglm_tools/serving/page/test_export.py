"""A conversation as Markdown: what was said is shown as it was said, and is never markup."""

import html
import io
import re
import zipfile

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.paths import CIRCLES
from tests.picture_files import encoded
from tests.serving_helpers import EngineByHand


pytest.importorskip("gradio", reason="the web demo needs gradio")

from visualglm_tools.serving.page.export import escape, pack, to_markdown
from visualglm_tools.serving.page.uploads import Uploads
from visualglm_tools.serving.page.words import CHINESE, ENGLISH


MARKUP = ["# a", "*b*", "`c`", "```", "    d", "\td", "- e", "1. f", "1) f", "> g", "[h](i)", "![j](k)", "<b>", "&lt;"]
MARKUP += [
    "<!-- l -->",
    "===",
    "---",
    "***",
    "|m|n|",
    "|-|-|",
    "\\",
    "http://example.org",
    "~~o~~",
    "$p$",
    "[^1]: q",
    "",
]
TEXTS = st.lists(st.sampled_from(MARKUP) | st.text(st.characters(codec="utf-8", exclude_categories=["C"])), max_size=6)


def shown(markdown: str) -> tuple[str, set[str]]:
    """The text that a reader of CommonMark sees, and the names of the tags around it."""
    parser = pytest.importorskip("markdown_it", reason="reads Markdown").MarkdownIt("commonmark").enable("table")
    page = parser.render(markdown)
    text = re.sub(r"<[^>]*>", "", page.replace("<br />\n", "\n"))
    return html.unescape(text), set(re.findall(r"<(\w+)", page))


def lines_of(text: str) -> list[str]:
    """Without the blanks that no reader of HTML shows."""
    return [line.rstrip() for line in text.strip("\n").split("\n")]


@settings(deadline=None, max_examples=200)
@given(TEXTS.map("\n".join))
@example("    four blanks are no code\n\n\n\tnor is a tab")
@example("# a\n\xa0")
@example("\u3000\u3000二\n\u2003\n\u3000")
@example("a\n===\nb\n---\n| a | b |\n|---|---|\n| c | d |")
@example("<script>alert(1)</script> ![a](http://example.org/a.png) &copy; https://example.org")
def test_whatever_was_said_is_shown_and_is_no_markup(text):
    text = "\n".join(text.splitlines()).strip("\n")
    found, tags = shown(escape(text))
    assert tags <= {"p", "br"}
    if text.strip():
        assert lines_of(found) == lines_of(text)


def test_questions_and_answers_are_told_apart_in_the_language_of_the_page():
    turns = [("Is it *red*?", "Yes.\nIt is."), ("背景？", "")]
    assert to_markdown(turns, "it says 7", ["![a](picture.png)"], False, ENGLISH) == (
        "# VisualGLM-6B\n\n![a](picture.png)\n\n\\[it says 7\\]\n\n**Question**\n\nIs it \\*red\\*\\?\n\n"
        "**Answer**\n\nYes\\.\\\nIt is\\.\n\n**Question**\n\n背景？\n\n**Answer**\n"
    )
    chinese = to_markdown(turns, "", [], True, CHINESE)
    assert "**问题**" in chinese and "**回答**" in chinese
    assert chinese.endswith(f"![{CHINESE['look']}](look.png)\n")


@pytest.fixture
def uploads():
    uploads = Uploads()
    yield uploads
    uploads.close()


def files_of(uploads: Uploads, content: bytes | None, view: Image.Image | None, look: str = "") -> dict[str, bytes]:
    path = uploads.folder / "red_[x](y).tiff"
    path.write_bytes(content or b"")
    upload = uploads.find(str(path))
    if content is None:
        path.unlink()
    packed = pack([("a", "b")], "", upload, view, look, ENGLISH)
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_picture_is_the_file_that_was_sent_where_browsers_show_it_or_else_what_the_model_saw(uploads):
    view = Image.new("RGB", (8, 8), "red")
    for kind, name in (
        ("PNG", "picture.png"),
        ("JPEG", "picture.jpg"),
        ("GIF", "picture.gif"),
        ("WEBP", "picture.webp"),
    ):
        content = encoded(view, kind)
        files = files_of(uploads, content, view)
        assert files[name] == content
        assert f"![red \\[x\\]\\(y\\)]({name})" in files["conversation.md"].decode()
    for content in (encoded(view, "TIFF"), None):  # None: deleted since
        [(name, written)] = [each for each in files_of(uploads, content, view).items() if each[0] != "conversation.md"]
        assert name == "picture.png" and Image.open(io.BytesIO(written)).getpixel((0, 0)) == (255, 0, 0)
    assert list(files_of(uploads, None, None)) == ["conversation.md"]


def test_the_map_of_the_last_answer_goes_along(uploads):
    import torch

    from visualglm_hf.looking import Look

    picture = Image.open(CIRCLES)
    look = Look(torch.ones(16, 16) / 256, "Red.", [], picture)
    files = files_of(uploads, CIRCLES.read_bytes(), None, look.to_html())
    assert files["look.png"] == look._repr_png_() and "(look.png)" in files["conversation.md"].decode()


def test_an_answer_on_its_way_is_exported_as_far_as_it_was_shown():
    import asyncio
    import base64

    from visualglm_tools.serving.page import page as web

    async def export():
        handlers, session = web.Handlers(EngineByHand()), web.Session()
        updates = handlers.ask(session, "Hello", (), 2048, 0.4, 0.8)
        assert [await anext(updates), await anext(updates)]
        exported = await handlers.export(session, [], "en")
        await updates.aclose()
        return exported

    with zipfile.ZipFile(io.BytesIO(base64.b64decode(asyncio.run(export())))) as archive:
        assert archive.read("conversation.md").decode().endswith("Hello\n\n**Answer**\n\none\n")
