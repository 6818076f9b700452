"""What paired seeds show, by the test their number allows, and what they cannot show.

Below six pairs the interval is Student's t and the test is the paired t test: three values have ten
distinct resamples, and flipping their signs cannot reach p < 0.25. From six pairs on the interval
is the bias-corrected and accelerated bootstrap (BCa) and the test flips signs, which is exact.
BCa is too short at such n: of normal differences its 95 % interval holds the mean in 88 % of cases
with 6 and 8 pairs, 90 % with 10. So the t interval is kept beside it, and a difference counts as
shown only where the interval excludes 0 and the exact test agrees (`PairedTest.shows`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spem.reproduce.equivalence import Equivalence, equivalence, equivalence_sentence
from spem.reproduce.pairs import (
    correlation,
    correlation_interval,
    differences,
    mean_and_sd,
    t_interval,
    t_test,
)
from spem.reproduce.power import smallest_visible
from spem.reproduce.resampling import bca, sign_flip
from spem.reproduce.statistics import Summary, check_level, summarise

__all__ = [
    "Compared",
    "Equivalence",
    "PairedTest",
    "against",
    "correlation_interval",
    "equivalence",
    "equivalence_sentence",
    "holm",
    "p_text",
    "paired_test",
    "reach_sentence",
    "sentence",
    "smallest_visible",
]

FEW = 6
"""Pairs from which on resampling means something: 2 / 2**6 = 0.03 is the smallest sign-flip p."""
MANY = 1000
"""Pairs above which resampling takes minutes to say what t says: t again."""


@dataclass(frozen=True)
class PairedTest:
    """The mean of per-seed differences with interval, test and the correlation of the pairs.

    Args:
        n: Number of pairs.
        mean: Mean difference; None for n = 0.
        sd: Standard deviation of the differences, n - 1 in the denominator; None for n < 2.
        low: Lower end of the interval; None where there is none (n < 2, or all differences equal).
        high: Upper end; None like `low`.
        interval: How the interval was made: "t", "BCa", or "" where there is none.
        p: Two-sided p value of no difference; None where there is no test.
        p_method: "t", "sign-flip", or "" where there is no test.
        correlation: Pearson's, between the two members of the pairs: how much pairing helps. None
            below three pairs (two always lie on a line) or where one side does not vary.
        level: The level of the interval.
        t_low: Lower end of the t interval, whatever `interval` is.
        t_high: Its upper end.
    """

    n: int
    mean: float | None
    sd: float | None
    low: float | None
    high: float | None
    interval: str
    p: float | None
    p_method: str
    correlation: float | None
    level: float = 0.95
    t_low: float | None = None
    t_high: float | None = None

    @property
    def excludes_zero(self) -> bool:
        """True if an interval exists and 0 lies outside of it."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    @property
    def shows(self) -> bool:
        """True if the interval excludes 0 and the test, taken alone, rejects at its level."""
        return self.excludes_zero and self.p is not None and self.p <= _alpha(self.level)

    @property
    def interval_text(self) -> str:
        """The interval for a table cell, or the reason why there is none."""
        return self.interval_in(2)

    def interval_in(self, decimals: int) -> str:
        """`interval_text` with so many decimals."""
        if self.low is not None and self.high is not None:
            return _brackets(self.low, self.high, decimals)
        return "n too small" if self.n < 2 else "all equal"


@dataclass(frozen=True)
class Compared:
    """One row of a table of comparisons: a group of runs, and its difference to the baseline.

    Args:
        name: The group.
        summary: Mean and deviation over all its seeds.
        test: Difference to the baseline over common seeds; None for the baseline itself.
        adjusted_p: `test.p` after Holm within the table; None where there is no p.
    """

    name: str
    summary: Summary
    test: PairedTest | None
    adjusted_p: float | None

    @property
    def shows(self) -> bool:
        """True if the difference is shown alone and after Holm within the table."""
        return (
            self.test is not None
            and self.test.shows
            and self.adjusted_p is not None
            and self.adjusted_p <= _alpha(self.test.level)
        )


