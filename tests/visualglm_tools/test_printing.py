"""What is said of an error: enough, and no screenful."""

import pytest

from visualglm_tools.printing import first_line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No space left on device", "No space left on device"),
        ("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA", "CUDA error: out of memory"),
        (
            "Error(s) in loading:\n\tsize mismatch for a\n\tsize mismatch for b",
            "Error(s) in loading: size mismatch for a",
        ),
        ("\n a heading alone:", "a heading alone:"),
        ("", "OSError"),
    ],
)
def test_of_an_error_the_first_line_that_says_something_is_told(text, expected):
    assert first_line(OSError(text)) == expected
