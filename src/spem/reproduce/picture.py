"""The picture of a comparison: seeds as dots, means and intervals as bars, learning curves."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spem.extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from spem.reproduce.results import Line, Run

COLOURS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
"""Colours that people with any kind of colour blindness can tell apart (Okabe and Ito)."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")


def draw(
    lines: Sequence["Line"], runs: Sequence["Run"], path: Path, *, title: str, reference: str
) -> None:
    """Draw a comparison into an image file.

    Args:
        lines: The rows of the comparison's table.
        runs: The finished runs behind them.
        path: Where to write; the suffix gives the format (.png, .svg, .pdf).
        title: What was trained, in one line.
        reference: The attention the others are compared with.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = build_figure(lines, runs, title=title, reference=reference)
    figure.savefig(path, dpi=150)


def build_figure(
    lines: Sequence["Line"], runs: Sequence["Run"], *, title: str, reference: str
) -> "Figure":
    """Accuracy, difference to the reference (where there is one) and learning curves, in a row."""
    require("matplotlib", extra="train", purpose="the picture of a comparison")
    from matplotlib.figure import Figure

    panels = 3 if any(line.difference is not None for line in lines) else 2
    height = 2.1 + 0.45 * max(len(lines), 4)
    figure = Figure(figsize=(3.2 + 3.4 * panels, height), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes: list[Axes] = list(figure.subplots(1, panels))
    _accuracy(axes[0], lines, runs)
    if panels == 3:
        _difference(axes[1], lines, runs, reference)
    _curves(axes[-1], lines, runs)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
    return figure


def _accuracy(axis: "Axes", lines: Sequence["Line"], runs: Sequence["Run"]) -> None:
    """Last-epoch test accuracy: a dot per seed, the mean with one standard deviation."""
    for i, line in enumerate(lines):
        seeds = [run.accuracy for run in runs if run.attention == line.attention]
        mean, sd = line.last.mean, line.last.sd
        _row(axis, i, seeds, mean, (mean - sd, mean + sd) if sd else None)
    _label_rows(axis, [line.attention for line in lines])
    spread = any(line.last.sd is not None for line in lines)
    axis.set_title("Accuracy after the last epoch", fontsize=10)
    axis.set_xlabel(
        "test accuracy, %" + ("\nbar: mean and standard deviation" if spread else ""), fontsize=9
    )


def _difference(
    axis: "Axes", lines: Sequence["Line"], runs: Sequence["Run"], reference: str
) -> None:
    """Paired difference to the reference: a dot per seed, the mean with its interval."""
    baseline = {run.seed: run.accuracy for run in runs if run.attention == reference}
    row = [line.attention for line in lines].index(reference)
    axis.axvline(0, color="0.4", linewidth=1, linestyle="--")
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
    axis.text(0, row, "reference", color="0.4", fontsize=9, ha="center", va="center", bbox=box)
    for i, line in enumerate(lines):
        d = line.difference
        if d is None or d.mean is None:
            continue
        seeds = [
            run.accuracy - baseline[run.seed]
            for run in runs
            if run.attention == line.attention and run.seed in baseline
        ]
        ends = None if d.low is None or d.high is None else (d.low, d.high)
        _row(axis, i, seeds, d.mean, ends)
    _label_rows(axis, [""] * len(lines))
    drawn = [line.difference for line in lines if line.difference is not None]
    kinds = " or ".join(sorted({d.interval for d in drawn if d.interval}, reverse=True))
    note = f"\nbar: mean and {100 * drawn[0].level:g} % {kinds} interval" if kinds else ""
    axis.set_title(f"Difference to {reference}, same seed", fontsize=10)
    axis.set_xlabel("percentage points" + note, fontsize=9)


def _row(
    axis: "Axes", i: int, seeds: Sequence[float], mean: float, ends: tuple[float, float] | None
) -> None:
    """The bar of row i with the mean as a tick, and the seeds as dots just below it."""
    colour = COLOURS[i % len(COLOURS)]
    if ends is not None:  # not always symmetric about the mean
        middle, half = sum(ends) / 2, (ends[1] - ends[0]) / 2
        axis.errorbar(middle, i - 0.1, xerr=half, color=colour, linewidth=2, capsize=5)
    axis.plot(mean, i - 0.1, color=colour, marker="|", markersize=18, markeredgewidth=3)
    # Seeds of equal accuracy would hide each other in one line.
    rows = [i + 0.16 + 0.18 * k / max(len(seeds) - 1, 1) for k in range(len(seeds))]
    axis.scatter(seeds, rows, s=30, marker=_marker(i), color=colour, alpha=0.8)


def _marker(i: int) -> str:
    return MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]  # another one when colours repeat


def _label_rows(axis: "Axes", names: Sequence[str]) -> None:
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)  # the first line of the table on top
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color="0.9")
    axis.set_axisbelow(True)
    axis.margins(x=0.08)
    axis.locator_params(axis="x", nbins=6)


def _curves(axis: "Axes", lines: Sequence["Line"], runs: Sequence["Run"]) -> None:
    """Test accuracy over epochs: the mean over seeds bold, each seed thin if there is room."""
    for i, line in enumerate(lines):
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]
        curves = [run.curve for run in runs if run.attention == line.attention]
        for curve in curves if len(lines) <= 4 else ():  # more would be a thicket
            axis.plot(range(1, len(curve) + 1), curve, color=colour, linewidth=0.7, alpha=0.45)
        mean = [sum(column) / len(column) for column in zip(*curves, strict=True)]
        axis.plot(
            range(1, len(mean) + 1),
            mean,
            color=colour,
            linestyle=dash,
            linewidth=2,
            marker=_marker(i) if len(mean) <= 12 else None,
            markersize=5,
            label=line.attention,
        )
    axis.set_title("Learning curves, mean of seeds", fontsize=10)
    axis.set_xlabel("epoch", fontsize=9)
    axis.set_ylabel("test accuracy, %", fontsize=9)
    axis.locator_params(axis="x", integer=True)
    axis.grid(color="0.9")
    axis.set_axisbelow(True)
    axis.legend(fontsize=8, frameon=False, loc="lower right")
