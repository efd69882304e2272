"""`visualglm chat` as a user meets it: in a real terminal, in a pipe, and with typing errors."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from tests.commands import SECONDS, chat, python, script
from tests.helpers import load_float32
from tests.paths import SCRIPTS, TINY
from visualglm_tools.options import parse


pexpect = pytest.importorskip("pexpect")

CLI = SCRIPTS / "cli_demo_hf.py"  # the name that it had
CHINESE = re.compile("[\u4e00-\u9fff]")
ASK_PICTURE = "请输入图像路径或URL[^\n]*："
ASK_QUESTION = "用户："
ANSWER = "VisualGLM：([^\n]*)\r\n"  # not of the size of VisualGLM-6B


@pytest.fixture(scope="module")
def cli():
    """The command's module, for its parts."""
    from visualglm_tools.commands import chat

    return chat


@pytest.fixture
def run_here(capsys, tiny_original):
    """Run the command in this process, which is quicker; returns (exit code, stdout, stderr)."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()

    def run(*options: str):
        code = chat("--model", tiny_original, *options)
        return code, *capsys.readouterr()

    yield run
    logging.set_verbosity(verbosity)


@pytest.fixture
def terminal():
    """Start the script in a pseudo-terminal; ends what is still running."""
    children = []

    def start(*options):
        child = pexpect.spawn(
            sys.executable,
            [str(CLI), *map(str, options)],
            encoding="utf-8",
            timeout=SECONDS,
            dimensions=(40, 400),
            env={**os.environ, "LANG": "C.UTF-8", "TERM": "xterm"},
        )
        children.append(child)
        return child

    yield start
    for child in children:
        child.close(force=True)


def run_apart(*options) -> subprocess.CompletedProcess:
    """Run the script in a process of its own, its output in pipes."""
    return script(CLI.name, *options, code=None, environment={"LANG": "C.UTF-8"})


def end_of(child) -> int:
    child.expect(pexpect.EOF)
    child.close()
    return child.exitstatus


def shown(text: str) -> str:
    """A response as the terminal shows it: without control characters."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", "", text)


def test_a_conversation_goes_from_picture_to_answer_to_follow_up_to_clear_to_text_only_to_stop(
    terminal, model, tokenizer, tiny_original, golden_dir
):
    picture = str(golden_dir / "images" / "img0.png")
    options = {"do_sample": False, "max_length": 200}
    first, history = model.chat(tokenizer, picture, "描述这张图片。", **options)
    second, _ = model.chat(tokenizer, "图中有什么颜色？", history=history, **options)
    text_only, _ = model.chat(tokenizer, "你好", **options)

    child = terminal("--model", tiny_original, "--greedy", "--max_length", 200)
    child.expect(ASK_PICTURE)
    child.sendline(picture)
    child.expect(ASK_QUESTION + "描述这张图片。")
    child.expect(ANSWER)
    assert child.match[1] == shown(first)
    child.expect(ASK_QUESTION)
    child.sendline("图中有什么颜色？")
    child.expect(ANSWER)
    assert child.match[1] == shown(second)
    child.expect(ASK_QUESTION)
    child.sendline("clear")
    child.expect(ASK_PICTURE)
    child.sendline("")
    child.expect(ASK_QUESTION)
    child.sendline("你好")
    child.expect(ANSWER)
    assert child.match[1] == shown(text_only)
    child.expect(ASK_QUESTION)
    child.sendline("stop")
    assert end_of(child) == 0


def test_a_bad_path_and_a_too_long_conversation_are_one_line_each_and_the_question_comes_back(
    terminal, tiny_original, golden_dir
):
    child = terminal("--model", tiny_original, "--max-length", 60, "--prompt_zh", "这是什么？")
    child.expect(ASK_PICTURE)
    for bad in ("no-such-picture.png", str(golden_dir / "golden.json"), "http://127.0.0.1:9/picture.png"):
        child.sendline(bad)
        child.expect("error: ([^\n]*)\r\n")
        assert bad in child.match[1]
        child.expect_exact("请输入")
        assert not child.before.replace("\x1b[?2004h", "").strip()  # readline: pastes come in brackets
        child.expect("：")
    child.sendline(f"'{golden_dir / 'images' / 'img0.png'}'")  # in quotes, as terminals paste it
    child.expect(ASK_QUESTION + "这是什么？")
    child.expect(ANSWER)
    child.expect(ASK_QUESTION)
    child.sendline("这张图片可能是在什么场所拍摄的？" * 10)
    child.expect("error: ([^\n]*)\r\n")
    assert child.match[1].endswith("Type 'clear' to start over.")
    child.expect(ASK_QUESTION)
    child.sendeof()
    assert end_of(child) == 0
    assert "Traceback" not in child.before


