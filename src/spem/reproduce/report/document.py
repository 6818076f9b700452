"""The report before it has a format: sections of sentences, tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spem.reproduce.agreement import McNemar, image_by_image
from spem.reproduce.experiments import EXPERIMENTS, experiment
from spem.reproduce.report import figures_accuracy, figures_inside, summary
from spem.reproduce.report.differences import DIFFERENCES
from spem.reproduce.report.drawing import Picture
from spem.reproduce.report.faster import equivalence_table
from spem.reproduce.report.lines import Block, Line, blocks, data_name
from spem.reproduce.report.reading import Folder, RunRow
from spem.reproduce.report.tables import (
    MINUS,
    STAR,
    Cell,
    Table,
    cell,
    experiment_table,
    number,
    p_value,
)
from spem.reproduce.scales import SCALES


@dataclass(frozen=True)
class Chapter:
    """The tables of one experiment.

    Args:
        name: The experiment.
        title: Its title.
        question: What it asks, in one sentence.
        tables: One for each data set; those of more questions follow.
    """

    name: str
    title: str
    question: str
    tables: tuple[Table, ...]


@dataclass(frozen=True)
class Document:
    """The whole report.

    Args:
        title: Its title.
        scale: Name of the scale; empty if the plan does not say.
        answer: The question fixed beforehand, and in short what is shown.
        headline: The same in numbers, a sentence for each comparison.
        headline_table: Its numbers.
        facts: What was run, on what, how long, what is missing; a sentence each.
        data: In what the images differ from the official sets.
        state: How much of each experiment is there.
        power: What so many seeds can show.
        images: Image by image: McNemar's tests; None without stored answers.
        no_images: Why that table is missing; empty if it is there.
        chapters: The tables.
        pictures: The figures.
        differences: From the paper, (what, how).
        runs: Appendix: every run.
    """

    title: str
    scale: str
    answer: tuple[str, ...]
    headline: tuple[str, ...]
    headline_table: Table | None
    facts: tuple[str, ...]
    data: tuple[str, ...]
    state: Table
    power: Table | None
    images: Table | None
    no_images: str
    chapters: tuple[Chapter, ...]
    pictures: tuple[Picture, ...]
    differences: tuple[tuple[str, str], ...]
    runs: tuple[RunRow, ...]


def compose(folder: Folder) -> tuple[Document, list[Block]]:
    """The report of a results folder, and the numbers behind its tables."""
    every = blocks(folder)
    scale = next((plan.scale for plan in folder.plan if plan.scale), "")
    facts = [
        *_scale(scale),
        *summary.recipe_sentences(folder),
        *summary.machine_sentences(folder),
        *summary.missing_sentences(folder, every),
    ]
    images = _images(folder, every)
    document = Document(
        title="SPEM: tables and figures, reproduced",
        scale=scale,
        answer=tuple(summary.answer(every)),
        headline=tuple(summary.headline(every)),
        headline_table=summary.headline_table(every),
        facts=tuple(facts),
        data=tuple(summary.data_sentences(run for run in folder.runs if run.finished)),
        state=summary.state_table(every),
        power=summary.power_table(every),
        images=images,
        no_images="" if images else _no_images(folder, every),
        chapters=tuple(_chapters(every)),
        pictures=tuple(_pictures(folder, every)),
        differences=DIFFERENCES,
        runs=folder.runs,
    )
    return document, every


def _scale(name: str) -> list[str]:
    if name in SCALES:
        return [f"Scale “{name}”: {SCALES[name].title}."]
    return [f"Scale “{name}”."] if name else []


def _chapters(every: Sequence[Block]) -> list[Chapter]:
    found: list[Chapter] = []
    for name in dict.fromkeys(block.experiment for block in every):
        title, question = name, ""
        if name in EXPERIMENTS:
            known = experiment(name, "smoke")
            title, question = known.title, known.question
        own = [block for block in every if block.experiment == name]
        tables = [experiment_table(block, title) for block in own]
        if name == "equivalence":
            tables += [equivalence_table(block) for block in own]
        found.append(Chapter(name, title, question, tuple(tables)))
    return found


def _pictures(folder: Folder, every: Sequence[Block]) -> list[Picture]:
    return [
        figures_accuracy.differences(every, "controls", "controls"),
        figures_accuracy.differences(every, "table1", "table1"),
        figures_accuracy.by_lambda(every),
        figures_accuracy.by_depth(every),
        figures_accuracy.curves(folder, every),
        figures_inside.lambdas(folder, every),
        figures_accuracy.cost(every),
        figures_inside.gates(folder, every),
        figures_inside.gradients(folder, every),
        figures_inside.penalty(folder, every),
    ]


def _images(folder: Folder, every: Sequence[Block]) -> Table | None:
    """McNemar's test of SPEM against its references, where the answers are stored."""
    found: dict[str, dict[int, McNemar]] = {}
    for line, other in _compared(every):
        ids = (line.plan.id, other.plan.id)
        if set(ids) <= set(folder.predictions.labels):
            tests = image_by_image(folder.predictions, *ids)
            if tests:
                found[f"{line.plan.row} {MINUS} {other.plan.row}"] = tests
    if not found:
        return None
    seeds = sorted({seed for tests in found.values() for seed in tests})
    cells = tuple(
        (cell(name), *(_image_cell(tests.get(seed)) for seed in seeds))
        for name, tests in found.items()
    )
    columns = ("networks", *(f"seed {seed}" for seed in seeds))
    notes = (
        "Test images that only the first network answers rightly : only the second, and the p of "
        "McNemar's exact test, which is about these two trained networks and not about the "
        "methods. The seeds share the images, so their tests are not pooled.",
    )
    return Table("images", "Image by image", columns, "l" + "r" * len(seeds), cells, notes)


