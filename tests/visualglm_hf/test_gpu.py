"""What only a CUDA device can show: the original's answers in float16, no host sync in a decode step, CUDA graphs."""

import pytest
import torch
from transformers import CompileConfig

from tests.helpers import HALF_LOGITS_TOLERANCE, load_float32
from visualglm_hf import VisualGLMForConditionalGeneration


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def cuda_model(tiny_original):
    return VisualGLMForConditionalGeneration.from_pretrained(tiny_original).half().cuda().eval()


@pytest.fixture(scope="module")
def inputs(described) -> dict:
    return {name: tensor.cuda() for name, tensor in described.items()}


def test_half_precision_logits_stay_within_rounding_noise(cuda_model, golden, arrays, pixel_values):
    case = golden["prompts"][0]
    with torch.no_grad():
        logits = cuda_model(
            torch.tensor([case["input_ids"]], device="cuda"), pixel_values=pixel_values[:1].cuda()
        ).logits
    expected = torch.tensor(arrays[case["logits.f16"]]).float()
    difference = logits[0, -len(expected) :].float().cpu() - expected.view(-1, logits.shape[-1])
    assert difference.abs().max() < HALF_LOGITS_TOLERANCE


def test_chat_gives_the_originals_first_answer(cuda_model, tokenizer, golden, golden_dir):
    case = next(
        case for case in golden["chat"] if case["dtype"] == "f16" and case["mode"] == "greedy" and case["image"]
    )
    turn = case["turns"][0]
    response, _ = cuda_model.chat(
        tokenizer,
        str(golden_dir / case["image"]),
        turn["query"],
        max_length=turn["max_length"],
        do_sample=False,
        min_length=0,
        repetition_penalty=1.0,
        english=False,
    )
    agreed = sum(1 for ours, theirs in zip(response, turn["response"], strict=False) if ours == theirs)
    assert agreed >= len(turn["response"]) // 2  # margins are smaller than float16 noise further on


def test_decode_step_never_waits_for_the_device(cuda_model, inputs):
    output = cuda_model.generate(**inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        prepared = cuda_model.prepare_inputs_for_generation(
            output.sequences, next_sequence_length=1, past_key_values=output.past_key_values
        )
        with torch.no_grad():
            cuda_model(**prepared)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled_static_cache_gives_the_eager_answer(cuda_model, inputs):
    options = {"max_new_tokens": 16, "do_sample": False}
    eager = cuda_model.generate(**inputs, **options)
    compiled = cuda_model.generate(**inputs, **options, cache_implementation="static")
    assert torch.equal(eager, compiled)


@pytest.mark.parametrize("compile", [True, CompileConfig(backend="cudagraphs")], ids=["compiled", "recorded"])
def test_recorded_answers_and_streams_are_the_eager_ones_without_recompiling(
    tiny_original, tokenizer, pictures, compile
):
    model = load_float32(tiny_original).cuda().eval()
    options = {"do_sample": False, "max_new_tokens": 16}
    queries = ("描述这张图片。", "这张图片的背景里有什么内容？")
    expected = [model.chat(tokenizer, pictures[0], query, **options)[0] for query in queries]
    model.chat(tokenizer, pictures[0], queries[0], compile=compile, **options)
    with torch.compiler.set_stance("fail_on_recompile"):
        for query, answer in zip(queries, expected, strict=True):
            assert model.chat(tokenizer, pictures[0], query, compile=compile, **options)[0] == answer
            stream = model.stream_chat(tokenizer, pictures[0], query, compile=compile, **options)
            assert list(stream)[-1][0] == answer


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_left_padded_batch_is_finite(cuda_model, golden, dtype):
    model = cuda_model.to(dtype)
    batch = golden["left_padded_batch"]
    ids, mask = (torch.tensor(batch[name], device="cuda") for name in ("input_ids", "attention_mask"))
    with torch.no_grad():
        assert model(ids, attention_mask=mask).logits.isfinite().all()
    cuda_model.half()
