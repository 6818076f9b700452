"""What attention keeps of one image: the gates of each block, as numbers and as a picture."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from spem.attention import ChannelAttention
from spem.extras import require
from spem.files import write_atomic
from spem.gates import inspect
from spem.insert.sites import attentions_of, evaluating, float_like
from spem.ops import use_impl

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

__all__ = ["BlockView", "Explanation", "draw", "explain"]

CLOSED = 0.1
"""A channel whose gate is below this is reported as closed."""
MOST, LEAST = "#0072B2", "#D55E00"
"""Colours of the channels most and least kept (Okabe and Ito, safe for colour blindness)."""
ANSWERS = 5
"""Number of classes whose probability is drawn."""


@dataclass(frozen=True, eq=False)
class BlockView:
    """What one attention did to the image.

    Shape:
        kept: [C], the gate of every channel; its mean over positions where they differ.
        maps: [C, H, W], the channels before the gate; the gate itself where it is ``spatial``; the
            output of a module that replaces a norm or a convolution.

    Attributes:
        name: The attention's name in the state dict; shared ones append the block's number.
        attention: Its name in the registry.
        spatial: Whether the gate differs from position to position.
        adds: Whether the attention also adds to the map.
        lambdas: The weight of the maximum in each of its mixes, by name.
        alpha: The alpha of an identity start, or None.
    """

    name: str
    attention: str
    kept: Tensor
    maps: Tensor
    spatial: bool
    adds: bool
    lambdas: dict[str, float]
    alpha: float | None

    @property
    def order(self) -> list[int]:
        """The channels from the most kept to the least; ties by number."""
        return self.kept.argsort(descending=True, stable=True).tolist()

    @property
    def mean(self) -> float:
        """The mean gate."""
        return float(self.kept.mean())

    @property
    def closed(self) -> float:
        """The share of channels whose gate is below 0.1."""
        return float((self.kept < CLOSED).double().mean())


@dataclass(frozen=True, eq=False)
class Explanation:
    """The attentions in running order, and the network's answer.

    Attributes:
        blocks: One view per attention, or per block that shares one.
        probabilities: Softmax of the logits, [classes]; None if the output is not a row of logits.
    """

    blocks: list[BlockView]
    probabilities: Tensor | None


@torch.no_grad()
def explain(model: nn.Module, image: Tensor) -> Explanation:
    """Run a network on one image and record what each of its attentions keeps.

    Tails are not fused here, since a fused one never forms the map that its gate multiplies.
    The mode of every module is restored.

    Shape:
        image: [1, 3, H, W], floating point, normalised as in training.

    Raises:
        ValueError: The network has no attention, or the image is not a batch of one.
    """
    if image.dim() != 4 or image.shape[0] != 1 or not image.is_floating_point():
        got = f"{image.dtype} {list(image.shape)}"
        raise ValueError(f"explain: needs one image [1, 3, H, W] in floating point, got {got}.")
    inside = inspect(model)
    maps: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, ChannelAttention)
        maps.append((inputs[0] if module.needs.replaces is None else output)[0].float().cpu())

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(use_impl("reference"))
        for attention in attentions_of(model).values():
            stack.enter_context(attention.register_forward_hook(keep))
        stack.enter_context(inside)
        like = float_like(model)
        output = model(image.to(like.device, like.dtype))
    blocks: list[BlockView] = []
    for record, shown in zip(inside.records, maps, strict=True):
        gate, name = record.gate[0].cpu(), record.name.partition("[")[0]
        spatial, prefix = gate.dim() > 1, f"{name}.".removeprefix(".")
        view = BlockView(
            name=record.name,
            attention=record.module.name,
            kept=gate.flatten(1).mean(1) if spatial else gate,
            maps=gate if spatial else shown,
            spatial=spatial,
            adds=record.module.needs.adds,
            lambdas={k: v for k, v in inside.lambdas.items() if k.startswith(prefix)},
            alpha=inside.alphas.get(name),
        )
        blocks.append(view)
    logits = isinstance(output, Tensor) and output.dim() == 2 and output.shape[0] == 1
    return Explanation(blocks, output[0].float().softmax(0).cpu() if logits else None)


# ---- the picture


def draw(
    explanation: Explanation,
    image: Tensor,
    path: Path,
    *,
    title: str,
    classes: Sequence[str],
    marked: int | None = None,
    blocks: int = 6,
    top: int = 4,
) -> None:
    """Draw an explanation and the original image (uint8 [3, H, W]) into a file.

    Args:
        explanation: From `explain`.
        image: The image, before it was normalised.
        path: File to write; its suffix sets the format, one of matplotlib's.
        title: Title of the picture, in one line.
        classes: The names of the classes.
        marked: The class to mark among the answers, or None.
        blocks: Maximum number of rows; of more blocks, an even selection from first to last.
        top: Number of most kept channels to show, and of least kept ones; at most 50 are drawn.

    Raises:
        ValueError: ``blocks`` or ``top`` is below 1, nothing was seen, gates or maps that are not
            finite, classes that are not those of the answer, or an unknown format.
        ImportError: matplotlib is not installed.
    """
    if blocks < 1 or top < 1:
        raise ValueError(f"explain: blocks={blocks} and top={top} must be at least 1.")
    require("matplotlib", extra="train", purpose="the picture of an explanation")
    from matplotlib.figure import Figure

    rows = evenly(explanation.blocks, blocks)
    if not rows:
        raise ValueError("explain: no attention has run on the image, so there is nothing to draw.")
    finite = lambda row: bool(row.kept.isfinite().all() and row.maps.isfinite().all())  # noqa: E731
    broken = [row.name for row in rows if not finite(row)]
    if broken:
        raise ValueError(
            f"explain: gates or channels of {broken[0]} are not finite on this image. Check the "
            f"weights and the image."
        )
    answers = None if explanation.probabilities is None else len(explanation.probabilities)
    if answers is not None and (len(classes) != answers or marked not in (None, *range(answers))):
        raise ValueError(
            f"explain: the network answers with {answers} classes; got {len(classes)} names and "
            f"marked={marked}."
        )
    top = min(top, 50, max((len(row.kept) + 1) // 2 for row in rows))
    figure = Figure(figsize=(6.6 + 1.9 * top, 1.5 + 1.55 * max(len(rows), 2)), layout="constrained")
    figure.suptitle(_literal(title), fontsize=12)
    classes = [_literal(name) for name in classes]
    halves = figure.subfigures(1, 2, squeeze=False, width_ratios=(2.7, 3.9 + 1.9 * top))
    _answer(halves[0, 0], explanation.probabilities, image, classes, marked)
    _rows(halves[0, 1], rows, top)
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the font lacks it: it is a box then
        figure.savefig(content, dpi=150, format=path.suffix.lower().removeprefix("."))
    write_atomic(path, content.getvalue())


def _literal(text: str) -> str:
    """Text that matplotlib shows unchanged: no formulas, no control characters."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text).replace("$", r"\$")


