"""The figures of a report: every module has one colour in all of them."""

from __future__ import annotations

import colorsys
import hashlib
import io
import re
import statistics
from collections.abc import Sequence
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

WIDTH = 5.2
"""Inches of a figure: with its 11 point letters it can be read on a telephone too."""
GREY = "#555555"
MINUS = "\N{MINUS SIGN}"
KNOWN = {
    # Okabe and Ito: people with any kind of colour blindness can tell them apart.
    "none": "#000000",
    CONTROL: "#7f7f7f",
    "scale": "#b39b00",
    "se": "#E69F00",
    "spem": "#0072B2",
    "eca": "#009E73",
    "cbam": "#CC79A7",
    "srm": "#D55E00",
    "sge": "#56B4E9",
}
MARKERS = "osD^vPX<>hp"
DASHES = ("-", "--", ":", "-.")
"""Lines of rows that share a colour, since they have the same module."""
DETAILED = ("compare", "table1", "controls", "scratch", "finetune-1000", "finetune-5000")
"""Experiments whose curves, mixes and gates are drawn."""
FAR = 6.0
"""A row that reaches this many times as far as the middle one is shown by an arrow at the edge."""
ACCURACY = "test accuracy, last epoch, %"


@dataclass(frozen=True)
class Drawing:
    """A figure: the name of its file, a caption, and a text for those who do not see it."""

    name: str
    figure: Figure
    caption: str
    alt: str

    @cached_property
    def svg(self) -> str:
        """The figure as an element of a page, letters as shapes."""
        import matplotlib as mpl

        text = io.StringIO()
        with mpl.rc_context({"svg.fonttype": "path", "svg.hashsalt": self.name}):
            self.figure.savefig(text, format="svg", metadata={"Date": None})
        svg = text.getvalue()
        svg = svg[svg.index("<svg") :]
        # As wide as its column; an id must be unique in a page of many figures.
        svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'role="img"', svg, count=1)
        tag = re.sub(r"\W", "-", self.name)
        svg = re.sub(r'(\bid="|"#|url\(#)', rf"\g<1>{tag}-", svg)
        alt = self.alt.replace("&", "&amp;").replace("<", "&lt;")
        return re.sub(r"(<svg[^>]*>)", rf"\1<title>{alt}</title>", svg, count=1)


def colour(module: str) -> str:
    """The colour of a module, the same in every figure; also of those of the user's own.

    >>> colour("se, start=identity") == colour("se") != colour("se(pool=max)")
    True
    """
    module = _attention_of(module)
    if module in KNOWN:
        return KNOWN[module]
    others = [name for name in list_attention() if name not in KNOWN]
    if module in others:  # neighbours in the list lie far apart on the circle of hues
        place = others.index(module)
        hue, light = (0.05 + 0.618034 * place) % 1, (0.38, 0.52, 0.3)[place % 3]
    else:
        digest = hashlib.sha256(module.encode()).digest()
        hue, light = digest[0] / 256, 0.3 + 0.2 * digest[1] / 256
    return "#{:02x}{:02x}{:02x}".format(
        *(round(255 * part) for part in colorsys.hls_to_rgb(hue, light, 0.7))
    )


def marker(module: str) -> str:
    """The mark of a module, beside its colour."""
    names, module = list(KNOWN), _attention_of(module)
    place = names.index(module) if module in names else sum(module.encode())
    return MARKERS[place % len(MARKERS)]


def _attention_of(module: str) -> str:
    """The attention in the name of a module: what follows its text is how the network began."""
    found = re.match(r".*\)|[^,]*", module)
    return found.group() if found else module


def _dashes(table: Table) -> dict[str, str]:
    """The line of each row: whole for the first of a colour, broken for the others."""
    seen: dict[str, int] = {}
    lines: dict[str, str] = {}
    for row, module in zip(table.frame["row"], table.frame["module"], strict=True):
        number = seen[colour(module)] = seen.get(colour(module), -1) + 1
        lines[row] = DASHES[number % len(DASHES)]
    return lines


