"""What a few paired seeds can show: mean, deviation, t interval of a paired difference.

The unit of every comparison is the difference of two runs with the same seed: they start from the
same backbone and see the same images in the same order. With few seeds the interval is wide, and
that is the honest answer.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spem.extras import require


@dataclass(frozen=True)
class Summary:
    """Mean and standard deviation of one number over seeds.

    Args:
        n: How many values there are, at least 1.
        mean: Their mean.
        sd: Their standard deviation with n - 1 in the denominator; None for n = 1.
    """

    n: int
    mean: float
    sd: float | None


@dataclass(frozen=True)
class PairedDifference:
    """The mean of per-seed differences and its t interval.

    Args:
        n: How many pairs there are; 0 if the two share no seed.
        mean: Mean difference; None for n = 0.
        sd: Standard deviation of the differences, n - 1 in the denominator; None for n < 2.
        low: Lower end of the interval; None where there is none (n < 2, or all differences equal).
        high: Upper end; None like `low`.
        level: The level of the interval.
    """

    n: int
    mean: float | None
    sd: float | None
    low: float | None
    high: float | None
    level: float = 0.95

    @property
    def excludes_zero(self) -> bool:
        """True if an interval exists and 0 lies outside of it."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    @property
    def interval_text(self) -> str:
        """The interval for a table cell, or the reason why there is none."""
        if self.low is not None and self.high is not None:
            return f"[{self.low:+.2f}, {self.high:+.2f}]"
        return "n too small" if self.n < 2 else "all equal"


def summarise(values: Sequence[float]) -> Summary:
    """Mean and standard deviation of `values`.

    **Formula** mean = sum(v) / n, sd = sqrt(sum((v - mean)^2) / (n - 1)).

    Args:
        values: At least one finite number.

    Raises:
        ValueError: `values` is empty or holds a number that is not finite.

    >>> summarise([1.0, 2.0, 3.0])
    Summary(n=3, mean=2.0, sd=1.0)
    """
    if not values:
        raise ValueError("summarise: no values to summarise. Pass at least one number.")
    check_finite("summarise", values)
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Summary(n, mean, None)
    # Equal values have no spread; the rounding of their mean must not invent one.
    spread = 0.0 if min(values) == max(values) else math.fsum((v - mean) ** 2 for v in values)
    return Summary(n, mean, math.sqrt(spread / (n - 1)))


def paired_difference(
    values: Mapping[int, float], baseline: Mapping[int, float], level: float = 0.95
) -> PairedDifference:
    """The mean difference `values - baseline` over the seeds both have, with its t interval.

    **Formula** mean(d) -+ t(n - 1, (1 + level) / 2) * sd(d) / sqrt(n), where d[seed] is
    values[seed] - baseline[seed] and t(k, q) the quantile q of Student's t with k degrees.

    Args:
        values: Seed -> number.
        baseline: Seed -> number; seeds that only one of the two has are left out.
        level: Level of the interval, between 0 and 1.

    Returns:
        The difference. There is no interval below two pairs, and none if all differences are the
        same number: a deviation of 0 says that the values are coarse, not that the difference is
        certain.

    Raises:
        ValueError: `level` is not between 0 and 1, or a number is not finite.
    """
    check_level("paired_difference", level)
    seeds = sorted(set(values) & set(baseline))
    if not seeds:
        return PairedDifference(0, None, None, None, None, level)
    both = [number for seed in seeds for number in (values[seed], baseline[seed])]
    check_finite("paired_difference", both)
    # Subtracting percentages leaves noise in the last digits; what is no larger is 0.
    noise = 1e-12 * max(map(abs, both))
    summary = summarise([_settle(values[seed] - baseline[seed], noise) for seed in seeds])
    mean, sd = _settle(summary.mean, noise), summary.sd
    if sd is None or sd <= noise:
        return PairedDifference(summary.n, mean, None if sd is None else 0.0, None, None, level)
    stats = require("scipy.stats", extra="train", purpose="the t interval")
    half = float(stats.t.ppf((1 + level) / 2, summary.n - 1)) * sd / math.sqrt(summary.n)
    return PairedDifference(summary.n, mean, sd, mean - half, mean + half, level)


