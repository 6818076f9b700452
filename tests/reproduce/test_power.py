"""Power of a paired t test against statsmodels, a simulation and the table of the design."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.power import TTestPower

from spem.reproduce.power import power_of, seeds_needed, smallest_visible


@pytest.mark.parametrize(
    ("sd", "n", "visible"),
    [
        (0.35, 3, 1.14),
        (0.35, 6, 0.50),
        (0.35, 10, 0.35),
        (0.5, 3, 1.63),
        (0.5, 6, 0.72),
        (0.5, 10, 0.50),
    ],
)
def test_the_table_of_the_design(sd: float, n: int, visible: float) -> None:
    assert smallest_visible(sd, n) == pytest.approx(visible, abs=0.005)


@pytest.mark.parametrize(("difference", "sd"), [(1.41, 0.35), (2.01, 0.5)])
def test_the_differences_of_the_paper_are_in_reach_of_three_seeds(
    difference: float, sd: float
) -> None:
    assert power_of(difference, sd, 3) == pytest.approx(0.91, abs=0.006)


@pytest.mark.parametrize(("sd", "seeds"), [(0.35, 13), (0.5, 24)])
def test_seeds_for_neighbouring_modules(sd: float, seeds: int) -> None:
    assert seeds_needed(0.3, sd) == seeds_needed(-0.3, sd) == seeds


@pytest.mark.parametrize("n", [2, 3, 6, 8, 30, 500])
@pytest.mark.parametrize(("power", "level"), [(0.8, 0.95), (0.5, 0.99)])
def test_power_of_statsmodels(n: int, power: float, level: float) -> None:
    visible = smallest_visible(0.35, n, power, level)
    assert power_of(visible, 0.35, n, level) == pytest.approx(power, abs=1e-9)
    other = TTestPower().power(visible / 0.35, n, 1 - level, alternative="two-sided")
    if math.isnan(other):  # which it is far out, where scipy's noncentral t fails: see below
        assert n < 6
    else:
        assert other == pytest.approx(power, abs=1e-6)


@pytest.mark.parametrize(
    ("n", "power", "level"), [(2, 0.8, 0.95), (2, 0.5, 0.99), (3, 0.5, 0.99), (6, 0.8, 0.95)]
)
def test_power_by_simulation(n: int, power: float, level: float) -> None:
    visible = smallest_visible(0.35, n, power, level)
    draws = np.random.default_rng(n).normal(visible, 0.35, (40_000, n))
    t = draws.mean(1) / draws.std(1, ddof=1) * math.sqrt(n)
    found = np.abs(t) > stats.t.ppf((1 + level) / 2, n - 1)
    assert found.mean() == pytest.approx(power, abs=0.01)  # four deviations


@pytest.mark.parametrize("n", [2, 3, 50])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_without_a_difference_the_power_is_the_level_of_the_test(n: int, level: float) -> None:
    assert power_of(0.0, 0.35, n, level) == pytest.approx(1 - level, abs=1e-9)


@pytest.mark.parametrize("difference", [10.0, 1.0, 0.05, 0.003])
def test_one_seed_fewer_is_too_few(difference: float) -> None:
    n = seeds_needed(difference, 0.35)
    assert power_of(difference, 0.35, n) >= 0.8
    assert n == 2 or power_of(difference, 0.35, n - 1) < 0.8


def test_without_spread_everything_is_visible() -> None:
    assert smallest_visible(0.0, 3) == 0.0
    assert seeds_needed(0.1, 0.0) == 2
    with pytest.raises(ValueError, match="sd=0"):
        power_of(1.0, 0.0, 3)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: smallest_visible(0.35, 1), "n=1 pairs"),
        (lambda: smallest_visible(-1.0, 3), "sd=-1.0"),
        (lambda: smallest_visible(math.nan, 3), "sd=nan"),
        (lambda: smallest_visible(0.35, 3, power=1.0), "power=1.0"),
        (lambda: smallest_visible(0.35, 3, power=0.04), "power=0.04"),
        (lambda: smallest_visible(0.35, 3, level=95), "level=95"),
        (lambda: seeds_needed(0.0, 0.35), "difference of 0.0"),
        (lambda: seeds_needed(math.inf, 0.35), "difference of inf"),
    ],
)
def test_mistakes(call, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()