def evenly(blocks: Sequence[BlockView], count: int) -> list[BlockView]:
    """At most this many blocks, evenly spaced, including the first and the last."""
    count = min(count, len(blocks))
    places = torch.linspace(len(blocks) - 1, 0, count).round().int().tolist()  # one is the last
    return [blocks[place] for place in reversed(places)]


def _answer(
    figure: SubFigure, seen: Tensor | None, image: Tensor, names: list[str], marked: int | None
) -> None:
    above, below = figure.subplots(2, 1, height_ratios=(3, 2))
    above.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
    above.set_title(f"the image, {image.shape[2]}x{image.shape[1]}", fontsize=10)
    above.set_axis_off()
    if seen is None:
        below.set_axis_off()
        return
    best = seen.argsort(descending=True, stable=True)[:ANSWERS].tolist()
    if marked is not None and marked not in best:
        best = [*best[:-1], marked]
    values = [float(seen[k]) for k in best]
    colours = [LEAST if k == marked else MOST for k in best]
    bars = below.barh(range(len(best)), values, color=colours, height=0.6)
    below.bar_label(bars, fmt="%.2f", padding=3, fontsize=9)
    below.set_yticks(range(len(best)), [names[k] for k in best], fontsize=9)
    below.set_ylim(len(best) - 0.4, -0.6)
    below.set(xlim=(0, 1.2), xticks=[0, 0.5, 1], xlabel="probability")
    below.tick_params(axis="y", length=0)
    below.set_title("answer" + ("" if marked is None else ", orange: --class"), fontsize=10)
    below.spines[["top", "right"]].set_visible(False)