def test_ctrl_c_ends_the_answer_and_only_twice_at_the_prompt_the_program(terminal, endless_original, golden_dir):
    child = terminal("--model", endless_original, "--image", golden_dir / "images" / "img0.png")
    child.expect("VisualGLM：..")
    child.sendintr()
    child.expect(ASK_QUESTION)
    assert len(child.before) < 5000, "the answer went on"  # to its end it has 10,000 characters
    child.sendline("然后呢？")
    child.expect("VisualGLM：..")
    child.sendintr()
    child.expect(ASK_QUESTION)
    child.sendintr()
    child.expect_exact("(Type 'stop' or press Ctrl-C again to leave.)")
    child.expect(ASK_QUESTION)
    child.sendline("")  # anything typed in between, and the next Ctrl-C is the first again
    child.expect(ASK_QUESTION)
    child.sendintr()
    child.expect_exact("(Type 'stop'")
    child.expect(ASK_QUESTION)
    child.sendintr()
    assert end_of(child) == 0
    assert "Traceback" not in child.before


@pytest.fixture
def endless_original(tiny_original, tmp_path) -> Path:
    """The tiny checkpoint, made to answer up to the maximum length."""
    folder = shutil.copytree(tiny_original, tmp_path / "endless")
    ids = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    options = {name: ids[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps({**options, "min_length": 2048}), encoding="utf-8")
    return folder


def test_an_interrupted_answer_stays_in_the_history_as_it_was_shown(cli, model, tokenizer, capsys, golden_dir):
    conversation = cli.Conversation(model, tokenizer, {"min_length": 2048, "max_length": 2048}, "zh")
    conversation.choose_picture(str(golden_dir / "images" / "img0.png"))
    before = signal.getsignal(signal.SIGINT)
    ctrl_c = threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT))
    ctrl_c.start()
    conversation.answer("描述这张图片。")
    ctrl_c.join()
    ((query, response),) = conversation.history
    assert query == "描述这张图片。"
    assert response
    assert shown(capsys.readouterr().out) == "VisualGLM：" + shown(response)
    assert signal.getsignal(signal.SIGINT) is before


def test_an_error_leaves_the_history_as_it_was(cli, model, tokenizer, capsys):
    conversation = cli.Conversation(model, tokenizer, {"max_length": 8}, "zh")
    conversation.history = [("你好", "你好！")]
    conversation.answer("你是谁？")
    assert conversation.history == [("你好", "你好！")]
    assert capsys.readouterr().err.startswith("error: ")


def test_one_shot_prints_exactly_what_chat_answers(model, tokenizer, tiny_original, golden_dir):
    picture = golden_dir / "images" / "img0.png"
    query = "这张图片可能是在什么场所拍摄的？"
    expected, _ = model.chat(tokenizer, str(picture), query, do_sample=False, max_length=90)
    options = ("--greedy", "--max_length", 90, "--device", "cpu", "--dtype", "float32")
    result = run_apart("--from_pretrained", tiny_original, "--image", picture, "--query", query, *options)
    assert result.returncode == 0
    assert result.stdout == expected + "\n"
    assert "float32 on cpu" in result.stderr  # says what was chosen
    assert "Warning" not in result.stderr


@pytest.fixture
def star_file(small_star, tmp_path) -> Path:
    small_star.save(tmp_path / "star.png")
    return tmp_path / "star.png"


TRAINED = ("--model", TINY, "--device", "cpu", "--dtype", "float32", "--greedy", "--query", "What color is it?")


@pytest.mark.parametrize("option", ["--zoom", "--zoom-twice"])
def test_zoom_answers_from_the_part_that_matters(capsys, star_file, option):
    assert chat(*TRAINED, "--image", star_file, option) == 0
    assert capsys.readouterr().out == "White.\n"


