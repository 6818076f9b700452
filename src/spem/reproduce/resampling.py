"""Sign-flip test and BCa interval of a mean difference: the same numbers, the same answer.

Both depend on the differences alone, not on the order in which they come, and the negative of all
differences gives the mirrored interval and the same p exactly.
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from spem.extras import require

EXACT = 20
"""Up to so many pairs all sign flips are counted, 2**19 of them by symmetry; a sample above."""
RESAMPLES = 9999
KEY = 20250101
"""Key of what is drawn: the same numbers give the same interval on every machine."""


def sign_flip(differences: Sequence[float], noise: float) -> float:
    """Two-sided p: the share of sign patterns whose sum is at least as far from 0.

    Args:
        differences: At least one finite number.
        noise: The rounding of one difference; sums that close count as equal.
    """
    n = len(differences)
    if n > EXACT:
        canonical, _ = _canonical(differences)
        test = _stats().permutation_test
        drawn = test(
            (canonical,),
            np.mean,
            permutation_type="samples",
            n_resamples=RESAMPLES,
            batch=max(1, 10**6 // n),
            **_generator(test),
        )
        return float(drawn.pvalue)
    sums = np.array([differences[0]])  # the other sign of the first mirrors every pattern
    for d in differences[1:]:
        sums = np.concatenate([sums + d, sums - d])
    reached = np.abs(sums) >= abs(math.fsum(differences)) - n * noise
    return float(np.mean(reached))


def bca(differences: Sequence[float], level: float) -> tuple[float, float]:
    """The bias-corrected and accelerated bootstrap interval of the mean.

    Args:
        differences: At least two finite numbers, not all equal.
        level: Level of the interval.
    """
    canonical, sign = _canonical(differences)
    bootstrap = _stats().bootstrap
    found = bootstrap(
        (canonical,),
        np.mean,
        confidence_level=level,
        method="BCa",
        n_resamples=RESAMPLES,
        batch=max(1, 10**6 // len(differences)),
        **_generator(bootstrap),
    ).confidence_interval
    ends = sorted((sign * float(found.low), sign * float(found.high)))
    return ends[0], ends[1]


def _canonical(differences: Sequence[float]) -> tuple[Any, int]:
    """The differences or their mirror image, whichever is larger, and the sign that leads back."""
    same, mirrored = sorted(differences), sorted(-d for d in differences)
    return (np.array(same), 1) if same >= mirrored else (np.array(mirrored), -1)


def _generator(function: Any) -> dict[str, Any]:
    """The argument that fixes what is drawn; scipy 1.15 gave it another name."""
    name = "rng" if "rng" in inspect.signature(function).parameters else "random_state"
    return {name: np.random.default_rng(KEY)}


def _stats() -> Any:
    return require("scipy.stats", extra="train", purpose="the statistics of paired seeds")