def paired_test(
    values: Mapping[int, float], baseline: Mapping[int, float], level: float = 0.95
) -> PairedTest:
    """The mean difference `values - baseline` over common seeds, with the test its n allows.

    **Formula** Below six pairs mean(d) -+ t(n - 1, (1 + level) / 2) * sd(d) / sqrt(n) and the
    paired t test; from six on BCa with 9999 resamples of d, and the share of all 2**n sign
    patterns whose |mean| is at least that of d (above 20 pairs, of a sample of 9999 patterns);
    above 1000 pairs t again.

    Args:
        values: Seed -> number.
        baseline: Seed -> number; seeds that only one of the two has are left out.
        level: Level of the interval, between 0 and 1.

    Returns:
        The test. If all differences are the same number there is no interval and no t test: a
        deviation of 0 says that the values are coarse. Flipping signs needs no deviation, so from
        six pairs on its p is still there. The result does not depend on how seeds are numbered,
        and swapping the two sides mirrors it exactly.

    Raises:
        ValueError: `level` is not between 0 and 1, or a number is not finite.
    """
    check_level("paired_test", level)
    found, noise = differences("paired_test", values, baseline)
    n = len(found)
    if n == 0:
        return PairedTest(0, None, None, None, None, "", None, "", None, level)
    mean, sd = mean_and_sd(found, noise)
    r = correlation(values, baseline, noise)
    p, p_method = None, ""
    resampled = FEW <= n <= MANY
    if resampled:
        p, p_method = sign_flip(found, noise), "sign-flip"
    if sd is None or sd == 0:
        return PairedTest(n, mean, sd, None, None, "", p, p_method, r, level)
    t_low, t_high = low, high = t_interval(mean, sd, n, level)
    interval = "t"
    if resampled:
        low, high = bca(found, level)
        interval = "BCa"
    else:
        p, p_method = t_test(mean, sd, n), "t"
    return PairedTest(n, mean, sd, low, high, interval, p, p_method, r, level, t_low, t_high)


def against(
    groups: Mapping[str, Mapping[int, float]], baseline: str, level: float = 0.95
) -> list[Compared]:
    """One row for each group with at least one number, each compared with the baseline.

    Args:
        groups: Name -> seed -> number; the order of the rows.
        baseline: The group the others are compared with; without it nothing is compared.
        level: Level of the intervals.

    Raises:
        ValueError: As `paired_test`.
    """
    reference = groups.get(baseline, {})
    tests = {
        name: paired_test(numbers, reference, level)
        for name, numbers in groups.items()
        if reference and numbers and name != baseline
    }
    adjusted = dict(zip(tests, holm([test.p for test in tests.values()]), strict=True))
    return [
        Compared(name, summarise(list(numbers.values())), tests.get(name), adjusted.get(name))
        for name, numbers in groups.items()
        if numbers
    ]


