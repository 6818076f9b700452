"""Per-seed differences of two groups of runs, free of rounding, and what t makes of them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from spem.extras import require
from spem.reproduce.statistics import check_finite, summarise

ROUNDING = 1e-6
"""Tables hold seven digits: what is no larger than this share of the values is rounding."""


def differences(
    subject: str, values: Mapping[int, float], baseline: Mapping[int, float]
) -> tuple[list[float], float]:
    """The differences over common seeds, in their order, and the size of mere rounding.

    Raises:
        ValueError: A number is not finite.
    """
    seeds = sorted(set(values) & set(baseline))
    both = [number for seed in seeds for number in (values[seed], baseline[seed])]
    check_finite(subject, both)
    noise = ROUNDING * max(map(abs, both), default=0.0)
    found = [values[seed] - baseline[seed] for seed in seeds]
    return [d if abs(d) > noise else 0.0 for d in found], noise


def mean_and_sd(found: Sequence[float], noise: float) -> tuple[float, float | None]:
    """Mean and deviation of differences; what is within rounding is 0."""
    summary = summarise(found)
    mean, sd = summary.mean, summary.sd
    return mean if abs(mean) > noise else 0.0, 0.0 if sd is not None and sd <= noise else sd


def correlation(
    values: Mapping[int, float], baseline: Mapping[int, float], noise: float
) -> float | None:
    """Pearson's correlation of the members of the pairs.

    **Formula** r = sum((x - mean x)(y - mean y)) / sqrt(sum((x - mean x)^2) sum((y - mean y)^2)).

    Args:
        values: Seed -> number.
        baseline: Seed -> number; seeds that only one of the two has are left out.
        noise: A side that spreads no further than this does not vary.

    Returns:
        The correlation; None below three pairs, because two points always lie on a line, and where
        one side does not vary.
    """
    seeds = sorted(set(values) & set(baseline))
    x, y = [values[seed] for seed in seeds], [baseline[seed] for seed in seeds]
    if len(seeds) < 3 or max(x) - min(x) <= noise or max(y) - min(y) <= noise:
        return None
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    x, y = [value - mean_x for value in x], [value - mean_y for value in y]
    product = math.fsum(a * b for a, b in zip(x, y, strict=True))
    r = product / (math.hypot(*x) * math.hypot(*y))
    return max(-1.0, min(1.0, r))


def correlation_interval(r: float, n: int, level: float = 0.95) -> tuple[float, float] | None:
    """How little a few pairs say about their correlation: Fisher's interval.

    **Formula** tanh(artanh(r) -+ z((1 + level) / 2) / sqrt(n - 3)), z the normal quantile.

    Args:
        r: The correlation measured.
        n: Number of pairs.
        level: Level of the interval.

    Returns:
        The interval; None below four pairs and for |r| = 1, where there is none.
    """
    if n < 4 or abs(r) >= 1:
        return None
    half = float(scipy_stats().norm.ppf((1 + level) / 2)) / math.sqrt(n - 3)
    return math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)


def scipy_stats() -> Any:
    """scipy.stats, which comes with an extra."""
    return require("scipy.stats", extra="train", purpose="the statistics of paired seeds")


def t_interval(mean: float, sd: float, n: int, level: float) -> tuple[float, float]:
    """**Formula** mean -+ t(n - 1, (1 + level) / 2) * sd / sqrt(n)."""
    half = float(scipy_stats().t.ppf((1 + level) / 2, n - 1)) * sd / math.sqrt(n)
    return mean - half, mean + half


def t_test(mean: float, sd: float, n: int) -> float:
    """Two-sided p of the paired t test."""
    return min(1.0, 2 * float(scipy_stats().t.sf(abs(mean) / (sd / math.sqrt(n)), n - 1)))
