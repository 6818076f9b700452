"""The tables of the report as plain data: what HTML, Markdown, LaTeX and CSV are written from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spem.reproduce.inference import FEW, PairedTest
from spem.reproduce.report.lines import Block, Comparison, Line, data_name
from spem.reproduce.report.reading import RunRow
from spem.reproduce.statistics import Summary, mean_interval

MINUS = "\N{MINUS SIGN}"
STAR = (
    "* 23 of the 10,000 test images are JPEG copies, not the official pixels. The training images "
    "were not compared."
)
NOT_RUN, DIVERGED = "not run", "diverged"
Value = str | int | float | None


@dataclass(frozen=True)
class Cell:
    """One cell.

    Args:
        lines: Its text; a second line says less important things.
        kind: "", "missing", "diverged", "above", "below" or "note": how it may be marked.
        runs: The runs behind it.
    """

    lines: tuple[str, ...] = ()
    kind: str = ""
    runs: tuple[RunRow, ...] = ()

    @property
    def text(self) -> str:
        """The cell in one line."""
        return "; ".join(self.lines)


@dataclass(frozen=True)
class Table:
    """A table for readers.

    Args:
        name: What distinguishes it, fit for an anchor.
        title: Its heading.
        columns: Heading of each column.
        align: A letter for each column: l for text, r for numbers.
        rows: Its cells.
        notes: Sentences below it.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    align: str
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()


def cell(*lines: str, kind: str = "", runs: Sequence[RunRow] = ()) -> Cell:
    """A cell of these lines."""
    return Cell(lines, kind, tuple(runs))


def number(value: float | None, decimals: int = 2, *, sign: bool = False) -> str:
    """A number as it is printed, with a true minus sign; nothing for None.

    >>> number(1.5, 1, sign=True), number(None), number(-0.001)
    ('+1.5', '', '0.00')
    """
    if value is None:
        return ""
    value = round(value, decimals) + 0.0  # no minus before a zero
    return f"{value:{'+' if sign else ''},.{decimals}f}".replace("-", MINUS)


def interval(low: float | None, high: float | None, *, sign: bool = True) -> str:
    """An interval in brackets; nothing where there is none."""
    if low is None or high is None:
        return ""
    return f"[{number(low, sign=sign)}, {number(high, sign=sign)}]"


def p_value(p: float | None) -> str:
    """A p value with three decimals."""
    if p is None:
        return ""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def experiment_table(block: Block, title: str) -> Table:
    """The table of an experiment on one data set, beside the paper's numbers where there are."""
    of_paper = any(line.plan.paper_top1 is not None for line in block.lines)
    counted = any(line.plan.paper_parameters_millions is not None for line in block.lines)
    columns = ["row", *(["paper"] if of_paper else []), "last epoch", "best epoch"]
    columns += [f"{MINUS} {heading}" for heading in block.headings]
    columns += ["verdict"] if of_paper else []
    columns += ["parameters, paper", "ours"] if counted else ["parameters"]
    rows = tuple(_row(line, block, of_paper, counted) for line in block.lines)
    align = "l" + "r" * (len(columns) - 1)
    if of_paper:
        where = columns.index("verdict")
        align = align[:where] + "l" + align[where + 1 :]
    return Table(
        f"{block.experiment}-{block.data}",
        f"{title}, {data_name(block.data)}" + ("*" if _copied(block) else ""),
        tuple(columns),
        align,
        rows,
        tuple(notes(block)),
    )


def _copied(block: Block) -> bool:
    return any(run.is_copy for run in block.runs)


def _row(line: Line, block: Block, of_paper: bool, counted: bool) -> tuple[Cell, ...]:
    plan = line.plan
    row = [cell(plan.row, *_small(line))]
    if of_paper:
        row.append(cell(number(plan.paper_top1)))
    row += [_accuracy(line, line.last), _accuracy(line, line.best)]
    row += [_difference(line, heading) for heading in block.headings]
    if of_paper:
        row.append(_verdict(line))
    if counted:
        row.append(cell(_paper_parameters(line)))
    row.append(_parameters(line))
    return tuple(row)


