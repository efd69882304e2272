"""What training takes on a CUDA device, at full size with random weights, beside what was computed. Run with -s."""

import pytest
import torch

from visualglm_hf import VisualGLMConfig, VisualGLMForConditionalGeneration
from visualglm_tools.training import memory
from visualglm_tools.training.adapters import add_adapter, lora_config
from visualglm_tools.training.keeping import sum_divergence


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ORIGINAL_QLORA = 9.8e9  # bytes, as the original documents it


def train_one_step(bits: int, batch_size: int, checkpointing: bool, keeps: bool) -> int:
    """Take a step of mixed precision, which keeps as many rows as it learns or none.

    Returns:
        The bytes at the peak, the loading not counted.
    """
    config = VisualGLMConfig()
    with torch.device("cuda"):
        model = VisualGLMForConditionalGeneration(config).to(memory.DTYPE)
    model.tie_weights()
    if bits:
        model.quantize(bits)
    model = add_adapter(model, lora_config(memory.RANK, memory.LAYERS)).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    text = config.text_config
    input_ids = torch.randint(1000, 2000, (batch_size, memory.LENGTH), device="cuda")
    input_ids[:, 62], input_ids[:, 63] = text.gmask_token_id, text.bos_token_id
    for _ in range(2):
        with torch.autocast("cuda", memory.DTYPE):
            loss = model(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        del loss
        if keeps:
            with torch.autocast("cuda", memory.DTYPE):
                logits = model(input_ids=input_ids).logits[:, -memory.ANSWER_LENGTH :].flatten(0, 1).clone()
                sum_divergence(logits, torch.zeros_like(logits)).backward()
            del logits
        optimizer.step()
        optimizer.zero_grad()
    return torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("keeps", [False, True], ids=["keeping nothing", "keeping answers"])
@pytest.mark.parametrize(("name", "bits", "batch_size", "checkpointing"), memory.CASES)
def test_training_takes_about_the_memory_that_was_computed(name, bits, batch_size, checkpointing, keeps):
    measured = train_one_step(bits, batch_size, checkpointing, keeps)
    compute = memory.estimate_most if keeps else memory.estimate
    computed = compute(VisualGLMConfig(), memory.default_step(bits, batch_size, checkpointing)).total
    print(
        f"{name}, {keeps=}: {measured / memory.GIGABYTE:.2f} GB measured, {computed / memory.GIGABYTE:.2f} GB computed"
    )
    assert 0.8 * computed < measured < 1.25 * computed
    assert bits != 4 or measured < ORIGINAL_QLORA
