"""Writes the generated parts of the documentation, each between two markers of its page.

python .ci/docs_tables.py            # rewrites them
python .ci/docs_tables.py --check    # says which are not current, and ends with status 1
"""

import contextlib
import csv
import inspect
import io
import json
import statistics
import sys
import textwrap
from collections import defaultdict
from pathlib import Path
from typing import Any

from spem.attention import attention_class, create_attention
from spem.cli import main as spem_command

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ROOT / "benchmarks" / "results"
PLACES = {
    "modules": "docs/modules.md",
    "lambda": "docs/lambda.md",
    "attach": "docs/insert.md",
    "export": "docs/export.md",
}
FORMS = ("ge(form=theta)", "ge(form=theta_plus)", "ge(extent=2)", "gct(placement=conv)")
"""Forms of modules that differ from the default in what they need."""
SAME = ("depth", "batch", "image", "dtype", "layout", "device", "hardware", "threads")
"""What rows must agree in to stand beside one another."""

sys.path.insert(0, str(ROOT / "benchmarks"))


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a measured table; none where it has not been measured."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def said(*arguments: str) -> str:
    """What a command prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        if spem_command(list(arguments)):
            sys.exit(f"docs_tables: spem {' '.join(arguments)} failed")
    return out.getvalue()


def modules() -> str:
    """A table of the registry, and for each module its formula, source, counts and cost."""
    facts: list[dict[str, Any]] = json.loads(said("list", "--json"))
    lines = said("list", "--markdown").splitlines()[2:]
    rows = {row[0].strip("| `"): row for row in (line.split(" | ") for line in lines)}
    costs = costs_by_name()
    parts = [
        "| module | what it is | C=64 | C=256 | gate at start | fused | step / plain |",
        "|---|---|---:|---:|---:|---|---:|",
    ]
    for name, row in rows.items():
        measured = costs.get(name)
        step = "not measured" if measured is None else measured["short"]
        cells = [f"[`{name}`](#{name})", row[1], row[3], row[5], row[6], row[7], step]
        parts.append(f"| {' | '.join(cells)} |")
    for module in facts:
        parts += ["", *section(module, rows[module["name"]], costs.get(module["name"]))]
    return "\n".join(parts)


def section(module: dict[str, Any], row: list[str], cost: dict[str, str] | None) -> list[str]:
    """One module: formula, source, parameters, start, needs, cost."""
    name = module["name"]
    counts = ", ".join(
        f"{'-' if n is None else f'{n:,}'} at C={channels}"
        for channels, n in module["parameters"].items()
    )
    source = row[9].removesuffix(" |")
    decay = f" Trained without weight decay: {row[8]}." if row[8] != "-" else ""
    return [
        f"### `{name}` {{ #{name} }}",
        "",
        f"{row[1]}.",
        "",
        "```text",
        formula(name),
        "```",
        "",
        f"- Source: {source if source != '-' else 'none, the control of this package'}",
        f"- Parameters: {counts}",
        f"- Gate at start: {row[6]}; stands in: {row[2]}; fused tail: {row[7]}.{decay}",
        f"- Needs: {'; '.join(module['needs']) or 'nothing in particular'}",
        f"- Measured: {'not measured' if cost is None else cost['long']}",
    ]


def formula(name: str) -> str:
    """The formula of a module, from the docstring of its class."""
    doc = inspect.getdoc(attention_class(name)) or ""
    lines: list[str] = []
    for line in doc.partition("Formula:\n")[2].splitlines():
        if line and not line.startswith(" "):
            break  # the next section
        lines.append(line)
    text = textwrap.dedent("\n".join(lines)).strip()
    if not text:
        sys.exit(f"docs_tables: the docstring of {name} has no formula")
    return text.replace("``", "")


def costs_by_name() -> dict[str, dict[str, str]]:
    """What has been measured of each module: the ratio of a training step to the plain network's.

    `family_cpu.csv` holds every module; without it `step_cpu.csv` those of the paper.
    """
    told: defaultdict[str, list[str]] = defaultdict(list)
    work = ""
    short: dict[str, str] = {}
    added: dict[str, str] = {}
    rows = read(MEASURED / "family_cpu.csv") or read(MEASURED / "step_cpu.csv")
    if mixed := [name for name in SAME if len({row.get(name) for row in rows}) > 1]:
        sys.exit(f"docs_tables: rows of different {', '.join(mixed)} in one table of costs")
    for row in rows:
        work = f"ResNet-{row['depth']}, batch {row['batch']}, {row['device'].upper()}"
        name = row["attention"]
        if row["way"] not in ("composed", "fused") or not row["to_plain"] or name == "none":
            continue
        ratio = f"{float(row['to_plain']):.2f}"
        told[name].append(f"{row['way']} {ratio}")
        if row["way"] == "composed":
            short[name] = ratio
        if row.get("attention_mflops"):
            number, mflops = int(row["attention_parameters"]), float(row["attention_mflops"])
            added[name] = f"; {number:+,} parameters, {mflops:+.2f} MFLOPs"
    return {
        name: {
            "short": short.get(name, "-"),  # only the fused step could be measured
            "long": f"training step / plain PyTorch ({work}): "
            f"{', '.join(parts)}{added.get(name, '')}",
        }
        for name, parts in told.items()
    }


def lambda_moves() -> str:
    """The record of `examples/lambda_moves.py`, one row for each arm."""
    rows = read(ROOT / "docs" / "data" / "lambda_moves.csv")
    last = max(int(row["step"]) for row in rows)
    parts = [
        f"| arm | network: lambda of the blocks after {last} steps, by seed "
        "| travelled a step | smallest size | clear pull: lambda | faint pull: lambda |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        network = [row for row in own if row["record"] == "network"]
        ends = [row for row in network if int(row["step"]) == last]
        seeds = dict.fromkeys(row["seed"] for row in ends)
        lambdas = "; ".join(
            ", ".join(f"{float(row['lambda']):.2f}" for row in ends if row["seed"] == seed)
            for seed in seeds
        )
        travelled = statistics.mean(float(row["travelled"]) for row in ends) / last
        size = min(float(row["size"]) for row in network)
        pulled = {
            float(row["strength"]): row["lambda"]
            for row in own
            if row["record"] == "pull" and int(row["step"]) == last
        }
        clear, faint = (
            "diverged" if pulled[strength] == "nan" else f"{float(pulled[strength]):.3f}"
            for strength in (1.0, 0.01)
        )
        parts.append(f"| {arm} | {lambdas} | {travelled:.2g} | {size:.2g} | {clear} | {faint} |")
    return "\n".join(parts)


def attach() -> str:
    """The table of `benchmarks/attach_table.py`."""
    from attach_table import markdown

    rows = read(MEASURED / "attach.csv")
    return markdown(rows).rstrip() if rows else "Not measured."


def export() -> str:
    """The modules of one size, and the table of `benchmarks/export_table.py`."""
    from export_table import markdown

    names: list[str] = sorted(
        [*(module["name"] for module in json.loads(said("list", "--json"))), *FORMS]
    )
    fixed = [f"`{name}`" for name in names if of_one_size(name)]
    rows = read(MEASURED / "export.csv")
    return "\n".join(
        [
            f"Built for maps of one size: {', '.join(fixed)}. All other modules take any.",
            "",
            markdown(rows).rstrip() if rows else "Not measured.",
        ]
    )


def of_one_size(spec: str) -> bool:
    """Whether `dynamic_size=True` refuses a module."""
    needs = create_attention(spec, 64, size=8).needs
    return needs.size or needs.fixed_size


def main() -> None:
    made = {"modules": modules, "lambda": lambda_moves, "attach": attach, "export": export}
    stale: list[str] = []
    for name, place in PLACES.items():
        page = ROOT / place
        text = page.read_text(encoding="utf-8")
        start, end = f"<!-- generated: {name} -->\n", "\n<!-- end -->"
        before, found, rest = text.partition(start)
        old, closed, after = rest.partition(end)
        if not found or not closed:
            sys.exit(f"docs_tables: {place} has no part {name}")
        new = made[name]()
        if new != old:
            stale.append(place)
            if "--check" not in sys.argv[1:]:
                page.write_text(before + start + new + end + after, encoding="utf-8")
    if stale and "--check" in sys.argv[1:]:
        sys.exit(f"not current: {', '.join(stale)}. Run: make docs")
    print(f"{'rewritten' if stale else 'current'}: {', '.join(stale or PLACES.values())}")


if __name__ == "__main__":
    main()
