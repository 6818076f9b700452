"""From samples to the columns of a table: quantiles, and ratios whose two kinds are kept apart."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from spem.bench.settings import COMPOSED, FOLDED, FUSED_FOLDED, OFFICIAL, Subject
from spem.bench.timing import quantiles

RATIOS = ("attention_cost", "to_plain", "to_official", "to_folded")
"""``attention_cost``: time / that of the same way without attention. ``to_plain``: time / that of
plain PyTorch; for a fused row this is the fusion gain. ``to_official``: time / that of the
published program's way. ``to_folded``: time / that of the plain network whose norms are folded into
its convolutions (inference). Each as the ratio of the medians, and as the median and the quantiles
of the ratios within each round."""

TIMES: tuple[str, ...] = ("time_ms_q20", "time_ms_median", "time_ms_q80")


def bases(subject: Subject) -> dict[str, Subject]:
    """Whom a subject is compared with, by the name of the ratio."""
    without = {FUSED_FOLDED: FOLDED, "composed folded": FOLDED, OFFICIAL: COMPOSED}
    found = {
        "attention_cost": Subject("none", without.get(subject.way, subject.way)),
        "to_plain": Subject("none", COMPOSED),
        "to_folded": Subject("none", FOLDED),
    }
    if subject.attention.startswith("spem"):
        found["to_official"] = Subject("spem(form=code)", OFFICIAL)
    return found


def time_columns(times: Sequence[float]) -> dict[str, str]:
    """Quantiles of milliseconds."""
    return {name: f"{q:.4g}" for name, q in zip(TIMES, quantiles(times), strict=True)}


def ratio_columns(
    subject: Subject, times: Mapping[Subject, Sequence[float]], names: Sequence[str]
) -> dict[str, str]:
    """The ratios of a subject's times to those of its bases; empty where there is no such base."""
    mine, compared = times[subject], bases(subject)
    columns: dict[str, str] = {}
    for name in names:
        base = times.get(compared[name]) if name in compared else None
        found = ["", "", "", ""]
        if base:
            per_round = [a / b for a, b in zip(mine, base, strict=True)]
            ratio = statistics.median(mine) / statistics.median(base)
            found = [f"{value:.3f}" for value in (ratio, *quantiles(per_round))]
        labels = (name, f"{name}_rounds_q20", f"{name}_rounds_median", f"{name}_rounds_q80")
        columns |= dict(zip(labels, found, strict=True))
    return columns


def no_columns(names: Sequence[str]) -> dict[str, str]:
    """The columns of times and ratios, empty: for a provider that could not run."""
    columns = dict.fromkeys(TIMES, "")
    for name in names:
        for label in (name, *(f"{name}_rounds_{q}" for q in ("q20", "median", "q80"))):
            columns[label] = ""
    return columns
