"""What the first page says: what was run, on what, what is missing, and the headline."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from spem.reproduce.inference import sentence
from spem.reproduce.power import seeds_needed, smallest_visible
from spem.reproduce.report.lines import (
    PAPER_EPOCHS,
    PAPER_IMAGES,
    Block,
    Line,
    data_name,
)
from spem.reproduce.report.reading import COPY_OF_CIFAR10, Folder, RunRow
from spem.reproduce.report.tables import (
    MINUS,
    STAR,
    Cell,
    Table,
    cell,
    difference_cell,
    interval,
    number,
    shown,
)

OFFICIAL_CIFAR100 = "7a49b15a2d025a396f6109d0703885ec10f65383c3003b58884d847adf3abb69"
"""Checksum of the official CIFAR-100 test set."""
NOT_COMPARED = "The training images were not compared."
"""No sum of a whole official training set is known here, and runs may train on a part of it."""


def question(blocks: Sequence[Block]) -> Block | None:
    """The table that answers the one question fixed beforehand."""
    return next((b for b in blocks if b.experiment == "controls" and b.runs), None)


def answer(blocks: Sequence[Block]) -> list[str]:
    """The headline in short: the question, and for each form of SPEM what is shown."""
    block = question(blocks)
    if block is None:
        return [
            "The question fixed beforehand, whether SPEM beats a network that starts as small "
            "without attention, is not answered here: the controls were not run."
        ]
    run = block.runs[0]
    found = [
        "The question fixed beforehand: is SPEM above a network whose branches start as small but "
        f"that has no attention? Measured on {data_name(run.dataset)}, depth {run.depth}, "
        f"{_amount(run.train_count)} training images, {_amount(run.epochs)} epochs:"
    ]
    for line in _spem(block):
        sides: dict[str, list[str]] = {}
        for heading, compared in line.comparisons.items():
            side = "not shown to be above or below"
            if shown(compared):
                above = (compared.test.mean or 0) > 0
                side = "above" if above else "below"
            sides.setdefault(side, []).append(heading)
        words = "; it is ".join(f"{side} {_list(names)}" for side, names in sides.items())
        pairs = sorted({compared.test.n for compared in line.comparisons.values()})
        if words:
            found.append(f"{line.plan.row} is {words} ({_spans(pairs)} paired seeds).")
    if any(line.missing or line.diverged for line in block.lines):
        planned = max(len(line.plan.seeds) for line in block.lines)
        found.append(
            f"The experiment is not complete: {planned} seeds were planned for each line. What an "
            "unfinished one shows may change, and stopping where it pleases would bias it."
        )
    return found


def _list(names: Sequence[str]) -> str:
    """Names in quotation marks, since some have commas."""
    quoted = [f"“{name}”" for name in names]
    return " and ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)


def headline(blocks: Sequence[Block]) -> list[str]:
    """SPEM minus its controls beside SPEM minus plain, in words that say what is shown."""
    block = question(blocks)
    if block is not None:
        return _controlled(block)
    found: list[str] = []
    for block in blocks:
        if block.experiment == "table1":
            where = data_name(block.lines[0].plan.dataset)
            found += [f"On {where}: {text}" for text in _against(block, ("plain",), _spem(block))]
    if found:
        found.append(
            "A difference to plain alone is not the attention's: SPEM starts every branch at 0.03 "
            "of its size, which can help by itself."
        )
    return found


def _controlled(block: Block) -> list[str]:
    lines = _spem(block)
    controls = [line.plan.row for line in block.lines if line.plan.reference == "control"]
    plain = [line.plan.row for line in block.lines if line.plan.reference == "plain"]
    found: list[str] = []
    found += [f"Against its controls: {text}" for text in _against(block, controls, lines)]
    found += [f"Against plain: {text}" for text in _against(block, plain, lines)]
    return found


def _spem(block: Block) -> list[Line]:
    return [line for line in block.lines if line.plan.attention.startswith("spem") and line.runs]


def _against(block: Block, headings: Iterable[str], lines: Sequence[Line]) -> list[str]:
    found: list[str] = []
    for line in lines:
        for heading in headings:
            compared = line.comparisons.get(heading)
            if compared is not None:
                alone = compared.family == 1
                found.append(
                    sentence(
                        line.plan.row,
                        compared.to,
                        compared.test,
                        None if alone else compared.adjusted,
                        family=compared.family_words,
                    )
                )
            else:
                found.append(f"{line.plan.row} {MINUS} {heading}: not run with common seeds.")
    return found


def headline_table(blocks: Sequence[Block]) -> Table | None:
    """The differences of the headline with their statistics; None without controls."""
    block = question(blocks)
    if block is None:
        return None
    marks = {line.plan.row: line.plan.reference for line in block.lines}
    order = sorted(block.headings, key=lambda heading: marks.get(heading) != "control")
    columns = ("difference", "points, interval", "t interval", "n", "sd", "correlation", "visible")
    rows: list[tuple[Cell, ...]] = []
    for line in _spem(block):
        for heading in order:
            found = line.comparisons.get(heading)
            if found is None or marks.get(heading) == "se":
                continue
            test = found.test
            visible = smallest_visible(test.sd, test.n) if test.sd and test.n > 1 else None
            rows.append(
                (
                    cell(f"{line.plan.row} {MINUS} {heading}", _role(marks.get(heading))),
                    difference_cell(found),
                    cell(interval(test.t_low, test.t_high)),
                    cell(str(test.n)),
                    cell(number(test.sd)),
                    cell(number(test.correlation)),
                    cell(number(visible)),
                )
            )
    title = f"SPEM {MINUS} control beside SPEM {MINUS} plain"
    notes = (
        "Test accuracy after the last epoch, percentage points, pairs of equal seed. sd: of the "
        "paired differences. correlation: of the two members of the pairs; pairing helps as far as "
        "it is above 0. visible: the difference that so many pairs with this sd find four times in "
        "five; smaller ones these seeds mostly miss. Holm: corrected for the lines of the "
        "experiment compared with the same network, SE among them; not across networks.",
    )
    return Table("headline", title, columns, "lrrrrrr", tuple(rows), notes)


def _role(mark: str | None) -> str:
    return "the attention's part" if mark == "control" else "includes the small start's part"


def power_table(blocks: Sequence[Block]) -> Table | None:
    """What the seeds of each table can and cannot show; None where nothing was compared."""
    rows: list[tuple[Cell, ...]] = []
    for block in blocks:
        for heading in block.headings[:1]:
            tests = [x.comparisons[heading].test for x in block.lines if heading in x.comparisons]
            usable = [test for test in tests if test.sd and test.n > 1]
            if not usable:
                continue
            sd = statistics.median(test.sd or 0.0 for test in usable)
            counts = sorted({test.n for test in usable})
            n = counts[0]  # what each line can show, not only the luckiest
            known = [test.correlation for test in usable if test.correlation is not None]
            rows.append(
                (
                    cell(f"{block.experiment}, {data_name(block.data)}"),
                    cell(heading),
                    cell(str(n), *([f"up to {counts[-1]}"] if len(counts) > 1 else [])),
                    cell(number(sd)),
                    cell(number(statistics.median(known)) if known else ""),
                    cell(number(smallest_visible(sd, n))),
                    cell(f"{seeds_needed(0.3, sd):,}"),
                    cell(f"{2 / 2**n:.3g}"),
                )
            )
    if not rows:
        return None
    columns = (
        "table",
        "compared with",
        "n",
        "sd",
        "correlation",
        "visible",
        "seeds for 0.3",
        "least sign-flip p",
    )
    notes = (
        "n: the smallest number of pairs of a line, of lines with at least two; what follows is "
        "for so many. sd and correlation of the pairs: medians over these lines. visible: the "
        "difference found with 80 % power. seeds for 0.3: pairs needed to find 0.3 points as "
        "often, the distance of many neighbouring cells of the paper.",
    )
    title = "What so many seeds can show"
    return Table("power", title, columns, "llrrrrrr", tuple(rows), notes)


def state_table(blocks: Sequence[Block]) -> Table:
    """How much of each experiment is there."""
    rows: list[tuple[Cell, ...]] = []
    for block in blocks:
        planned = sum(len(line.plan.seeds) for line in block.lines if line.plan.id)
        finished = sum(len(line.runs) for line in block.lines)
        diverged = sum(len(line.diverged) for line in block.lines)
        missing = sum(len(line.missing) for line in block.lines)
        out = sum(len(line.excluded) for line in block.lines)
        trained = {data_name(line.plan.dataset) for line in block.lines if line.plan.id}
        rows.append(
            (
                cell(block.experiment),
                cell(_starred(block), *_stands_in(trained, block.data)),
                cell(str(planned)),
                cell(str(finished)),
                cell(str(diverged), kind="diverged" if diverged else ""),
                cell(str(missing), kind="missing" if missing else ""),
                cell(str(out)),
            )
        )
    columns = ("experiment", "data", "planned", "finished", "diverged", "not run", "left out")
    notes = ["Runs, a seed each; a run that serves several tables counts in each of them."]
    notes += [STAR] if any(run.is_copy for block in blocks for run in block.runs) else []
    return Table("state", "What is there", columns, "llrrrrr", tuple(rows), tuple(notes))


def _starred(block: Block) -> str:
    """The data set's name, with a star where its images are not all the official ones."""
    return data_name(block.data) + ("*" if any(run.is_copy for run in block.runs) else "")