def draw_all(tables: Sequence[Table], frames: dict[str, pd.DataFrame]) -> list[Drawing]:
    """Every figure that the tables have data for, the differences of the first table first."""
    found = [differences(table) for table in tables]
    for table in tables:
        found += [by_lambda(table), by_depth(table), curves(table, frames["epochs"])]
        found += [lambdas(table, frames["mixes"]), gates(table, frames["gates"])]
        found.append(gradients(table, frames["epochs"]))
    return [drawing for drawing in found if drawing is not None]


def differences(table: Table) -> Drawing | None:
    """Differences to the reference of equal seeds: seeds as dots, means with 95 % intervals."""
    rows = table.frame[table.frame["difference"].notna()]
    if rows.empty:
        return None
    dots = _seed_differences(table)
    figure, axis = _canvas(1.1 + 0.38 * len(rows))
    axis.axvline(0, color=GREY, linewidth=1.2)
    lines = rows.to_dict("records")
    reach = [_reach(table, line, dots[line["row"]]) for line in lines]
    middle = statistics.median(max(abs(low), abs(high)) for low, high in reach)
    near = [one for one in reach if max(map(abs, one)) <= FAR * middle]
    least, most = min(0.0, *(low for low, _ in near)), max(0.0, *(high for _, high in near))
    margin = 0.08 * ((most - least) or 1.0)
    described: list[str] = []
    for place, line in enumerate(lines):
        tint, mean = colour(line["module"]), line["difference"]
        own = dots[line["row"]]
        described.append(f"{line['row']} {mean:+.2f}")
        known = line["low"] == line["low"]
        if known:
            described[-1] += f" [{line['low']:+.2f}, {line['high']:+.2f}]"
        if reach[place] not in near:
            edge, inner = (least, 1) if mean < 0 else (most, -1)
            edge -= inner * margin
            ends = f" [{line['low']:+.1f}, {line['high']:+.1f}]" if known else ""
            axis.annotate(
                f"{mean:+.1f}{ends}".replace("-", MINUS),
                xy=(edge, place),
                xytext=(26 * inner, 0),
                textcoords="offset points",
                va="center",
                ha="left" if inner > 0 else "right",
                color=tint,
                arrowprops={"arrowstyle": "-|>", "color": tint, "linewidth": 2.4},
            )
            continue
        if known:
            axis.plot(_within(table, line), [place, place], color=tint, linewidth=2.4)
        axis.plot(mean, place, marker="|", markersize=15, markeredgewidth=3, color=tint)
        above = [place - 0.24] * len(own)
        axis.scatter(own, above, s=22, color=tint, alpha=0.65, linewidths=0, zorder=3)
    axis.set_yticks(range(len(rows)), [_short(row) for row in rows["row"]])
    axis.set_ylim(len(rows) - 0.5, -0.6)
    axis.set_xlim(least - margin, most + margin)
    axis.tick_params(axis="y", length=0)
    reference = table.reference or "the reference of the same group"
    axis.set_xlabel(f"difference to {_short(reference)}, points of accuracy")
    few = rows["low"].isna().all()
    bars = "no intervals: too few seeds" if few else "bars are 95 % t intervals"
    caption = f"Dots are pairs of runs with the same seed, ticks their mean; {bars}."
    if len(near) < len(reach):
        caption += " An arrow with numbers stands for a row that lies beyond the figure."
    return Drawing(
        f"{table.name}-differences", figure, caption, f"{table.title}: {'; '.join(described)}."
    )


def _reach(table: Table, line: dict[Any, Any], own: Sequence[float]) -> tuple[float, float]:
    """From where to where a row is drawn: its seeds, and its interval where there is one."""
    ends = _within(table, line) if line["low"] == line["low"] else ()
    return min([line["difference"], *own, *ends]), max([line["difference"], *own, *ends])


def _within(table: Table, line: dict[Any, Any]) -> tuple[float, float]:
    """The interval, not beyond what accuracies of 0 and 100 % allow."""
    means = dict(zip(table.frame["row"], table.frame["mean"], strict=True))
    base = means.get(line["baseline"], 50.0)
    return max(line["low"], -base), min(line["high"], 100 - base)


