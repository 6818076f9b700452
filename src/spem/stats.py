"""Paired comparison of a table of results: one function in, one table out.

What is compared are per-seed differences: two networks that were trained with the same seed share
batches and the start of the backbone, so their difference varies less than either of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from spem.extras import require

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["compare"]

FEW = 3
"""Pairs from which on there is an interval: two have a spread that says next to nothing."""
FLIP = 6
"""Pairs from which on flipping signs can reject at 0.05: the smallest p is 2 / 2**6 = 0.03."""
EXACT = 14
"""Pairs up to which all 2**n patterns of signs are looked at; above, 9999 random ones."""

REFERENCE, ABOVE, BELOW, OPEN = "reference", "above", "below", "no difference shown"
TOO_FEW, UNTRAINED, EQUAL = "too few seeds", "hardly trained", "all differences equal"


def compare(
    table: pd.DataFrame,
    *,
    by: str | Sequence[str] = "module",
    value: str = "accuracy",
    pair: str = "seed",
    baseline: str | None = None,
    within: str | Sequence[str] = (),
    together: bool = False,
    classes: str = "classes",
    level: float = 0.95,
) -> pd.DataFrame:
    """Compare groups of runs with a baseline, run by run of equal seed.

    **Formula** With d the n differences of pairs: mean(d) -+ t(n - 1, (1 + level) / 2) sd(d) /
    sqrt(n), and p of the paired t test; from six pairs on also the share of the 2**n patterns of
    signs whose mean is as far from 0. Holm's correction is over the comparisons of one table.

    Args:
        table: One run a row.
        by: Columns that name a group.
        value: Column of the number that is compared; rows without a finite number are left out.
        pair: Column that makes two runs a pair.
        baseline: Group that the others are compared with; None takes "none" where there is such a
            group, else the first.
        within: Columns that split the table into tables of their own.
        together: Correct over the comparisons of all these tables, not of each.
        classes: Column with the number of classes, where `value` is an accuracy: groups that are
            hardly better than guessing are not judged.
        level: Level of the intervals.

    Returns:
        A row for each group, the baseline first: the columns of `within`, then `group`,
        `baseline`, `n` (runs), `mean`, `sd`, `pairs`, `difference`, `difference_sd`, `low`, `high`,
        `p`, `p_flip`, `p_holm` and `verdict`, which is "above" or "below" only where the p after
        Holm is at most 1 - level; "too few seeds" (below three pairs: no interval and no p),
        "hardly trained", "all differences equal" (no interval), "no difference shown", "reference".

    Raises:
        KeyError: The table has no such column.
        ValueError: Two runs have the same group and pair, no group has the baseline's name, a
            value is too large to subtract, or the level is none.
    """
    import pandas as pd

    by, within = _columns(by), _columns(within)
    if not 0 < level < 1:
        raise ValueError(f"compare: level={level} is no level. Use a number between 0 and 1.")
    for name in (*by, value, pair, *within):
        if name not in table.columns:
            raise KeyError(f"compare: {no_column(name, list(table.columns))}")
    rows = table.assign(
        **{value: pd.to_numeric(table[value], errors="coerce")}, group=group_names(table, by)
    )
    rows = rows[rows[value].abs() < float("inf")]
    if rows.empty:
        raise ValueError(f"compare: no row holds a finite number in {value!r}.")
    names = list(dict.fromkeys(rows["group"]))
    chosen = _baseline(names, baseline)
    parts = rows.groupby(list(within), sort=False, dropna=False) if within else [((), rows)]
    found: list[pd.DataFrame] = []
    for key, part in parts:
        own = _part(part, value, pair, chosen if baseline else None, classes, level)
        own["p_holm"] = own["p"] if together else holm(own["p"])
        for name, cell in zip(reversed(within), reversed(key), strict=True):
            own.insert(0, name, [cell] * len(own))
        found.append(own)
    table = pd.concat(found, ignore_index=True)
    if together:
        table["p_holm"] = holm(table["p"])
    alpha = round(1 - level, 12)
    verdicts = [_verdict(line, alpha) for line in table.to_dict("records")]
    return table.drop(columns="trained").assign(verdict=verdicts)


def _part(
    rows: pd.DataFrame,
    value: str,
    pair: str,
    baseline: str | None,
    classes: str,
    level: float,
) -> pd.DataFrame:
    """The table of rows that may be compared with one another."""
    import pandas as pd

    twice = rows[rows.duplicated(["group", pair], keep=False)]
    if len(twice):
        raise ValueError(_twice(twice, pair, value))
    names = list(dict.fromkeys(rows["group"]))
    reference = baseline or _baseline(names, None)
    names.sort(key=lambda name: name != reference)
    wide = rows.pivot(index=pair, columns="group", values=value)
    guessing = _guessing(rows, value, classes)
    means = {name: _mean(wide[name].dropna().to_numpy()) for name in names}
    theirs = means[reference][1] if reference in means else float("nan")
    lines: list[dict[str, Any]] = []
    for name in names:
        line: dict[str, Any] = {"group": name, "baseline": reference}
        line |= dict(zip(("n", "mean", "sd"), means[name], strict=True))
        line["trained"] = guessing is None or max(line["mean"], theirs) >= guessing
        if reference in names and name != reference:
            both = wide[[name, reference]].dropna()
            line |= _difference(both[name].to_numpy(), both[reference].to_numpy(), level)
        lines.append(line)
    columns = ["group", "baseline", "n", "mean", "sd", "pairs", "difference", "difference_sd"]
    table = pd.DataFrame(lines, columns=[*columns, "low", "high", "p", "p_flip", "trained"])
    return table.astype({"pairs": "Int64"})


def _verdict(line: dict[Any, Any], alpha: float) -> str:
    if line["group"] == line["baseline"]:
        return REFERENCE
    if count(line["pairs"]) < FEW:  # the baseline may have no runs
        return TOO_FEW
    if not line["trained"]:
        return UNTRAINED
    if line["low"] != line["low"]:
        return EQUAL
    if line["p_holm"] <= alpha:
        return ABOVE if line["difference"] > 0 else BELOW
    return OPEN


def count(pairs: Any) -> int:
    """The number in a cell of `pairs`, 0 where there is none."""
    import pandas as pd

    return 0 if pd.isna(pairs) else int(pairs)


def _difference(a: Any, b: Any, level: float) -> dict[str, Any]:
    """Mean, spread, interval and tests of the differences a - b."""
    import numpy as np

    n = len(a)
    if n == 0:
        return {"pairs": 0}
    scale = _scale(np.concatenate([a, b]))
    d = a / scale - b / scale
    mean, sd = d.mean(), d.std(ddof=1) if n > 1 else np.nan
    line = {"pairs": n, "difference": float(mean) * scale, "difference_sd": float(sd) * scale}
    if not np.isfinite(line["difference"]):
        raise ValueError("compare: numbers this large cannot be subtracted. Rescale the column.")
    # What the rounding of the numbers themselves can make of equal differences is no spread.
    if n > 1 and np.ptp(d) <= 4 * np.finfo(float).eps:
        line["difference_sd"] = sd = 0.0
    if n < FEW:
        return line
    if n >= FLIP:
        line["p_flip"] = sign_flip(d)
    if sd:
        t = require("scipy.stats", extra="train", purpose="spem.stats").t
        error = sd / np.sqrt(n)
        half = t.ppf((1 + level) / 2, n - 1) * error
        line |= {"low": (mean - half) * scale, "high": (mean + half) * scale}
        line["p"] = 2 * t.sf(abs(mean) / error, n - 1)
    return line


def _mean(values: Any) -> tuple[int, float, float]:
    import numpy as np

    scale = _scale(values)
    scaled = values / scale
    spread = scaled.std(ddof=1) if len(values) > 1 else np.nan
    if len(values) > 1 and np.ptp(values) == 0:
        spread = 0.0  # the rounding of the mean of equal numbers
    return len(values), float(scaled.mean() * scale), float(spread * scale)


def _scale(values: Any) -> float:
    """A power of two near the largest number: dividing by it is exact and squares stay finite."""
    import numpy as np

    largest = float(np.abs(values).max())
    return float(np.ldexp(1.0, int(np.clip(np.frexp(largest)[1], -1000, 1000)))) if largest else 1.0


def sign_flip(differences: Any) -> float:
    """Two-sided p of a mean of 0: patterns of signs whose mean is at least as far from it."""
    import numpy as np

    scipy = require("scipy.stats", extra="train", purpose="spem.stats")
    if not np.any(differences):
        return 1.0
    resamples = np.inf if len(differences) <= EXACT else 9999
    result = scipy.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        n_resamples=resamples,
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)


def holm(p: Any) -> Any:
    """Holm's adjusted p values; NaN (no test) stays NaN and does not count."""
    import numpy as np

    values = np.asarray(p, dtype=float)
    adjusted = values.copy()
    known = np.isfinite(values)
    if known.sum() > 1:
        tests = require("statsmodels.stats.multitest", extra="train", purpose="spem.stats")
        adjusted[known] = tests.multipletests(values[known], method="holm")[1]
    return adjusted


