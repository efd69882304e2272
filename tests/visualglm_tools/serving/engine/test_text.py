"""Text that grows token by token."""

import random

import pytest

from visualglm_tools.serving.engine.text import GrowingText


@pytest.mark.parametrize("seed", range(4))
def test_streamed_text_is_always_the_beginning_of_the_final_text(loaded, seed):
    tokenizer = loaded[1]
    choice = random.Random(seed)
    pieces = [
        *range(6, len(tokenizer)),
        *tokenizer("你好,好! n't [[训练时间]] x .", add_special_tokens=False)["input_ids"] * 40,
    ]
    for _ in range(60):
        tokens = choice.choices(pieces, k=40)
        growing = GrowingText(tokenizer, choice.choice(((), ("a", "好!"), ("的",))))
        for length in range(1, len(tokens) + 1):
            growing.update(tokens[:length])
            if growing.is_stopped:
                break
        assert growing.final(tokens[:length])[0].startswith(growing.shown)