def _seed_differences(table: Table) -> dict[str, list[float]]:
    runs = table.runs[(table.runs["status"] == FINISHED) & table.runs["accuracy"].notna()]
    wide = runs.pivot_table(index="seed", columns="row", values="accuracy")
    return {
        line["row"]: list((wide[line["row"]] - wide[line["baseline"]]).dropna())
        for line in table.frame.to_dict("records")
        if line["baseline"] in wide and line["row"] in wide
    }


def by_lambda(table: Table) -> Drawing | None:
    """Figure 2 and Table 3: accuracy for each constant mix, beside the average or learned one."""
    if table.experiment not in ("figure2", "table3"):
        return None
    rows = table.frame.assign(lam=table.frame["row"].str.extract(r"lambda = ([\d.]+)$")[0])
    rows, base = rows[rows["lam"].notna()], rows[rows["lam"].isna()]
    if rows.empty:
        return None
    net = "se" if table.experiment == "figure2" else "spem"
    figure, axis = _canvas(3.4)
    places = [float(lam) for lam in rows["lam"]]
    _with_seeds(axis, places, rows, table, colour(net), width=0.012)
    axis.plot(places, rows["mean"], color=colour(net), linewidth=1.6, label="constant mix")
    if len(base):
        level = base["mean"].iloc[0]
        axis.axhline(level, color="black", linestyle="--", label=str(base["row"].iloc[0]))
    axis.set_xticks(places)
    axis.set_xlabel("lambda: share of the maximum")
    axis.set_ylabel(ACCURACY)
    _legend(axis)
    described = ", ".join(f"{m:.2f} at {p:g}" for p, m in zip(places, rows["mean"], strict=True))
    caption = (
        f"{net.upper()} on {data_name(table.runs['dataset'].iloc[0])} by constant lambda. Dots are "
        "seeds, bars one standard deviation. The best of several means is above the others by "
        "chance alone; only the differences in the table judge it."
    )
    return Drawing(f"{table.name}-lambda", figure, caption, f"Accuracy by lambda: {described}.")


def by_depth(table: Table) -> Drawing | None:
    """Table 2: with and without SPEM at each depth."""
    if table.experiment != "table2" or table.frame.empty:
        return None
    depth_of = table.runs.groupby("row")["depth"].first()
    rows = table.frame.assign(depth=[int(depth_of[row]) for row in table.frame["row"]])
    depths = sorted(set(rows["depth"]))
    figure, axis = _canvas(3.4)
    described: list[str] = []
    for shift, (module, own) in zip(
        (-0.05, 0.05), rows.groupby("module", sort=False), strict=False
    ):
        places = [depths.index(depth) + shift for depth in own["depth"]]
        name = str(module)
        _with_seeds(axis, places, own, table, colour(name), width=0.02)
        style = {"marker": marker(name), "markersize": 5}
        axis.plot(places, own["mean"], color=colour(name), label=name, **style)
        described.append(f"{name} " + ", ".join(f"{mean:.2f}" for mean in own["mean"]))
    axis.set_xticks(range(len(depths)), [str(depth) for depth in depths])
    axis.set_xlabel("depth")
    axis.set_ylabel(ACCURACY)
    _legend(axis)
    return Drawing(
        f"{table.name}-depth",
        figure,
        "Dots are seeds, lines join their means, bars are one standard deviation.",
        f"Accuracy at depths {', '.join(map(str, depths))}: {'; '.join(described)}.",
    )