def prediction_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Where one more run of the same kind would lie; None below three runs or without spread.

    **Formula** mean -+ t(n - 1, (1 + level) / 2) sd sqrt(1 + 1 / n).
    """
    import numpy as np

    n, mean, sd = _mean(np.asarray(values, dtype=float))
    if n < FEW or not sd:
        return None
    t = require("scipy.stats", extra="train", purpose="spem.stats").t
    half = float(t.ppf((1 + level) / 2, n - 1) * sd * np.sqrt(1 + 1 / n))
    return mean - half, mean + half


def _guessing(rows: pd.DataFrame, value: str, classes: str) -> float | None:
    """The accuracy below which a network is hardly trained: twice guessing, for few classes less.

    >>> [hardly_trained_below(n) for n in (2, 10, 100)]
    [62.5, 20.0, 2.0]
    """
    if "acc" not in value.lower() or classes not in rows.columns:
        return None
    counts = rows[classes].dropna().unique()
    if len(counts) != 1 or not float(counts[0]) > 1:
        return None
    percent = rows[value].max() > 1.5
    return hardly_trained_below(int(float(counts[0]))) / (1 if percent else 100)


def hardly_trained_below(classes: int) -> float:
    """An accuracy in percent that a network must reach to be judged: 20 for ten classes."""
    chance = 100 / classes
    return chance + min(chance, (100 - chance) / 4)


def group_names(table: pd.DataFrame, by: Sequence[str]) -> Any:
    """The name of each row's group: the first cell, then the others with their columns' names."""
    first, *others = by
    names = table[first].astype(str)
    for column in others:
        cells = table[column].astype(object).where(table[column].notna(), "-").replace("", "-")
        names = names + f", {column}=" + cells.astype(str)
    return names


def _columns(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _baseline(names: Sequence[str], asked: str | None) -> str:
    """The group meant: of that name, else the only one that begins with it."""
    if asked is None:
        return "none" if "none" in names else names[0]
    if asked in names:
        return asked
    found = [name for name in names if name.startswith(f"{asked}, ")]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"baseline {asked!r} stands for several groups: {'; '.join(found)}. Name one in full."
        )
    nearest = get_close_matches(asked, names, n=3, cutoff=0.5)
    hint = f" Nearest: {', '.join(nearest)}." if nearest else ""
    raise ValueError(
        f"no group {asked!r} to be the baseline.{hint} Name one of: {', '.join(names)}."
    )


def _twice(rows: pd.DataFrame, pair: str, value: str) -> str:
    """The sentence for runs of one group and pair, with the columns that could distinguish them."""
    one = rows[(rows["group"] == rows["group"].iloc[0]) & (rows[pair] == rows[pair].iloc[0])]
    apart = [
        str(column)
        for column in rows.columns
        if column not in ("group", value, pair)
        and not str(column).startswith(("time_", "host_"))
        and one[column].nunique(dropna=False) > 1
    ]
    what = f"compare: {one['group'].iloc[0]} has {pair} {one[pair].iloc[0]} {len(one)} times"
    if not apart:
        return f"{what}. Remove one, or name the column that distinguishes them."
    return (
        f"{what}. They differ in {', '.join(apart[:5])}: add one of these to by, to compare along "
        "it too, or to within, to split by it."
    )


def no_column(name: str, columns: Sequence[str]) -> str:
    """One sentence for a column that does not exist, with the nearest that do."""
    nearest = get_close_matches(name, columns, n=3, cutoff=0.5)
    hint = f" Nearest: {', '.join(nearest)}." if nearest else ""
    return f"no column {name!r}.{hint} Columns: {', '.join(columns)}."


def sentence(line: Any, *, unit: str = "points", decimals: int = 2, pair: str = "seed") -> str:
    """What one row of `compare` says, in words that say no more than the data.

    Args:
        line: The row, as a mapping.
        unit: Unit of the difference; "" for none.
        decimals: Decimals of the numbers.
        pair: What makes a pair.
    """
    name, baseline, verdict = line["group"], line["baseline"], line["verdict"]
    pairs = count(line["pairs"])
    if pairs == 0:
        return f"{name} and {baseline} share no {pair}: nothing can be compared."
    of = f" {unit}" if unit else ""
    start = (
        f"{name} - {baseline}: {line['difference']:+.{decimals}f}{of} over {pairs} paired {pair}"
    )
    start += "s" if pairs > 1 else ""
    if verdict == TOO_FEW:
        return f"{start}: too few {pair}s for a conclusion."
    if verdict == EQUAL:
        return f"{start}, the same for every {pair}: no interval, no conclusion."
    low, high = line["low"], line["high"]
    if low == low:
        start += f" [{low:+.{decimals}f}, {high:+.{decimals}f}]"
    if verdict == UNTRAINED:
        return f"{start}, but both networks are hardly trained: no conclusion."
    after = f"(Holm p {p_text(line['p_holm'])})"
    if verdict == OPEN:
        return f"{start}: no difference shown {after}."
    return f"{start}: {name} is {verdict} {baseline} in this setting {after}."


def answer(table: pd.DataFrame, *, unit: str = "points", decimals: int = 2) -> str:
    """What a whole table of `compare` shows, in one sentence."""
    lines = [line for line in table.to_dict("records") if line["verdict"] != REFERENCE]
    if not lines:
        return "There is nothing to compare yet."
    baseline = lines[0]["baseline"]

    def phrase(line: dict[Any, Any]) -> str:
        if not count(line["pairs"]):
            return str(line["group"])
        return f"{line['group']} ({line['difference']:+.{decimals}f})"

    groups: dict[str, list[str]] = {}
    for line in lines:
        groups.setdefault(line["verdict"], []).append(phrase(line))
    pairs = [count(line["pairs"]) for line in lines]
    seeds = f"{min(pairs)}" if min(pairs) == max(pairs) else f"{min(pairs)} to {max(pairs)}"
    words = {
        ABOVE: f"above {baseline}: {{}}",
        BELOW: f"below {baseline}: {{}}",
        OPEN: f"no difference to {baseline} shown: {{}}",
        TOO_FEW: f"too few seeds to compare with {baseline}: {{}}",
        UNTRAINED: "hardly trained, so nothing is concluded: {}",
        EQUAL: "the same difference in every seed, so no interval: {}",
    }
    parts = [words[kind].format(listed(groups[kind])) for kind in words if kind in groups]
    text = "; ".join(parts)
    unit = f"differences in {unit}, " if unit else ""
    return f"{text[0].upper()}{text[1:]} ({unit}{seeds} paired seeds)."


def listed(names: Sequence[str], most: int = 6) -> str:
    """Names in a sentence: "a, b and c"; of more than `most`, how many others there are."""
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} others"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def p_text(p: float | None) -> str:
    """A p value as tables show it.

    >>> p_text(0.03125), p_text(0.0001), p_text(None)
    ('0.031', '<0.001', '-')
    """
    if p is None or p != p:
        return "-"
    return "<0.001" if p < 0.001 else f"{p:.3f}"
