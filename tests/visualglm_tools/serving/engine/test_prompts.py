"""Conversations become prompts, or are refused before the model sees them."""

import pytest


def about(picture) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]}]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "must be a list"),
        ("hello", "must be a list"),
        ([{"role": "user"}], "content"),
        ([{"content": "a"}], "role"),
        ([{"role": "tool", "content": "a"}, {"role": "user", "content": "a"}], "alternate"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "last message"),
        ([{"role": "user", "content": " "}], "empty"),
        ([{"role": "user", "content": [{"type": "video"}]}], "neither"),
        ([{"role": "user", "content": "x\ufffc"}], "reserved"),
        ([{"role": "user", "content": "好" * 3000}], "tokens long"),
        (about("/etc/passwd"), "no path"),
        (about("http://localhost/a.png"), "no path or address"),
        (about(b"no picture"), "not a picture"),
        (about(b""), "is empty"),
        (about(b"0" * (20 * 2**20 + 1)), "too large"),
        ([{"role": "user", "content": [{"type": "image", "image": b""}] * 9}], "9 pictures"),
    ],
)
def test_bad_conversations_are_refused_before_the_model_sees_them(engine, messages, reason):
    with pytest.raises(ValueError, match=reason):
        engine.prepare(messages)
