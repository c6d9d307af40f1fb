"""Squares and tight windows are compared where they cost the same."""
from __future__ import annotations

import pytest
from conftest import ROOT, load_module

load_module("quality", ROOT / "benchmarks" / "quality.py")
agreement = load_module("qtd_agreement", ROOT / "benchmarks" / "agreement.py")


def point(cost: float, agrees: float):
    return agreement.Point(cost, agrees, 1.0, 1.0)


@pytest.mark.parametrize("cost, expected", [(0.4, 25.0), (0.5, 27.0), (0.6, 29.0), (0.7, 29.0), (0.9, 31.0), (0.39, None), (0.91, None)])
def test_squares_are_read_between_what_was_measured_at_the_best_that_a_cost_buys(cost, expected):
    squares = [point(0.4, 25.0), point(0.6, 29.0), point(0.8, 28.0), point(0.9, 31.0)]
    found = agreement.squares_at(cost, squares)
    assert found == (expected if expected is None else pytest.approx(expected))


def test_a_row_tells_of_squares_only_beside_tight_windows():
    found = {(0.4, "square"): [point(0.5, 25.0), point(0.9, 29.0)], (0.4, "tight"): [point(0.3, 26.0), point(0.7, 30.0)]}
    assert [row[4] for row in agreement.agreement_rows(found)] == ["", "", "", "27.0"]
