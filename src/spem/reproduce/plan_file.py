"""`plan.csv` of a results folder: every cell of every experiment asked for in it so far."""

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from spem.reproduce.experiments import EXPERIMENTS, Cell, Experiment
from spem.reproduce.rows import Row, write_table
from spem.training import RunConfig
from spem.training.claim import folder_lock

PLAN = "plan.csv"


@dataclass(frozen=True)
class Planned:
    """One row of `plan.csv`, all of it text as the file holds it.

    Args:
        experiment: Name of the table or figure.
        row: What people call the cell.
        data: The paper's data set.
        scale: Name of the scale.
        dataset: What is trained on; empty where nothing can be run.
        depth: Depth of the network.
        attention: Canonical spec.
        id: Id of the runs, with an arm after a hyphen where their arithmetic is another.
        seeds: Seeds, separated by spaces.
        reference: `plain`, `se`, `control`, `base` or empty.
        paper_row: What the paper calls the row.
        paper_depth: Its depth.
        paper_parameters_millions: Its parameters as printed.
        paper_top1: Its accuracy.
        note: What a reader must know.
    """

    experiment: str
    row: str
    data: str
    scale: str
    dataset: str
    depth: str
    attention: str
    id: str
    seeds: str
    reference: str
    paper_row: str
    paper_depth: str
    paper_parameters_millions: str
    paper_top1: str
    note: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What is unique in the file."""
        return (self.experiment, self.data, self.row)

    @property
    def folder(self) -> str:
        """The folder of its runs below `runs/`: the scale and the arm."""
        arm = self.id.partition("-")[2]
        return f"{self.scale}-{arm}" if arm else self.scale


def name_of(config: RunConfig) -> str:
    """The id of a run as tables write it: with the arm, if `config.experiment` names one.

    The implementation of the tails is no part of a run's id, so arms that differ by it alone would
    share one.
    """
    arm = config.experiment.partition("-")[2]
    return f"{config.id}-{arm}" if arm else config.id


def record_plan(experiments: Iterable[Experiment], out: Path) -> None:
    """Add experiments to a results folder's plan; what was planned before stays, seeds add up.

    Two commands may do this at once.

    Raises:
        ValueError: The folder holds experiments of another scale, or its plan is damaged.
    """
    out.mkdir(parents=True, exist_ok=True)
    with folder_lock(out):
        _add(experiments, out)


def _add(experiments: Iterable[Experiment], out: Path) -> None:
    before = {row.key: row for row in read_plan(out)} if (out / PLAN).exists() else {}
    rows = dict(before)
    for experiment in experiments:
        for cell in experiment.cells:
            row = _planned(experiment, cell)
            old = before.get(row.key)
            rows[row.key] = row if old is None else _with_seeds_of(row, old)
    scales = sorted({row.scale for row in [*before.values(), *rows.values()]})
    if len(scales) > 1:
        raise ValueError(
            f"reproduce: {out} would hold results of the scales {' and '.join(scales)}. "
            "Use another --results folder."
        )
    order = {name: index for index, name in enumerate(EXPERIMENTS)}
    ordered = sorted(rows.values(), key=lambda row: order.get(row.experiment, len(order)))
    write_table([vars(row) for row in ordered], out / PLAN)


def read_plan(out: Path) -> list[Planned]:
    """Read `plan.csv`.

    Raises:
        FileNotFoundError: The folder has none.
        ValueError: A column is missing.
    """
    path = out / PLAN
    if not path.exists():
        raise FileNotFoundError(
            f"reproduce: {path} is not there, so {out} is no results folder. "
            f"Make one: spem reproduce table1 --scale smoke --results {out}"
        )
    names = [field.name for field in fields(Planned)]
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [name for name in names if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(
                f"reproduce: {path} lacks the column {', '.join(missing)}. "
                "Delete it and run the same `spem reproduce` again; finished runs are kept."
            )
        return [Planned(**{name: row[name] or "" for name in names}) for row in reader]


def _planned(experiment: Experiment, cell: Cell) -> Planned:
    config, paper = cell.config, cell.paper
    run: Mapping[str, object] = (
        {"dataset": "", "depth": "", "attention": "", "id": "", "seeds": ""}
        if config is None
        else {
            "dataset": Path(config.data.name).name,
            "depth": config.model.depth,
            "attention": config.model.attention,
            "id": name_of(config),
            "seeds": " ".join(map(str, experiment.seeds)),
        }
    )
    values: Row = {
        "experiment": experiment.name,
        "row": cell.row,
        "data": cell.data,
        "scale": experiment.scale.name,
        **run,  # pyright: ignore[reportAssignmentType]  # texts and numbers
        "reference": cell.reference,
        "paper_row": paper.label if paper else "",
        "paper_depth": paper.depth if paper else "",
        "paper_parameters_millions": _number(paper.parameters_millions if paper else None),
        "paper_top1": _number(paper.top1 if paper else None),
        "note": cell.note,
    }
    return Planned(**{key: str(value) for key, value in values.items()})


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _with_seeds_of(row: Planned, old: Planned) -> Planned:
    if old.id != row.id:
        return row
    seeds = sorted({int(seed) for seed in (old.seeds + " " + row.seeds).split()})
    return Planned(**(vars(row) | {"seeds": " ".join(map(str, seeds))}))
