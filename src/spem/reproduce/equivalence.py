"""Whether two ways of training differ by less than a margin: two one-sided t tests."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from spem.reproduce.pairs import differences, mean_and_sd, scipy_stats, t_interval


@dataclass(frozen=True)
class Equivalence:
    """Two one-sided t tests: is the difference smaller than a margin fixed beforehand?

    Args:
        n: Number of pairs.
        mean: Mean difference; None for n = 0.
        low90: Lower end of the 90 % t interval; None for n < 2 or if all differences are equal.
        high90: Its upper end.
        p: The larger of the two one-sided p values; None like `low90`.
        shown: True if the 90 % interval lies within the margin, which is p < 0.05.
        margin: Differences below this, either way, count as none.
    """

    n: int
    mean: float | None
    low90: float | None
    high90: float | None
    p: float | None
    shown: bool
    margin: float


def equivalence(
    values: Mapping[int, float], baseline: Mapping[int, float], margin: float
) -> Equivalence:
    """Two one-sided t tests of `values - baseline` against -margin and +margin.

    **Formula** p = max(P(T > (mean + margin) / se), P(T < (mean - margin) / se)), T of Student's t
    with n - 1 degrees; shown if mean -+ t(n - 1, 0.95) se lies within -margin..margin.

    Args:
        values: Seed -> number.
        baseline: Seed -> number; seeds that only one of the two has are left out.
        margin: The largest difference that counts as none, above 0, in the unit of the values. Fix
            it before looking.

    Returns:
        The result. With equal differences, all 0 included, nothing is shown: without a deviation
        there is no measure of what the next seed would bring.

    Raises:
        ValueError: The margin is not above 0, or a number is not finite.
    """
    if not (math.isfinite(margin) and margin > 0):
        raise ValueError(
            f"equivalence: margin={margin} is no margin. Use a number above 0, in the unit of "
            "the values."
        )
    found, noise = differences("equivalence", values, baseline)
    n = len(found)
    if n == 0:
        return Equivalence(0, None, None, None, None, False, margin)
    mean, sd = mean_and_sd(found, noise)
    if sd is None or sd == 0:
        return Equivalence(n, mean, None, None, None, False, margin)
    t = scipy_stats().t
    se = sd / math.sqrt(n)
    p = max(float(t.sf((mean + margin) / se, n - 1)), float(t.cdf((mean - margin) / se, n - 1)))
    low, high = t_interval(mean, sd, n, 0.9)
    return Equivalence(n, mean, low, high, p, -margin < low and high < margin, margin)


def equivalence_sentence(
    name: str, baseline: str, test: Equivalence, *, unit: str = "points", decimals: int = 2
) -> str:
    """What two one-sided tests show, in one sentence.

    Args:
        name: What was compared.
        baseline: What it was compared with.
        test: `name` minus `baseline`.
        unit: Unit of the margin; "" for none.
        decimals: Decimals of the interval.
    """
    margin = f"{test.margin:g}" + (f" {unit}" if unit else "")
    if test.low90 is None or test.high90 is None or test.p is None:
        why = "too few pairs" if test.n < 2 else "the difference is the same for every seed"
        return f"{name} and {baseline}, equal within {margin}? No interval can be drawn: {why}."
    text = f"90 % interval [{test.low90:+.{decimals}f}, {test.high90:+.{decimals}f}]"
    if test.shown:
        return f"{name} and {baseline} are equal within {margin}: {text}, p = {test.p:.2g}."
    return (
        f"{name} and {baseline} are not shown to be equal within {margin}: {text}, "
        f"p = {test.p:.2g}; this does not show that they differ."
    )
