"""Room: the bytes of low-bit matrices, and what they stand for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import seeded
from visualglm_hf.lowbit_format import count_groups, dequantize_naive, multiply_naive, pack_int4, unpack_int4


@given(st.integers(1, 9), st.integers(1, 70), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_unpacking_returns_what_was_packed(rows, columns, seed):
    codes = torch.randint(-8, 8, (rows, columns), generator=seeded(seed), dtype=torch.int8)
    packed = pack_int4(codes)
    assert packed.dtype == torch.int8
    assert packed.shape == (rows, (columns + 1) // 2)
    assert torch.equal(unpack_int4(packed, columns), codes)


def test_the_even_column_is_in_the_high_nibble():
    assert pack_int4(torch.tensor([[1, -2, -8, 7]])).tolist() == [[0x1E, 0x87 - 0x100]]


@pytest.mark.parametrize(("scales", "groups"), [(torch.ones(3), 1), (torch.ones(3, 4), 4), (None, 0)])
def test_groups_are_counted(scales, groups):
    assert count_groups(scales) == groups


def test_a_value_is_its_code_times_the_scale_of_its_group():
    codes, scales = torch.tensor([[1, 2, 3, -4], [-8, 7, 0, 5]]), torch.tensor([[1.0, -2.0], [0.5, 4.0]]).half()
    matrix = torch.tensor([[1, 2, -6, 8], [-4, 3.5, 0, 20]])
    assert torch.equal(dequantize_naive(pack_int4(codes), scales, 4, 4, torch.float32), matrix)
    assert torch.equal(dequantize_naive(codes.to(torch.int8), scales, 8, 4, torch.float32), matrix)
    x = torch.randn(3, 4, generator=seeded())
    assert torch.equal(multiply_naive(x, pack_int4(codes), scales, 4), x @ matrix.T)
    assert torch.equal(multiply_naive(x, matrix.half(), None, torch.float16), x @ matrix.T)