def _with_seeds(
    axis: Axes,
    places: Sequence[float],
    rows: pd.DataFrame,
    table: Table,
    tint: str,
    *,
    width: float,
) -> None:
    """Seeds as dots around their place, and a bar of one standard deviation about their mean."""
    values = table.runs.groupby("row")["accuracy"]
    for place, line in zip(places, rows.to_dict("records"), strict=True):
        if line["sd"] == line["sd"]:
            low, high = line["mean"] - line["sd"], min(100.0, line["mean"] + line["sd"])
            axis.plot([place, place], [low, high], color=tint, linewidth=1.4)
        own = values.get_group(line["row"]).dropna()
        middle = (len(own) - 1) / 2
        xs = [place + width * (i - middle) / max(middle, 1) for i in range(len(own))]
        axis.scatter(xs, own, s=13, color=tint, alpha=0.65, linewidths=0, zorder=3)


def curves(table: Table, epochs: pd.DataFrame) -> Drawing | None:
    """Test accuracy over epochs, the mean over seeds."""
    if "test_accuracy" not in epochs or table.experiment not in DETAILED:
        return None
    own = epochs.merge(
        table.runs[["config", "seed", "row", "module"]].rename(columns={"module": "_module"}),
        on=["config", "seed"],
    )
    if own.empty or own["epoch"].nunique() < 2:
        return None
    figure, axis = _canvas(3.6)
    described: list[str] = []
    dashes = _dashes(table)
    for row in table.frame["row"]:
        part = own[own["row"] == row]
        if part.empty:
            continue
        module = part["_module"].iloc[0]
        mean = part.groupby("epoch")["test_accuracy"].mean()
        few = {"marker": marker(module), "markersize": 4} if len(mean) <= 12 else {}
        style = {"color": colour(module), "linestyle": dashes[row], "linewidth": 1.6}
        axis.plot(mean.index + 1, mean, label=_short(row), **style, **few)
        described.append(f"{row} {mean.iloc[-1]:.2f}")
    axis.set_xlabel("epoch")
    axis.set_ylabel("test accuracy, %")
    axis.locator_params(axis="x", integer=True)
    _legend(axis)
    caption = "Test accuracy after each epoch, the mean of the seeds."
    return Drawing(
        f"{table.name}-curves", figure, caption, f"Curves end at {', '.join(described)}."
    )


def lambdas(table: Table, mixes: pd.DataFrame) -> Drawing | None:
    """Lambda and |p| of every block over epochs, of the first row with a learned mix."""
    if mixes.empty or table.experiment not in (*DETAILED, "penalty"):
        return None
    runs = table.runs[table.runs["config"].isin(mixes["config"])]
    if runs.empty:
        return None
    row = runs["row"].iloc[0]
    runs = runs[runs["row"] == row]
    own = mixes[mixes["config"].isin(runs["config"]) & mixes["seed"].isin(runs["seed"])]
    blocks = list(dict.fromkeys(own["mix"]))
    figure, (top, bottom) = _canvas(5.0, rows=2)
    for (block, seed), part in own.groupby(["mix", "seed"], sort=False):
        if len(blocks) > 12 and seed != own["seed"].min():
            continue  # a thicket
        tint = _ramp(blocks.index(block), len(blocks))
        first = seed == own["seed"].min() and len(blocks) <= 6
        name = str(block).partition(".attention")[0] if first else None
        top.plot(part["epoch"] + 1, part["lambda"], color=tint, linewidth=1.3, label=name)
        bottom.plot(part["epoch"] + 1, part["magnitude"], color=tint, linewidth=1.3)
    top.set_ylim(-0.03, 1.03)
    top.set_ylabel("lambda")
    if (own["magnitude"] > 0).all():
        bottom.set_yscale("log")
    bottom.set_ylabel("|p|")
    bottom.set_xlabel("epoch")
    bottom.locator_params(axis="x", integer=True)
    if len(blocks) <= 6:
        _legend(top)
    last = own[own["epoch"] == own["epoch"].max()]["lambda"]
    caption = (
        f"{row}: a line for each block and seed, dark for the first block. lambda depends on the "
        "direction of p only, and the smaller |p| the larger its steps: lambdas near 0 or 1 that "
        "differ between seeds say nothing about the data."
    )
    alt = f"lambda of {len(blocks)} blocks ends between {last.min():.2f} and {last.max():.2f}."
    return Drawing(f"{table.name}-mix", figure, caption, alt)


