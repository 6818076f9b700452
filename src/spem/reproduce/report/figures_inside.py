"""Pictures of the inside of networks: lambda and |p| over epochs, gates and gradients by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from spem.reproduce.report.drawing import (
    Panel,
    Picture,
    canvas,
    legend,
    log_scale,
    name_axes,
    plain,
    style,
)
from spem.reproduce.report.lines import Block, Line, data_name
from spem.reproduce.report.reading import EpochRow, Folder, GateRow, GradientRow, MixRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MANY = 12
"""Blocks from which on single seeds and bars would be a thicket."""
R = TypeVar("R", MixRow, EpochRow)
MixValue = Callable[[MixRow], float | None]
Series = dict[int, list[float]]


def lambdas(folder: Folder, blocks: Sequence[Block]) -> Picture:
    """Lambda and |p| of every block over epochs, for the learned mix of SPEM on each data set."""
    panels: list[Panel] = []
    for block in blocks:
        if block.experiment not in ("table1", "controls"):
            continue
        for line in block.lines:
            if line.plan.attention.startswith("spem"):
                panels += _mix_panels(folder, line)
    return Picture(
        "mix",
        "Lambda and |p| of each block over epochs",
        "A line for each block and seed, dark blue for the first block to yellow for the last "
        "(with more than twelve blocks only the first seed). lambda depends on the direction of p "
        "only; the smaller |p|, the larger its steps. Lambdas of one run that lie near 0 or 1 and "
        "differ between seeds say nothing about the data.",
        tuple(_once(panels)),
        "table1",
    )


def _once(panels: Sequence[Panel]) -> list[Panel]:
    """Drop panels of a name that is there already: two tables share runs."""
    return list({panel.name: panel for panel in panels}.values())


def _mix_panels(folder: Folder, line: Line) -> list[Panel]:
    rows = _mixes_of(folder, line)
    if not rows:
        return []
    run = line.runs[0]
    name = f"{plain(line.plan.attention)}, {data_name(run.dataset)}, depth {run.depth}"
    low, high = _lines(rows, lambda row: row.lam), _lines(rows, lambda row: row.magnitude)
    return [
        _mix_panel(f"lambda-{run.id}", low, f"lambda, {name}", "lambda", log=False),
        _mix_panel(f"magnitude-{run.id}", high, f"|p|, {name}", "|p|", log=True),
    ]


Lines = dict[tuple[str, int], list[tuple[int, float]]]


def _mixes_of(folder: Folder, line: Line) -> list[MixRow]:
    seeds = {run.seed for run in line.runs}
    own = [row for row in folder.mixes if row.id == line.plan.id and row.seed in seeds]
    if len({row.mix for row in own}) > MANY:
        own = [row for row in own if row.seed == min(seeds)]
    return own


def _lines(rows: Sequence[MixRow], value: MixValue) -> Lines:
    found: Lines = {}
    for row in sorted(rows, key=lambda row: (row.seed, row.epoch)):
        number = value(row)
        if number is not None:
            found.setdefault((row.mix, row.seed), []).append((row.epoch + 1, number))
    return found


def _mix_panel(name: str, lines: Lines, title: str, label: str, *, log: bool) -> Panel:
    figure, axis = canvas(3.3, title)
    mixes = sorted({mix for mix, _ in lines}, key=_block_order)
    seeds = sorted({seed for _, seed in lines})
    for (mix, seed), points in lines.items():
        i = mixes.index(mix)
        axis.plot(
            [epoch for epoch, _ in points],
            [value for _, value in points],
            color=_ramp(i, len(mixes)),
            linestyle=style(seeds.index(seed) % 4)[2],
            linewidth=1.5 if len(mixes) <= MANY else 0.9,
            label=_block_name(mix) if len(mixes) <= 6 and seed == seeds[0] else None,
        )
    if log and any(value > 0 for points in lines.values() for _, value in points):
        log_scale(axis)
    elif not log:
        axis.set_ylim(-0.03, 1.03)
    name_axes(axis, "epoch", label)
    axis.locator_params(axis="x", integer=True)
    if len(mixes) <= 6:
        legend(figure, axis, len(mixes))
    ends = [points[-1][1] for points in lines.values()]
    alt = (
        f"{title}: {len(mixes)} blocks, {len(seeds)} seeds, at the end between "
        f"{min(ends, default=0):.3g} and {max(ends, default=0):.3g}."
    )
    return Panel(name, figure, alt)


def _block_order(name: str) -> list[int | str]:
    """`layer1.10` after `layer1.9`."""
    return [int(part) if part.isdigit() else part for part in name.split(".")]


def _block_name(mix: str) -> str:
    return plain(mix.partition(".attention")[0])


def _ramp(i: int, n: int) -> tuple[float, float, float, float]:
    """The i-th of n colours from dark blue to yellow, the last not too pale."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.9 * i / max(n - 1, 1))


