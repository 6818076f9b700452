"""From plan and runs to the numbers of every line of every table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from spem.reproduce.inference import PairedTest, holm, paired_test
from spem.reproduce.report.reading import Folder, Planned, RunRow
from spem.reproduce.statistics import Summary, prediction_interval, summarise, verdict

PAPER = ("table1", "table2", "table3", "table4", "figure2")
"""Experiments that stand beside a table or figure of the paper."""
PAPER_DEPTH = 164
PAPER_EPOCHS, PAPER_IMAGES, PAPER_TEST_IMAGES, PAPER_BATCH = 164, 50_000, 10_000, 128
NAMES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "digits": "digits"}


@dataclass(frozen=True)
class Comparison:
    """The paired difference of one line to another one.

    Args:
        to: Label of the line compared with.
        test: Difference, interval and test.
        adjusted: Its p after Holm over the lines of the table compared with the same reference.
        heading: Of the column that it stands in: the lines compared there are Holm's family.
        family: How many comparisons with a p value that column has.
        runs: The pairs: runs of both lines with the seeds that both have.
    """

    to: str
    test: PairedTest
    adjusted: float | None = None
    heading: str = ""
    family: int = 0
    runs: tuple[RunRow, ...] = ()

    @property
    def family_words(self) -> str:
        """The comparisons that Holm corrected for.

        >>> Comparison("scale", paired_test({}, {}), None, "scale", 5).family_words
        'the 5 comparisons with “scale”'
        """
        if self.family == 1:
            return f"the only comparison with “{self.heading}”"
        return f"the {self.family} comparisons with “{self.heading}”"


@dataclass(frozen=True)
class Line:
    """One row of a table, in numbers.

    Args:
        plan: What was planned, and what the paper prints.
        runs: The finished runs behind the numbers, by seed.
        diverged: Runs that diverged.
        missing: Seeds without a run.
        excluded: Finished runs that may not enter a table of the paper.
        comparisons: Heading of a column -> difference; a line has none under its own heading.
    """

    plan: Planned
    runs: tuple[RunRow, ...] = ()
    diverged: tuple[RunRow, ...] = ()
    missing: tuple[int, ...] = ()
    excluded: tuple[RunRow, ...] = ()
    comparisons: Mapping[str, Comparison] = field(default_factory=dict[str, Comparison])

    @property
    def last(self) -> Summary | None:
        """Test accuracy after the last epoch."""
        return summarise(list(self.by_seed.values())) if self.runs else None

    @property
    def best(self) -> Summary | None:
        """Test accuracy at each run's best epoch."""
        return summarise(self.best_values) if self.runs else None

    @property
    def by_seed(self) -> dict[int, float]:
        """Seed -> accuracy after the last epoch."""
        return {run.seed: run.accuracy for run in self.runs if run.accuracy is not None}

    @property
    def best_values(self) -> list[float]:
        """Accuracy of the best epoch of each run."""
        return [run.best_accuracy for run in self.runs if run.best_accuracy is not None]

    @property
    def selected_on_test(self) -> bool:
        """Whether every best epoch was chosen on the test images, as the paper's were."""
        return all(run.best_selected_on == "test" for run in self.runs)

    @property
    def paper_depth(self) -> int:
        """The depth of the paper's network: of the cell, of the label, else of its main one."""
        named = re.match(r"ResNet(\d+)\b", self.plan.row)
        return self.plan.paper_depth or (int(named[1]) if named else PAPER_DEPTH)

    @property
    def other_recipe(self) -> tuple[str, ...]:
        """In what the runs differ from the paper's recipe, one phrase each."""
        if not self.runs:
            return ()
        run, plan = self.runs[0], self.plan
        found: list[str] = []
        if plan.dataset != plan.data:
            found.append(f"trained on {data_name(plan.dataset)} instead of {data_name(plan.data)}")
        if run.depth != self.paper_depth:
            found.append(f"depth {run.depth} instead of {self.paper_depth}")
        facts = (
            (run.train_count, PAPER_IMAGES, "training images"),
            (run.test_count, PAPER_TEST_IMAGES, "test images"),
            (run.epochs, PAPER_EPOCHS, "epochs"),
            (run.batch, PAPER_BATCH, "images a batch"),
        )
        for ours, theirs, what in facts:
            if ours is not None and ours != theirs:
                found.append(f"{ours:,} {what} instead of {theirs:,}")
        return tuple(found)

    @property
    def prediction(self) -> tuple[float, float] | None:
        """Where one more best-epoch run of ours would lie, with 95 %."""
        return prediction_interval(self.best_values) if self.runs else None

    @property
    def verdict(self) -> str:
        """Whether the paper's number lies there; empty where there is nothing to judge."""
        if self.plan.paper_top1 is None or not self.runs or not self.selected_on_test:
            return ""
        return verdict(self.plan.paper_top1, self.best_values)


@dataclass(frozen=True)
class Block:
    """The table of one experiment on one data set.

    Args:
        experiment: Its name.
        data: The data set in the paper's terms.
        lines: Its rows, in the order of the plan.
        headings: The references its lines are compared with, a column each.
    """

    experiment: str
    data: str
    lines: tuple[Line, ...]
    headings: tuple[str, ...]

    @property
    def runs(self) -> list[RunRow]:
        """Every finished run behind the table, once."""
        return list({run.key: run for line in self.lines for run in line.runs}.values())