def gates(table: Table, gates: pd.DataFrame) -> Drawing | None:
    """How large the gates of each block are, and how far they look at the image."""
    if gates.empty or table.experiment not in DETAILED:
        return None
    rows = dict(zip(table.runs["config"], table.runs["row"], strict=True))
    own = gates[gates["config"].isin(rows)]
    if own.empty:
        return None
    own = own.assign(row=own["config"].map(rows), spread=100 * own["sd_images"] / own["mean"].abs())
    figure, (top, bottom) = _canvas(5.0, rows=2)
    described: list[str] = []
    dashes = _dashes(table)
    for row in table.frame["row"]:
        part = own[own["row"] == row]
        if part.empty:
            continue
        module = str(table.frame.loc[table.frame["row"] == row, "module"].iloc[0])
        means = part.groupby("index")[["q50", "spread"]].mean()
        style = {"color": colour(module), "marker": marker(module), "markersize": 5}
        style["linestyle"] = dashes[row]
        top.plot(means.index + 1, means["q50"], label=_short(row), **style)
        bottom.plot(means.index + 1, means["spread"], **style)
        described.append(f"{row} {means['spread'].min():.1f} to {means['spread'].max():.1f} %")
    top.set_ylabel("gate, median")
    bottom.set_ylabel("spread over images, %")
    bottom.set_xlabel("block, from the first to the last")
    bottom.locator_params(axis="x", integer=True)
    _legend(top)
    caption = (
        "The median gate of each block, and its standard deviation over images in per cent of its "
        "mean: near 0 the gate is a constant factor that does not look at its input."
    )
    return Drawing(f"{table.name}-gates", figure, caption, f"Spread: {'; '.join(described)}.")


def gradients(table: Table, epochs: pd.DataFrame) -> Drawing | None:
    """The gradient of the first block over that of the last, by depth, after the last epoch."""
    if table.experiment != "gradients" or "gradient_first" not in epochs:
        return None
    columns = ["config", "seed", "row", "module", "depth"]
    own = epochs.drop(columns=["module", "depth"]).merge(table.runs[columns], on=["config", "seed"])
    own = own[own["epoch"] == own.groupby("config")["epoch"].transform("max")]
    if own.empty:
        return None
    own = own.assign(ratio=own["gradient_first"] / own["gradient_last"])
    figure, axis = _canvas(3.2)
    for module, part in own.groupby("module", sort=False):
        means = part.groupby("depth")["ratio"].mean()
        style = {"color": colour(str(module)), "marker": marker(str(module))}
        axis.plot(means.index, means, label=str(module), **style)
    axis.set_yscale("log")
    axis.set_xlabel("depth")
    axis.set_ylabel("gradient, first block / last")
    _legend(axis)
    caption = "Where gradients vanish, the ratio falls with depth. Means over seeds, last epoch."
    return Drawing(f"{table.name}-ratio", figure, caption, "Ratio of gradients by depth.")


def _canvas(height: float, rows: int = 1) -> tuple[Figure, Any]:
    """A figure of the usual width, and its axes."""
    require("matplotlib", extra="train", purpose="figures")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=rows > 1)
    for axis in axes if rows > 1 else [axes]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=10)
        axis.xaxis.label.set_size(11)
        axis.yaxis.label.set_size(11)
        axis.grid(color="0.92")
        axis.set_axisbelow(True)
    return figure, axes


def _legend(axis: Axes) -> None:
    names = axis.get_legend_handles_labels()[1]
    if names:
        axis.legend(fontsize=9, frameon=False, ncols=2 if len(names) > 4 else 1)


def _ramp(i: int, n: int) -> Any:
    """The i-th of n colours from dark blue to yellow, the last not too pale."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.9 * i / max(n - 1, 1))


def _short(text: str) -> str:
    """A label that leaves room for the figure, in two lines where it is long."""
    import textwrap

    lines = textwrap.wrap(text.replace("$", r"\$"), 22, max_lines=2, placeholder=" ...")
    return "\n".join(lines)