def penalty(folder: Folder, blocks: Sequence[Block]) -> Picture:
    """With and without the penalty: |p|, the steps of lambda, and the training loss."""
    block = next((b for b in blocks if b.experiment == "penalty" and b.runs), None)
    panels: list[Panel] = []
    if block is not None:
        lines = [line for line in block.lines if line.runs]
        mixes = [
            ("magnitude", "|p|, median of blocks and seeds", lambda row: row.magnitude, True),
            ("change", "change of lambda in a step, median", lambda row: row.change, True),
        ]
        for name, label, value, log in mixes:
            series = [(line, _by_epoch(folder.mixes, line, value)) for line in lines]
            panels.append(_series_panel(f"penalty-{name}", label, series, log=log))
        label = "lambda, median of blocks and seeds"
        series = [(line, _by_epoch(folder.mixes, line, lambda row: row.lam)) for line in lines]
        panels.insert(0, _series_panel("penalty-lambda", label, series, band=True))
        series = [(line, _by_epoch(folder.epochs, line, _task_loss)) for line in lines]
        panels.append(
            _series_panel("penalty-loss", "training loss without the penalty term", series)
        )
    return Picture(
        "penalty",
        "Penalty 0 against 0.1",
        'The paper adds the penalty "to prevent explosion". Runs that diverged stand in the table. '
        "The band of lambda reaches from the lowest to the highest block of any seed.",
        tuple(panels),
        "penalty",
    )


def _task_loss(row: EpochRow) -> float | None:
    """The loss without the penalty, the same measure with and without one."""
    return None if row.loss is None else row.loss - (row.penalty or 0.0)


def _by_epoch(rows: Sequence[R], line: Line, value: Callable[[R], float | None]) -> Series:
    """Epoch -> the numbers of all blocks and seeds, sorted."""
    seeds = {run.seed for run in line.runs}
    found: dict[int, list[float]] = {}
    for row in rows:
        number = value(row) if row.id == line.plan.id and row.seed in seeds else None
        if number is not None:
            found.setdefault(row.epoch + 1, []).append(number)
    return {epoch: sorted(found[epoch]) for epoch in sorted(found)}