def _rows(figure: SubFigure, rows: Sequence[BlockView], top: int) -> None:
    widths = [2.6, *[1.0] * top, 0.12, *[1.0] * top]
    grid = figure.add_gridspec(len(rows), len(widths), width_ratios=widths)
    for row, block in enumerate(rows):
        order = block.order
        count = min(top, (len(order) + 1) // 2)
        _profile(figure.add_subplot(grid[row, 0]), block, count)
        low, high, colours = _scale(block)
        sides = (order[:count], 1, MOST), (order[-count:], top + 2, LEAST)
        for channels, first, colour in sides:
            for place, channel in enumerate(channels):
                axis = figure.add_subplot(grid[row, first + place])
                axis.imshow(block.maps[channel].numpy(), cmap=colours, vmin=low, vmax=high)
                title = f"{channel}: {number(float(block.kept[channel]))}"
                axis.set_title(title, fontsize=9, color=colour, pad=3)
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_color(colour)
    legend = "Curves: the gate of every channel, sorted. Maps: channels most kept (blue) and least "
    legend += "kept (orange), number and gate above.\nColours: the "
    spatial = "gate at each position, from dark (low) to bright (high)."
    plain = "channel before its gate, red above 0, blue below, one scale a row."
    legend += spatial if any(block.spatial for block in rows) else plain
    figure.supxlabel(legend, fontsize=9)


def _profile(axis: Axes, block: BlockView, count: int) -> None:
    """The gates of all channels, sorted; those whose maps are shown are marked."""
    values = block.kept.sort(descending=True).values.tolist()
    channels = range(len(values))
    axis.plot(channels, values, color="0.25", linewidth=1.5)
    for shown, colour in ((slice(count), MOST), (slice(-count, None), LEAST)):
        axis.plot(channels[shown], values[shown], "o", color=colour, markersize=4)
    low, high = min(0.0, values[-1]), max(values[0], 0.02)
    axis.set_ylim(low - 0.06 * (high - low), high + 0.1 * (high - low))
    axis.set_xlim(-0.03 * len(values), 1.03 * len(values))
    axis.locator_params(axis="y", nbins=4)
    axis.set_xticks([0, len(values) - 1], ["1", str(len(values))])
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    closed = f", {100 * block.closed:.0f} % < {CLOSED}" if low >= 0 else ""
    axis.set_title(f"{block.name}\nmean {number(block.mean)}{closed}", fontsize=9, loc="left")


def _scale(block: BlockView) -> tuple[float, float, str]:
    """The colour limits of a row, chosen so that rare large values do not wash out the rest."""
    import numpy as np

    maps = block.maps.flatten()
    if block.spatial:
        return float(maps.min()), max(float(maps.max()), float(maps.min()) + 1e-6), "viridis"
    highest = max(float(np.quantile(maps.abs().numpy(), 0.995)), 1e-6)
    return -highest, highest, "RdBu_r"


def number(value: float) -> str:
    """A gate with two decimals, or with two digits if it is small."""
    return f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.2g}"