def _small(line: Line) -> list[str]:
    """Below a row's label: what the paper does not call it, where that says more."""
    plan = line.plan
    found = [plan.attention] if plan.attention.lower() not in (plan.row.lower(), "none", "") else []
    return (
        ([", ".join([*found, *([plan.note] if plan.note else [])])]) if found or plan.note else []
    )


def _absent(line: Line) -> Cell | None:
    """What a cell says that has no numbers."""
    if line.runs:
        return None
    if line.excluded:
        return cell("left out", "not float32 composed", kind="missing", runs=line.excluded)
    if line.diverged:
        return cell(DIVERGED, kind="diverged", runs=line.diverged)
    return cell(NOT_RUN, kind="missing")


def _accuracy(line: Line, summary: Summary | None) -> Cell:
    """Mean, deviation and n, the interval of the mean; the seeds that are lacking."""
    absent = _absent(line)
    if absent is not None or summary is None:
        return absent or cell(NOT_RUN, kind="missing")
    spread = "" if summary.sd is None else f" ± {number(summary.sd)}"
    between = interval(*(mean_interval(summary) or (None, None)), sign=False)
    lines = [f"{number(summary.mean)}{spread} ({summary.n})", *([between] if between else [])]
    lacking = [f"{len(line.diverged)} {DIVERGED}"] if line.diverged else []
    lacking += [f"{len(line.missing)} {NOT_RUN}"] if line.missing else []
    lacking += [f"{len(line.excluded)} left out"] if line.excluded else []
    return cell(*lines, *([", ".join(lacking)] if lacking else []), runs=line.runs)


def _difference(line: Line, heading: str) -> Cell:
    found = line.comparisons.get(heading)
    if found is None:
        return cell("\N{EN DASH}" if line.runs else "")
    return difference_cell(found)


def difference_cell(found: Comparison) -> Cell:
    """A difference with its interval; below it the p values."""
    test = found.test
    first = number(test.mean, sign=True)
    second = interval(test.low, test.high) or ("n too small" if test.n < 2 else "all equal")
    third = f"n {test.n}"
    if test.p is not None:
        third += f", p {p_value(test.p)}, Holm {p_value(found.adjusted)}"
    kind = ""
    if shown(found) and test.n >= FEW:  # no marks on three seeds: their interval speaks
        kind = "above" if (test.mean or 0) > 0 else "below"
    return cell(f"{first} {second}", third, kind=kind, runs=found.runs)


def shown(found: Comparison) -> bool:
    """Whether a difference may be called one: interval, test, and test after Holm agree."""
    alpha = round(1 - found.test.level, 12)
    return found.test.shows and found.adjusted is not None and found.adjusted <= alpha


def _verdict(line: Line) -> Cell:
    """The verdict on the paper's number, by the rule fixed beforehand."""
    verdict = line.verdict
    if not verdict:
        if line.runs and line.plan.paper_top1 is not None and not line.selected_on_test:
            return cell("none: best epoch not selected on test", kind="note", runs=line.runs)
        return cell("")
    ends = line.prediction
    lines = [verdict if ends is None else f"{verdict} {interval(*ends, sign=False)}"]
    if line.other_recipe:
        lines.append("another recipe")
    return cell(*lines, kind="note", runs=line.runs)


def _paper_parameters(line: Line) -> str:
    millions = line.plan.paper_parameters_millions
    return "" if millions is None else f"{millions:.2f} M"


def _parameters(line: Line) -> Cell:
    """Our exact count, and whether it rounds to the paper's of the same depth and classes."""
    if not line.runs:
        return cell("")
    count = line.runs[0].parameters or 0
    printed = line.plan.paper_parameters_millions
    same = line.plan.paper_depth == line.plan.depth and line.plan.dataset == line.plan.data
    if printed is None or not same:
        return cell(f"{count:,}", runs=line.runs)
    word = "rounds to it" if f"{count / 1e6:.2f}" == f"{printed:.2f}" else "does not round to it"
    return cell(f"{count:,}", word, runs=line.runs)


