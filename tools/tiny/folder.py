"""What stands in the tiny model's folder beside the weights: settings, processor, and the code, as links or as files.

In a checkout, `models/visualglm-tiny` has links to the code of `visualglm_hf`, so that there is one of each file. One
file is its own, `linked_code.py`, which its settings name first: it says what to do where links have become something
else. Any other folder has the code as files, as everything that `visualglm convert` writes.
"""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import GenerationConfig

from visualglm_hf import ChatGLMTokenizer, VisualGLMConfig
from visualglm_tools.checkpoints.prepared import write_description
from visualglm_tools.checkpoints.remote_code import LINKED_CODE, package_folder


CHECKOUT = Path(__file__).resolve().parents[2]
PACKAGE = package_folder()
NAMED_FIRST = {  # what transformers opens first, whatever it is asked for
    "config.json": {"AutoConfig"},
    "preprocessor_config.json": {"AutoImageProcessor"},
    "processor_config.json": {"AutoImageProcessor", "AutoProcessor"},
}
# What settings say of the one who wrote them.
TRACES = {"transformers_version", "is_local", "local_files_only"}


def write_files(output: Path, config: VisualGLMConfig, tokenizer: ChatGLMTokenizer) -> None:
    """Write everything beside the weights: code, configuration, tokenizer, processor, and greedy short answers.

    A file that says the same already, whichever transformers has written it, stays as it is.
    """
    has_links = is_linked(output)
    with TemporaryDirectory() as place:
        folder = Path(place)
        write_description(folder, config, tokenizer)
        text = config.text_config
        GenerationConfig(
            bos_token_id=text.bos_token_id,
            eos_token_id=text.eos_token_id,
            pad_token_id=text.pad_token_id,
            do_sample=False,
            min_length=0,
        ).save_pretrained(folder)
        code = sorted(path.name for path in folder.glob("*.py"))
        if has_links and link_code(output, code):
            for name, classes in NAMED_FIRST.items():
                name_linked_code(folder / name, classes)
            for name in code:
                (folder / name).unlink()
        for file in folder.iterdir():
            renew(output / file.name, file)


def refresh(output: Path) -> None:
    """Write today's code and settings beside weights that are trained already."""
    write_files(output, VisualGLMConfig.from_pretrained(output), ChatGLMTokenizer.from_pretrained(output))


def is_linked(output: Path) -> bool:
    """Whether a folder is one whose code is links into this checkout."""
    return (output / LINKED_CODE).is_file() and output.resolve().is_relative_to(CHECKOUT)


def link_code(output: Path, names: list[str]) -> bool:
    """Link files of the package into a folder; False, and nothing is done, where this system makes no links."""
    for name in names:
        link, target = output / name, os.path.relpath(PACKAGE / name, output.resolve())
        if link.is_symlink() and os.readlink(link) == target:
            continue
        fresh = output / f".{name}.new"
        try:
            fresh.symlink_to(target)
        except OSError:  # Windows, unless its developer mode is on
            return False
        fresh.replace(link)
    return True


def name_linked_code(settings: Path, classes: set[str]) -> None:
    """Let the `auto_map`s of a file of settings name `linked_code.py` for some classes."""
    content = json.loads(settings.read_text(encoding="utf-8"))
    for part in (content, content.get("image_processor", {})):
        for name in classes & part.get("auto_map", {}).keys():
            part["auto_map"][name] = f"{Path(LINKED_CODE).stem}.{part['auto_map'][name].rpartition('.')[2]}"
    settings.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def renew(path: Path, fresh: Path) -> None:
    """Write what `fresh` says to `path`, unless it says that already; a link becomes a file."""
    if path.is_symlink():
        path.unlink()
    if not path.is_file() or meaning_of(path) != meaning_of(fresh):
        path.write_bytes(fresh.read_bytes())


def meaning_of(file: Path) -> object:
    """What a file says; of settings, without what they say of the one who wrote them."""
    content = file.read_bytes()
    try:
        settings = json.loads(content) if file.suffix == ".json" else None
    except ValueError:
        return content
    if file.name == "config.json":
        settings = VisualGLMConfig.from_dict(settings).to_dict()  # some versions leave out what is usual
    return {key: settings[key] for key in settings if key not in TRACES} if isinstance(settings, dict) else content
