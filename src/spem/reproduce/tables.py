"""Runs as DataFrames: reading run folders, the CSV files of a results folder, the tables.

A results folder holds `runs.csv`, `epochs.csv`, `mixes.csv` and `gates.csv`. Rows are added or
replaced by (config, seed), and no row is removed; of a comparison's earlier arms only the baseline
changes. Epochs and blocks count from 0; columns that depend on the clock begin with `time_`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spem import stats
from spem.extras import require
from spem.files import require_regular, write_atomic
from spem.reproduce.experiments import (
    EXPERIMENTS,
    SCALES,
    Cell,
    Experiment,
    experiment,
    module_name,
)
from spem.training import Run, RunConfig, read_run

if TYPE_CHECKING:
    import pandas as pd

FILES = ("runs.csv", "epochs.csv", "mixes.csv", "gates.csv")
FINISHED, DIVERGED, FAILED = "finished", "diverged", "failed"
TEXTS = (
    *("experiment", "scale", "module", "dataset", "config", "setting", "baseline"),
    *("status", "error"),
)
_RESULT = (  # columns that are fields of a run's result
    *("accuracy", "loss", "train_accuracy", "train_loss", "validation_accuracy"),
    *("best_accuracy", "best_epoch", "best_selected_on", "parameters", "attention_parameters"),
    *("flops", "steps", "impl", "step", "train_sha256", "test_sha256", "hardware", "commit"),
)
COMPARE = "compare"
Row = dict[str, Any]


def load_runs(folder: str | Path) -> pd.DataFrame:
    """Read every run of a folder into one row each, including failed and unfinished ones.

    Rows come from the run folders in `folder` or below, and from its `runs.csv` for runs whose
    folder is missing.

    Returns:
        Columns `experiment` (the tables a run belongs to), `scale`, `module`, `depth`, `dataset`,
        `classes`, `seed`, `config` (its id), `status`, `error`, `accuracy` (percent, last epoch),
        `best_accuracy`, `parameters`, `impl`, `step`, `hardware` and more. `status` is "finished",
        "diverged", "failed", "unfinished", or "unreadable" with the reason in `error`.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: `runs.csv` is damaged, or not one that spem wrote.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"load_runs: there is no folder {folder}.")
    rows = {_key(row): row for row in _read_texts(folder / "runs.csv")}
    unreadable: list[Row] = []
    for path in sorted(folder.rglob("config.json")):
        try:
            run = read_run(path.parent)
        except (OSError, ValueError) as error:
            unreadable.append({"status": "unreadable", "error": str(error)})
            continue
        row = run_row(run)
        before = rows.get(_key(row), {})
        if run.finished or not before:
            rows[_key(row)] = before | row
    return _typed([*rows.values(), *unreadable])


def run_row(run: Run) -> Row:
    """A run as one row."""
    row = config_row(run.config) | {"classes": len(run.data.classes), "error": run.error}
    result = run.result
    if result is None:
        return row | {"status": "unfinished" if run.error is None else DIVERGED}
    row |= {"status": FINISHED} | {name: getattr(result, name) for name in _RESULT}
    row |= {"torch": result.versions.get("torch"), "time_train_seconds": result.train_seconds}
    return row | {"time_step_ms": 1000 * result.step_seconds, "time_date": result.date}


def config_row(config: RunConfig) -> Row:
    """What is known about a run before training."""
    bare = replace(config, model=replace(config.model, attention="none", branch_start=None))
    return {
        "scale": config.experiment,
        "module": module_name(config.model),
        "depth": config.model.depth,
        "dataset": Path(config.data.name).name,
        "seed": config.seed,
        "config": config.id,
        "setting": bare.id,  # equal for the arms of one comparison
        "epochs": config.optim.epochs,
        "batch": config.optim.batch,
        "train_images": config.data.limit,
        "penalty": config.optim.penalty,
        "precision": config.runtime.precision,
    }


def inner_rows(run: Run) -> dict[str, list[Row]]:
    """Epochs, learned mixes and gates of a run, as rows."""
    of_run = config_row(run.config)
    key = {name: of_run[name] for name in ("module", "depth", "dataset", "config", "seed")}
    epochs: list[Row] = []
    mixes: list[Row] = []
    for line in run.epochs:
        row = {f"time_{k}" if "second" in k else k: v for k, v in line.items()}
        norms = list(row.pop("gradients", {}).values())
        row.pop("mixes", None)
        ends = {"gradient_first": norms[0], "gradient_last": norms[-1]} if norms else {}
        epochs.append({**key, **row, **ends})
        for mix, values in line.get("mixes", {}).items():
            mixes.append({**key, "epoch": line["epoch"], "mix": mix, **values})
    gates = [{**key, "index": i, **g} for i, g in enumerate(run.result.gates if run.result else [])]
    return {"epochs.csv": epochs, "mixes.csv": mixes, "gates.csv": gates}