def reading(name: str, baseline: str, difference: PairedDifference) -> str:
    """One plain sentence that says what the interval shows, and no more.

    Args:
        name: The module compared.
        baseline: The module it is compared with.
        difference: `name` minus `baseline`, in percentage points of accuracy.
    """
    d = difference
    if d.n == 0 or d.mean is None:
        return f"{name} and {baseline} share no seed: nothing can be compared."
    pairs = f"{d.n} paired seed" + ("s" if d.n > 1 else "")
    start = f"{name} - {baseline}: {d.mean:+.2f} points over {pairs}"
    if d.n < 2:
        return f"{start}. One seed shows no spread (n too small): no conclusion."
    if d.low is None:
        return f"{start}, the same for every seed: no interval can be drawn, no conclusion."
    start = f"{start}, {d.level:.0%} interval {d.interval_text}".replace("%", " %")
    if not d.excludes_zero:
        return f"{start}: it contains 0, so these runs do not show a difference."
    side = "above" if d.mean > 0 else "below"
    return f"{start}: it lies {side} 0, so in this setting {name} is {side} {baseline}."


def prediction_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Where one more run of the same kind would lie.

    **Formula** mean -+ t(n - 1, (1 + level) / 2) * sd * sqrt(1 + 1 / n).

    Args:
        values: The runs there are.
        level: Level of the interval, between 0 and 1.

    Returns:
        The interval; None below three runs, and None if all are the same number: as with
        `paired_difference`, a deviation of 0 says that the values are coarse (few test images), not
        that the next run must give the same number again.

    Raises:
        ValueError: `level` is not between 0 and 1, or a number is not finite.
    """
    check_level("prediction_interval", level)
    check_finite("prediction_interval", values)
    if len(values) < 3:
        return None
    summary = summarise(values)
    noise = 1e-12 * max(map(abs, values))
    if summary.sd is None or summary.sd <= noise:
        return None
    n = summary.n
    stats = require("scipy.stats", extra="train", purpose="the prediction interval")
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * summary.sd * math.sqrt(1 + 1 / n)
    return summary.mean - half, summary.mean + half


def verdict(paper: float, best: Sequence[float]) -> str:
    """Whether a number of the paper could be one more best-epoch run of ours.

    The rule, fixed before any run: "inside" if it lies in the 95 % prediction interval for one
    more run, ends included, "outside" if not, and "n too small to say" where there is no such
    interval (below three runs, or all of them equal). "inside" does not say that the numbers are
    the same; with three runs the interval is 9.9 deviations wide.

    Args:
        paper: The number the paper prints.
        best: Our runs, each at its best epoch on the test images, as the paper's are.

    Raises:
        ValueError: A number is not finite.

    >>> verdict(94.0, [93.8, 94.1, 94.3]), verdict(90.0, [93.8, 94.1, 94.3])
    ('inside', 'outside')
    >>> verdict(94.0, [94.0, 94.1])
    'n too small to say'
    """
    check_finite("verdict", [paper])
    interval = prediction_interval(best)
    if interval is None:
        return "n too small to say"
    return "inside" if interval[0] <= paper <= interval[1] else "outside"


def check_level(subject: str, level: float) -> None:
    """Refuses a level that is not between 0 and 1.

    Raises:
        ValueError: As it says.
    """
    if not 0 < level < 1:
        raise ValueError(f"{subject}: level={level} is no level. Use a number between 0 and 1.")


def check_finite(subject: str, values: Sequence[float]) -> None:
    """Refuses what is not a finite number.

    Raises:
        ValueError: As it says.
    """
    for value in values:
        if not math.isfinite(value):
            raise ValueError(
                f"{subject}: {value} is not a finite number. Look for a run that diverged."
            )


def _settle(value: float, noise: float) -> float:
    return value if abs(value) > noise else 0.0
