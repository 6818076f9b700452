"""Paired comparison of a table of results: one function in, one table out.

It compares per-seed differences: networks trained with the same seed share batches and the initial
backbone, so their difference varies less than either of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from itertools import product
from typing import TYPE_CHECKING, Any

from spem.extras import require

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["compare"]

FEW = 3  # pairs from which on there is an interval: two have a spread that says next to nothing
FLIP = 6  # pairs from which on flipping signs can reject at 0.05: the smallest p is 2 / 2**6 = 0.03
EXACT = 14  # pairs up to which all 2**n patterns of signs are looked at; above, 9999 random ones

REFERENCE, ABOVE, BELOW, OPEN = "reference", "above", "below", "no difference shown"
TOO_FEW, UNTRAINED, EQUAL = "too few seeds", "hardly trained", "all differences equal"
EQUAL_RUNS = "all runs equal"
_DIFFERENCE = ["pairs", "difference", "difference_sd", "low", "high", "p", "p_flip"]


def compare(
    table: pd.DataFrame,
    *,
    by: str | Sequence[str] = "module",
    value: str = "accuracy",
    pair: str = "seed",
    baseline: str | Mapping[tuple[Any, ...], str] | None = None,
    within: str | Sequence[str] = (),
    together: bool = False,
    level: float = 0.95,
) -> pd.DataFrame:
    """Compare groups of runs with a baseline, pairing runs of equal seed.

    **Formula** With d the n differences of pairs: mean(d) -+ t(n - 1, (1 + level) / 2) sd(d) /
    sqrt(n), and p of the paired t test; from six pairs on also the share of the 2**n patterns of
    signs whose mean is as far from 0. Holm's correction is over the comparisons of one table.

    Args:
        table: One run a row; where the values are accuracies and a column `classes` says how many
            there are, groups that are hardly better than guessing are not judged.
        by: Columns that name a group.
        value: Column to compare; rows without a finite number are left out.
        pair: Column whose equal values make two runs a pair; rows without one are left out.
        baseline: Group that the others are compared with, or one for each table of `within`, by
            its cells; None takes "none" where there is such a group, else the first.
        within: Columns that split the table into separate tables.
        together: Correct over the comparisons of all these tables, not of each.
        level: Level of the intervals.

    Returns:
        A row for each group, the baseline first: the columns of `within`, then `group`,
        `baseline`, `n` (runs), `mean`, `sd`, `pairs`, `difference`, `difference_sd`, `low`, `high`,
        `p`, `p_flip`, `p_holm` and `verdict`, which is "above" or "below" only where the p after
        Holm is at most 1 - level; "too few seeds" (below three pairs: no interval and no p),
        "hardly trained", "all differences equal" (no interval), "no difference shown", "reference".

    Raises:
        KeyError: The table has no such column, or the baseline of a part is not given.
        ValueError: Two runs have the same group and pair, no group has the baseline's name, the
            largest value is outside 1e-100 to 1e100, or the level is none.
    """
    for module in ("pandas", "scipy.stats", "statsmodels.stats.multitest"):
        require(module, extra="train", purpose="spem.stats")
    import pandas as pd

    by, within = [[names] if isinstance(names, str) else list(names) for names in (by, within)]
    if not 0 < level < 1:
        raise ValueError(f"compare: level={level} is not a level. Use a number between 0 and 1.")
    for name in (*by, value, pair, *within):
        if name not in table.columns:
            raise KeyError(f"compare: {no_column(name, list(table.columns))}")
    own = {"baseline", "n", "mean", "sd", *_DIFFERENCE, "p_holm", "verdict"}
    if clash := own.intersection(within) | ({"group"} & {value, pair, *within}):
        raise ValueError(f"compare: the result has a column {min(clash)!r} too. Rename yours.")
    numbers = pd.to_numeric(table[value], errors="coerce").astype(float)
    rows = table.assign(**{value: numbers}, group=_group_names(table, by))
    rows = rows[(numbers.abs() < float("inf")) & table[pair].notna()]
    if rows.empty:
        said = f"no row holds a finite number in {value!r} and a value in {pair!r}"
        raise ValueError(f"compare: {said}.")
    largest = rows[value].abs().max()
    if largest and not 1e-100 < largest < 1e100:
        raise ValueError(
            f"compare: {largest:.3g} in {value!r} is out of range. Rescale the column."
        )
    if baseline is not None and not isinstance(baseline, Mapping):
        baseline = _baseline(list(rows["group"].unique()), str(baseline))
    found: list[pd.DataFrame] = []
    for key, part in rows.groupby(within, sort=False, dropna=False) if within else [((), rows)]:
        if isinstance(baseline, Mapping) and key not in baseline:
            raise KeyError(f"compare: baseline= names no group for the table {key}. Name one.")
        chosen = baseline[key] if isinstance(baseline, Mapping) else baseline
        own = _part(part, value, pair, chosen, level)
        own["p_holm"] = own["p"] if together else holm(own["p"])
        for name, cell in zip(reversed(within), reversed(key), strict=True):
            own.insert(0, name, [cell] * len(own))
        found.append(own)
    table = pd.concat(found, ignore_index=True)
    if together:
        table["p_holm"] = holm(table["p"])
    verdicts = [_verdict(line, round(1 - level, 12)) for line in table.to_dict("records")]
    return table.drop(columns="trained").assign(verdict=verdicts)


def _part(
    rows: pd.DataFrame, value: str, pair: str, reference: str | None, level: float
) -> pd.DataFrame:
    """The table of rows that may be compared with each other."""
    import numpy as np
    import pandas as pd

    twice = rows[rows.duplicated(["group", pair], keep=False)]
    if len(twice):
        raise ValueError(_twice(twice, pair, value))
    wide = rows.pivot(index=pair, columns="group", values=value)[rows["group"].unique()]
    reference = reference or ("none" if "none" in wide else str(wide.columns[0]))
    wide = wide[sorted(wide, key=lambda name: name != reference)]
    table = wide.agg(["count", "mean", "std"]).T.set_axis(["n", "mean", "sd"], axis=1)
    table.loc[wide.nunique() < table["n"].clip(upper=2), "sd"] = 0.0  # of equal numbers
    lines = {
        name: _difference(wide.reindex(columns=[name, reference]).dropna().to_numpy(), level)
        for name in wide
        if name != reference
    }
    differences = pd.DataFrame.from_dict(lines, orient="index", columns=_DIFFERENCE, dtype=float)
    table = table.join(differences)
    least = _guessing(rows, value)
    table["trained"] = np.fmax(table["mean"], table["mean"].get(reference, np.nan)) >= least
    table.insert(0, "baseline", reference)
    return table.rename_axis("group").reset_index().astype({"n": int, "pairs": "Int64"})


def _verdict(line: dict[Any, Any], alpha: float) -> str:
    if line["group"] == line["baseline"]:
        return REFERENCE
    if line["pairs"] < FEW:
        return TOO_FEW
    if not line["trained"]:
        return UNTRAINED
    if line["low"] != line["low"]:
        return EQUAL
    if line["p_holm"] <= alpha:
        return ABOVE if line["difference"] > 0 else BELOW
    return OPEN


def _difference(pairs: Any, level: float) -> dict[str, float]:
    """Mean, spread, interval and tests of the differences of two columns."""
    import numpy as np
    from scipy.stats import ttest_1samp

    n, d = len(pairs), pairs[:, 0] - pairs[:, 1]
    if n == 0:
        return {"pairs": 0}
    line = {"pairs": n, "difference": d.mean(), "difference_sd": d.std(ddof=1) if n > 1 else np.nan}
    # Rounding alone can make equal differences look unequal: that is not a spread.
    rounding = 4 * np.finfo(float).eps * np.abs(pairs).max()
    equal = np.ptp(d) <= rounding
    if n > 1 and equal:
        line["difference_sd"] = 0.0
    if n >= FEW and not equal:
        test: Any = ttest_1samp(d, 0)
        line["low"], line["high"] = test.confidence_interval(level)
        line["p"] = test.pvalue
    return line | ({"p_flip": sign_flip(d, rounding)} if n >= FLIP else {})


def sign_flip(differences: Any, rounding: float = 0.0) -> float:
    """Two-sided p of a mean of 0: patterns of signs whose mean is at least as far from it.

    Accuracies are counts, so sums are often equal but for the rounding of each difference, which
    scipy's `permutation_test` takes for smaller ones: its p is too low.
    """
    import numpy as np

    n, drawn = len(differences), len(differences) > EXACT
    if drawn:
        signs = np.random.default_rng(0).choice((-1, 1), (9999, n))
    else:
        signs = np.array(list(product((-1, 1), repeat=n)))
    far = np.abs(signs @ differences) >= abs(np.sum(differences)) - n * rounding
    return float((far.sum() + drawn) / (len(far) + drawn))


def holm(p: Any) -> Any:
    """Holm's adjusted p values; NaN (no test) stays NaN and does not count."""
    import numpy as np
    from statsmodels.stats.multitest import multipletests

    adjusted = np.array(p, dtype=float)
    known = np.isfinite(adjusted)
    if known.sum() > 1:
        adjusted[known] = multipletests(adjusted[known], method="holm")[1]
    return adjusted


