"""What bounds a time: reading, or multiplying."""

import pytest

from visualglm_tools.benchmarking.limits import add_rates


@pytest.mark.parametrize(("batch", "limit"), [(1, "reading"), (100, "GEMM")])
def test_small_batches_are_limited_by_reading_and_large_ones_by_multiplying(batch, limit):
    row = {"part": "decode", "batch": batch, "context": 0, "ms": {"median": 1000.0}}
    model = {"token_gb": 10.0, "cache_gb_per_token": 0.0, "block_gflop": 10.0, "head_gflop": 0.0}
    add_rates(row, model, {"read_gb_per_s": 20.0, "gemm_gflop_per_s": 1000.0})
    assert row["limit"] == limit
    assert row["fraction_of_limit"] == (0.5 if batch == 1 else 1.0)


def test_pictures_are_limited_by_multiplying():
    row = {"part": "encode", "batch": 4, "ms": {"median": 2000.0}}
    add_rates(row, {"picture_gflop": 100.0}, {"read_gb_per_s": 20.0, "gemm_gflop_per_s": 400.0})
    assert (row["pictures_per_s"], row["gflop_per_s"]) == (2.0, 200.0)
    assert (row["limit"], row["fraction_of_limit"]) == ("GEMM", 0.5)