def holm(p: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjusted p values; None (no test) stays None and does not count.

    **Formula** The k-th smallest of m becomes max over j <= k of min(1, (m - j + 1) * p_(j)).

    Args:
        p: The p values of one table.

    Raises:
        ValueError: A p value does not lie in 0..1.

    >>> holm([0.01, None, 0.04, 0.02])
    [0.03, None, 0.04, 0.04]
    """
    order = sorted((value, i) for i, value in enumerate(p) if value is not None)
    adjusted: list[float | None] = [None] * len(p)
    largest = 0.0
    for rank, (value, i) in enumerate(order):
        if not 0 <= value <= 1:
            raise ValueError(f"holm: {value} is no p value. Pass numbers from 0 to 1, or None.")
        largest = max(largest, min(1.0, (len(order) - rank) * value))
        adjusted[i] = largest
    return adjusted


def sentence(
    name: str,
    baseline: str,
    test: PairedTest,
    adjusted_p: float | None = None,
    *,
    unit: str = "points",
    decimals: int = 2,
    pair: str = "seed",
    family: str = "all comparisons of the table",
) -> str:
    """What the test shows in plain words, and what so few seeds cannot show; no more than that.

    Args:
        name: What was compared.
        baseline: What it was compared with.
        test: `name` minus `baseline`.
        adjusted_p: Its p after Holm within the family; None if this is the only comparison.
        unit: Unit of the difference; "" for none.
        decimals: Decimals of the numbers.
        pair: What makes a pair.
        family: The comparisons that Holm corrected for, in words.
    """
    if test.n == 0 or test.mean is None:
        return f"{name} and {baseline} share no {pair}: nothing can be compared."
    of = f" {unit}" if unit else ""
    pairs = f"{test.n} paired {pair}" + ("s" if test.n > 1 else "")
    start = f"{name} - {baseline}: {test.mean:+.{decimals}f}{of} over {pairs}"
    if test.n < 2:
        return f"{start}. One {pair} shows no spread (n too small): no conclusion."
    if test.low is None or test.p is None:
        return f"{start}, the same for every {pair}: no interval can be drawn, no conclusion."
    start = f"{start}, {_percent(test.level)} interval {test.interval_in(decimals)}"
    start += f" ({_method(test, decimals)}), {p_text(test.p)} ({test.p_method})"
    if not test.shows:
        why = "it contains 0"
        if test.excludes_zero:
            why = "it leaves 0 out, but the exact test does not reject"
        return (
            f"{start}: {why}, so these runs do not show a difference. {_cannot(test, of, decimals)}"
        )
    side = "above" if test.low > 0 else "below"
    claim = f"{start}: it lies {side} 0"
    shown = f"so in this setting {name} is {side} {baseline}"
    if adjusted_p is None:
        return f"{claim}, {shown}."
    after = f"correction for {family} (Holm {p_text(adjusted_p)})"
    if adjusted_p <= _alpha(test.level):
        return f"{claim}, {shown}, also after {after}."
    return (
        f"{claim} if looked at alone, but not after {after}: among so many comparisons these runs "
        f"do not show a difference. {_cannot(test, of, decimals)}"
    )


def reach_sentence(lines: Sequence[Compared]) -> str:
    """Says so where so few pairs cannot reach significance after Holm, however large a difference.

    Args:
        lines: The rows of one table.

    Returns:
        The sentence, or "" where a difference could be shown.
    """
    tests = [line.test for line in lines if line.test is not None and line.test.p is not None]
    if not tests or any(test.p_method != "sign-flip" for test in tests):
        return ""
    n = max(test.n for test in tests)
    smallest = 2.0 ** (1 - n)
    if len(tests) * smallest <= _alpha(tests[0].level):
        return ""
    return (
        f"The smallest p that flipping the signs of {n} pairs can give is {smallest:.2g}: after "
        f"Holm among {len(tests)} comparisons no difference could have been shown, however large."
    )


def p_text(p: float) -> str:
    """A p value for a sentence.

    >>> p_text(0.03125), p_text(0.0001), p_text(1.0)
    ('p = 0.031', 'p < 0.001', 'p = 1')
    """
    if p < 0.001:
        return "p < 0.001"
    return f"p = {p:.3f}" if p < 0.9995 else "p = 1"


def _cannot(test: PairedTest, unit: str, decimals: int) -> str:
    """What so many pairs with such a deviation cannot be expected to show."""
    if test.sd is None:
        return ""
    visible = smallest_visible(test.sd, test.n, level=test.level)
    return (
        f"With the measured deviation of {test.sd:.{decimals}f}, {test.n} pairs find a difference "
        f"of about {visible:.{decimals}f}{unit} four times in five; smaller ones they mostly miss."
    )


def _method(test: PairedTest, decimals: int) -> str:
    if test.interval == "t" or test.t_low is None or test.t_high is None:
        return test.interval
    return f"{test.interval}; t {_brackets(test.t_low, test.t_high, decimals)}"


def _brackets(low: float, high: float, decimals: int) -> str:
    return f"[{low:+.{decimals}f}, {high:+.{decimals}f}]"


def _percent(level: float) -> str:
    return f"{100 * level:g} %"


def _alpha(level: float) -> float:
    """1 - level, without the noise in its last digit: 1 - 0.95 is 0.050000000000000044."""
    return round(1 - level, 12)