def notes(block: Block) -> list[str]:
    """What must be known to read a table, in sentences."""
    found = [STAR] if _copied(block) else []
    beside = [line for line in block.lines if line.plan.paper_top1 is not None]
    recipes = dict.fromkeys(phrase for line in block.lines for phrase in line.other_recipe)
    if recipes:
        start = f"Our runs are of another recipe than the paper's ({', '.join(recipes)})"
        rest = "no number here can be compared with one of the paper."
        if any(line.verdict for line in block.lines):
            rest = (
                "the verdicts follow the rule, but this is no comparison with the paper's numbers "
                "and neither confirms nor refutes them."
            )
        found.append(f"{start}: {rest}")
    apart = {line.plan.row for line in block.lines}.isdisjoint
    elsewhere = [name for name in ("plain", "SE") if name in block.headings and apart([name])]
    if elsewhere and block.experiment != "table1":
        found.append(f"{' and '.join(elsewhere)}: the runs of Table 1.")
    excluded = sum(len(line.excluded) for line in block.lines)
    if excluded:
        found.append(
            f"{excluded} finished runs in bfloat16 or with fused kernels are left out: such runs "
            "enter a table of the paper only after it was shown that they do not move accuracy."
        )
    few = sorted({len(line.runs) for line in block.lines if 0 < len(line.runs) < 3})
    if few and beside:
        found.append("With fewer than three seeds no verdict is given, with one no interval.")
    found += [
        f"Diverged: {run.key}: {run.message}" for line in block.lines for run in line.diverged
    ]
    tested = {run.test_images for run in block.runs} - {None}
    if tested:
        counts = ", ".join(f"{count:,}" for count in sorted(count for count in tested if count))
        found.append(f"Tested on {counts} images.")
    return found


def csv_rows(block: Block) -> list[dict[str, Value]]:
    """The numbers of a table, tidy and unrounded; one row a line."""
    return [_csv_row(line, block) for line in block.lines]


def _csv_row(line: Line, block: Block) -> dict[str, Value]:
    plan, last, best, ends = line.plan, line.last, line.best, line.prediction
    state = "finished" if line.runs else (_absent(line) or cell(NOT_RUN)).lines[0]
    row: dict[str, Value] = {
        "experiment": plan.experiment,
        "data": plan.data,
        "row": plan.row,
        "dataset": plan.dataset,
        "depth": plan.depth,
        "attention": plan.attention,
        "state": state,
        "paper_row": plan.paper_row,
        "paper_top1": plan.paper_top1,
        "n": len(line.runs),
        "last_mean": None if last is None else last.mean,
        "last_sd": None if last is None else last.sd,
        "best_mean": None if best is None else best.mean,
        "best_sd": None if best is None else best.sd,
        "best_prediction_low": None if ends is None else ends[0],
        "best_prediction_high": None if ends is None else ends[1],
        "verdict": line.verdict,
        "other_recipe": "; ".join(line.other_recipe),
        "paper_parameters_millions": plan.paper_parameters_millions,
        "parameters": line.runs[0].parameters if line.runs else None,
    }
    for heading in block.headings:
        row |= _csv_difference(heading, line.comparisons.get(heading))
    row["seeds_not_run"] = " ".join(map(str, line.missing))
    row["seeds_diverged"] = " ".join(str(run.seed) for run in line.diverged)
    row["seeds_left_out"] = " ".join(str(run.seed) for run in line.excluded)
    row["id"] = plan.id
    row["runs"] = " ".join(run.key for run in line.runs)
    return row


def _csv_difference(heading: str, found: Comparison | None) -> Mapping[str, Value]:
    test = found.test if found else PairedTest(0, None, None, None, None, "", None, "", None)
    numbers: dict[str, Value] = {
        "n": test.n if found else None,
        "mean": test.mean,
        "sd": test.sd,
        "low95": test.low,
        "high95": test.high,
        "interval": test.interval,
        "t_low95": test.t_low,
        "t_high95": test.t_high,
        "p": test.p,
        "p_method": test.p_method,
        "p_holm": found.adjusted if found else None,
        "correlation": test.correlation,
    }
    return {f"minus {heading}: {name}": value for name, value in numbers.items()}
