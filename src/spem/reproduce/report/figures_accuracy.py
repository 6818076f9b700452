"""Pictures of accuracy: by lambda, by depth, over epochs, by cost, and as paired differences."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from spem.reproduce.report.drawing import (
    DotRow,
    Panel,
    Picture,
    canvas,
    dot_rows,
    legend,
    name_axes,
    plain,
    style,
)
from spem.reproduce.report.lines import Block, Line, data_name
from spem.reproduce.report.reading import Folder, RunRow
from spem.reproduce.report.tables import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ACCURACY = "test accuracy, last epoch, %"


def by_lambda(blocks: Sequence[Block]) -> Picture:
    """Figure 2, and Table 3 in the same way: accuracy for each constant mix, beside a line."""
    panels: list[Panel] = []
    for block in blocks:
        if block.experiment not in ("figure2", "table3"):
            continue
        points = [(lam, line) for line in block.lines if (lam := _lambda(line)) is not None]
        points = sorted(((lam, line) for lam, line in points if line.runs), key=lambda p: p[0])
        base = next((x for x in block.lines if x.plan.reference and x.runs), None)
        if points:
            panels.append(_lambda_panel(block, points, base))
    return Picture(
        "lambda",
        "Accuracy by lambda",
        "Dots are seeds, the line joins their means, bars are one standard deviation. The dashed "
        "line with its band (mean and standard deviation) is average pooling for SE, the learned "
        "lambda for SPEM. Figure 2 of the paper prints no numbers; its claim is that the best mix "
        "matches or beats average pooling. The best of several means is above the others by "
        "chance alone: only the differences with their intervals in the tables judge it.",
        tuple(panels),
        "figure2",
    )


def _lambda(line: Line) -> float | None:
    found = re.search(r"lambda = ([\d.]+)$", line.plan.row)
    return float(found[1]) if found else None


def _lambda_panel(block: Block, points: Sequence[tuple[float, Line]], base: Line | None) -> Panel:
    net = "SE" if block.experiment == "figure2" else "SPEM"
    where = _where(points[0][1])
    figure, axis = canvas(3.6, plain(f"{net}, {where}"))
    colour = style(2)[0]
    for lam, line in points:
        _column(axis, lam, line, colour, 0.012)
    means = [line.last.mean if line.last else 0.0 for _, line in points]
    axis.plot([lam for lam, _ in points], means, color=colour, linewidth=1.6, label="constant mix")
    if base is not None and base.last is not None:
        what = "average pooling" if block.experiment == "figure2" else base.plan.row
        axis.axhline(
            base.last.mean, color="black", linestyle="--", linewidth=1.4, label=plain(what)
        )
        if base.last.sd is not None:
            ends = (base.last.mean - base.last.sd, base.last.mean + base.last.sd)
            axis.axhspan(*ends, color="black", alpha=0.08, linewidth=0)
    name_axes(axis, "lambda: share of the maximum, the rest is the minimum", ACCURACY)
    axis.set_xticks([lam for lam, _ in points])
    axis.margins(x=0.06, y=0.1)
    legend(figure, axis, 2)
    told = ", ".join(f"{m:.2f} % at {lam:g}" for (lam, _), m in zip(points, means, strict=True))
    alt = f"{net} on {where}, accuracy by lambda: {told}"
    if base is not None and base.last is not None:
        alt += f"; {base.plan.row} {base.last.mean:.2f} %"
    return Panel(f"lambda-{block.experiment}-{block.data}", figure, alt + ".")


def _column(axis: Axes, x: float, line: Line, colour: str, width: float) -> None:
    """Seeds as dots and a bar of one standard deviation around their mean, at one place."""
    last = line.last
    assert last is not None
    if last.sd is not None:
        axis.errorbar(x, last.mean, yerr=last.sd, color=colour, linewidth=1.6, capsize=3)
    values = list(line.by_seed.values())
    middle = (len(values) - 1) / 2
    places = [x + width * (k - middle) / max(middle, 1) for k in range(len(values))]
    axis.scatter(places, values, s=14, color=colour, alpha=0.7, linewidths=0, zorder=3)


def by_depth(blocks: Sequence[Block]) -> Picture:
    """Table 2: with and without SPEM at each depth."""
    panels = [
        _depth_panel(block) for block in blocks if block.experiment == "table2" and block.runs
    ]
    return Picture(
        "depth",
        "Accuracy by depth",
        "Dots are seeds, the lines join their means, bars are one standard deviation. The paper "
        "prints a gain of SPEM at every depth, the largest at depth 326.",
        tuple(panels),
        "table2",
    )


def _depth_panel(block: Block) -> Panel:
    groups: dict[str, list[Line]] = {}
    for line in block.lines:
        if line.runs:
            groups.setdefault(line.plan.attention, []).append(line)
    first = next(iter(groups.values()))[0]
    figure, axis = canvas(3.6, plain(_where(first, depth=False)))
    told: list[str] = []
    depths = sorted({line.runs[0].depth for lines in groups.values() for line in lines})
    for i, (attention, lines) in enumerate(groups.items()):
        colour, marker, dash = style((0, 2)[i] if i < 2 else i + 1)
        places = [depths.index(line.runs[0].depth) + 0.08 * (i - 0.5) for line in lines]
        means = [line.last.mean if line.last else 0.0 for line in lines]
        for x, line in zip(places, lines, strict=True):
            _column(axis, x, line, colour, 0.03)
        name = _name(attention)
        axis.plot(places, means, color=colour, marker=marker, linestyle=dash, label=plain(name))
        pairs = zip(lines, means, strict=True)
        told.append(f"{name} " + ", ".join(f"{m:.2f} % ({x.runs[0].depth})" for x, m in pairs))
    axis.set_xticks(range(len(depths)), [str(depth) for depth in depths])
    axis.set_xlim(-0.5, len(depths) - 0.5)
    axis.margins(y=0.1)
    name_axes(axis, "depth", ACCURACY)
    legend(figure, axis, len(groups))
    alt = f"Accuracy by depth on {_where(first, depth=False)}: {'; '.join(told)}."
    return Panel(f"depth-{block.data}", figure, alt)


def curves(folder: Folder, blocks: Sequence[Block]) -> Picture:
    """Test accuracy over epochs, the mean over seeds."""
    accuracy = {(row.id, row.seed, row.epoch): row.test_accuracy for row in folder.epochs}
    panels: list[Panel] = []
    for block in blocks:
        if block.experiment not in ("table1", "controls"):
            continue
        drawn = [(line, _curve(line, accuracy)) for line in block.lines]
        drawn = [(line, curve) for line, curve in drawn if curve]
        if drawn:
            panels.append(_curve_panel(block, drawn))
    return Picture(
        "curves",
        "Learning curves",
        "Test accuracy after each epoch, the mean of the seeds. Where the rate falls the curves "
        "jump; the paper's numbers are the highest point of one such curve.",
        tuple(panels),
        "table1",
    )


def _curve(
    line: Line, accuracy: Mapping[tuple[str, int, int], float | None]
) -> list[tuple[int, float]]:
    """(epoch from 1, mean over the seeds), as far as every seed has a number."""
    found: list[tuple[int, float]] = []
    for epoch in range(line.runs[0].epochs or 0) if line.runs else ():
        values = [accuracy.get((run.id, run.seed, epoch)) for run in line.runs]
        known = [value for value in values if value is not None]
        if len(known) == len(line.runs):
            found.append((epoch + 1, sum(known) / len(known)))
    return found


def _curve_panel(block: Block, drawn: Sequence[tuple[Line, Sequence[tuple[int, float]]]]) -> Panel:
    where = _where(drawn[0][0])
    title = f"{'Controls' if block.experiment == 'controls' else 'Table 1'}, {where}"
    figure, axis = canvas(4.2, plain(title))
    for line, curve in drawn:
        colour, marker, dash = style(block.lines.index(line))
        axis.plot(
            [epoch for epoch, _ in curve],
            [value for _, value in curve],
            color=colour,
            linestyle=dash,
            marker=marker if len(curve) <= 12 else None,
            markersize=4,
            linewidth=1.6,
            label=plain(line.plan.row),
        )
    name_axes(axis, "epoch", "test accuracy, %")
    axis.locator_params(axis="x", integer=True)
    legend(figure, axis, len(drawn))
    told = ", ".join(f"{line.plan.row} {curve[-1][1]:.2f} %" for line, curve in drawn)
    alt = f"Learning curves on {where}, ending at: {told}."
    return Panel(f"curves-{block.experiment}-{block.data}", figure, alt)


Measure = Callable[[RunRow], float | None]
COSTS: tuple[tuple[str, str, Measure], ...] = (
    ("parameters", "parameters, millions", lambda run: (run.parameters or 0) / 1e6),
    ("flops", "FLOPs of an image, millions", lambda run: (run.flops or 0) / 1e6),
    ("time", "measured time of a training step, ms", lambda run: run.time_step_ms),
)


def cost(blocks: Sequence[Block]) -> Picture:
    """Accuracy against parameters, FLOPs and measured step time."""
    panels: list[Panel] = []
    for block in blocks:
        lines = [line for line in block.lines if line.runs]
        if block.experiment == "table1" and lines:
            panels += [_cost_panel(block, lines, *measure) for measure in COSTS]
    return Picture(
        "cost",
        "Cost against accuracy",
        "Dots are means over seeds, vertical bars one standard deviation of the accuracy. Step "
        "times are medians of the machine named above; runs that shared it with others differ.",
        tuple(panels),
        "table1",
    )


def _cost_panel(
    block: Block, lines: Sequence[Line], name: str, label: str, measure: Measure
) -> Panel:
    where = _where(lines[0])
    figure, axis = canvas(3.6, plain(where))
    told: list[str] = []
    for line in lines:
        numbers = sorted(value for run in line.runs if (value := measure(run)) is not None)
        if not numbers or line.last is None:
            continue
        x = numbers[len(numbers) // 2]
        colour, marker, _ = style(block.lines.index(line))
        axis.errorbar(
            x,
            line.last.mean,
            yerr=line.last.sd,
            color=colour,
            marker=marker,
            markersize=7,
            linewidth=1.2,
            linestyle="none",
            label=plain(line.plan.row),
        )
        told.append(f"{line.plan.row} {x:.4g}, {line.last.mean:.2f} %")
    axis.margins(x=0.08, y=0.1)
    axis.locator_params(axis="x", nbins=6)
    name_axes(axis, label, ACCURACY)
    legend(figure, axis, len(lines))
    return Panel(
        f"cost-{name}-{block.data}", figure, f"{label} and accuracy, {where}: {'; '.join(told)}."
    )


def differences(blocks: Sequence[Block], experiment: str, command: str) -> Picture:
    """Paired differences to each reference of an experiment: seeds as dots, intervals as bars."""
    panels: list[Panel] = []
    for block in blocks:
        if block.experiment != experiment:
            continue
        for k, heading in enumerate(block.headings):
            rows = [row for line in block.lines if (row := _difference(line, heading, block))]
            if not rows:
                continue
            where = _where(next(line for line in block.lines if line.runs))
            figure = dot_rows(
                rows, plain(f"Minus {heading}\n{where}"), "percentage points", zero=True
            )
            told = "; ".join(f"{row.label} {row.mean:+.2f}" + _ends(row) for row in rows)
            alt = f"Differences to {heading} on {where}, points: {told}."
            panels.append(Panel(f"{experiment}-minus-{k + 1}-{block.data}", figure, alt))
    title = {"controls": "Controls", "table1": "Modules"}[experiment]
    return Picture(
        f"differences-{experiment}",
        f"{title}: differences of equal seeds",
        "A dot is the difference of two runs with the same seed, the tick their mean, the bar the "
        "95 % interval (t below six pairs, BCa from six on). Pale: not shown to differ from 0 "
        "after the correction (Holm) for the lines compared with the same reference.",
        tuple(panels),
        command,
    )


def _difference(line: Line, heading: str, block: Block) -> DotRow | None:
    found = line.comparisons.get(heading)
    if found is None or found.test.mean is None:
        return None
    other = next(one for one in block.lines if one.plan.row == found.to)
    own, theirs = line.by_seed, other.by_seed
    dots = [own[seed] - theirs[seed] for seed in sorted(set(own) & set(theirs))]
    test = found.test
    return DotRow(
        line.plan.row,
        dots,
        test.mean or 0.0,
        test.low,
        test.high,
        not shown(found),
        block.lines.index(line),
    )


def _ends(row: DotRow) -> str:
    return "" if row.low is None else f" [{row.low:+.2f}, {row.high:+.2f}]"


def _where(line: Line, *, depth: bool = True) -> str:
    run = line.runs[0]
    parts = [data_name(run.dataset)]
    parts += [f"depth {run.depth}"] if depth else []
    parts += [f"{run.train_count:,} images"] if run.train_count else []
    return ", ".join([*parts, f"{run.epochs} epochs"])


def _name(attention: str) -> str:
    return {"none": "plain", "spem": "SPEM"}.get(attention, attention)
