"""What a table says, for people: the two ratios by name, and whether the aims are met."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from spem.bench.settings import COMPOSED, FOLDED, FUSED, FUSED_FOLDED
from spem.bench.table import Row, select

LEGEND = {
    "attention_cost": "attention cost = time / the same passes without attention",
    "to_plain": "fusion gain = fused / plain PyTorch without attention (below 1: faster)",
    "to_official": "/ official = time / the published program's way",
    "to_folded": "/ folded = time / plain network, norms folded into its convolutions",
}
HEADINGS = {
    "attention_cost": "attention cost",
    "to_plain": "/ plain",
    "to_official": "/ official",
    "to_folded": "/ folded",
}
AIMED = ("spem", "se", "eca")
AIMED_WORK = {"depth": "29", "batch": "128", "layout": "contiguous"}
"""The network and batch for which aims are stated."""
_STEP = "training step"
_EXTRA = {
    "ops": {"share_of_copy": "of copy bandwidth"},
    "family": {"attention_parameters": "parameters added", "attention_mflops": "MFLOPs added"},
}
"""Columns that one kind of table alone has, and their headings."""


class Report(NamedTuple):
    """A table for `print_table`."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    align: str


class Aim(NamedTuple):
    """A bound on a ratio, and what was measured."""

    text: str
    bound: float
    found: float

    @property
    def met(self) -> bool:
        """Whether the bound holds."""
        return self.found <= self.bound

    def __str__(self) -> str:
        verdict = "met" if self.met else "MISSED"
        return f"{verdict:<7} {self.text}: {self.found:.2f} (at most {self.bound:.2f})"


def reports(kind: str, rows: Sequence[Row]) -> list[Report]:
    """One table for each map, batch or mode."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if not row.get("note"):
            groups.setdefault(_group(kind, row), []).append(row)
    value, heading = ("peak_mib", "peak MiB") if kind == "memory" else ("time_ms_median", "ms")
    tables: list[Report] = []
    for title, members in groups.items():
        ratios = [name for name in HEADINGS if any(row.get(name) for row in members)]
        extra = _EXTRA.get(kind, {})
        columns = ["attention", "way", heading, *(HEADINGS[name] for name in ratios)]
        lines = [
            [row["attention"], _way(row), row[value], *(row[name] or "-" for name in ratios)]
            + [row[name] for name in extra]
            for row in members
        ]
        columns += extra.values()
        tables.append(Report(title, columns, lines, "ll" + "r" * (len(columns) - 2)))
    return tables


def legend(rows: Sequence[Row]) -> list[str]:
    """What the columns of ratios mean."""
    return [text for name, text in LEGEND.items() if any(row.get(name) for row in rows)]


def failures(rows: Sequence[Row]) -> list[str]:
    """The providers that could not run, with the reason."""
    notes = {row: None for row in map(_note, rows) if row}
    return list(notes)


def _note(row: Row) -> str:
    note = row.get("note")
    return f"{row['attention']}, {row['way']}: {note}" if note else ""


def aims(kind: str, rows: Sequence[Row]) -> list[Aim]:
    """The project's aims that these rows can tell about, with what was measured.

    Those for a CPU, float32 and contiguous maps; of whole networks at depth 29 and batch 128. Those
    for a GPU are not judged yet.
    """
    rows = [row for row in select(rows, {"device": "cpu", "dtype": "float32"}) if _timed(row)]
    judges = {"ops": _ops, "step": _step, "network": _network, "memory": _memory}
    return judges[kind](rows) if kind in judges else []


def _ops(rows: Sequence[Row]) -> list[Aim]:
    found: list[Aim] = []
    whole = {"bn_train": "both", "bn_eval": "forward"}
    for row in select(rows, {"layout": "contiguous", "way": FUSED}):
        if row["attention"] in AIMED and row["mode"] == whole[row["op"]]:
            bound = 1.10 if row["height"] == "8" else 1.00
            text = f"tail of {row['attention']}, {row['op']}, {_shape(row)}: fused / plain"
            found.append(Aim(text, bound, float(row["to_plain"])))
    return found


def _step(rows: Sequence[Row]) -> list[Aim]:
    found: list[Aim] = []
    for row in select(rows, {"way": FUSED, **AIMED_WORK}):
        if row["attention"] not in AIMED:
            continue
        name = f"step with {row['attention']}"
        found.append(Aim(f"{name}: attention cost", 1.05, float(row["attention_cost"])))
        found.append(Aim(f"{name}: fused / plain", 1.00, float(row["to_plain"])))
        if row["to_official"]:
            found.append(Aim(f"{name}: fused / official", 0.70, float(row["to_official"])))
    return found


def _network(rows: Sequence[Row]) -> list[Aim]:
    found: list[Aim] = []
    rows = [row for row in select(rows, AIMED_WORK) if row["attention"] in AIMED]
    for row in rows:
        name = f"inference with {row['attention']}, batch {row['batch']}"
        if row["way"] == FUSED:
            found.append(Aim(f"{name}: attention cost", 1.05, float(row["attention_cost"])))
            found.append(Aim(f"{name}: fused / plain", 1.00, float(row["to_plain"])))
        elif row["way"] == FUSED_FOLDED:
            text = f"{name}: fused folded / plain, folded"
            found.append(Aim(text, 1.00, float(row["to_folded"])))
    return found


def _memory(rows: Sequence[Row]) -> list[Aim]:
    return [
        Aim(
            f"{row['mode']} with {row['attention']}: peak memory / plain",
            1.05,
            float(row["to_plain"]),
        )
        for row in select(rows, {"way": FUSED, **AIMED_WORK})
        if row["attention"] in AIMED
    ]


def _timed(row: Row) -> bool:
    return not row.get("note")


def _group(kind: str, row: Row) -> str:
    if kind == "ops":
        l2 = f", L2 {row['l2']}" if row["l2"] else ""
        copy = f"; copy {float(row['copy_gb_s']):.1f} GB/s"
        return (
            f"{row['op']}, {row['mode']}, {_shape(row)}, {row['dtype']}, {row['layout']}{l2}{copy}"
        )
    name = {"step": _STEP, "family": _STEP, "network": "inference"}.get(
        kind
    ) or f"{row['mode']}, memory"
    work = f"ResNet-{row['depth']}, batch {row['batch']}, {row['dtype']}, {row['layout']}"
    return f"{name}, {work}"


def _shape(row: Row) -> str:
    return "x".join(row[name] for name in ("batch", "channels", "height", "width"))


def _way(row: Row) -> str:
    if row["way"].startswith(FUSED):
        passes = f"{row['way']} ({row['impl']})"
        return f"{passes}, v = 1" if row["attention"] == "none" else passes
    if row["attention"] == "none" and row["way"] in (COMPOSED, FOLDED):
        return "plain" if row["way"] == COMPOSED else "plain, folded"
    return row["way"]
