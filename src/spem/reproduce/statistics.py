"""What a few seeds say of one network: mean and deviation, and where one more run would lie.

How two networks compare is told by the differences of their runs of equal seed; see `inference`.
"""

import math
from collections.abc import Sequence
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


def mean_interval(summary: Summary, level: float = 0.95) -> tuple[float, float] | None:
    """The t interval of a mean.

    **Formula** mean -+ t(n - 1, (1 + level) / 2) * sd / sqrt(n).

    Args:
        summary: Mean, deviation and number of the values.
        level: Level of the interval, between 0 and 1.

    Returns:
        The interval; None for one value, and none if all are equal: a deviation of 0 says that the
        values are coarse (few test images), not that the mean is certain.

    Raises:
        ValueError: `level` is not between 0 and 1.
    """
    check_level("mean_interval", level)
    if not summary.sd or summary.sd <= 1e-12 * abs(summary.mean):
        return None
    stats = require("scipy.stats", extra="train", purpose="the interval of a mean")
    quantile = float(stats.t.ppf((1 + level) / 2, summary.n - 1))
    half = quantile * summary.sd / math.sqrt(summary.n)
    return summary.mean - half, summary.mean + half


def prediction_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Where one more run of the same kind would lie.

    **Formula** mean -+ t(n - 1, (1 + level) / 2) * sd * sqrt(1 + 1 / n).

    Args:
        values: The runs there are.
        level: Level of the interval, between 0 and 1.

    Returns:
        The interval; None below three runs, and None if all are the same number: a deviation of 0
        says that the values are coarse (few test images), not that the next run must give the same
        number again.

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
