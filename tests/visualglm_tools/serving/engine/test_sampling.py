"""Settings of an answer."""

import pytest

from visualglm_tools.serving.engine.sampling import Settings


@pytest.mark.parametrize(
    "values",
    [
        {"max_new_tokens": 0},
        {"max_length": 0},
        {"min_length": -1},
        {"temperature": -0.1},
        {"temperature": float("inf")},
        {"top_p": 1.1},
        {"top_k": -1},
        {"repetition_penalty": 0},
        {"seed": -1},
        {"stop": [""]},
        {"stop": "text"},
        {"stop": ["a"] * 17},
    ],
)
def test_bad_settings_are_refused_with_their_name(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        Settings(**values)
