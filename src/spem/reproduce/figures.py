"""The figures of a report: every module has one colour in all of them."""

from __future__ import annotations

import colorsys
import io
import re
import statistics
import textwrap
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from spem.attention import list_attention
from spem.extras import require
from spem.reproduce.experiments import CONTROL
from spem.reproduce.tables import FINISHED, Table, data_name

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 5.2  # inches: at 11 points, text stays readable on a phone
STYLE = {
    **{"axes.labelsize": 11, "xtick.labelsize": 10, "ytick.labelsize": 10},
    **{"axes.spines.top": False, "axes.spines.right": False},
    **{"axes.grid": True, "axes.axisbelow": True, "grid.color": "0.92"},
}
DOT: dict[str, Any] = {"alpha": 0.65, "linewidths": 0, "zorder": 3}
GREY = "#555555"
MINUS = "\N{MINUS SIGN}"
KNOWN = {  # Okabe and Ito: people with any kind of colour blindness can tell them apart
    **{"none": "#000000", CONTROL: "#7f7f7f", "scale": "#b39b00"},
    **{"se": "#E69F00", "spem": "#0072B2", "eca": "#009E73"},
    **{"cbam": "#CC79A7", "srm": "#D55E00", "sge": "#56B4E9"},
}
MARKERS = "osD^vPX<>hp"
DASHES = ("-", "--", ":", "-.")  # of rows that share a colour, since they have the same module
# Experiments whose curves, mixes and gates are drawn.
DETAILED = ("compare", "table1", "controls", "scratch", "finetune-1000", "finetune-5000")
FAR = 6.0  # times as far as the middle row: such a row is shown by an arrow at the edge
ACCURACY = "test accuracy, last epoch, %"


@dataclass(frozen=True)
class Drawing:
    """A figure: file name, caption and alternative text."""

    name: str
    figure: Figure
    caption: str
    alt: str

    @cached_property
    def svg(self) -> str:
        """The figure as an SVG element, text as paths."""
        import matplotlib as mpl

        text = io.StringIO()
        with mpl.rc_context({"svg.fonttype": "path", "svg.hashsalt": self.name}):
            self.figure.savefig(text, format="svg", metadata={"Date": None})
        svg = "<svg" + text.getvalue().partition("<svg")[2]
        # As wide as its column; ids must be unique in a page of many figures.
        svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'role="img"', svg, count=1)
        tag = re.sub(r"\W", "-", self.name)
        svg = re.sub(r'(\bid="|"#|url\(#)', rf"\g<1>{tag}-", svg)
        alt = self.alt.replace("&", "&amp;").replace("<", "&lt;")
        return re.sub(r"(<svg[^>]*>)", rf"\1<title>{alt}</title>", svg, count=1)


def colour(module: str) -> str:
    """The colour of a module, the same in every figure; also of a user's own modules.

    >>> colour("se, start=identity") == colour("se") != colour("se(pool=max)")
    True
    """
    module = _attention_of(module)
    if module in KNOWN:
        return KNOWN[module]
    others = [name for name in list_attention() if name not in KNOWN]
    place = others.index(module) if module in others else zlib.crc32(module.encode())
    # Neighbours in the list have distant hues.
    hue, light = (0.05 + 0.618034 * place) % 1, (0.38, 0.52, 0.3)[place % 3]
    parts = (round(255 * part) for part in colorsys.hls_to_rgb(hue, light, 0.7))
    return "#{:02x}{:02x}{:02x}".format(*parts)


def _marked(module: str) -> dict[str, Any]:
    """The colour and the mark of a module."""
    attention = _attention_of(module)
    place = [*KNOWN].index(attention) if attention in KNOWN else sum(attention.encode())
    return {"color": colour(module), "marker": MARKERS[place % len(MARKERS)]}


def _attention_of(module: str) -> str:
    """The attention in a module's name; what follows it is how the network started."""
    found = re.match(r".*\)|[^,]*", module)
    return found.group() if found else module


def _styles(table: Table) -> dict[str, dict[str, Any]]:
    """The line style of each row: solid for the first of a colour, dashed for the others."""
    rows, modules = table.frame["row"], table.frame["module"]
    dashes = [DASHES[n % len(DASHES)] for n in rows.groupby(modules.map(colour)).cumcount()]
    lines = zip(rows, modules, dashes, strict=True)
    return {row: _marked(module) | {"linestyle": dash} for row, module, dash in lines}