def data_name(name: str) -> str:
    """A data set's name for people.

    >>> data_name("cifar100"), data_name("/images/birds")
    ('CIFAR-100', 'birds')
    """
    return NAMES.get(name, name.rstrip("/").rpartition("/")[2])


def blocks(folder: Folder) -> list[Block]:
    """Every table of a folder, in the order of the plan."""
    found: dict[tuple[str, str], list[Planned]] = {}
    for plan in folder.plan:
        found.setdefault((plan.experiment, plan.data), []).append(plan)
    lines = {key: [_line(plan, folder) for plan in plans] for key, plans in found.items()}
    return [
        _block(name, data, own, _borrowed(own, lines.get((PAPER[0], data), ())))
        for (name, data), own in lines.items()
    ]


def _borrowed(own: Sequence[Line], first: Sequence[Line]) -> list[Line]:
    """Plain and SE of Table 1, for the paper's tables that have no such row themselves."""
    if not own or own[0].plan.experiment not in PAPER:
        return []
    marks = {line.plan.reference for line in own}
    ids = {line.plan.id for line in own}
    return [
        line
        for line in first
        if line.plan.reference not in ("", *marks) and line.plan.id not in ids and line.runs
    ]


def _line(plan: Planned, folder: Folder) -> Line:
    """A plan's row with its runs."""
    own = [
        run for run in (folder.by_id.get(plan.id, ()) if plan.id else ()) if run.seed in plan.seeds
    ]
    chosen: dict[int, RunRow] = {}
    excluded: list[RunRow] = []
    diverged: list[RunRow] = []
    for run in own:
        if not run.finished:
            diverged.append(run)
        elif plan.experiment in PAPER and not run.composed:
            excluded.append(run)
        else:
            chosen[run.seed] = run
    known = {*chosen, *(run.seed for run in diverged), *(run.seed for run in excluded)}
    return Line(
        plan,
        tuple(chosen[seed] for seed in sorted(chosen)),
        tuple(sorted(diverged, key=lambda run: run.seed)),
        tuple(seed for seed in plan.seeds if seed not in known) if plan.id else (),
        tuple(sorted(excluded, key=lambda run: run.seed)),
    )


def _block(name: str, data: str, lines: Sequence[Line], borrowed: Sequence[Line] = ()) -> Block:
    """Compare the lines with the references among them, and with those of another table."""
    references: dict[str, list[Line]] = {}
    for line in (*lines, *borrowed):
        if line.plan.reference:
            references.setdefault(line.plan.reference, []).append(line)
    compared: list[dict[str, Comparison]] = [{} for _ in lines]
    headings: list[str] = []
    for mark, members in references.items():
        for heading, reference_of in _columns(mark, members):
            found: dict[int, Comparison] = {}
            for i, line in enumerate(lines):
                reference = reference_of(line)
                if reference is None or reference is line:
                    continue
                test = paired_test(line.by_seed, reference.by_seed) if line.runs else None
                if test is not None and test.n and same_recipe(line, reference):
                    runs = _paired_runs(line, reference)
                    found[i] = Comparison(reference.plan.row, test, runs=runs)
            if members[0] in lines or found:
                headings.append(heading)
            adjusted = holm([found[i].test.p for i in found])
            family = sum(p is not None for p in adjusted)
            for i, p in zip(found, adjusted, strict=True):
                compared[i][heading] = replace(found[i], adjusted=p, heading=heading, family=family)
    done = [replace(line, comparisons=own) for line, own in zip(lines, compared, strict=True)]
    return Block(name, data, tuple(done), tuple(headings))


def _paired_runs(one: Line, other: Line) -> tuple[RunRow, ...]:
    """The runs behind a difference: of both lines, with their common seeds."""
    common = one.by_seed.keys() & other.by_seed.keys()
    return tuple(run for line in (one, other) for run in line.runs if run.seed in common)


def same_recipe(one: Line, other: Line) -> bool:
    """Whether two lines were trained and tested alike, so that their seeds are pairs."""
    a, b = one.runs[0], other.runs[0]
    return (a.dataset, a.depth, a.epochs, a.batch, a.train_images, a.test_sha256) == (
        b.dataset,
        b.depth,
        b.epochs,
        b.batch,
        b.train_images,
        b.test_sha256,
    )


class _Fixed:
    """One reference for every line."""

    def __init__(self, reference: Line) -> None:
        self.reference = reference

    def __call__(self, line: Line) -> Line | None:
        return self.reference


class _Prefix:
    """The reference whose label begins like the line's, up to the first comma."""

    def __init__(self, members: Iterable[Line]) -> None:
        self.members = {line.plan.row.partition(",")[0]: line for line in members}

    def __call__(self, line: Line) -> Line | None:
        return self.members.get(line.plan.row.partition(",")[0])


def _columns(mark: str, members: Sequence[Line]) -> list[tuple[str, _Fixed | _Prefix]]:
    """The columns of one mark: one for each control, else one in all.

    Where several lines have the same mark (plain networks of four depths), a line is compared with
    the one that begins like itself.
    """
    if mark == "control" or len(members) == 1:
        return [(line.plan.row, _Fixed(line)) for line in members]
    heading = {"plain": "plain, same depth", "base": "own base"}.get(mark, mark)
    return [(heading, _Prefix(members))]
