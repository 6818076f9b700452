"""Pictures of the tables: functions of the CSV file and of nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spem.bench.report import Report, reports
from spem.bench.table import Row, read
from spem.extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"fused": "#0072B2", "composed": "#E69F00", "official": "#D55E00", "plain": "#000000"}
"""Of the Okabe and Ito set, which people with any kind of colour blindness can tell apart."""
OTHER = "#999999"
UNITS = {"memory": ("peak_mib", "MiB"), "": ("time_ms_median", "ms")}


def draw(kind: str, table: Path) -> Path:
    """Draws a table beside it, as SVG.

    Args:
        kind: A key of `spem.bench.table.KINDS`.
        table: Its CSV file.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The table is empty.
    """
    matplotlib = require("matplotlib", extra="train", purpose="the picture of a benchmark")
    rows = [row for row in read(table) if not row.get("note")]
    if not rows:
        raise ValueError(f"bench: {table} holds no measurements.")
    path = table.with_suffix(".svg")
    # The same table gives the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": table.stem}):
        build_figure(kind, rows).savefig(path, metadata={"Date": None})
    return path


def build_figure(kind: str, rows: Sequence[Row]) -> Figure:
    """A panel of bars for each map, batch or mode; whole calls where a table has their parts."""
    require("matplotlib", extra="train", purpose="the picture of a benchmark")
    from matplotlib.figure import Figure

    shown = [row for row in rows if _whole(kind, row)]
    panels = reports(kind, shown)
    longest = max(len(panel.rows) for panel in panels)
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    size = (6.4 * across, 0.8 + down * (1.0 + 0.22 * longest))
    figure = Figure(figsize=size, layout="constrained")
    first = rows[0]
    threads = "" if first["device"] == "cuda" else f", threads: {first['threads']}"
    figure.suptitle(f"{first['hardware']}{threads}, torch {first['torch']}", fontsize=10)
    axes: list[Axes] = list(figure.subplots(down, across, squeeze=False).flat)
    start = 0
    for axis, panel in zip(axes, panels, strict=False):
        members = _members(kind, shown, panel)
        start += len(members)
        _panel(axis, kind, panel, members)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    return figure


def _members(kind: str, rows: Sequence[Row], panel: Report) -> list[Row]:
    return [row for row in rows if reports(kind, [row])[0].title == panel.title]


def _whole(kind: str, row: Row) -> bool:
    if kind != "ops":
        return True
    whole = "both" if row["op"] == "bn_train" else "forward"
    return row["mode"] == whole and row["l2"] in ("", "flushed")


def _panel(axis: Axes, kind: str, panel: Report, members: Sequence[Row]) -> None:
    """Horizontal bars with their quantiles; a line where plain PyTorch is."""
    column, unit = UNITS.get(kind, UNITS[""])
    values = [float(row[column]) for row in members]
    ends = (
        ("peak_mib_least", "peak_mib_most") if kind == "memory" else ("time_ms_q20", "time_ms_q80")
    )
    spread = [
        [max(0.0, v - float(row[ends[0]])) for v, row in zip(values, members, strict=True)],
        [max(0.0, float(row[ends[1]]) - v) for v, row in zip(values, members, strict=True)],
    ]
    labels = [f"{line[0]}, {line[1]}" for line in panel.rows]
    axis.barh(range(len(values)), values, xerr=spread, color=[_colour(x) for x in panel.rows])
    plain = [v for v, line in zip(values, panel.rows, strict=True) if line[1] == "plain"]
    if plain:
        axis.axvline(plain[0], color="black", linewidth=1, linestyle="--")
    for i, (value, above, row) in enumerate(zip(values, spread[1], members, strict=True)):
        axis.text(value + above, i, f" {float(row['to_plain']):.2f}", va="center", fontsize=7)
    axis.set_yticks(range(len(values)), labels, fontsize=7)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_title(panel.title, fontsize=8)
    axis.set_xlabel(f"{unit}; the number: / plain PyTorch", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _colour(line: Sequence[str]) -> str:
    return next((c for name, c in COLOURS.items() if line[1].startswith(name)), OTHER)