# ---- the CSV files of a results folder ---------------------------------------------------------


def record(
    planned: Mapping[RunConfig, Sequence[str]],
    runs: Path,
    out: Path,
    *,
    failed: Mapping[RunConfig, str] | None = None,
    baseline: str | None = None,
) -> list[str]:
    """Write the rows of runs below `runs` into the CSV files of the results folder `out`.

    `planned` has the experiments that each run belongs to, `failed` the errors of runs without a
    result, `baseline` the module that the others of a comparison are compared with.

    Returns:
        A sentence for each run that diverged, failed or cannot be read; these have rows too.

    Raises:
        ValueError: An existing file is damaged, or spem did not write it.
    """
    filelock = require("filelock", extra="train", purpose="writing results")
    out.mkdir(parents=True, exist_ok=True)
    require_regular(out / ".lock", missing_ok=True)
    tables: dict[str, list[Row]] = {name: [] for name in FILES}
    problems: list[str] = []
    with filelock.FileLock(out / ".lock"):  # of two commands, the later one must see both's rows
        there = {_key(row): row for row in _read_texts(out / "runs.csv")}
        for config, names in planned.items():
            before = there.get((config.id, str(config.seed)), {})
            names = dict.fromkeys([*before.get("experiment", "").split(), *names])
            row: Row = {"experiment": " ".join(names)}
            row["baseline"] = baseline or before.get("baseline")
            folder, error, run = config.folder(runs), (failed or {}).get(config), None
            try:
                if error is None and (folder / "result.json").exists():
                    run = read_run(folder)
            except (OSError, ValueError) as damage:
                error = str(damage)
            if run is not None:
                error = run.error
                tables["runs.csv"].append(row | run_row(run))
                for name, rows in inner_rows(run).items():
                    tables[name] += rows
            elif error is not None:
                ended = config_row(config) | {"status": FAILED, "error": error}
                if before.get("status") == FINISHED:  # elsewhere: a failure here does not undo it
                    ended = before | row
                tables["runs.csv"].append(row | ended)
            if error is not None:
                problems.append(f"{run_name(config)}: {error}")
        if baseline is not None:  # also of earlier arms: they are compared with what was asked last
            written = {_key(row) for row in tables["runs.csv"]}
            settings = {row["setting"] for row in map(config_row, planned)}
            tables["runs.csv"] += [
                row | {"baseline": baseline}
                for key, row in there.items()
                if key not in written and row.get("setting") in settings
            ]
        for name, rows in tables.items():
            _merge(out / name, rows, first=baseline is not None)
    return problems


def _merge(path: Path, rows: Sequence[Row], *, first: bool) -> None:
    """Add rows to a CSV file; those of the same runs are replaced: in place, or by `first` there.

    The first comparison of a folder is the one that its report begins with.
    """
    import pandas as pd

    if not rows:
        return
    before = _read_texts(path)
    groups: dict[tuple[str, str], list[Row]] = {_key(row): [] for row in rows if first}
    for row in before:
        groups.setdefault(_key(row), []).append(row)
    groups |= {_key(row): [] for row in rows}
    for row in rows:
        groups[_key(row)].append({name: _text(value) for name, value in row.items()})
    columns = list(dict.fromkeys(name for row in (*before, *rows) for name in row))
    table = pd.DataFrame([row for lines in groups.values() for row in lines], columns=columns)
    write_atomic(path, table.to_csv(index=False, lineterminator="\n").encode())


def _key(row: Row) -> tuple[str, str]:
    return row["config"], str(row["seed"])


def _text(value: Any) -> str:
    if value is None or value != value:
        return ""
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def _read_texts(path: Path) -> list[Row]:
    """The rows of one of our CSV files, as text; ValueError for a damaged or foreign one."""
    import pandas as pd

    if not path.exists():
        return []
    try:
        if not path.read_bytes().endswith(b"\n"):  # as a copy that was broken off
            raise ValueError("its last line is cut off")
        table = pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False)
    except (ValueError, pd.errors.ParserWarning) as error:
        raise ValueError(f"{path} cannot be read ({error}). Move it away, or repair it.") from error
    lacking = sorted({"config", "seed", "module"} - set(table.columns))
    if lacking or not table["seed"].str.fullmatch(r"\d+").all():
        what = f"it has no column {', '.join(lacking)}" if lacking else "a seed is not a number"
        raise ValueError(
            f"{path} is not a table that spem wrote: {what}. Move it away, or use another folder."
        )
    return table.to_dict("records")


