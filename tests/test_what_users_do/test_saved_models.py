"""What is saved loads again, without this package: models, configs, tokenizers, processors, trainers' checkpoints."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, Trainer, TrainingArguments

from tests.commands import python
from tests.helpers import load_float32
from visualglm_hf import VisualGLMConfig, VisualGLMForConditionalGeneration, VisualGLMImageProcessor, VisualGLMProcessor


def ask_without_this_package(code: str, folder: Path) -> dict:
    """Run code in a new process that knows neither the package nor a hub; it prints JSON in its last line."""
    environment = {"PYTHONPATH": None, "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    program = "import json, sys, torch, transformers\nfolder = sys.argv[1]\n" + code
    result = python("-c", program, folder, cwd=folder, environment=environment)
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def saved(tiny_original, tokenizer, tmp_path_factory) -> Path:
    """Everything saved on its own, straight from the package, and what a new process says when it loads it."""
    folder = tmp_path_factory.mktemp("saved")
    load_float32(tiny_original).quantize(8).save_pretrained(folder / "quantized")
    load_float32(tiny_original).save_pretrained(folder / "plain")
    tokenizer.save_pretrained(folder / "tokenizer")
    VisualGLMImageProcessor().save_pretrained(folder / "image_processor")
    VisualGLMConfig.from_pretrained(tiny_original).save_pretrained(folder / "config")
    VisualGLMProcessor(VisualGLMImageProcessor(), tokenizer).save_pretrained(folder / "processor")
    VisualGLMProcessor(VisualGLMImageProcessor(), tokenizer).save_pretrained(folder / "plain")
    train_one_step(load_float32(tiny_original), tokenizer, folder)
    return folder


def train_one_step(model, tokenizer, folder: Path) -> None:
    """Let a trainer save "checkpoint-1", of the model as it is."""
    config = model.config.text_config
    ids = torch.tensor([5, 6, config.gmask_token_id, config.bos_token_id, 7, 8])
    row = {"input_ids": ids, "labels": torch.where(torch.arange(6) > 3, ids, -100)}
    options = {"max_steps": 1, "save_steps": 1, "learning_rate": 0.0, "use_cpu": True}
    arguments = TrainingArguments(output_dir=folder, report_to=[], disable_tqdm=True, **options)
    Trainer(model, arguments, train_dataset=[row], processing_class=tokenizer).train()


@pytest.fixture(scope="module")
def told(saved, tiny_original) -> dict:
    config = VisualGLMConfig.from_pretrained(tiny_original).text_config
    ids = [[5, 6, config.gmask_token_id, config.bos_token_id, 7, 8]]
    code = f"""
def load_float32(auto, name):
    return getattr(transformers, auto).from_pretrained(f"{{folder}}/{{name}}", trust_remote_code=True)

told = {{"modules": {{}}, "logits": {{}}}}
for auto, name in {WHAT!r}:
    loaded = load_float32(auto, name)
    told["modules"][f"{{auto}} {{name}}"] = type(loaded).__module__
    if auto == "AutoModel":
        with torch.no_grad():
            told["logits"][name] = loaded(input_ids=torch.tensor({ids})).logits[0, -1].tolist()
load_float32("AutoModelForImageTextToText", "quantized").save_pretrained(folder + "/again")
load_float32("AutoProcessor", "processor").save_pretrained(folder + "/again")
load_float32("AutoProcessor", "again")
with torch.no_grad():
    told["logits"]["again"] = load_float32("AutoModel", "again")(input_ids=torch.tensor({ids})).logits[0, -1].tolist()