def test_a_zoom_that_has_nothing_to_gain_says_so_and_answers(capsys, small_star, tmp_path):
    small_star.resize((224, 224)).save(tmp_path / "small.png")
    assert chat(*TRAINED, "--image", tmp_path / "small.png", "--zoom") == 0
    out, err = capsys.readouterr()
    assert out.strip() and "nothing to gain from a picture of 224 x 224" in err


def test_a_conversation_zooms_into_each_question_anew(cli, capsys, loaded, star_file):
    options = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": 16}
    conversation = cli.Conversation(*loaded, options, "en", {"zoom": 1})
    conversation.choose_picture(str(star_file))
    for query in ("What color is it?", "And the shape?"):
        conversation.answer(query)
    assert conversation.history == [("What color is it?", "White."), ("And the shape?", "A star.")]
    assert len(conversation.history.images) == 1


def test_look_writes_where_the_model_looked_and_prints_the_same_answer(capsys, star_file, tmp_path):
    assert chat(*TRAINED, "--image", star_file) == 0
    expected = capsys.readouterr().out
    assert chat(*TRAINED, "--image", star_file, "--look", tmp_path / "look.png") == 0
    assert capsys.readouterr().out == expected
    with Image.open(tmp_path / "look.png") as overlay:
        assert overlay.size == (896, 896)
        red, _, blue = overlay.getpixel((560, 336))  # the star's middle
        assert red > blue


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--look", "out.png"), "Give --image and --query"),
        (("--look", "out.png", "--image", "a.png", "--query", "a", "--zoom"), "Give one of them"),
        (("--look", "out.jpg", "--image", "a.png", "--query", "a"), ".png file, found 'out.jpg'"),
        (("--look", "no/such/out.png", "--image", "a.png", "--query", "a"), "no folder"),
    ],
)
def test_a_look_that_cannot_be_written_is_one_line_before_the_model_is_loaded(capsys, options, complaint):
    assert chat(*options) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and complaint in error


@pytest.mark.parametrize("options", [("--zoom",), ("--read-text",), ("--read-text", "--zoom-twice", "--image", "")])
def test_what_needs_a_picture_and_has_none_is_one_line_before_the_model_is_loaded(capsys, options):
    assert chat("--query", "a", *options) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: {options[0]}") and error.endswith("Give --image, or leave them out.")


def test_a_missing_reader_is_one_line_before_the_model_is_loaded(capsys, monkeypatch, star_file):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    assert chat("--query", "a", "--image", star_file, "--read-text") == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "rapidocr is not installed" in error and "pip install rapidocr onnxruntime" in error


def test_one_shot_without_a_picture_answers_from_text_alone(run_here, model, tokenizer):
    expected, _ = model.chat(tokenizer, "你好", do_sample=False, max_length=50)
    code, out, _ = run_here("--query", "你好", "--greedy", "--max-length", "50")
    assert (code, out) == (0, expected + "\n")


def test_the_same_seed_gives_the_same_answer_and_another_seed_another(run_here):
    answers = [
        run_here("--query", "你好", "--max_length", "50", "--top_p", "1", "--seed", seed)[1] for seed in ("1", "1", "2")
    ]
    assert answers[0] == answers[1] != answers[2]


def test_english_forbids_chinese(run_here):
    options = ("--query", "Describe the image.", "--max_length", "60", "--top_p", "1", "--seed", "1")
    chinese, english = run_here(*options)[1], run_here(*options, "--english")[1]
    assert CHINESE.search(chinese)  # what this untrained model answers otherwise
    assert english.strip()
    assert not CHINESE.search(english)


def test_english_forbids_exactly_the_pieces_with_chinese_and_the_bytes_that_spell_it(cli, tokenizer):
    vocabulary = tokenizer.get_vocab()
    forbidden = set(cli.english_only_token_ids(vocabulary))
    assert {token_id for piece, token_id in vocabulary.items() if CHINESE.search(piece)} <= forbidden
    spelled = {vocabulary[f"<0x{byte:02X}>"] for character in "一龥あ한" for byte in character.encode()[:1]}
    assert spelled <= forbidden
    for text in ("Two red circles, on 'white' paper!", "naïve café – “quoted” €5 😀", "。，？"):
        assert not forbidden & set(tokenizer.encode(text, add_special_tokens=False)), text


