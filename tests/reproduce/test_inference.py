"""Paired tests against scipy, statsmodels, brute force, and cases whose answer is known."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_paired

from spem.reproduce.inference import (
    PairedTest,
    against,
    correlation_interval,
    equivalence,
    equivalence_sentence,
    holm,
    paired_test,
)

CLOSE = 1e-9
# accuracies of 10,000 images, whose differences are often equal
accuracies = st.integers(5000, 9900).map(lambda k: k / 100)


def pairs(n: int, key: int = 0) -> tuple[dict[int, float], dict[int, float]]:
    rng = np.random.default_rng([n, key])
    shared = rng.normal(0, 0.3, n)
    a, b = 94 + shared + rng.normal(0, 0.3, n), 93.6 + shared + rng.normal(0, 0.3, n)
    return dict(enumerate(a.tolist())), dict(enumerate(b.tolist()))


def ends(test: PairedTest) -> tuple[float, float]:
    assert test.low is not None
    assert test.high is not None
    return test.low, test.high


def apart(differences: Sequence[float]) -> PairedTest:
    """The test of given differences."""
    return paired_test({i: 50 + d for i, d in enumerate(differences)}, dict.fromkeys(range(99), 50))


# ---- below six pairs: Student's t


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_few_pairs_are_the_paired_t_test_of_scipy(n: int, level: float) -> None:
    a, b = pairs(n)
    test = paired_test(a, b, level)
    other = stats.ttest_rel(list(a.values()), list(b.values()))
    low, high = other.confidence_interval(level)
    assert (test.n, test.interval, test.p_method) == (n, "t", "t")
    assert test.p == pytest.approx(other.pvalue, abs=CLOSE)
    assert (test.low, test.high) == (pytest.approx(low, abs=CLOSE), pytest.approx(high, abs=CLOSE))
    assert (test.t_low, test.t_high) == (test.low, test.high)
    assert test.excludes_zero == test.shows == (other.pvalue < 1 - level)


def test_one_pair_has_neither_interval_nor_test() -> None:
    test = apart([0.5])
    assert (test.n, test.mean, test.sd, test.low, test.high) == (1, 0.5, None, None, None)
    assert (test.interval, test.p, test.p_method, test.correlation) == ("", None, "", None)
    assert test.interval_text == "n too small"
    assert not test.shows


def test_no_pair() -> None:
    test = paired_test({0: 1.0}, {1: 1.0})
    assert (test.n, test.mean, test.p) == (0, None, None)
    assert paired_test({}, {}) == test


def test_two_pairs_by_hand() -> None:
    """Differences 1 and 3: mean 2, standard error 1, t = 2 with one degree: p = 2/pi arccot 2."""
    test = apart([1.0, 3.0])
    assert test.p == pytest.approx(2 * math.atan(1 / 2) / math.pi, abs=CLOSE)
    half = math.tan(0.475 * math.pi)
    assert (test.low, test.high) == (pytest.approx(2 - half), pytest.approx(2 + half))
    assert test.correlation is None  # two points always lie on a line


@pytest.mark.parametrize("n", [2, 3, 5, 6, 8, 25])
def test_identical_runs_show_nothing(n: int) -> None:
    same, _ = pairs(n)
    test = paired_test(same, same)
    assert (test.mean, test.sd, test.low, test.high, test.interval) == (0.0, 0.0, None, None, "")
    assert test.p == (None if n < 6 else 1.0)
    assert test.interval_text == "all equal"
    assert not test.shows
    assert equivalence(same, same, 0.5).shown is False


@pytest.mark.parametrize(("n", "p"), [(3, None), (6, 2 / 64), (8, 2 / 256)])
def test_a_constant_shift_is_no_certainty(n: int, p: float | None) -> None:
    """The spread is 0, not an interval of no width; flipping signs needs no spread."""
    baseline, _ = pairs(n)
    test = paired_test({seed: value + 0.3 for seed, value in baseline.items()}, baseline)
    assert test.mean == pytest.approx(0.3)
    assert (test.sd, test.low, test.p) == (0.0, None, p)
    assert test.correlation == pytest.approx(1.0)
    assert not test.shows


def test_seven_digits_of_a_table_are_no_spread() -> None:
    """One image of 360 more for every seed, written with seven digits, differs in the seventh."""
    a, b = (
        [f"{100 * k / 360:.7g}" for k in (344, 345, 341)],
        [f"{100 * k / 360:.7g}" for k in (343, 344, 340)],
    )
    written = [float(x) - float(y) for x, y in zip(a, b, strict=True)]
    assert max(written) - min(written) > 5e-6
    test = paired_test(dict(enumerate(map(float, a))), dict(enumerate(map(float, b))))
    assert (test.sd, test.low) == (0.0, None)


# ---- from six pairs on: sign flips and BCa


def test_the_smallest_p_of_sign_flips() -> None:
    six = apart([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert (six.p, six.p_method, six.interval) == (2 / 64, "sign-flip", "BCa")
    assert apart([-d / 10 for d in range(1, 9)]).p == 2 / 256
    # with the smallest turned, all signs + and that one - reach as far: 4 patterns of 64
    assert apart([-0.1, 0.2, 0.3, 0.4, 0.5, 0.6]).p == 4 / 64


@pytest.mark.parametrize("n", [6, 7, 10])
def test_sign_flips_one_by_one(n: int) -> None:
    for key in range(5):
        rng = np.random.default_rng([n, key])
        hundredths = rng.integers(-30, 60, n)  # as whole numbers, so that ties are ties
        count = sum(
            abs(sum(s * d for s, d in zip(signs, hundredths, strict=True))) >= abs(hundredths.sum())
            for signs in itertools.product((1, -1), repeat=n)
        )
        assert apart([d / 100 for d in hundredths]).p == count / 2**n


@pytest.mark.parametrize("n", [6, 9, 12])
def test_sign_flips_of_scipy(n: int) -> None:
    a, b = pairs(n, key=1)
    differences = np.array(list(a.values())) - np.array(list(b.values()))
    other = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    assert paired_test(a, b).p == pytest.approx(other.pvalue, abs=CLOSE)


def test_many_pairs_sample_the_sign_flips() -> None:
    """Above 20 pairs p is near that of the t test, and the same each time."""
    a, b = pairs(30, key=1)
    b = {seed: value + 0.35 for seed, value in b.items()}
    expected = stats.ttest_rel(list(a.values()), list(b.values())).pvalue
    assert 0.02 < expected < 0.6
    test = paired_test(a, b)
    assert test.p == pytest.approx(expected, abs=0.03)
    assert test == paired_test(a, b)


def test_very_many_pairs_are_not_resampled() -> None:
    a, b = pairs(1001)
    test = paired_test(a, b)
    other = stats.ttest_rel(list(a.values()), list(b.values()))
    assert (test.interval, test.p_method) == ("t", "t")
    assert test.p == pytest.approx(other.pvalue, abs=CLOSE)


def exact_bca(differences: np.ndarray, level: float) -> tuple[float, float]:
    """BCa from its definition, over all n**n resamples."""
    n = len(differences)
    means = np.array([np.mean(r) for r in itertools.product(differences, repeat=n)])
    mean = differences.mean()
    z0 = stats.norm.ppf((np.mean(means < mean - CLOSE) + np.mean(means <= mean + CLOSE)) / 2)
    left_out = np.array([np.delete(differences, i).mean() for i in range(n)])
    u = left_out.mean() - left_out
    a = (u**3).sum() / (6 * (u**2).sum() ** 1.5)
    z = stats.norm.ppf([(1 - level) / 2, (1 + level) / 2])
    return tuple(np.quantile(means, stats.norm.cdf(z0 + (z0 + z) / (1 - a * (z0 + z)))))


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_bca_over_all_resamples(skewed: bool, level: float) -> None:
    differences = np.array([0.1, 0.15, 0.2, 0.3, 0.35, 1.9 if skewed else 0.4])
    test = paired_test(dict(enumerate(differences + 50)), dict.fromkeys(range(6), 50.0), level)
    low, high = exact_bca(differences, level)
    # 9999 of the 46656 resamples: a few percent of the width
    assert test.low == pytest.approx(low, abs=0.03 * (high - low))
    assert test.high == pytest.approx(high, abs=0.03 * (high - low))
    if skewed:  # the acceleration matters: the t interval is symmetric about the mean
        found_low, found_high = ends(test)
        mean = differences.mean()
        assert found_high - mean > 1.5 * (mean - found_low)


def test_both_intervals_are_kept_from_six_on() -> None:
    a, b = pairs(6)
    test = paired_test(a, b)
    low, high = stats.ttest_rel(list(a.values()), list(b.values())).confidence_interval(0.95)
    assert (test.t_low, test.t_high) == (pytest.approx(low), pytest.approx(high))
    bca_low, bca_high = ends(test)
    assert bca_high - bca_low < high - low


# ---- what holds for every test


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.lists(st.tuples(accuracies, accuracies), min_size=1, max_size=8))
def test_swapping_mirrors_exactly(rows: list[tuple[float, float]]) -> None:
    a, b = dict(enumerate(x for x, _ in rows)), dict(enumerate(y for _, y in rows))
    one, other = paired_test(a, b), paired_test(b, a)
    assert one.mean == -other.mean
    assert (one.sd, one.p, one.correlation) == (other.sd, other.p, other.correlation)
    if one.low is not None:
        low, high = ends(one)
        assert low <= high
        assert (-high, -low) == ends(other)
        assert one.t_low == -other.t_high


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.lists(st.tuples(accuracies, accuracies), min_size=1, max_size=8), st.randoms())
def test_seeds_are_only_names(rows: list[tuple[float, float]], random: object) -> None:
    names = list(range(100, 100 + len(rows)))
    random.shuffle(names)
    test = paired_test(dict(enumerate(x for x, _ in rows)), dict(enumerate(y for _, y in rows)))
    renamed = paired_test(
        {name: x for name, (x, _) in zip(names, rows, strict=True)},
        {name: y for name, (_, y) in zip(names, rows, strict=True)},
    )
    for field in dataclasses.fields(PairedTest):
        assert getattr(test, field.name) == pytest.approx(getattr(renamed, field.name), abs=CLOSE)


@pytest.mark.parametrize("n", [2, 6])
def test_missing_seeds_are_left_out(n: int) -> None:
    a, b = pairs(n)
    assert paired_test(a | {77: 1.0}, b | {88: 99.0}) == paired_test(a, b)


@pytest.mark.parametrize("n", [3, 8])
def test_the_correlation_of_scipy(n: int) -> None:
    a, b = pairs(n)
    other = stats.pearsonr(list(a.values()), list(b.values()))
    assert paired_test(a, b).correlation == pytest.approx(other.statistic, abs=CLOSE)
    if n == 8:
        low, high = other.confidence_interval(0.9)
        found = correlation_interval(other.statistic, n, 0.9)
        assert found == (pytest.approx(low, abs=CLOSE), pytest.approx(high, abs=CLOSE))


def test_no_correlation_without_spread() -> None:
    assert apart([0.1, 0.2, 0.4]).correlation is None
    assert correlation_interval(0.5, 3) is correlation_interval(1.0, 8) is None


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        paired_test({0: bad}, {0: 1.0})
    with pytest.raises(ValueError, match="finite"):
        equivalence({0: bad}, {0: 1.0}, 1.0)


def test_no_level() -> None:
    with pytest.raises(ValueError, match="level=95 is no level"):
        paired_test({0: 1.0}, {0: 1.0}, 95)


# ---- simulations: the promise of an interval is how often it holds


def test_t_intervals_hold_as_often_as_they_say() -> None:
    draws = np.random.default_rng(4).normal(0.3, 0.35, (500, 4))
    tests = [apart(d) for d in draws]
    held = sum(low <= 0.3 <= high for low, high in map(ends, tests))
    assert 0.93 * 500 <= held <= 0.97 * 500


@pytest.mark.parametrize("n", [6, 8])
def test_no_difference_is_rarely_shown_although_bca_is_short(n: int) -> None:
    tests = [apart(d) for d in np.random.default_rng(n).normal(0, 0.35, (400, n))]
    assert sum(test.excludes_zero for test in tests) > 0.08 * 400
    assert sum(test.shows for test in tests) < 0.07 * 400


# ---- Holm


@pytest.mark.parametrize("m", [1, 2, 3, 7, 20])
def test_holm_of_statsmodels(m: int) -> None:
    rng = np.random.default_rng(m)
    for top in (0.05, 1.0):
        p = rng.uniform(0, top, m).round(2).tolist()  # rounded, so that there are ties
        assert holm(p) == pytest.approx(multipletests(p, method="holm")[1].tolist(), abs=CLOSE)


def test_what_has_no_p_does_not_count() -> None:
    assert holm([None, 0.02, None, 0.03]) == [None, 0.04, None, 0.04]
    assert holm([None]) == [None]
    assert holm([]) == []


@pytest.mark.parametrize("bad", [-0.1, 1.5, math.nan])
def test_no_p(bad: float) -> None:
    with pytest.raises(ValueError, match="no p value"):
        holm([0.5, bad])


def test_a_table_is_corrected_as_a_whole() -> None:
    a, b = pairs(4)
    c = {seed: value + 0.01 * seed for seed, value in a.items()}
    lines = against({"x": a, "none": b, "y": c, "empty": {}, "one": {0: 3.0}}, "none")
    assert [line.name for line in lines] == ["x", "none", "y", "one"]
    assert [line.summary.n for line in lines] == [4, 4, 4, 1]
    p = [stats.ttest_rel(list(v.values()), list(b.values())).pvalue for v in (a, c)]
    expected = multipletests(p, method="holm")[1]
    assert [line.adjusted_p for line in lines] == [
        pytest.approx(expected[0]),
        None,
        pytest.approx(expected[1]),
        None,
    ]
    assert lines[1].test is None
    assert all(line.test is None for line in against({"x": a}, "none"))


# ---- equivalence


@pytest.mark.parametrize("n", [2, 3, 6, 12])
@pytest.mark.parametrize("margin", [0.1, 0.5, 2.0])
def test_two_one_sided_tests_of_statsmodels(n: int, margin: float) -> None:
    a, b = pairs(n, key=2)
    found = equivalence(a, b, margin)
    p, _, _ = ttost_paired(np.array(list(a.values())), np.array(list(b.values())), -margin, margin)
    assert found.p == pytest.approx(p, abs=CLOSE)
    assert found.shown == (p < 0.05)
    low, high = stats.ttest_rel(list(a.values()), list(b.values())).confidence_interval(0.9)
    assert (found.low90, found.high90) == (pytest.approx(low), pytest.approx(high))


def test_equivalence_of_too_little() -> None:
    assert equivalence({0: 1.0}, {1: 1.0}, 1.0).mean is None
    one = equivalence({0: 1.0}, {0: 1.5}, 1.0)
    assert (one.n, one.mean, one.p, one.shown) == (1, -0.5, None, False)
    assert "too few pairs" in equivalence_sentence("bf16", "fp32", one)
    same = equivalence({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}, 1.0)
    assert "the same for every seed" in equivalence_sentence("bf16", "fp32", same)


@pytest.mark.parametrize("margin", [0.0, -1.0, math.nan, math.inf])
def test_no_margin(margin: float) -> None:
    with pytest.raises(ValueError, match="no margin"):
        equivalence({0: 1.0}, {0: 1.0}, margin)


def test_what_equivalence_says() -> None:
    baseline = dict.fromkeys(range(6), 50.0)
    near = {i: 50 + d for i, d in enumerate([0.1, -0.1, 0.05, -0.05, 0.1, -0.05])}
    assert "are equal within 0.3 points: 90 % interval [-0.06" in equivalence_sentence(
        "bf16", "fp32", equivalence(near, baseline, 0.3)
    )
    text = equivalence_sentence("bf16", "fp32", equivalence(near, baseline, 0.05))
    assert "are not shown to be equal within 0.05 points" in text
    assert "does not show that they differ" in text