print(json.dumps(told))
"""
    return ask_without_this_package(code, saved) | {"ids": ids}


WHAT = [
    ("AutoModel", "quantized"),
    ("AutoModelForCausalLM", "quantized"),
    ("AutoModelForImageTextToText", "quantized"),
    ("AutoModel", "plain"),
    ("AutoProcessor", "plain"),
    ("AutoTokenizer", "plain"),
    ("AutoTokenizer", "tokenizer"),
    ("AutoImageProcessor", "image_processor"),
    ("AutoConfig", "config"),
    ("AutoProcessor", "processor"),
    ("AutoModel", "checkpoint-1"),
    ("AutoTokenizer", "checkpoint-1"),
]


@pytest.mark.parametrize(("auto", "name"), WHAT)
def test_what_was_saved_from_the_package_brings_its_code(told, auto, name):
    assert told["modules"][f"{auto} {name}"].startswith("transformers_modules.")


def test_it_answers_as_before_also_when_it_was_saved_twice(told, tiny_original):
    for name in ("plain", "checkpoint-1", "quantized", "again"):
        model = load_float32(tiny_original)
        expected = model.quantize(8) if name in ("quantized", "again") else model
        with torch.no_grad():
            logits = expected(input_ids=torch.tensor(told["ids"])).logits[0, -1]
        assert (torch.tensor(told["logits"][name]) - logits).abs().max() < 1e-4 * logits.abs().max()
    assert told["logits"]["again"] == told["logits"]["quantized"]


def test_saving_registers_nothing_for_other_models(saved, tmp_path):
    """ChatGLM2 and ChatGLM3 have the same model_type."""
    fields = json.loads((saved / "plain" / "config.json").read_text())
    del fields["auto_map"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="chatglm"):
        AutoConfig.from_pretrained(tmp_path)


# Embeddings of another size


def resize(model, rows: int, **options) -> torch.Tensor:
    """Resize, and return the logits of the tokens that were there before."""
    model.resize_token_embeddings(rows, **options)
    return logits(model)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    config = model.config.text_config
    return model(input_ids=torch.tensor([[5, 6, config.gmask_token_id, config.bos_token_id, 7, 8]])).logits


@pytest.mark.parametrize("mean_resizing", [True, False])
@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_resized_embeddings_keep_what_was_there_and_are_saved(tiny_original, tmp_path, tied, bits, mean_resizing):
    model = load_float32(tiny_original)
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 1.5)
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    if bits:
        model.quantize(bits, group_size=16)
    before, kind, rows = logits(model), type(model.lm_head), model.config.text_config.vocab_size
    after = resize(model, rows + 40, mean_resizing=mean_resizing)
    assert after.shape[-1] == rows + 40
    assert torch.allclose(after[..., :rows], before, atol=1e-5)
    assert type(model.lm_head) is kind
    assert (model.lm_head.weight is model.transformer.word_embeddings.weight) == tied
    model.save_pretrained(tmp_path)
    reloaded = load_float32(tmp_path)
    assert torch.allclose(logits(reloaded), after, atol=1e-5)
    assert torch.allclose(resize(reloaded, rows), before, atol=1e-5)


def quantize_the_head(folder: Path) -> VisualGLMForConditionalGeneration:
    return load_float32(folder).quantize(4, group_size=16, lm_head=True)


def adapt_the_head(folder: Path) -> VisualGLMForConditionalGeneration:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(load_float32(folder), peft.LoraConfig(target_modules=["lm_head"])).get_base_model()


@pytest.mark.parametrize(
    ("prepare", "rows", "message"),
    [
        (quantize_the_head, 2000, "lm_head has few bits.*resize the embeddings, then quantize"),
        (adapt_the_head, 2000, "lm_head has an adapter"),
        (load_float32, 300, "would lose eos_token_id"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_embeddings_that_cannot_be_resized_stay_as_they_were(tiny_original, prepare, rows, message):
    model = prepare(tiny_original)
    before, rows_before = logits(model), model.config.text_config.vocab_size
    with pytest.raises(ValueError, match=message):
        model.resize_token_embeddings(rows)
    assert model.config.text_config.vocab_size == model.get_input_embeddings().num_embeddings == rows_before
    assert torch.equal(logits(model), before)