def _stands_in(trained: set[str], data: str) -> list[str]:
    if not trained:
        return ["nothing planned at this scale"]
    others = trained - {data_name(data)}
    return [f"trained on {', '.join(sorted(others))}"] if others else []


def recipe_sentences(folder: Folder) -> list[str]:
    """Scale, data, depth, images, epochs and seeds of what was run."""
    groups: dict[tuple[str, int | None, int | None, int | None, int | None], list[RunRow]] = {}
    for run in folder.runs:
        if not run.finished:
            continue
        key = (run.dataset, run.train_count, run.test_count, run.epochs, run.batch)
        groups.setdefault(key, []).append(run)
    found: list[str] = []
    paper = f"the paper trains for {PAPER_EPOCHS} epochs on {PAPER_IMAGES:,}."
    for (dataset, train, test, epochs, batch), runs in groups.items():
        depths = ", ".join(str(depth) for depth in sorted({run.depth for run in runs}))
        seeds = sorted({run.seed for run in runs})
        text = (
            f"{data_name(dataset)}: {_count(len(runs), 'finished run')} of depth {depths}, "
            f"{_amount(epochs)} epochs on {_amount(train)} training images in batches of "
            f"{_amount(batch)}, tested on {_amount(test)} images, "
            f"{_plural(len(seeds), 'seed')} {_spans(seeds)}"
        )
        whole = (train, epochs) == (PAPER_IMAGES, PAPER_EPOCHS)
        found.append(f"{text}: {'as long as the paper.' if whole else paper}")
    return found or ["Nothing has been run yet."]


