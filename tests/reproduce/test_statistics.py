"""Statistics against scipy and against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from spem.reproduce.statistics import (
    mean_interval,
    prediction_interval,
    summarise,
    verdict,
)

CLOSE = 1e-9


def test_mean_and_deviation_by_hand() -> None:
    summary = summarise([94.0, 95.0, 97.0])
    assert summary.n == 3
    assert summary.mean == pytest.approx(286 / 3, abs=CLOSE)
    # squared deviations 16/9, 1/9, 25/9: their sum 14/3, over n - 1 = 2
    assert summary.sd == pytest.approx(math.sqrt(7 / 3), abs=CLOSE)


def test_one_value_has_no_deviation() -> None:
    assert summarise([3.5]).sd is None


def test_equal_values_have_none_either() -> None:
    assert summarise([0.1, 0.1, 0.1]).sd == 0.0


def test_an_interval_by_hand() -> None:
    """Values 1, 2, 3: mean 2, deviation 1, t(2, 0.975) = 4.30265."""
    half = 4.302652729749464 / math.sqrt(3)
    assert mean_interval(summarise([1.0, 2.0, 3.0])) == pytest.approx((2 - half, 2 + half))


@pytest.mark.parametrize("n", [2, 3, 6, 10])
@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_intervals_of_scipy(n: int, level: float) -> None:
    values = np.random.default_rng(100 * n).normal(94, 1, n)
    expected = stats.t.interval(level, n - 1, loc=np.mean(values), scale=stats.sem(values))
    assert mean_interval(summarise(list(values)), level) == pytest.approx(expected, abs=CLOSE)


def test_no_spread_is_no_certainty() -> None:
    assert mean_interval(summarise([94.0])) is None
    assert mean_interval(summarise([94.1, 94.1, 94.1])) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        summarise([1.0, bad])


def test_nothing_to_summarise() -> None:
    with pytest.raises(ValueError, match="no values"):
        summarise([])


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0])
def test_no_level(level: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        mean_interval(summarise([1.0, 2.0]), level)


def test_a_prediction_interval_by_hand() -> None:
    """1, 2, 3: mean 2, deviation 1, t(2, 0.975) = 4.30265, times sqrt(4/3)."""
    half = 4.302652729749464 * math.sqrt(4 / 3)
    assert prediction_interval([1.0, 2.0, 3.0]) == (
        pytest.approx(2 - half, abs=CLOSE),
        pytest.approx(2 + half, abs=CLOSE),
    )


@pytest.mark.parametrize("n", [3, 8])
def test_one_more_run_lies_inside_as_often_as_said(n: int) -> None:
    draws = np.random.default_rng(n).normal(94, 0.2, (1000, n + 1))
    verdicts = [verdict(more, runs) for *runs, more in draws.tolist()]
    assert set(verdicts) == {"inside", "outside"}
    assert verdicts.count("inside") == pytest.approx(950, abs=21)  # three deviations


def test_the_rule_of_the_verdict() -> None:
    interval = prediction_interval([94.0, 94.3, 94.1])
    assert interval is not None
    low, high = interval
    runs = [94.1, 94.0, 94.3]
    assert verdict(low + 1e-9, runs) == verdict(high - 1e-9, runs) == "inside"
    assert verdict(low - 1e-9, runs) == verdict(high + 1e-9, runs) == "outside"


@pytest.mark.parametrize("runs", [[], [94.0], [94.0, 94.5], [94.0, 94.0, 94.0]])
def test_too_few_runs_or_no_spread_have_no_verdict(runs: list[float]) -> None:
    assert prediction_interval(runs) is None
    assert verdict(94.0, runs) == "n too small to say"


def test_what_cannot_be_predicted() -> None:
    with pytest.raises(ValueError, match="finite"):
        verdict(math.nan, [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="finite"):
        prediction_interval([1.0, math.inf, 3.0])
    with pytest.raises(ValueError, match="level"):
        prediction_interval([1.0, 2.0, 3.0], 95)
