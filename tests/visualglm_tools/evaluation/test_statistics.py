"""Intervals and tests against values that are known from elsewhere, and what must hold of any."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visualglm_tools.evaluation.statistics import Z95, mcnemar_p_value, wilson_interval


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [
        # Newcombe (1998), Statistics in Medicine 17, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        # docs/evaluating.md
        (15, 20, 0.53, 0.89),
    ],
)
def test_the_interval_is_wilsons(hits, total, low, high):
    places = 2 if total == 20 and hits else 4
    assert tuple(round(bound, places) for bound in wilson_interval(hits, total)) == (low, high)


def test_nothing_is_known_of_nothing():
    assert wilson_interval(0, 0) == (0.0, 1.0)


@given(st.integers(1, 2000), st.data())
def test_an_interval_holds_its_share_and_mirrors_that_of_the_misses(total, data):
    hits = data.draw(st.integers(0, total))
    low, high = wilson_interval(hits, total)
    assert 0 <= low <= hits / total <= high <= 1
    assert (1 - high, 1 - low) == pytest.approx(wilson_interval(total - hits, total), abs=1e-12)


@given(st.integers(1, 500), st.data())
def test_each_bound_is_the_share_that_is_just_so_far_from_what_was_seen(total, data):
    """Wilson's definition: |share - bound| = z * sqrt(bound * (1 - bound) / total)."""
    hits = data.draw(st.integers(1, total))
    low, _ = wilson_interval(hits, total)
    assert hits / total - low == pytest.approx(Z95 * math.sqrt(low * (1 - low) / total), abs=1e-9)


@pytest.mark.parametrize(
    ("better", "worse", "p_value"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 0, 0.0625),
        (6, 0, 0.03125),
        (8, 1, 20 / 512),
        (10, 10, 1.0),
        (4, 14, 2 * (1 + 18 + 153 + 816 + 3060) / 2**18),
        (1, 9, 2 * (1 + 10) / 2**10),
    ],
)
def test_the_test_is_mcnemars(better, worse, p_value):
    assert mcnemar_p_value(better, worse) == pytest.approx(p_value, abs=5e-7)
    assert mcnemar_p_value(worse, better) == mcnemar_p_value(better, worse)


def test_thousands_of_rows_can_be_compared():
    assert 0 < mcnemar_p_value(1000, 1500) < 1e-20 and mcnemar_p_value(4000, 4000) == 1