def machine_sentences(folder: Folder) -> list[str]:
    """Hardware, versions and time."""
    runs = [run for run in folder.runs if run.finished]
    if not runs:
        return []
    found = [f"Hardware: {'; '.join(sorted({run.host_hardware for run in runs}))}."]
    versions = sorted({f"{k} {v}" for run in runs for k, v in run.versions.items()})
    if versions:
        found.append(f"Versions: {', '.join(versions)}.")
    commits = sorted({run.host_commit for run in runs if run.host_commit})
    if commits:
        found.append(f"Commits: {', '.join(commits)}.")
    arithmetic = sorted({f"{run.precision}, {run.impl or 'default'} tails" for run in runs})
    found.append(f"Arithmetic: {'; '.join(arithmetic)}.")
    train = sum(run.time_train_seconds or 0 for run in runs) / 3600
    test = sum(run.time_evaluation_seconds or 0 for run in runs) / 3600
    found.append(f"Time of all runs together: {train:.1f} h training, {test:.1f} h testing.")
    return found


def missing_sentences(folder: Folder, blocks: Sequence[Block]) -> list[str]:
    """What is not there, and what diverged."""
    cells = [line for block in blocks for line in block.lines]
    wanted = {(line.plan.id, s) for line in cells for s in line.missing}
    none = sum(1 for line in cells if not line.plan.id)
    diverged = [run for run in folder.runs if not run.finished]
    found = [
        f"{_count(len(wanted), 'planned run')} not run yet."
        if wanted
        else "No planned run is missing."
    ]
    if diverged:
        found.append(
            f"{_count(len(diverged), 'run')} diverged: " + ", ".join(r.key for r in diverged) + "."
        )
    else:
        found.append("No run diverged.")
    if none:
        found.append(
            f"{_count(none, 'cell')} of the paper with nothing to run: at this scale, or because "
            "the paper does not say what the row is."
        )
    return found


def data_sentences(runs: Iterable[RunRow]) -> list[str]:
    """What is known of the images by the checksum of the test set, and what is not."""
    sums: dict[str, set[str]] = {}
    for run in runs:
        sums.setdefault(run.dataset, set()).add(run.test_sha256)
    found: list[str] = []
    for dataset, tests in sorted(sums.items()):
        name = data_name(dataset)
        sums_text = ", ".join(f"{one[:12]}..." for one in sorted(tests))
        if tests <= {COPY_OF_CIFAR10}:
            found.append(
                f"{name}: by their checksum the test images are those of a copy in which 23 of the "
                "10,000 are JPEG copies of quality 75, because no lossless copy of them was at "
                f"hand; the others hold the original pixels. {NOT_COMPARED} The training set that "
                "belongs to this copy has 85 such images among 50,000."
            )
        elif tests <= {OFFICIAL_CIFAR100}:
            found.append(
                f"{name}: by their checksum the test images are the official ones, bit for bit. "
                f"{NOT_COMPARED}"
            )
        elif dataset == "digits":
            found.append(
                "digits are scikit-learn's 8x8 images, a test of the machinery: no number of the "
                "paper can be compared with them."
            )
        else:
            found.append(
                f"Whether these images of {name} are those of the official set was not checked "
                f"(SHA-256 of the test images: {sums_text})."
            )
    return found


def _count(n: int, what: str) -> str:
    return f"{n:,} {_plural(n, what)}"


def _plural(n: int, what: str) -> str:
    return what if n == 1 else f"{what}s"


def _amount(value: int | None) -> str:
    return "all" if value is None else f"{value:,}"


def _spans(seeds: Sequence[int]) -> str:
    """Numbers with runs of neighbours drawn together.

    >>> _spans([0, 1, 2, 5])
    '0 to 2, 5'
    """
    parts: list[list[int]] = []
    for seed in seeds:
        if parts and seed == parts[-1][-1] + 1:
            parts[-1].append(seed)
        else:
            parts.append([seed])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]} to {p[-1]}" for p in parts)
