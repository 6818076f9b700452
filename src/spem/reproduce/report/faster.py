"""Whether faster arithmetic gives the same accuracy: two one-sided tests, by network."""

from __future__ import annotations

from collections.abc import Iterator

from spem.reproduce.equivalence import Equivalence, equivalence, equivalence_sentence
from spem.reproduce.report.lines import Block, Line, data_name, same_recipe
from spem.reproduce.report.tables import MINUS, NOT_RUN, Cell, Table, cell, interval, number

MARGIN = 0.5
"""Points below which a difference counts as none; fixed beforehand, not chosen by results."""
POLICY = (
    "Runs in bfloat16 or with fused kernels are kept out of the paper's tables until such a study "
    "has shown them equivalent for each of its networks; to admit them then is a change of the "
    "experiments, not of this report."
)


def equivalence_table(block: Block) -> Table:
    """Each line with other arithmetic against the base of the same network, and what is shown."""
    rows: list[tuple[Cell, ...]] = []
    notes = [
        f"Differences below {MARGIN:g} points count as none; this margin was fixed beforehand. "
        "Equality is shown where the 90 % t interval lies within it, which is two one-sided tests "
        "with p < 0.05. A difference that is not shown is not equality."
    ]
    for line, base in _pairs(block):
        name = f"{line.plan.row} {MINUS} {base.plan.row}"
        if not (line.runs and base.runs and same_recipe(line, base)):
            rows.append((cell(name), cell(NOT_RUN, kind="missing"), cell(), cell("0"), cell()))
            continue
        test = equivalence(line.by_seed, base.by_seed, MARGIN)
        common = line.by_seed.keys() & base.by_seed.keys()
        runs = [run for one in (line, base) for run in one.runs if run.seed in common]
        difference = f"{number(test.mean, sign=True)} {interval(test.low90, test.high90)}".strip()
        p = "" if test.p is None else f"{test.p:.2g}"
        rows.append(
            (
                cell(name),
                cell(difference, runs=runs),
                cell(p),
                cell(str(test.n)),
                cell(_finding(test)),
            )
        )
        notes.append(equivalence_sentence(line.plan.row, base.plan.row, test))
    return Table(
        f"{block.experiment}-{block.data}-within",
        f"Equal within {MARGIN:g} points? {data_name(block.data)}",
        ("networks", "points, 90 % interval", "p", "n", f"equal within {MARGIN:g}"),
        "lrrrl",
        tuple(rows),
        (*notes, POLICY),
    )


def _pairs(block: Block) -> Iterator[tuple[Line, Line]]:
    """Lines with the base whose label is the same up to the first comma."""
    bases = {_network(line): line for line in block.lines if line.plan.reference == "base"}
    for line in block.lines:
        base = bases.get(_network(line))
        if base is not None and base is not line:
            yield line, base


def _network(line: Line) -> str:
    return line.plan.row.partition(",")[0]


def _finding(test: Equivalence) -> str:
    if test.p is None:
        return "n too small" if test.n < 2 else "all equal: no interval"
    return "shown" if test.shown else "not shown"