@pytest.mark.parametrize(
    "answer",
    [
        "图中有一只猫,两只狗!还有什么?没有.",
        "I do n't know , it 's a dog ' s life . They 're [ here ] , I 've seen [[it]] .",
        "训练到[[训练时间]],是的:3:4",
        "a\n\n  b \t c",
    ],
)
def test_what_is_typed_bit_by_bit_is_the_answer(cli, tokenizer, capsys, answer):
    from visualglm_hf.conversation import clean_response

    typewriter = cli.Typewriter()
    for length in range(len(answer) + 1):
        response = clean_response(tokenizer.clean_up_tokenization(answer[:length]))
        typewriter.show(cli.stable_part(response))
    typewriter.finish(response)
    assert capsys.readouterr().out == response + "\n"


def test_an_answer_that_changed_after_all_is_typed_again_in_full(cli, capsys):
    typewriter = cli.Typewriter()
    for response in ("一只猫", "两只狗"):
        typewriter.show(response)
    typewriter.finish("两只狗。")
    assert capsys.readouterr().out == "一只猫\n两只狗。\n"


def test_an_answer_cannot_command_the_terminal(cli, capsys):
    cli.Typewriter().finish("a\x1b[2Jb\x07c\r\n\td\x9b")
    assert capsys.readouterr().out == "a[2Jbc\n\td\n"


ORIGINAL_OPTIONS = {
    "max_length": "200",
    "top_p": "0.5",
    "top_k": "3",
    "temperature": "0.9",
    "quant": "4",
    "from_pretrained": "there",
    "prompt_zh": "--这_是",
    "prompt_en": "--what_is this",
}


def test_the_originals_spellings_are_understood_and_values_left_as_they_are(cli):
    words = [f"--{name}={value}" for name, value in ORIGINAL_OPTIONS.items()]
    options = options_of(cli, *words, "--english", "--query=--x_y")
    read = {name: str(getattr(options, name.replace("from_pretrained", "model"))) for name in ORIGINAL_OPTIONS}
    assert read == ORIGINAL_OPTIONS
    assert options.english and options.query == "--x_y"
    for value in ("--x_y z", "--x_y=a b", "-", ""):
        assert options_of(cli, "--query", value).query == value


def test_only_a_model_of_its_size_is_called_6b(cli, model):
    from visualglm_hf import VisualGLMConfig

    assert cli.name_of(SimpleNamespace(config=VisualGLMConfig())) == "VisualGLM-6B"
    assert cli.name_of(model) == "VisualGLM"


def test_help_comes_without_torch():
    help_text = run_apart("-h").stdout
    for option in ORIGINAL_OPTIONS:
        assert f"--{option.replace('_', '-')}" in help_text
    imports = python("-X", "importtime", CLI, "-h").stderr
    assert "argparse" in imports
    assert not re.search(r"\|\s+(torch|transformers|visualglm_hf)\b", imports)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--temperature", "0"),
        ("--temperature", "-1"),
        ("--temperature", "nan"),
        ("--top_p", "1.5"),
        ("--top-p", "-0.1"),
        ("--top_k", "-1"),
        ("--max_length", "0"),
        ("--max-length", "1e3"),
        ("--quant", "3"),
        ("--dtype", "float8"),
        ("--seed", "one"),
    ],
)
def test_a_bad_option_is_one_line_that_names_the_value(capsys, option, value):
    with pytest.raises(SystemExit) as stop:
        chat(f"{option}={value}")
    assert stop.value.code == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert option.replace("_", "-") in error
    assert value in error


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (None, "no config.json"),
        ("{", "is no JSON"),
        ('{"model_type": "chatglm", "num_layers": 28}', "not of a VisualGLM"),
    ],
)
def test_a_folder_without_a_visualglm_is_one_line(capsys, tmp_path, config, complaint):
    if config is not None:
        (tmp_path / "config.json").write_text(config, encoding="utf-8")
    assert chat("--model", tmp_path, "--query", "你好") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert str(tmp_path) in line
    assert complaint in line