def prediction_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Where one more run would lie (95 %); None below three runs, or of equal ones.

    **Formula** mean -+ t(n - 1, 0.975) sd sqrt(1 + 1 / n).
    """
    import numpy as np
    from scipy.stats import t

    n = len(values)
    if n < FEW or not np.ptp(values):
        return None
    spread = np.std(values, ddof=1) * np.sqrt(1 + 1 / n)
    low, high = t.interval(0.95, n - 1, np.mean(values), spread)
    return float(low), float(high)


def _guessing(rows: pd.DataFrame, value: str) -> float:
    """The least mean to be judged: twice guessing, less for few classes; else -inf."""
    counts = rows["classes"].dropna().unique() if "classes" in rows.columns else []
    try:
        (classes,) = {int(float(cell)) for cell in counts}
    except ValueError:  # none, several, or texts
        classes = 0
    if "acc" not in value.lower() or classes < 2:
        return -float("inf")
    chance = 100 / classes
    least = chance + min(chance, (100 - chance) / 4)
    return least / (1 if rows[value].max() > 1.5 else 100)


def _group_names(table: pd.DataFrame, by: Sequence[str]) -> Any:
    """The name of each row's group: the first cell, then the others with their columns' names."""
    names = table[by[0]].astype(str)
    for column in by[1:]:
        cells = table[column].astype(object).where(table[column].notna(), "-").replace("", "-")
        names = names + f", {column}=" + cells.astype(str)
    return names


def _baseline(names: Sequence[str], asked: str) -> str:
    """The group meant: of that name, else the only one that begins with it."""
    found = [name for name in names if name.startswith(f"{asked}, ")]
    if asked in names or len(found) == 1:
        return asked if asked in names else found[0]
    what = f"no group {asked!r} to be the baseline.{_nearest(asked, names)}"
    if found:
        what = f"baseline {asked!r} matches several groups."
    raise ValueError(f"{what} Name one of: {'; '.join(found or names)}.")


def _twice(rows: pd.DataFrame, pair: str, value: str) -> str:
    """The sentence for runs of one group and pair, with the columns that could distinguish them."""
    one = rows[(rows["group"] == rows["group"].iloc[0]) & (rows[pair] == rows[pair].iloc[0])]
    differing = map(str, one.columns[one.nunique(dropna=False) > 1])
    apart = [name for name in differing if name != value and not name.startswith("time_")]
    what = f"compare: {one['group'].iloc[0]} has {pair} {one[pair].iloc[0]} {len(one)} times"
    if not apart:
        return f"{what}. Remove one, or name the column that distinguishes them."
    return (
        f"{what}. They differ in {', '.join(apart[:5])}: add one of these to by=, to compare along "
        "it too, or to within=, to split by it."
    )


def no_column(name: str, columns: Sequence[str]) -> str:
    """One sentence for a column that does not exist, with the nearest that do."""
    return f"no column {name!r}.{_nearest(name, columns)} Columns: {', '.join(columns)}."


def _nearest(name: str, known: Sequence[str]) -> str:
    nearest = get_close_matches(name, known, n=3, cutoff=0.5)
    return f" Nearest: {', '.join(nearest)}." if nearest else ""


def sentence(line: Any, *, unit: str = "points", decimals: int = 2, pair: str = "seed") -> str:
    """One row of `compare` in words that claim no more than the data."""
    name, baseline, pairs = line["group"], line["baseline"], line["pairs"]
    if pairs == 0:
        return f"{name} and {baseline} share no {pair}: nothing can be compared."
    start = f"{name} - {baseline}: {line['difference']:+.{decimals}f}{unit and f' {unit}'} over "
    start += f"{pairs} paired {pair}" + ("s" if pairs > 1 else "")
    low, high, after = line["low"], line["high"], f"(Holm p {p_text(line['p_holm'])})"
    if low == low:
        start += f" [{low:+.{decimals}f}, {high:+.{decimals}f}]"
    return start + {
        TOO_FEW: f": too few {pair}s for a conclusion.",
        EQUAL: f", the same for every {pair}: no interval, no conclusion.",
        UNTRAINED: ", but both networks are hardly trained: no conclusion.",
        OPEN: f": no difference shown {after}.",
    }.get(line["verdict"], f": {name} is {line['verdict']} {baseline} in this setting {after}.")


def answer(table: pd.DataFrame, *, decimals: int = 2) -> str:
    """The result of a table of `compare` in one sentence; differences are in points."""
    lines = table[table["verdict"] != REFERENCE].to_dict("records")
    if not lines:
        return "There is nothing to compare yet."
    baseline, groups = lines[0]["baseline"], dict[str, list[str]]()
    for line in lines:
        gain = f" ({line['difference']:+.{decimals}f})" if line["pairs"] else ""
        groups.setdefault(line["verdict"], []).append(f"{line['group']}{gain}")
    words = {
        ABOVE: f"above {baseline}",
        BELOW: f"below {baseline}",
        OPEN: f"no difference to {baseline} shown",
        TOO_FEW: f"too few seeds to compare with {baseline}",
        UNTRAINED: "hardly trained, so nothing is concluded",
        EQUAL: "the same difference in every seed, so no interval",
    }
    text = "; ".join(f"{words[kind]}: {listed(groups[kind])}" for kind in words if kind in groups)
    least, most = (end(line["pairs"] for line in lines) for end in (min, max))
    seeds = f"{least}" if least == most else f"{least} to {most}"
    seeds += f" paired seed{'s' * (most != 1)}"
    return f"{text[0].upper()}{text[1:]} (differences in points, {seeds})."


def listed(names: Sequence[str], most: int = 6) -> str:
    """Names in a sentence: "a, b and c"; of more than `most`, how many others there are."""
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} others"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def p_text(p: float) -> str:
    """A p value as tables show it.

    >>> p_text(0.03125), p_text(0.0001), p_text(float("nan"))
    ('0.031', '<0.001', '-')
    """
    if p != p:
        return "-"
    return "<0.001" if p < 0.001 else f"{p:.3f}"
