"""What is checked in a checkpoint: each check reads one thing and says what it found, or what is wrong and what to do.

`visualglm check` is the command.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import check_imports, get_relative_import_files

from visualglm_hf.configuration_visualglm import VisualGLMConfig
from visualglm_hf.tokenization_chatglm import ChatGLMTokenizer
from visualglm_tools.checkpoints import remote_code
from visualglm_tools.checkpoints.files import (
    LM_HEAD,
    Entry,
    Weights,
    are_tied,
    check_tensors,
    check_vocabulary,
    each_tensor,
    find_weights,
    read_config,
    read_json,
    read_tokenizer,
    some,
    survey,
)
from visualglm_tools.checkpoints.loading import load_weights
from visualglm_tools.printing import one_line, printable


KNOWN_IDS = Path(__file__).parent / "real_tokenizer_vectors.json"
REAL_START_ID = 130004  # of <sop>: no other vocabulary has it there
LAST_OBSERVED_ID = 130012  # the file's later ids were inferred, not seen, so they prove nothing
QUESTION = "描述这张图片。"
ANSWER_LENGTH = 96  # tokens, picture and question included
PROBLEMS = (ValueError, OSError, RuntimeError, ImportError, SyntaxError, SafetensorError)


@dataclass
class Subject:
    """The folder and what the checks so far have read of it."""

    folder: Path
    config: VisualGLMConfig | None = None
    tokenizer: ChatGLMTokenizer | None = None
    weights: Weights | None = None
    entries: dict[str, Entry] | None = None


@dataclass(frozen=True)
class Check:
    """One row: returns what it found or raises what is wrong; runs only once what it `needs` has been read."""

    name: str
    run: Callable[[Subject], str]
    needs: tuple[str, ...] = ()
    show: Callable[[str], str] = one_line  # what was found, as it may be printed


@dataclass(frozen=True)
class Outcome:
    name: str
    verdict: str  # "ok", "FAILED" or "skipped"
    detail: str


def check_configuration(subject: Subject) -> str:
    subject.config = read_config(subject.folder)
    text, vision, qformer = (getattr(subject.config, name) for name in subject.config.sub_configs)
    layers = "+".join(str(part.num_hidden_layers) for part in (vision, qformer, text))
    return f"{layers} layers (ViT+Q-Former+decoder), decoder width {text.hidden_size:,}"


def check_code(subject: Subject) -> str:
    """The files that `trust_remote_code=True` will look for, and the packages that these import."""
    remote_code.check_code(subject.folder)
    auto_map = read_json(subject.folder / "config.json").get("auto_map") or {}
    targets = {name for value in auto_map.values() for name in (value if isinstance(value, list) else [value]) if name}
    if not targets or any("chatglm.ChatGLMConfig" in target or "--" in target for target in targets):
        return "none of ours: use the package's classes, or run visualglm convert"
    files = {subject.folder / f"{target.split('.')[0]}.py" for target in targets}
    try:
        files |= {Path(needed) for file in files for needed in get_relative_import_files(file)}
        for file in sorted(files):
            check_imports(file)
    except FileNotFoundError as error:
        raise ValueError(
            f"{Path(error.filename).name} is missing. Write the model's code into the folder: visualglm check "
            f'"{subject.folder}" --copy-code'
        ) from error
    return f"{len(files)} files"


def check_tokenizer_file(subject: Subject) -> str:
    subject.tokenizer = read_tokenizer(subject.folder)
    return f"{subject.tokenizer.vocab_size:,} pieces"


def check_layout(subject: Subject) -> str:
    tokenizer, config = subject.tokenizer, subject.config
    check_vocabulary(tokenizer, config)
    expected = {
        tokenizer.unk_token: config.image_token_id,
        tokenizer.pad_token: config.text_config.pad_token_id,
        tokenizer.mask_token: config.text_config.mask_token_id,
        tokenizer.gmask_token: config.text_config.gmask_token_id,
    }
    found = {token: tokenizer.convert_tokens_to_ids(token) for token in expected}
    wrong = [
        f"{token} is {found[token]} instead of {index}" for token, index in expected.items() if found[token] != index
    ]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}. Take ice_text.model and config.json from the same folder.")
    return f"special tokens as in config.json, {config.text_config.vocab_size:,} rows"


def check_known_ids(subject: Subject) -> str:
    if subject.tokenizer.bos_token_id != REAL_START_ID:
        return "not the vocabulary of VisualGLM-6B, nothing to compare with"
    known = json.loads(KNOWN_IDS.read_text(encoding="utf-8"))
    differences = compare_ids(subject.tokenizer, known)
    if differences:
        raise ValueError(
            f"{len(differences)} differences from the real tokenizer: {some(differences)}. Copy ice_text.model from "
            "the original visualglm-6b (or chatglm-6b, version 1.1) repository again."
        )
    return f"{len(known['encode_no_special'])} texts give the ids of the real tokenizer"


def compare_ids(tokenizer: ChatGLMTokenizer, known: dict) -> list[str]:
    """Describe where `tokenizer` gives other ids than the real one was seen to give."""
    differences = []
    for piece, index in known["vocab"].items():
        if piece == "num_tokens" or index > LAST_OBSERVED_ID:
            continue
        found = tokenizer.convert_tokens_to_ids(piece)
        if found != index:
            differences.append(f"{piece!r} is {found} instead of {index}")
    for case in known["encode_no_special"]:
        found = tokenizer(case["text"], add_special_tokens=False)["input_ids"]
        if found != case["ids"]:
            differences.append(f"{case['text']!r} gives {found} instead of {case['ids']}")
    suffix = tokenizer("")["input_ids"][-2:]
    if suffix != known["encode_special_suffix"]:
        differences.append(f"a context ends in {suffix} instead of {known['encode_special_suffix']}")
    return differences


def check_files(subject: Subject) -> str:
    subject.weights = find_weights(subject.folder)
    subject.entries = survey(subject.weights)
    gigabytes = sum(entry.num_bytes for entry in subject.entries.values()) / 1e9
    return f"{len(subject.entries):,} tensors in {len(subject.weights.files)} file(s), {gigabytes:,.3g} GB"


def check_keys(subject: Subject) -> str:
    check_tensors(subject.entries, subject.config)
    return "those of config.json"


def check_quantization(subject: Subject) -> str:
    bits, entries = subject.config.quantization_bit, subject.entries
    packed = [key for key, entry in entries.items() if entry.dtype == torch.int8]
    if bool(bits) != bool(packed):
        raise ValueError(
            f"config.json says quantization_bit {bits}, but {len(packed)} weights are integers. Take weights and "
            "config.json from the same folder."
        )
    encoder = ", those of the image encoder 8 bits" if subject.config.quantization_image_encoder else ""
    return f"{bits} bits, {len(packed)} weights{encoder}" if bits else "none"


def check_tying(subject: Subject) -> str:
    is_tied, promised = are_tied(subject.entries), subject.config.tie_word_embeddings
    if promised and not is_tied:
        raise ValueError(
            "lm_head and the word embeddings differ, but config.json ties them. Set tie_word_embeddings to false in "
            "config.json, or run visualglm convert, which does."
        )
    if LM_HEAD not in subject.entries:
        return "lm_head is the word embeddings"
    return "lm_head and the word embeddings are equal" if is_tied else "lm_head and the word embeddings differ, as said"


def check_values(subject: Subject) -> str:
    """Every value is a number; one tensor is looked at after the other."""
    total = sum(entry.num_bytes for entry in subject.entries.values())
    broken = []
    with tqdm(total=total, unit="B", unit_scale=True, desc="Reading weights", leave=False) as progress:
        for file, key, tensor in each_tensor(subject.weights):
            count = 0 if tensor.dtype == torch.int8 else tensor.numel() - torch.isfinite(tensor).sum().item()
            if count:
                broken.append(f"{key} ({count:,} of {tensor.numel():,} values, in {file.name})")
            progress.update(tensor.nbytes)
    if broken:
        raise ValueError(
            f"{len(broken)} tensors have NaN or infinity: {some(broken)}. Copy or download the file again; if you "
            "trained or converted this checkpoint, half precision overflowed: repeat that in bfloat16 or float32."
        )
    return "no NaN, no infinity"


def load(folder: Path) -> PreTrainedModel:
    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.bfloat16)
    return load_weights(folder, dtype).to(device).eval()


def check_answer(subject: Subject) -> str:
    model = load(subject.folder)
    picture = draw_picture()
    options = {"do_sample": False, "min_length": 0, "max_length": ANSWER_LENGTH}
    answer, _ = model.chat(subject.tokenizer, picture, QUESTION, history=[], **options)
    if not answer:
        raise ValueError(f"The answer to {QUESTION} is empty. See whether the checks above found the cause.")
    return f"{answer!r} (the picture is a red disc on white)"


def report_kernels(subject: Subject) -> str:
    return str(load(subject.folder).kernel_report())


def draw_picture() -> Image.Image:
    picture = Image.new("RGB", (224, 224), "white")
    ImageDraw.Draw(picture).ellipse((52, 52, 172, 172), fill="red")
    return picture


CHECKS = (
    Check("configuration", check_configuration),
    Check("remote code", check_code, ("config",)),
    Check("tokenizer file", check_tokenizer_file),
    Check("vocabulary", check_layout, ("config", "tokenizer")),
    Check("known token ids", check_known_ids, ("tokenizer",)),
    Check("weight files", check_files),
    Check("keys and shapes", check_keys, ("config", "entries")),
    Check("quantization", check_quantization, ("config", "entries")),
    Check("tied embeddings", check_tying, ("config", "entries")),
    Check("values", check_values, ("entries",)),
)
GENERATION = Check("answer", check_answer, ("config", "tokenizer", "entries"))
KERNELS = Check("kernels", report_kernels, ("config", "entries"), printable)


def run_checks(folder: Path, checks: tuple[Check, ...]) -> Iterator[Outcome]:
    """Run the checks in order; one that cannot run because an earlier one failed is skipped."""
    subject = Subject(folder)
    for check in checks:
        if any(getattr(subject, need) is None for need in check.needs):
            yield Outcome(check.name, "skipped", "needs a check above that failed")
            continue
        try:
            yield Outcome(check.name, "ok", check.show(check.run(subject)))
        except PROBLEMS as error:
            yield Outcome(check.name, "FAILED", one_line(error))
