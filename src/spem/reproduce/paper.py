"""The numbers of the paper's Tables 1 to 4, as printed (`paper.csv`)."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True)
class Printed:
    """One cell of a table of the paper.

    Args:
        table: Number of the table, 1 to 4.
        label: What the paper calls the row: its number, or the variant (`lambda=0.1`, `a`, `ours`).
        depth: Depth of the network.
        attention: `none`, `se`, `cbam`, `eca`, `srm`, `sge` or `spem`.
        dataset: `cifar10` or `cifar100`.
        parameters_millions: Parameters as printed; None in Table 3, which prints none.
        top1: Accuracy in percent: the best test epoch of one run.
    """

    table: int
    label: str
    depth: int
    attention: str
    dataset: str
    parameters_millions: float | None
    top1: float


@cache
def printed() -> tuple[Printed, ...]:
    """Every cell of the paper's tables, in their order."""
    text = files("spem.reproduce").joinpath("paper.csv").read_text(encoding="utf-8")
    return tuple(_cell(row) for row in csv.DictReader(text.splitlines()))


def find_printed(
    table: int, dataset: str, *, depth: int = 164, attention: str = "spem", variant: str = ""
) -> Printed:
    """The cell of a table; `variant` is the label of a row of Table 3 or 4.

    Raises:
        KeyError: The table has no such cell.
    """
    for cell in printed():
        where = (cell.table, cell.dataset, cell.depth, cell.attention)
        if where == (table, dataset, depth, attention) and variant in ("", cell.label):
            return cell
    raise KeyError((table, dataset, depth, attention, variant))


def _cell(row: Mapping[str, str]) -> Printed:
    size = row["params_millions"]
    return Printed(
        table=int(row["table"]),
        label=row["variant"] or row["row"],
        depth=int(row["depth"]),
        attention=row["attention"],
        dataset=row["dataset"].lower(),
        parameters_millions=float(size) if size else None,
        top1=float(row["top1_percent"]),
    )
