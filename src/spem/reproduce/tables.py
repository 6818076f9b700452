"""Runs as rows of DataFrames: reading run folders, the CSV files of a results folder, the tables.

A results folder holds `runs.csv`, `epochs.csv`, `mixes.csv` and `gates.csv`. Rows are added or
replaced by (config, seed); nothing else in these files is touched, and no row is removed. Epochs
and blocks count from 0; columns that depend on the clock begin with `time_`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spem import stats
from spem.files import write_atomic
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
KEY = ["config", "seed"]
FINISHED, DIVERGED, FAILED = "finished", "diverged", "failed"
TEXTS = (
    *("experiment", "scale", "module", "dataset", "config", "setting", "baseline"),
    *("status", "error"),
)
_COMPARED_WITHIN = ["setting", "dataset", "depth", "epochs", "train_images", "batch", "precision"]
"""What the arms of one comparison share; `setting` is empty in rows written before it was there."""
COMPARE = "compare"
Row = dict[str, Any]


def load_runs(folder: Path) -> pd.DataFrame:
    """Read every run of a folder: one row a run, with those that failed or are not finished.

    Rows come from the run folders beneath `folder`, and from its `runs.csv` for runs whose folder
    is not there.

    Args:
        folder: A results folder, a folder of runs, or a run folder.

    Returns:
        Columns `experiment` (the tables a run belongs to), `scale`, `module`, `depth`, `dataset`,
        `classes`, `seed`, `config` (its id), `status`, `error`, `accuracy` (percent, last epoch),
        `best_accuracy`, `parameters`, `impl`, `step`, `hardware` and more. `status` is "finished",
        "diverged", "failed", "unfinished", or "unreadable" with the reason in `error`.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: `runs.csv` is damaged, or not one that spem wrote.
    """
    import pandas as pd

    if not folder.is_dir():
        raise FileNotFoundError(f"load_runs: there is no folder {folder}.")
    rows = {(row["config"], int(row["seed"])): row for row in _recorded(folder)}
    unreadable: list[Row] = []
    for path in sorted(folder.rglob("config.json")):
        try:
            run = read_run(path.parent)
        except (OSError, ValueError) as error:
            unreadable.append({"status": "unreadable", "error": str(error)})
            continue
        before = rows.get((run.config.id, run.config.seed), {})
        if run.finished or not before:
            rows[run.config.id, run.config.seed] = before | run_row(run)
    return _typed(pd.DataFrame([*rows.values(), *unreadable]))


def run_row(run: Run) -> Row:
    """A run in one row."""
    result = run.result
    row = config_row(run.config) | {"classes": len(run.data.classes), "error": run.error}
    if result is None:
        return row | {"status": "unfinished" if run.error is None else DIVERGED}
    return row | {
        "status": FINISHED,
        "accuracy": result.accuracy,
        "loss": result.loss,
        "train_accuracy": result.train_accuracy,
        "train_loss": result.train_loss,
        "validation_accuracy": result.validation_accuracy,
        "best_accuracy": result.best_accuracy,
        "best_epoch": result.best_epoch,
        "best_selected_on": result.best_selected_on,
        "parameters": result.parameters,
        "attention_parameters": result.attention_parameters,
        "flops": result.flops,
        "steps": result.steps,
        "impl": result.impl,
        "step": result.step,
        "train_sha256": result.train_sha256,
        "test_sha256": result.test_sha256,
        "hardware": result.hardware,
        "commit": result.commit,
        "torch": result.versions.get("torch"),
        "time_train_seconds": result.train_seconds,
        "time_step_ms": 1000 * result.step_seconds,
        "time_date": result.date,
    }


def config_row(config: RunConfig) -> Row:
    """What is known of a run before it has been trained."""
    return {
        "scale": config.experiment,
        "module": module_name(config.model),
        "depth": config.model.depth,
        "dataset": Path(config.data.name).name,
        "seed": config.seed,
        "config": config.id,
        "setting": _setting(config),
        "epochs": config.optim.epochs,
        "batch": config.optim.batch,
        "train_images": config.data.limit,
        "penalty": config.optim.penalty,
        "precision": config.runtime.precision,
    }


def _setting(config: RunConfig) -> str:
    """The id of a config without its module: equal for the arms of one comparison."""
    model = replace(config.model, attention="none", branch_start=None)
    return replace(config, model=model).id


def inner_rows(run: Run) -> dict[str, list[Row]]:
    """Epochs, learned mixes and gates of a run, in rows."""
    key = {name: config_row(run.config)[name] for name in ("module", "depth", "dataset", *KEY)}
    epochs: list[Row] = []
    mixes: list[Row] = []
    for line in run.epochs:
        norms = list(line.get("gradients", {}).values())
        numbers = {
            f"time_{name}" if "second" in name else name: value
            for name, value in line.items()
            if not isinstance(value, (dict, list))
        }
        ends = {"gradient_first": norms[0], "gradient_last": norms[-1]} if norms else {}
        epochs.append({**key, **numbers, **ends})
        for mix, values in line.get("mixes", {}).items():
            mixes.append({**key, "epoch": line["epoch"], "mix": mix, **values})
    gates = run.result.gates if run.result is not None else []
    gates = [{**key, "index": i, **gate} for i, gate in enumerate(gates)]
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
    """Write the rows of planned runs into the CSV files of a results folder.

    Args:
        planned: Runs, each with the experiments it belongs to.
        runs: Folder of all runs.
        out: The results folder.
        failed: What went wrong with runs that have no result.
        baseline: Module that the others of a comparison are compared with.

    Returns:
        A sentence for each run that diverged, failed or cannot be read; they have a row too.

    Raises:
        OSError: A file cannot be written.
        ValueError: A file that is there is damaged, or not one that spem wrote.
    """
    tables: dict[str, list[Row]] = {name: [] for name in FILES}
    problems: list[str] = []
    for config, names in planned.items():
        extra: Row = {"experiment": " ".join(names), "baseline": baseline}
        folder, error = config.folder(runs), (failed or {}).get(config)
        run: Run | None = None
        try:
            if error is None and (folder / "result.json").exists():
                run = read_run(folder)
        except (OSError, ValueError) as damage:
            error = str(damage)
        if run is not None:
            error = run.error
            tables["runs.csv"].append(extra | run_row(run))
            for name, rows in inner_rows(run).items():
                tables[name] += rows
        elif error is not None:
            row = extra | config_row(config) | {"status": FAILED, "error": error}
            tables["runs.csv"].append(row)
        if error is not None:
            problems.append(f"{run_name(config)}: {error}")
    for name, rows in tables.items():
        _merge(out / name, rows)
    return problems


def require_tables(out: Path) -> None:
    """Make sure that rows can be added to the files of a results folder, before hours of training.

    Raises:
        ValueError: One of them is damaged, not one that spem wrote, or holds a run twice.
    """
    for name in FILES:
        if (out / name).exists():
            _read_texts(out / name)
    own = [row for row in _recorded(out) if COMPARE in row.get("experiment", "").split()]
    keys = [
        tuple(row.get(name, "") for name in (*_COMPARED_WITHIN, "module", "seed")) for row in own
    ]
    twice = sorted({f"{key[-2]}, seed {key[-1]}" for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(
            f"{out / 'runs.csv'} holds two comparisons that cannot be told apart ({twice[0]} is "
            "there twice). Move it away, or name another folder with --out."
        )


def _recorded(folder: Path) -> list[Row]:
    return _read_texts(folder / "runs.csv") if (folder / "runs.csv").exists() else []


def _merge(path: Path, rows: Sequence[Row]) -> None:
    """Add rows to a CSV file; those of the same runs are replaced where they stand."""
    import pandas as pd

    if not rows:
        return
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in _read_texts(path) if path.exists() else []:
        groups.setdefault((row["config"], row["seed"]), []).append(row)
    own: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        cells = {name: _text(value) for name, value in row.items()}
        own.setdefault((cells["config"], cells["seed"]), []).append(cells)
    for key, lines in own.items():
        before = groups.get(key, [{}])[0].get("experiment", "").split()
        for line in lines if before else ():
            names = dict.fromkeys([*before, *line.get("experiment", "").split()])
            line["experiment"] = " ".join(names)
        groups[key] = lines
    table = pd.DataFrame([row for lines in groups.values() for row in lines])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, table.to_csv(index=False, lineterminator="\n").encode())


def _text(value: Any) -> str:
    if value is None or value != value:
        return ""
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def _read_texts(path: Path) -> list[Row]:
    """The rows of a CSV file of ours, as the texts that are there.

    Raises:
        ValueError: It is damaged, or not one that spem wrote.
    """
    import pandas as pd

    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False)
        lacking = {*KEY, "module"} - set(table.columns)
    except (ValueError, pd.errors.ParserWarning) as error:
        raise ValueError(f"{path} cannot be read ({error}). Move it away, or mend it.") from error
    if lacking or not table["seed"].str.fullmatch(r"\d+").all():
        what = (
            f"it has no column {', '.join(sorted(lacking))}" if lacking else "a seed is no number"
        )
        raise ValueError(
            f"{path} is not a table that spem wrote: {what}. Move it away, or use another folder."
        )
    return table.to_dict("records")


def _typed(table: pd.DataFrame) -> pd.DataFrame:
    """Numbers where a column holds only numbers, and texts that stay texts."""
    import pandas as pd

    for name in (*TEXTS, "accuracy", "best_accuracy", "classes"):
        if name not in table.columns:
            table[name] = None
    for name in table.columns:
        if name in TEXTS:
            table[name] = table[name].astype(object).where(table[name].notna(), "").astype(str)
        else:
            cells = table[name].astype(object).replace("", None)
            numbers = pd.to_numeric(cells, errors="coerce")
            whole = numbers.notna().sum() == cells.notna().sum()
            table[name] = numbers if whole else cells
    return table


def read_results(folder: Path) -> dict[str, pd.DataFrame]:
    """The tables of a results folder by name ("runs", "epochs", "mixes", "gates").

    Raises:
        FileNotFoundError: It holds no runs.csv.
        ValueError: A file is damaged.
    """
    import pandas as pd

    if not (folder / "runs.csv").is_file():
        raise FileNotFoundError(
            f"report: {folder} holds no runs.csv. Name a folder that `spem reproduce` or `spem "
            "compare` wrote."
        )
    return {
        name.removesuffix(".csv"): _typed(
            pd.DataFrame(_read_texts(folder / name) if (folder / name).exists() else [])
        )
        for name in FILES
    }


# ---- tables ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """One table of a report.

    Args:
        name: What it is called in file names: `table1-cifar10`, `compare-digits`.
        experiment: Its experiment; "compare" for arms that were typed in.
        title: Its heading.
        question: What was asked.
        where: What was trained, in one line.
        frame: A row for each row of the table that was run: the columns of `spem.stats.compare`
            and `row`, `module`, `note`, `parameters`, `flops`; where the paper prints numbers of
            these cells `paper` and `paper_parameters`; with its recipe `best_mean`, `best_sd` and
            `against_paper`.
        runs: The runs behind it, with their `row`.
        not_run: Rows without a run.
        paper_recipe: Whether its runs follow the paper's recipe on the paper's data.
    """

    name: str
    experiment: str
    title: str
    question: str
    where: str
    frame: pd.DataFrame
    runs: pd.DataFrame
    not_run: tuple[str, ...]
    paper_recipe: bool

    @property
    def reference(self) -> str:
        """The row that others are compared with; "" where there are several."""
        found = set(self.frame["baseline"])
        return found.pop() if len(found) == 1 else ""

    @property
    def answer(self) -> str:
        """What it shows, in one sentence."""
        table = self.frame.assign(group=self.frame["row"])
        if not self.reference:
            table = table.assign(baseline="the reference of the same group")
        return stats.answer(table, decimals=self.decimals)

    @property
    def decimals(self) -> int:
        """Decimals that accuracies are shown with: about as many as one test image is worth."""
        return 1 if set(self.runs["dataset"]) == {"digits"} else 2


def build_tables(runs: pd.DataFrame) -> list[Table]:
    """Every table that some rows of `runs` belong to, comparisons that were typed in first."""
    asked = {name for names in runs["experiment"] for name in names.split()}
    found = _typed_in(runs) if COMPARE in asked else []
    for name in EXPERIMENTS:
        if name in asked:
            for scale in SCALES:
                found += _of_experiment(experiment(name, scale), runs)
    return found


def _of_experiment(one: Experiment, runs: pd.DataFrame) -> list[Table]:
    scale, tables = one.scale.name, list[Table]()
    for data in dict.fromkeys(cell.data for cell in one.cells):
        cells = [cell for cell in one.cells if cell.data == data]
        rows = {cell.config.id: cell.row for cell in cells if cell.config is not None}
        asked = runs["experiment"].str.split().map(lambda names: one.name in names)
        own = runs[asked & runs["config"].isin(rows) & runs["scale"].str.startswith(scale)]
        if own.empty:
            continue
        own = own.assign(row=own["config"].map(rows))
        dataset = str(own["dataset"].iloc[0])
        of_paper = dataset == data  # digits are not put beside CIFAR's numbers
        frame = _compared(own, cells)
        if of_paper and any(cell.paper is not None for cell in cells):
            frame = _beside_paper(frame, own, cells, verdict=scale == "paper")
        name = f"{one.name}-{dataset}" + (f"-{scale}" if of_paper and scale != "paper" else "")
        missing = tuple(cell.row for cell in cells if cell.row not in set(frame["row"]))
        where = f"{_where(own)}; {one.scale.title}" if scale != "paper" else _where(own)
        paper = of_paper and scale == "paper"
        tables.append(
            Table(name, one.name, one.title, one.question, where, frame, own, missing, paper)
        )
    return tables


def _typed_in(runs: pd.DataFrame) -> list[Table]:
    """The tables of `spem compare`: one for each setting that its arms share."""
    own = runs[runs["experiment"].str.split().map(lambda names: COMPARE in names)]
    shared = [name for name in _COMPARED_WITHIN if name in own.columns]
    tables: list[Table] = []
    for _, part in own.groupby(shared, sort=False, dropna=False):
        names = list(dict.fromkeys(part["module"]))
        given = str(part["baseline"].iloc[0])
        reference = given if given in names else names[0]
        dataset = str(part["dataset"].iloc[0])
        part = part.assign(row=part["module"])
        frame = _compared(part, [Cell(name, dataset, None, name == reference) for name in names])
        others = [name for name in names if name != reference]
        named = stats.listed(others, len(others))
        question = f"{'Does' if len(others) == 1 else 'Do'} {named} differ from {reference}?"
        name = f"{COMPARE}-{dataset}" + (f"-{len(tables) + 1}" if tables else "")
        title = f"{named} against {reference}"
        missing = tuple(name for name in names if name not in set(frame["row"]))
        tables.append(
            Table(name, COMPARE, title, question, _where(part), frame, part, missing, False)
        )
    return tables


def run_name(config: RunConfig) -> str:
    """A run in a few words."""
    data = Path(config.data.name).name
    return f"{module_name(config.model)}, {data}, depth {config.model.depth}, seed {config.seed}"


def _compared(runs: pd.DataFrame, cells: Sequence[Cell]) -> pd.DataFrame:
    """A row for each cell with runs: means over seeds, and differences within its group."""
    import pandas as pd

    cell_of = {cell.row: cell for cell in cells}
    done = runs[(runs["status"] == FINISHED) & runs["accuracy"].notna()]
    # One group's reference has another name than the next one's: ResNet83 plain, ResNet164 plain.
    arms = [stats.REFERENCE if cell_of[row].reference else row for row in done["row"]]
    done = done.assign(arm=arms, within=[cell_of[row].group for row in done["row"]])
    frame = pd.DataFrame(columns=["arm"])
    if len(done):
        baseline = stats.REFERENCE if stats.REFERENCE in arms else None
        frame = stats.compare(done, by="arm", baseline=baseline, within="within", together=True)
        if baseline is None:  # the reference was not run
            frame = frame.assign(verdict=stats.TOO_FEW).assign(
                **dict.fromkeys(
                    ("difference", "low", "high", "p", "p_flip", "p_holm"), float("nan")
                )
            )
    names = {(c.group, stats.REFERENCE if c.reference else c.row): c.row for c in cells}
    pairs = zip(frame.get("within", []), frame.get("group", []), strict=True)
    frame = frame.assign(row=[names[pair] for pair in pairs])
    references = {cell.group: cell.row for cell in cells if cell.reference}
    frame["baseline"] = [references.get(cell_of[row].group, "") for row in frame["row"]]
    order = [cell.row for cell in cells]
    frame = frame.sort_values("row", key=lambda rows: rows.map(order.index), ignore_index=True)
    by_row = done.groupby("row", sort=False)
    first = by_row.first()
    return frame.assign(
        module=[first["module"][row] for row in frame["row"]],
        note=[cell_of[row].note for row in frame["row"]],
        parameters=[first["parameters"][row] for row in frame["row"]],
        flops=[first["flops"][row] for row in frame["row"]],
    )


def _beside_paper(
    frame: pd.DataFrame, runs: pd.DataFrame, cells: Sequence[Cell], *, verdict: bool
) -> pd.DataFrame:
    """The paper's numbers; where the recipe is the paper's, also our best epochs and a verdict.

    The rule, fixed before any run: a number of the paper is "inside" if it lies in the 95 %
    prediction interval for one more best-epoch run of ours.
    """
    printed = {cell.row: cell.paper for cell in cells if cell.paper is not None}
    rows = frame["row"]
    frame = frame.assign(
        paper=[printed[row].top1 if row in printed else None for row in rows],
        paper_parameters=[
            printed[row].parameters_millions if row in printed else None for row in rows
        ],
    )
    if not verdict:
        return frame
    best = {row: part.dropna() for row, part in runs.groupby("row")["best_accuracy"]}
    said: list[str] = []
    for row in rows:
        ends = stats.prediction_interval(best[row])
        if row not in printed:
            said.append("")
        elif ends is None:
            said.append("n too small to say")
        else:
            said.append("inside" if ends[0] <= printed[row].top1 <= ends[1] else "outside")
    means, spreads = [best[row].mean() for row in rows], [best[row].std() for row in rows]
    return frame.assign(best_mean=means, best_sd=spreads, against_paper=said)


def _where(runs: pd.DataFrame) -> str:
    """What was trained, in one line."""
    one = runs.iloc[0]
    seeds = runs["seed"].nunique()
    parts = [data_name(one["dataset"])]
    if one.get("train_images") == one.get("train_images") and one.get("train_images"):
        parts[0] += f" ({int(one['train_images']):,} training images)"
    depths = sorted({int(depth) for depth in runs["depth"]})
    parts.append(
        f"ResNet-{depths[0]}" if len(depths) == 1 else f"ResNet-{depths[0]} to {depths[-1]}"
    )
    parts.append(f"{int(one['epochs'])} epoch" + ("s" if one["epochs"] > 1 else ""))
    parts.append(f"{seeds} seed" + ("s" if seeds > 1 else ""))
    return ", ".join(parts)


def data_name(name: str) -> str:
    """A data set as people write it."""
    return {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}.get(name, name)