def test_a_device_that_is_not_there_and_a_cut_download_are_one_line(run_here, tiny_original, tmp_path):
    code, _, err = run_here("--query", "你好", "--device", "cuda:99")
    assert code == 2
    assert err.startswith("error: device 'cuda:99' is not available")

    folder = shutil.copytree(tiny_original, tmp_path / "cut")
    for shard in folder.glob("pytorch_model-00002*"):
        shard.write_bytes(shard.read_bytes()[:1000])
    code, _, err = run_here("--query", "你好", "--model", str(folder))
    assert code == 2
    assert err.splitlines()[-1].startswith(f"error: cannot load {str(folder)!r}: ")


def test_missing_weights_are_one_line_instead_of_random_numbers(run_here, tiny_original, tmp_path):
    import torch

    folder = shutil.copytree(tiny_original, tmp_path / "incomplete")
    shard = folder / "pytorch_model-00002-of-00002.bin"
    weights = torch.load(shard)
    name = "image_encoder.glm_proj.weight"
    del weights[name]
    torch.save(weights, shard)
    code, _, err = run_here("--query", "你好", "--model", str(folder))
    assert code == 2
    assert err.splitlines()[-1].startswith("error: ")
    assert f"lacks 1 weights, among them {name}" in err


@pytest.mark.parametrize("bits", [8, 4])
def test_quant_answers_as_the_quantized_model(run_here, tokenizer, tiny_original, bits):
    model = load_float32(tiny_original).quantize(bits)
    expected, _ = model.chat(tokenizer, "你好", do_sample=False, max_length=40)
    code, out, err = run_here("--query", "你好", "--greedy", "--max_length", "40", "--quant", str(bits))
    assert (code, out) == (0, expected + "\n")
    assert f"{bits} bits" in err


def options_of(cli, *words: str):
    """What the command line says."""
    return parse(cli.Options, words, "visualglm chat", "")


def test_compile_reaches_the_model_and_a_missing_compiler_is_one_line(cli, run_here, monkeypatch):
    assert cli.answer_keywords(options_of(cli), None)["compile"] is False
    assert cli.answer_keywords(options_of(cli, "--compile"), None)["compile"] is True
    monkeypatch.setenv("CXX", "no-such-compiler")
    code, out, err = run_here("--query", "你好", "--compile")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and "there is no 'no-such-compiler'" in err


def test_record_reaches_the_model_and_is_refused_on_a_cpu_in_one_line(cli, run_here):
    assert cli.answer_keywords(options_of(cli, "--record"), None)["compile"].backend == "cudagraphs"
    code, out, err = run_here("--query", "你好", "--record", "--device", "cpu")
    assert (code, out) == (2, "")
    assert err == "error: --record is for an NVIDIA GPU, and the model will be on 'cpu'. Leave it out.\n"
    with pytest.raises(SystemExit):
        options_of(cli, "--record", "--compile")


def test_a_cpu_computes_in_float32_if_that_fits_into_the_free_memory(cli, monkeypatch, tiny_original):
    import torch

    from visualglm_tools.checkpoints import loading

    size = loading.size_in_float32(tiny_original)
    assert size == pytest.approx(2 * 1.18e6, rel=0.05)  # two shards of float16
    for free, expected in ((2 * size, torch.float32), (size, torch.bfloat16)):
        monkeypatch.setattr(loading.psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        assert loading.choose_dtype("auto", torch.device("cpu"), tiny_original) == expected
    assert loading.choose_dtype("auto", torch.device("cuda"), tiny_original) == torch.float16
    assert loading.choose_dtype("bfloat16", torch.device("cuda"), tiny_original) == torch.bfloat16


def test_the_trained_model_is_the_default_and_says_what_is_in_the_picture(tmp_path, capsys):
    from tools.tiny import world as tiny_world

    picture = tmp_path / "picture.png"
    tiny_world.draw(tiny_world.make_scene("circle", "red", "paper", "middle")).save(picture)
    assert chat("--image", picture, "--query", "描述这张图片。", "--greedy") == 0
    answer = capsys.readouterr().out
    assert "红色" in answer and "圆形" in answer