def _typed(rows: Sequence[Row]) -> pd.DataFrame:
    """A table of rows; columns that hold only numbers become numeric."""
    import pandas as pd

    table = pd.DataFrame(rows)
    needed = (*TEXTS, "accuracy", "best_accuracy", "classes")
    table = table.reindex(columns=list(dict.fromkeys([*table.columns, *needed])))
    text, kinds = io.StringIO(table.to_csv(index=False)), dict.fromkeys(TEXTS, str)
    typed = pd.read_csv(text, dtype=kinds, keep_default_na=False, na_values=[""])
    return typed.fillna(dict.fromkeys(TEXTS, ""))


def read_results(folder: Path) -> dict[str, pd.DataFrame]:
    """The tables of a results folder by name ("runs", "epochs", "mixes", "gates")."""
    if not (folder / "runs.csv").is_file():
        raise FileNotFoundError(
            f"report: {folder} holds no runs.csv. Name a folder that `spem reproduce` or `spem "
            "compare` wrote."
        )
    return {name.removesuffix(".csv"): _typed(_read_texts(folder / name)) for name in FILES}


# ---- tables ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """One table of a report; a row needs a finished run.

    `frame` has the columns of `spem.stats.compare` and `row`, `module`, `note`, `parameters`,
    `flops`; where the paper prints numbers of these cells `paper` and `paper_parameters`; with its
    recipe `best_mean`, `best_sd` and `against_paper`.
    """

    name: str  # in file names: `table1-cifar10`, `compare-digits`
    experiment: str  # `COMPARE` for `spem compare`
    title: str
    question: str
    where: str  # what was trained, in one line
    frame: pd.DataFrame
    runs: pd.DataFrame  # behind it, with their `row`
    not_run: list[str]  # rows without a run
    paper_recipe: bool = False  # and the paper's data

    @property
    def reference(self) -> str:
        """The row that others are compared with; "" if there are several."""
        found = set(self.frame["baseline"])
        return found.pop() if len(found) == 1 else ""

    @property
    def answer(self) -> str:
        """The result in one sentence."""
        several = {} if self.reference else {"baseline": "the reference of the same group"}
        return stats.answer(self.frame.assign(**several), decimals=self.decimals)

    @property
    def decimals(self) -> int:
        """Decimals to show accuracies with, matching what one test image is worth."""
        return 1 if set(self.runs["dataset"]) == {"digits"} else 2


def build_tables(runs: pd.DataFrame) -> list[Table]:
    """Every table that finished runs belong to, those of `spem compare` first."""

    def of(name: str) -> pd.DataFrame:
        return runs.loc[[name in names.split() for names in runs["experiment"]]]

    found = _typed_in(of(COMPARE))
    for name in EXPERIMENTS:
        own = of(name)
        for scale in SCALES if len(own) else ():
            found += _of_experiment(experiment(name, scale), own)
    return found


def _of_experiment(one: Experiment, runs: pd.DataFrame) -> list[Table]:
    scale, tables = one.scale.name, list[Table]()
    runs = runs[runs["scale"].str.startswith(scale)]
    for data in dict.fromkeys(cell.data for cell in one.cells):
        cells = [cell for cell in one.cells if cell.data == data]
        rows = {cell.config.id: cell.row for cell in cells if cell.config is not None}
        own = runs.assign(row=runs["config"].map(rows)).dropna(subset="row")
        if not _done(own).any():
            continue
        dataset = str(own["dataset"].iloc[0])
        of_paper = dataset == data  # digits are not compared with CIFAR's numbers
        paper_recipe = of_paper and scale == "paper"
        frame = _compared(own, cells)
        if of_paper and any(cell.paper is not None for cell in cells):
            frame = _beside_paper(frame, own, cells, verdict=paper_recipe)
        name = f"{one.name}-{dataset}" + (f"-{scale}" if of_paper and scale != "paper" else "")
        where = _where(own) + (f"; {one.scale.title}" if scale != "paper" else "")
        not_run = [cell.row for cell in cells if cell.row not in set(frame["row"])]
        texts = (name, one.name, one.title, one.question, where)
        tables.append(Table(*texts, frame, own, not_run, paper_recipe))
    return tables


def _typed_in(runs: pd.DataFrame) -> list[Table]:
    """The tables of `spem compare`: one for each setting that its arms share."""
    tables: list[Table] = []
    for _, own in runs.assign(row=runs["module"]).groupby("setting", sort=False):
        if not _done(own).any():
            continue
        names, given = list(dict.fromkeys(own["module"])), str(own["baseline"].iloc[0])
        reference, dataset = given if given in names else names[0], str(own["dataset"].iloc[0])
        frame = _compared(own, [Cell(name, name, dataset, name == reference) for name in names])
        others = [name for name in names if name != reference]
        named = stats.listed(others, len(others)) if others else "the others"  # none has run yet
        question = f"{'Does' if len(others) == 1 else 'Do'} {named} differ from {reference}?"
        name = f"{COMPARE}-{dataset}" + (f"-{len(tables) + 1}" if tables else "")
        texts = (name, COMPARE, f"{named} against {reference}", question, _where(own))
        not_run = [name for name in names if name not in set(frame["row"])]
        tables.append(Table(*texts, frame, own, not_run))
    return tables


def run_name(config: RunConfig) -> str:
    """A run in a few words."""
    data = Path(config.data.name).name
    return f"{module_name(config.model)}, {data}, depth {config.model.depth}, seed {config.seed}"


def _done(runs: pd.DataFrame) -> pd.Series:
    return (runs["status"] == FINISHED) & runs["accuracy"].notna()


def _compared(runs: pd.DataFrame, cells: Sequence[Cell]) -> pd.DataFrame:
    """A row per cell with runs: means over seeds, and differences within its group."""
    cell_of = {cell.row: cell for cell in cells}
    runs = runs[_done(runs)].assign(within=runs["row"].map(lambda row: cell_of[row].group))
    references = {(cell.group,): cell.row for cell in cells if cell.reference}
    frame = stats.compare(runs, by="row", baseline=references, within="within", together=True)
    order = list(cell_of).index
    frame = frame.sort_values("group", key=lambda rows: rows.map(order), ignore_index=True)
    first = runs.groupby("row").first().loc[frame["group"]].reset_index()
    first["note"] = [cell_of[row].note for row in first["row"]]
    return frame.join(first[["row", "module", "note", "parameters", "flops"]])


def _beside_paper(
    frame: pd.DataFrame, runs: pd.DataFrame, cells: Sequence[Cell], *, verdict: bool
) -> pd.DataFrame:
    """The paper's numbers; with the paper's recipe, also our best epochs and a verdict.

    The rule, fixed before any run: a number of the paper is "inside" if it is within the 95 %
    prediction interval for one more best-epoch run of ours.
    """
    printed = {cell.row: cell.paper for cell in cells if cell.paper is not None}
    rows = frame["row"]
    frame = frame.assign(
        paper=rows.map({row: paper.top1 for row, paper in printed.items()}),
        paper_parameters=rows.map({row: p.parameters_millions for row, p in printed.items()}),
    )
    if not verdict:
        return frame
    best = {row: part.dropna() for row, part in runs.groupby("row")["best_accuracy"]}

    def judge(row: str) -> str:
        if row not in printed:
            return ""
        ends = stats.prediction_interval(best[row])
        if ends is None:
            return "n too small to say" if len(best[row]) < stats.FEW else stats.EQUAL_RUNS
        return "inside" if ends[0] <= printed[row].top1 <= ends[1] else "outside"

    means, spreads = [best[row].mean() for row in rows], [best[row].std() for row in rows]
    return frame.assign(best_mean=means, best_sd=spreads, against_paper=rows.map(judge))


def _where(runs: pd.DataFrame) -> str:
    """What was trained, in one line."""
    one, seeds, depths = runs.iloc[0], runs["seed"].nunique(), sorted(runs["depth"].astype(int))
    images, data = one.get("train_images"), data_name(one["dataset"])
    data += f" ({int(images):,} training images)" if images and images == images else ""
    depth = f"{depths[0]} to {depths[-1]}" if depths[0] < depths[-1] else f"{depths[0]}"
    epochs = f"{int(one['epochs'])} epoch" + ("s" if one["epochs"] > 1 else "")
    return f"{data}, ResNet-{depth}, {epochs}, {seeds} seed" + ("s" if seeds > 1 else "")


def data_name(name: str) -> str:
    """A data set's usual name."""
    return {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}.get(name, name)