def _series_panel(
    name: str,
    label: str,
    series: Sequence[tuple[Line, Series]],
    *,
    log: bool = False,
    band: bool = False,
) -> Panel:
    """The median by epoch of each line, in a band from the lowest to the highest number."""
    figure, axis = canvas(3.3, label)
    told: list[str] = []
    middles = [[v[len(v) // 2] for v in found.values()] for _, found in series]
    for i, ((line, found), medians) in enumerate(zip(series, middles, strict=True)):
        if not medians:
            continue
        colour, marker, dash = style(2 * i)
        told.append(f"{line.plan.row} ends at {medians[-1]:.3g}")
        if band:
            low, high = [v[0] for v in found.values()], [v[-1] for v in found.values()]
            axis.fill_between(list(found), low, high, color=colour, alpha=0.12, linewidth=0)
            told[-1] += f" ({low[-1]:.3g} to {high[-1]:.3g})"
        axis.plot(
            list(found),
            medians,
            color=colour,
            linestyle=dash,
            marker=marker if len(medians) <= 12 else None,
            markersize=4,
            linewidth=1.6,
            label=plain(line.plan.row),
        )
    if log and all(value > 0 for medians in middles for value in medians):
        log_scale(axis)
    name_axes(axis, "epoch", "")
    axis.locator_params(axis="x", integer=True)
    legend(figure, axis, len(series))
    return Panel(name, figure, f"{label}: {'; '.join(told) or 'nothing recorded'}.")


def gates(folder: Folder, blocks: Sequence[Block]) -> Picture:
    """The distribution of the gates by block, and how far they look at the image."""
    panels: list[Panel] = []
    for block in blocks:
        if block.experiment not in ("table1", "controls"):
            continue
        drawn: list[tuple[Line, list[GateRow]]] = []
        for line in block.lines:
            rows = _mean_gates(folder, line)
            if rows:
                drawn.append((line, rows))
        if drawn:
            panels += _gate_panels(block, drawn)
    return Picture(
        "gates",
        "Gates by depth",
        "Gates: mark and bar are the median and the range from the 5 % to the 95 % quantile of the "
        "gate over the channels and the first test images (lines alone with more than twelve "
        "blocks); means over seeds. Deviation over images: where it is "
        "near 0, the gate is a constant factor for each channel and does not look at its input.",
        tuple(panels),
        "table1",
    )


def _mean_gates(folder: Folder, line: Line) -> list[GateRow]:
    """One row for each block, the mean over the seeds."""
    seeds = {run.seed for run in line.runs}
    groups: dict[int, list[GateRow]] = {}
    for row in folder.gates:
        if row.id == line.plan.id and row.seed in seeds:
            groups.setdefault(row.index, []).append(row)
    numbers = ("mean", "q05", "q25", "q50", "q75", "q95", "sd_channels", "sd_images")
    found: list[GateRow] = []
    for index in sorted(groups):
        rows = groups[index]
        means = {n: sum(float(getattr(r, n)) for r in rows) / len(rows) for n in numbers}
        found.append(GateRow(rows[0].seed, rows[0].id, rows[0].block, index, **means))
    return found


def _gate_panels(block: Block, drawn: Sequence[tuple[Line, list[GateRow]]]) -> list[Panel]:
    run = drawn[0][0].runs[0]
    where = f"{data_name(run.dataset)}, depth {run.depth}"
    names = f"{block.experiment}-{block.data}"
    spread, axis = canvas(4.0, plain(f"Gates, {where}"))
    images, other = canvas(4.0, plain(f"Deviation over images, {where}"))
    told: list[str] = []
    for i, (line, rows) in enumerate(drawn):
        index = block.lines.index(line)
        _gate_line(axis, (i + 0.5) / len(drawn) - 0.5, index, line, rows)
        colour, marker, dash = style(index)
        other.plot(
            [row.index + 1 for row in rows],
            [row.sd_images for row in rows],
            color=colour,
            linestyle=dash,
            marker=marker if len(rows) <= MANY else None,
            markersize=5,
            linewidth=1.5,
            label=plain(line.plan.row),
        )
        medians = ", ".join(f"{row.q50:.2g}" for row in (rows[0], rows[-1]))
        told.append(f"{line.plan.row} {medians}")
    for one, drawing in ((axis, spread), (other, images)):
        name_axes(one, "block, from the first to the last", "gate")
        if len(drawn[0][1]) <= MANY:
            one.set_xticks([row.index + 1 for row in drawn[0][1]])
        legend(drawing, one, len(drawn))
    other.set_ylabel("standard deviation over images", fontsize=9)
    alt = f"Gates by block on {where}, median of first and last block: {'; '.join(told)}."
    looks = f"Deviation of the gates over images by block on {where}."
    return [Panel(f"gates-{names}", spread, alt), Panel(f"gates-images-{names}", images, looks)]


def _gate_line(axis: Axes, shift: float, index: int, line: Line, rows: Sequence[GateRow]) -> None:
    colour, marker, dash = style(index)
    few = len(rows) <= MANY
    places = [row.index + 1 + (0.6 * shift if few else 0.0) for row in rows]
    medians = [row.q50 for row in rows]
    if few:
        low = [row.q50 - row.q05 for row in rows]
        high = [row.q95 - row.q50 for row in rows]
        axis.errorbar(
            places,
            medians,
            yerr=[[max(v, 0.0) for v in low], [max(v, 0.0) for v in high]],
            color=colour,
            marker=marker,
            markersize=5,
            linestyle="none",
            linewidth=1.4,
            label=plain(line.plan.row),
        )
        return
    axis.plot(places, medians, color=colour, linestyle=dash, label=plain(line.plan.row))
    axis.fill_between(
        places, [r.q05 for r in rows], [r.q95 for r in rows], color=colour, alpha=0.12, linewidth=0
    )


def gradients(folder: Folder, blocks: Sequence[Block]) -> Picture:
    """The norm of the gradient of each block, plain and with SPEM, at each depth."""
    block = next((b for b in blocks if b.experiment == "gradients" and b.runs), None)
    panels: list[Panel] = []
    depths = sorted({run.depth for run in block.runs}) if block is not None else []
    for depth in depths:
        lines = [x for x in block.lines if x.runs and x.runs[0].depth == depth] if block else []
        series = [(line, _norms(folder, line)) for line in lines]
        series = [(line, ends) for line, ends in series if ends]
        if series:
            panels.append(_gradient_panel(depth, series))
    return Picture(
        "gradients",
        "Gradient of each block by depth",
        "Norm of the loss's gradient for the convolutions of each block, on a logarithmic scale, "
        "mean over the seeds, after the first epoch (solid) and after the last (dashed). The "
        "paper says that SPEM mitigates vanishing gradients: then its lines would fall less "
        "towards the first blocks than those of the plain network.",
        tuple(panels),
        "gradients",
    )


Ends = list[tuple[int, list[tuple[int, float]]]]


def _norms(folder: Folder, line: Line) -> Ends:
    """(epoch, [(block, mean norm)]) of the first and the last recorded epoch."""
    seeds = {run.seed for run in line.runs}
    own = [row for row in folder.gradients if row.id == line.plan.id and row.seed in seeds]
    epochs = sorted({row.epoch for row in own})
    return [
        (epoch + 1, _mean_norms([row for row in own if row.epoch == epoch]))
        for epoch in dict.fromkeys((epochs[0], epochs[-1]) if epochs else ())
    ]


def _mean_norms(rows: Sequence[GradientRow]) -> list[tuple[int, float]]:
    groups: dict[int, list[float]] = {}
    for row in rows:
        if row.norm is not None:
            groups.setdefault(row.index, []).append(row.norm)
    return [(index + 1, sum(v) / len(v)) for index, v in sorted(groups.items())]


def _gradient_panel(depth: int, series: Sequence[tuple[Line, Ends]]) -> Panel:
    figure, axis = canvas(3.6, f"Depth {depth}")
    told: list[str] = []
    for i, (line, ends) in enumerate(series):
        colour, marker, _ = style(2 * i)
        for (epoch, points), dash in zip(ends, ("-", "--"), strict=False):
            axis.plot(
                [index for index, _ in points],
                [norm for _, norm in points],
                color=colour,
                linestyle=dash,
                marker=marker if len(points) <= MANY else None,
                markersize=4,
                linewidth=1.5,
                label=plain(f"{line.plan.row.rpartition(', ')[2]}, epoch {epoch}"),
            )
            if points:
                told.append(
                    f"{line.plan.row}, epoch {epoch}: first block {points[0][1]:.3g}, last block "
                    f"{points[-1][1]:.3g}"
                )
    if all(norm > 0 for _, ends in series for _, points in ends for _, norm in points):
        log_scale(axis)
    name_axes(axis, "block, from the first to the last", "norm of the gradient")
    axis.locator_params(axis="x", integer=True)
    legend(figure, axis, 4)
    return Panel(f"gradients-{depth}", figure, f"Gradients at depth {depth}: {'; '.join(told)}.")
