"""Statistics against scipy and against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from spem.reproduce.statistics import (
    PairedDifference,
    paired_difference,
    prediction_interval,
    reading,
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
    """Differences 1, 2, 3: mean 2, deviation 1, t(2, 0.975) = 4.30265."""
    d = paired_difference({0: 2.0, 1: 4.0, 2: 6.0}, {0: 1.0, 1: 2.0, 2: 3.0})
    assert (d.n, d.mean, d.sd) == (3, pytest.approx(2.0), pytest.approx(1.0))
    assert d.low == pytest.approx(2 - 4.302652729749464 / math.sqrt(3), abs=CLOSE)
    assert d.high == pytest.approx(2 + 4.302652729749464 / math.sqrt(3), abs=CLOSE)
    assert not d.excludes_zero
    assert d.interval_text == "[-0.48, +4.48]"


@pytest.mark.parametrize("n", [2, 3, 6, 10])
@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_intervals_of_scipy(n: int, level: float) -> None:
    rng = np.random.default_rng(100 * n)
    a, b = rng.normal(94, 1, n), rng.normal(93, 1, n)
    d = paired_difference(dict(enumerate(a)), dict(enumerate(b)), level)
    test = stats.ttest_rel(a, b)
    low, high = test.confidence_interval(level)
    assert (d.low, d.high) == (pytest.approx(low, abs=CLOSE), pytest.approx(high, abs=CLOSE))
    assert d.excludes_zero == (test.pvalue < 1 - level)
    half = stats.t.interval(level, n - 1, loc=np.mean(a - b), scale=stats.sem(a - b))
    assert (d.low, d.high) == (pytest.approx(half[0], abs=CLOSE), pytest.approx(half[1], abs=CLOSE))
    assert d.sd == pytest.approx(np.std(a - b, ddof=1), abs=CLOSE)


def test_only_common_seeds_count() -> None:
    """Pairs are by seed, whatever the order and whatever else there is."""
    d = paired_difference({7: 3.0, 1: 1.0, 5: 9.0}, {1: 0.0, 7: 1.0, 2: 50.0})
    assert (d.n, d.mean) == (2, pytest.approx(1.5))
    assert d.sd == pytest.approx(math.sqrt(0.5))


def test_too_few_pairs() -> None:
    none = paired_difference({0: 1.0}, {1: 1.0})
    assert none == PairedDifference(0, None, None, None, None)
    one = paired_difference({0: 3.0}, {0: 1.0})
    assert one == PairedDifference(1, 2.0, None, None, None)
    assert none.interval_text == one.interval_text == "n too small"
    assert not none.excludes_zero
    assert not one.excludes_zero


def test_equal_differences_are_no_certainty() -> None:
    """Percentages of 360 images, one image more each time: rounding must not fake a deviation."""
    a, b = [100 * k / 360 for k in (344, 345, 347)], [100 * k / 360 for k in (343, 344, 346)]
    d = paired_difference(dict(enumerate(a)), dict(enumerate(b)))
    assert (d.n, d.sd, d.low, d.high) == (3, 0.0, None, None)
    assert d.mean == pytest.approx(100 / 360)
    assert d.interval_text == "all equal"
    assert not d.excludes_zero


def test_no_difference_is_zero() -> None:
    """Differences 1, -1 and 0 images of 360 have mean 0, not 1e-14."""
    a, b = [100 * k / 360 for k in (344, 340, 347)], [100 * k / 360 for k in (343, 341, 347)]
    assert paired_difference(dict(enumerate(a)), dict(enumerate(b))).mean == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        summarise([1.0, bad])
    with pytest.raises(ValueError, match="finite"):
        paired_difference({0: bad, 1: 1.0}, {0: 1.0, 1: 1.0})


def test_nothing_to_summarise() -> None:
    with pytest.raises(ValueError, match="no values"):
        summarise([])


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0])
def test_no_level(level: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        paired_difference({0: 1.0}, {0: 1.0}, level)


@pytest.mark.parametrize(
    ("difference", "says", "never"),
    [
        (PairedDifference(3, 0.5, 0.4, -0.49, 1.49), "contains 0", "above"),
        (PairedDifference(3, 0.5, 0.1, 0.25, 0.75), "lies above 0", "contains"),
        (PairedDifference(3, -0.5, 0.1, -0.75, -0.25), "lies below 0", "contains"),
        (PairedDifference(1, 0.5, None, None, None), "no conclusion", "lies"),
        (PairedDifference(3, 0.5, 0.0, None, None), "no conclusion", "lies"),
        (PairedDifference(0, None, None, None, None), "nothing can be compared", "lies"),
    ],
)
def test_the_sentence_claims_no_more_than_the_interval(
    difference: PairedDifference, says: str, never: str
) -> None:
    sentence = reading("spem", "none", difference)
    assert sentence.startswith("spem ")
    assert says in sentence
    assert never not in sentence


def test_the_sentence_names_numbers() -> None:
    sentence = reading("spem", "none", PairedDifference(3, 0.5, 0.4, -0.49, 1.49))
    assert "+0.50 points over 3 paired seeds, 95 % interval [-0.49, +1.49]" in sentence


# ---- one more run, and the verdict on a number of the paper


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
