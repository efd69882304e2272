"""How times grow with the context."""

import pytest

from tests.benchmarking_helpers import decode_rows
from visualglm_tools.benchmarking.growth import measure_growth, plot_growth


def test_growth_along_a_line_is_found_and_is_linear():
    rows = decode_rows(lambda context: 900 + 0.02 * context) + decode_rows(lambda context: 1800 + 0.04 * context, 4)
    alone, four = measure_growth(rows)
    assert alone["ms_fixed"] == pytest.approx(900)
    assert alone["ms_per_1000_tokens"] == pytest.approx(20)
    assert alone["bend"] == pytest.approx(0, abs=1e-6)
    assert alone["is_linear_at_most"] and four["is_linear_at_most"]
    assert four["over_batch_1"] == pytest.approx(2)


def test_growth_with_the_square_of_the_context_is_not_linear():
    (growth,) = measure_growth(decode_rows(lambda context: 100 + 1e-4 * context**2))
    assert growth["bend"] == pytest.approx(1e-4 * 1984**2 / (100 + 1e-4 * 1984**2), rel=1e-3)
    assert not growth["is_linear_at_most"]


def test_three_contexts_say_nothing_about_growth():
    assert measure_growth(decode_rows(lambda context: context)[:3]) == []


def test_the_plot_of_growth_is_the_same_every_time(tmp_path):
    variants = [{"name": "int4", "rows": decode_rows(lambda context: 900 + 0.02 * context)}]
    files = [tmp_path / "one.png", tmp_path / "two.png"]
    assert all(plot_growth(variants, "forward", file) for file in files)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not plot_growth(variants, "generate, compiled", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