def draw_all(tables: Sequence[Table], frames: Mapping[str, pd.DataFrame]) -> list[Drawing]:
    """Every figure that the tables have data for, starting with the first table's differences."""
    found = [differences(table) for table in tables]
    for table in tables:
        epochs, mixes, gated = (of_table(table, frames[n]) for n in ("epochs", "mixes", "gates"))
        found += [by_lambda(table), by_depth(table), curves(table, epochs), lambdas(table, mixes)]
        found += [gates(table, gated), gradients(table, epochs)]
    return [drawing for drawing in found if drawing is not None]


def of_table(table: Table, rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of a table's finished runs, with their `row` and `module` there."""
    finished = table.runs["status"] == FINISHED
    runs = table.runs.loc[finished, ["config", "seed", "row", "module"]]
    return rows if rows.empty else rows.drop(columns="module").merge(runs, on=["config", "seed"])


def differences(table: Table) -> Drawing | None:
    """Differences from the reference at equal seeds: seeds as dots, means with 95 % intervals."""
    lines = table.frame[table.frame["difference"].notna()].to_dict("records")
    if not lines:
        return None
    wide = table.runs.pivot_table(index="seed", columns="row", values="accuracy")
    base_of = table.frame.set_index("row")["mean"]
    for line in lines:
        low, high, base = line["low"], line["high"], base_of[line["baseline"]]
        line["dots"] = (wide[line["row"]] - wide[line["baseline"]]).dropna()
        # Not beyond what accuracies of 0 and 100 % allow.
        line["bar"] = [max(low, -base), min(high, 100 - base)] if low == low else []
        line["reach"] = [line["difference"], *line["dots"], *line["bar"]]
        line["farthest"] = max(map(abs, line["reach"]))
    limit = FAR * statistics.median(line["farthest"] for line in lines)
    ends = [end for line in lines if line["farthest"] <= limit for end in line["reach"]]
    least, most = min(0.0, *ends), max(0.0, *ends)
    margin = 0.08 * ((most - least) or 1.0)
    figure, axis = _canvas(1.1 + 0.38 * len(lines))
    axis.axvline(0, color=GREY, linewidth=1.2)
    for place, line in enumerate(lines):
        tint, mean, dots = colour(line["module"]), line["difference"], line["dots"]
        if line["farthest"] > limit:
            text = f"{mean:+.1f}{_interval(line, 1)}".replace("-", MINUS)
            text = f"\N{LEFTWARDS ARROW} {text}" if mean < 0 else f"{text} \N{RIGHTWARDS ARROW}"
            edge, side = (least - margin, "left") if mean < 0 else (most + margin, "right")
            axis.text(edge, place, f" {text} ", va="center", ha=side, color=tint)
            continue
        axis.plot(line["bar"], [place] * len(line["bar"]), color=tint, linewidth=2.4)
        axis.plot(mean, place, marker="|", markersize=15, markeredgewidth=3, color=tint)
        axis.scatter(dots, [place - 0.24] * len(dots), s=22, color=tint, **DOT)
    axis.set_yticks(range(len(lines)), [_short(line["row"]) for line in lines])
    axis.set_ylim(len(lines) - 0.5, -0.6)
    axis.set_xlim(least - margin, most + margin)
    axis.tick_params(axis="y", length=0)
    reference = table.reference or "the reference of the same group"
    axis.set_xlabel(f"difference to {_short(reference)}, points of accuracy")
    some = any(line["bar"] for line in lines)
    bars = "bars are 95 % t intervals" if some else "no intervals: too few seeds"
    caption = f"Dots are pairs of runs with the same seed, ticks their mean; {bars}."
    if any(line["farthest"] > limit for line in lines):
        caption += " An arrow with numbers marks a row outside the figure."
    shown = (f"{line['row']} {line['difference']:+.2f}{_interval(line, 2)}" for line in lines)
    alt = f"{table.title}: {'; '.join(shown)}."
    return Drawing(f"{table.name}-differences", figure, caption, alt)


def _interval(line: Mapping[str, Any], decimals: int) -> str:
    low, high = line["low"], line["high"]
    return f" [{low:+.{decimals}f}, {high:+.{decimals}f}]" if low == low else ""


def by_lambda(table: Table) -> Drawing | None:
    """Figure 2 and Table 3: accuracy at each constant mix, next to the average or learned one."""
    lam = table.frame["row"].str.extract(r"lambda = ([\d.]+)$")[0].astype(float)
    rows, base = table.frame[lam.notna()], table.frame[lam.isna()]
    if table.experiment not in ("figure2", "table3") or rows.empty:
        return None
    net = "se" if table.experiment == "figure2" else "spem"
    figure, axis = _canvas(3.4)
    places = list(lam.dropna())
    _with_seeds(axis, places, rows, table, colour(net), width=0.012)
    axis.plot(places, rows["mean"], color=colour(net), linewidth=1.6, label="constant mix")
    if len(base):
        level, name = base["mean"].iloc[0], str(base["row"].iloc[0])
        axis.axhline(level, color="black", linestyle="--", label=name)
    axis.set_xticks(places)
    _finish(axis, "lambda: share of the maximum", ACCURACY)
    caption = (
        f"{net.upper()} on {data_name(table.runs['dataset'].iloc[0])} by constant lambda. Dots are "
        "seeds, bars one standard deviation. The best of several means is above the others by "
        "chance alone; only the differences in the table judge it."
    )
    return Drawing(f"{table.name}-lambda", figure, caption, f"{table.title}: accuracy by lambda.")


def by_depth(table: Table) -> Drawing | None:
    """Table 2: with and without SPEM at each depth."""
    if table.experiment != "table2":
        return None
    depth_of = table.runs.groupby("row")["depth"].first()
    rows = table.frame.assign(depth=table.frame["row"].map(depth_of).astype(int))
    depths = sorted(set(rows["depth"]))
    figure, axis = _canvas(3.4)
    for i, (module, own) in enumerate(rows.groupby("module", sort=False)):
        shift, name = 0.1 * i - 0.05, str(module)  # beside each other
        places = [depths.index(depth) + shift for depth in own["depth"]]
        _with_seeds(axis, places, own, table, colour(name), width=0.02)
        axis.plot(places, own["mean"], label=name, markersize=5, **_marked(name))
    axis.set_xticks(range(len(depths)), [str(depth) for depth in depths])
    _finish(axis, "depth", ACCURACY)
    caption = "Dots are seeds, lines join their means, bars are one standard deviation."
    return Drawing(f"{table.name}-depth", figure, caption, f"{table.title}: accuracy by depth.")


def _with_seeds(
    axis: Axes, places: Sequence[float], rows: pd.DataFrame, table: Table, tint: str, width: float
) -> None:
    """Seeds as dots, and a bar of one standard deviation around their mean."""
    values = table.runs.groupby("row")["accuracy"]
    for place, line in zip(places, rows.to_dict("records"), strict=True):
        if line["sd"] == line["sd"]:
            low, high = line["mean"] - line["sd"], min(100.0, line["mean"] + line["sd"])
            axis.plot([place, place], [low, high], color=tint, linewidth=1.4)
        own = values.get_group(line["row"]).dropna()
        middle = (len(own) - 1) / 2
        xs = [place + width * (i - middle) / max(middle, 1) for i in range(len(own))]
        axis.scatter(xs, own, s=13, color=tint, **DOT)


def curves(table: Table, epochs: pd.DataFrame) -> Drawing | None:
    """Test accuracy over epochs, the mean over seeds."""
    known = "test_accuracy" in epochs and epochs["epoch"].nunique() > 1
    if not known or table.experiment not in DETAILED:
        return None
    figure, axis = _canvas(3.6)
    means = epochs.groupby(["row", "epoch"])["test_accuracy"].mean()
    for row, style in _styles(table).items():
        if row in means:
            mean = means[row]
            few = {"markersize": 4} if len(mean) <= 12 else {"marker": None}
            axis.plot(mean.index + 1, mean, label=_short(row), linewidth=1.6, **(style | few))
    _finish(axis, "epoch", "test accuracy, %")
    caption = "Test accuracy after each epoch, the mean of the seeds."
    return Drawing(f"{table.name}-curves", figure, caption, f"{table.title}: accuracy by epoch.")


def lambdas(table: Table, mixes: pd.DataFrame) -> Drawing | None:
    """Lambda and |p| of every block over epochs, for the first row with a learned mix."""
    if mixes.empty or table.experiment not in (*DETAILED, "penalty"):
        return None
    from matplotlib import colormaps

    row = next(row for row in table.runs["row"] if row in set(mixes["row"]))
    own = mixes[mixes["row"] == row]
    blocks, first_seed = list(dict.fromkeys(own["mix"])), own["seed"].min()
    figure, (top, bottom) = _canvas(5.0, rows=2)
    for (block, seed), part in own.groupby(["mix", "seed"], sort=False):
        if len(blocks) > 12 and seed != first_seed:
            continue  # a thicket
        named = seed == first_seed and len(blocks) <= 6
        name = str(block).partition(".attention")[0] if named else None
        # From dark blue to a yellow that is not too pale.
        shade = colormaps["viridis"](0.9 * blocks.index(block) / max(len(blocks) - 1, 1))
        style = {"color": shade, "linewidth": 1.3}
        top.plot(part["epoch"] + 1, part["lambda"], label=name, **style)
        bottom.plot(part["epoch"] + 1, part["magnitude"], **style)
    top.set_ylim(-0.03, 1.03)
    if (own["magnitude"] > 0).all():
        bottom.set_yscale("log")
    _finish(top, "", "lambda")
    _finish(bottom, "epoch", "|p|")
    caption = (
        f"{row}: a line for each block and seed, dark for the first block. lambda depends on the "
        "direction of p only, and the smaller |p| the larger its steps: lambdas near 0 or 1 that "
        "differ between seeds say nothing about the data."
    )
    return Drawing(f"{table.name}-mix", figure, caption, f"{table.title}: lambda by epoch.")


def gates(table: Table, gates: pd.DataFrame) -> Drawing | None:
    """The size of each block's gates, and how much they depend on the image."""
    if gates.empty or table.experiment not in DETAILED:
        return None
    figure, (top, bottom) = _canvas(5.0, rows=2)
    spread = 100 * gates["sd_images"] / gates["mean"].abs()
    means = gates.assign(spread=spread).groupby(["row", "index"])[["q50", "spread"]].mean()
    for row, style in _styles(table).items():
        if row in means.index:
            own = means.loc[row]
            top.plot(own.index + 1, own["q50"], label=_short(row), markersize=5, **style)
            bottom.plot(own.index + 1, own["spread"], markersize=5, **style)
    _finish(top, "", "gate, median")
    _finish(bottom, "block, from the first to the last", "spread over images, %")
    bottom.locator_params(axis="x", integer=True)
    caption = (
        "The median gate of each block, and its standard deviation over images in per cent of its "
        "mean: near 0 the gate is a constant factor that does not look at its input."
    )
    return Drawing(f"{table.name}-gates", figure, caption, f"{table.title}: gates by block.")


def gradients(table: Table, epochs: pd.DataFrame) -> Drawing | None:
    """The gradient of the first block over that of the last, by depth, after the last epoch."""
    if table.experiment != "gradients" or "gradient_first" not in epochs or epochs.empty:
        return None
    own = epochs[epochs["epoch"] == epochs.groupby("config")["epoch"].transform("max")]
    own = own.assign(ratio=own["gradient_first"] / own["gradient_last"])
    figure, axis = _canvas(3.2)
    for module, part in own.groupby("module", sort=False):
        means = part.groupby("depth")["ratio"].mean()
        axis.plot(means.index, means, label=str(module), **_marked(str(module)))
    axis.set_yscale("log")
    _finish(axis, "depth", "gradient, first block / last")
    caption = "Where gradients vanish, the ratio falls with depth. Means over seeds, last epoch."
    return Drawing(f"{table.name}-ratio", figure, caption, f"{table.title}.")


def _canvas(height: float, rows: int = 1) -> tuple[Figure, Any]:
    """A figure of standard width, and its axes."""
    mpl = require("matplotlib", extra="train", purpose="drawing figures")
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        return figure, figure.subplots(rows, 1, sharex=rows > 1)


def _finish(axis: Axes, x: str, y: str) -> None:
    """Axis labels, integers below if these are epochs, and a legend if lines have names."""
    axis.set(xlabel=x, ylabel=y)
    if x == "epoch":
        axis.locator_params(axis="x", integer=True)
    names = axis.get_legend_handles_labels()[1]
    if names:
        axis.legend(fontsize=9, frameon=False, ncols=2 if len(names) > 4 else 1)


def _short(text: str) -> str:
    """A label, wrapped to two lines if long."""
    return textwrap.fill(text.replace("$", r"\$"), 22, max_lines=2, placeholder=" ...")