def _compared(every: Sequence[Block]) -> list[tuple[Line, Line]]:
    """Forms of SPEM with the references that saw the same test images; SE is left out."""
    block = summary.question(every) or next((b for b in every if b.experiment == "table1"), None)
    if block is None:
        return []
    rows = {line.plan.row: line for line in block.lines}
    return [
        (line, rows[compared.to])
        for line in block.lines
        if line.plan.attention.startswith("spem")
        for compared in line.comparisons.values()
        if rows[compared.to].plan.reference != "se"
    ]


def _no_images(folder: Folder, every: Sequence[Block]) -> str:
    """Why there is no test of SPEM and its references image by image."""
    start = "McNemar's tests, image by image, are missing:"
    pairs = _compared(every)
    if not pairs:
        return (
            f"{start} neither the controls nor Table 1 have SPEM and a network it is compared with."
        )
    ids = {line.plan.id for pair in pairs for line in pair}
    if not any(name in ids for name, _ in folder.predictions.answers):
        return (
            f"{start} predictions.npz holds no answers of these runs, because it was not kept "
            "beside the tables or the runs have stored none."
        )
    if not ids & set(folder.predictions.labels):
        return (
            f"{start} predictions.npz holds answers but not the labels of the test images, because "
            "these were not at hand where the runs were collected. Collect them where they are."
        )
    return f"{start} no two of the networks have stored answers of one seed, and labels."


def _image_cell(test: McNemar | None) -> Cell:
    if test is None:
        return cell("")
    return cell(f"{test.only_a:,} : {test.only_b:,}", f"p {p_value(test.p)}")


def runs_table(document: Document) -> Table:
    """The appendix: every run with what was trained and what came out."""
    columns = (
        "id",
        "seed",
        "data",
        "depth",
        "attention",
        "settings",
        "last epoch",
        "best epoch",
        "ms a step",
    )
    rows = [
        (
            cell(run.id, runs=(run,)),
            cell(str(run.seed)),
            cell(data_name(run.dataset) + ("*" if run.is_copy else "")),
            cell(str(run.depth)),
            cell(run.attention),
            cell(_settings(run)),
            cell(number(run.accuracy)) if run.finished else cell("diverged", kind="diverged"),
            cell(_best(run)),
            cell(number(run.time_step_ms, 1)),
        )
        for run in document.runs
    ]
    notes = (STAR,) if any(run.is_copy for run in document.runs) else ()
    return Table("runs", "Runs", columns, "lrlrllrrr", tuple(rows), notes)


def _settings(run: RunRow) -> str:
    """What distinguishes a run's config beside data, depth and attention."""
    parts = [f"{run.epochs} epochs"] if run.epochs is not None else []
    parts += [f"{run.train_count:,} images"] if run.train_count else []
    parts += [f"batch {run.batch}"]
    parts += [f"penalty {run.penalty:g}"] if run.penalty is not None else []
    parts += [f"branches start at {run.branch_start:.4g}"] if run.branch_start is not None else []
    return ", ".join([*parts, run.precision, run.impl or "default tails"])


def _best(run: RunRow) -> str:
    if run.best_accuracy is None or run.best_epoch is None:
        return ""
    return f"{number(run.best_accuracy)} (epoch {run.best_epoch + 1}, {run.best_selected_on})"
