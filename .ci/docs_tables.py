"""The generated parts of README and documentation: tables and pictures made from committed rows.

A page names a part by a line `<!-- generated: NAME -->`; mkdocs calls this file as a hook and puts
the part there. In the README, which is read where it lies, parts are between such a line and
`<!-- end -->`:

    python .ci/docs_tables.py            # rewrites them
    python .ci/docs_tables.py --check    # names those that are not current, and ends with status 1
"""

import csv
import inspect
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ROOT / "benchmarks" / "results"
PICTURES = (
    "benchmarks/results/speed.svg",
    "results/cifar10/figures/scratch-cifar10-study-differences.svg",
    "results/finetune/figures/finetune-5000-cifar10-study-differences.svg",
)
"""Files outside of the pages' folder that pages show, each by its name under pictures/."""
MARK = re.compile(r"<!-- generated: (\w+) -->\n(?:((?:(?!<!--).)*?)<!-- end -->\n)?", re.DOTALL)
SHOWN = ("none", "se", "eca", "spem")


def read(name: str) -> list[dict[str, str]]:
    """The rows of a measured table."""
    with (MEASURED / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def table(columns: str, rows: list[list[Any]]) -> str:
    """A table in Markdown; a column whose title ends in ":" holds numbers."""
    titles = [title.strip() for title in columns.split("|")]
    lines = [[title.rstrip(":") for title in titles]]
    lines += [["---:" if title.endswith(":") else "---" for title in titles], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


# Modules


def modules() -> str:
    """Every module in a short row."""
    from spem.attention import attention_class, list_attention
    from spem.cli.listing import describe

    steps = composed_steps()
    rows: list[list[str]] = []
    for name in list_attention():
        described = describe(name)
        doc = (inspect.getdoc(attention_class(name)) or "").partition("\n")[0]
        gate = described["start_gate"]
        start = f"about {mean_gate(name):.2f}" if gate is None else f"{gate:.3g}"
        fused = "yes" if described["fusable"] else "no"
        count = f"{described['parameters']['256']:,}"
        kind = re.split("[:,.]", doc)[0]
        rows.append([f"[`{name}`](#{name})", kind, count, start, fused, steps.get(name, "-")])
    return table("module | kind | C=256: | start: | fused | step:", rows)


def modules_full() -> str:
    """For every module a section: formula, source, counts, what it needs."""
    from spem.attention import attention_class, list_attention
    from spem.cli.listing import describe
    from spem.share import formula

    parts: list[str] = []
    for name in list_attention():
        described = describe(name)
        doc = inspect.getdoc(attention_class(name)) or ""
        title, _, link = described["paper"].partition(", http")
        counts = [f"{n:,} at C={c}" for c, n in described["parameters"].items() if n is not None]
        facts = [f"[{title}](http{link})" if link else title, f"parameters: {', '.join(counts)}"]
        if described["place"] != "blocks":
            facts.append(f"stands in: {described['place']}")
        facts += [f"needs: {', '.join(described['needs'])}"] if described["needs"] else []
        facts += (
            [f"without weight decay: {', '.join(described['no_decay'])}"]
            if described["no_decay"]
            else []
        )
        lines = [f"### {name} {{ #{name} }}", "", doc.partition("\n")[0], "", "```text"]
        parts += [
            *lines,
            formula(name).replace("``", ""),
            "```",
            "",
            *(f"- {fact}" for fact in facts),
            "",
        ]
    return "\n".join(parts)


def mean_gate(name: str) -> float:
    """The mean gate of a new module in training, on normal maps under a fixed seed."""
    import torch
    from torch import nn

    from spem.attention import create_attention
    from spem.seeding import initialise, keyed_generator

    module = create_attention(name, 64, size=16)
    initialise(nn.Sequential(module), 0)
    x = torch.randn(32, 64, 16, 16, generator=keyed_generator(0, "list"))
    with torch.no_grad():
        return float(module.gate(x).mean())


def composed_steps() -> dict[str, str]:
    """The time of a training step of composed modules over that of the plain network."""
    rows = [row for row in read("family_cpu.csv") if row["way"] == "composed"]
    return {row["attention"]: f"{float(row['to_plain']):.2f}" for row in rows if row["to_plain"]}


def readme_modules() -> str:
    """What `spem list --markdown` prints."""
    from spem.cli.listing import markdown_table

    return markdown_table()


def mixes() -> str:
    """The record of `benchmarks/lambda_moves.py`, a row for each arm."""
    rows = read("lambda_moves.csv")
    last = max(int(row["step"]) for row in rows)
    found: list[list[str]] = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        ends = [row for row in rows if row["arm"] == arm and int(row["step"]) == last]
        network = [row for row in ends if row["record"] == "network"]
        lambdas = ", ".join(f"{float(r['lambda']):.2f}" for r in network if r["seed"] == "0")
        travelled = statistics.mean(float(row["travelled"]) for row in network) / last
        pulled = {float(r["strength"]): r["lambda"] for r in ends if r["record"] == "pull"}
        clear, faint = (
            "diverged" if pulled[strength] == "nan" else f"{float(pulled[strength]):.2f}"
            for strength in (1.0, 0.01)
        )
        found.append([arm, lambdas, f"{travelled:.2g}", clear, faint])
    return table("arm | in a network | change a step: | clear pull: | faint pull:", found)


# Networks


def architectures() -> str:
    """What `attach` adds to thirty networks (`benchmarks/attach_table.py`)."""
    rows = read("attach.csv")
    found: list[list[str]] = []
    for name in dict.fromkeys(row["architecture"] for row in rows):
        own = {row["attention"]: row for row in rows if row["architecture"] == name}
        added = [own[a]["added_parameters"] for a in ("spem", "se", "eca")]
        cells = [f"{int(cell):,}" if cell.isdigit() else "too narrow" for cell in added]
        plain = int(own["spem"]["plain_parameters"])
        found.append([f"`{name}`", own["spem"]["sites"], f"{plain:,}", *cells])
    return table("network | sites: | parameters: | `spem` adds: | `se` adds: | `eca` adds:", found)


def elsewhere() -> str:
    """What `attach` finds in networks of other libraries (`benchmarks/attach_elsewhere.py`)."""
    columns = ("network", "sites", "first_site", "folded_difference")
    found: list[list[str]] = []
    for row in read("attach_elsewhere.csv"):
        assert float(row["identity_difference"]) == 0, row
        assert row["restored"] == "yes", row
        name, sites, first, folded = (row[column] for column in columns)
        library = f"{row['library']} {row['version']}"
        found.append([library, name, sites, f"`{first}`", folded or "-"])
    return table("library | network | sites: | the first | own folding:", found)


def export() -> str:
    """Errors and latency of every module as ONNX (`benchmarks/export_table.py`)."""
    found: list[list[str]] = []
    for row in read("export.csv"):
        size = "one" if "one size" in row["dynamic_size"] else "any"
        found.append(
            [f"`{row['spec']}`", size, row["fp32"], row["fp16"], row["latency_over_plain"]]
        )
    return table("module | size | fp32: | fp16: | latency / plain:", found)


# Speed


def gpu() -> str:
    """Training steps on a GPU, recorded as CUDA graphs (`python benchmarks/gpu.py`)."""
    rows = read("steps_h200.csv")
    found: list[list[str]] = []
    for depth in ("29", "164"):
        for name in SHOWN:
            own = [r for r in rows if r["depth"] == depth and r["attention"] == name]
            by = {r["impl"]: r for r in own}
            cells = [f"{float(by[i]['time_ms']):.1f} ms" for i in ("reference", "triton")]
            ratio = min(float(r["to_plain"]) for r in own)
            found.append([depth, f"`{name}`", *cells, f"{ratio:.2f}"])
    return table("depth: | module | composed: | Triton: | best / plain:", found)


def speed() -> str:
    """Training step and inference over the fastest plain network, in its dtype and layout."""
    rows = read("speed.csv")
    on_gpu = {
        (row["attention"], row["impl"]): row["to_plain"]
        for row in read("steps_h200.csv")
        if row["depth"] == "29"
    }

    def ratios(table: str, batch: str, name: str, *ways: str) -> str:
        """Of composed, fused, and compiled; pieces that look for the fastest have another base."""
        found = {
            row["way"]: f"{float(row['to_plain']):.2f}"
            for row in rows
            if row["piece"].split()[2] not in ("plain", "compiled")
            and (row["table"], row["batch"], row["attention"]) == (table, batch, name)
            and (row["dtype"], row["layout"]) == ("bf16", "channels_last")
        }
        return " / ".join(
            next((found[way] for way in each.split("|") if way in found), "-") for each in ways
        )

    trained = ("composed|plain", "fused")
    inferred = ("attached|plain", "fused", "attached, compiled|plain, compiled")
    cells = [
        [
            f"`{name}`",
            ratios("steps", "128", name, *trained),
            *(ratios("inference", batch, name, *inferred) for batch in ("1", "8")),
            f"{float(on_gpu[name, 'reference']):.2f} / {float(on_gpu[name, 'triton']):.2f}",
        ]
        for name in SHOWN
    ]
    return table(
        "time / fastest plain network, composed / fused / compiled | CPU training step: | "
        "CPU inference, 1 image: | 8 images: | H200 training step:",
        cells,
    )


def tails() -> str:
    """Fused tails over plain ones on one thread and on two, geometric means of the maps."""
    found: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for row in read("speed.csv"):
        if row["way"] == "fused" and row["table"].endswith("tails"):
            what = "training" if row["table"] == "tails" else f"inference, {row['batch']} images"
            place = (what.replace(" 1 images", " 1 image"), row["dtype"], row["layout"])
            ratios = found.setdefault(place, {})
            key = f"{row['attention']} {row['threads']}"
            ratios.setdefault(key, []).append(float(row["to_plain"]))
    cells = [
        [*place]
        + [
            ", ".join(f"{statistics.geometric_mean(ratios[f'{name} {n}']):.2f}" for n in (1, 2))
            for name in SHOWN
        ]
        for place, ratios in sorted(found.items(), reverse=True)
    ]
    names = " | ".join(f"{name}:" for name in SHOWN)
    return table(f"tail | dtype | layout | {names}", cells)


# Results


def compared(folder: str, name: str) -> str:
    """A table of differences, from `spem report`."""
    with (ROOT / "results" / folder / "tables" / f"{name}.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    rows: list[list[str]] = []
    for line in lines:
        cells = [line["row"], f"{float(line['mean']):.2f} ± {float(line['sd']):.2f}"]
        if line["difference"]:
            low, high = (f"{float(line[end]):+.2f}" for end in ("low", "high"))
            holm = float(line["p_holm"])
            cells += [f"{float(line['difference']):+.2f}", f"[{low}, {high}]"]
            cells.append("<0.001" if holm < 0.001 else f"{holm:.3f}")
        else:
            cells += ["", "", ""]
        rows.append(cells)
    return table("network | accuracy, %: | difference: | 95 % interval: | Holm p:", rows)


def results_rows(folder: str, name: str) -> list[dict[str, str]]:
    with (ROOT / "results" / folder / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def gates() -> str:
    """Mean gate and its spread between images, by block, over the seeds."""
    rows = results_rows("cifar10", "gates.csv")
    found: list[list[str]] = []
    for name in dict.fromkeys(row["module"] for row in rows):
        for block in dict.fromkeys(row["block"] for row in rows):
            own = [row for row in rows if (row["module"], row["block"]) == (name, block)]
            if not own:
                continue
            means = [float(row["mean"]) for row in own]
            spreads = [float(row["sd_images"]) / abs(float(row["mean"])) for row in own]
            if max(spreads) == 0:
                continue
            between = f"{100 * min(spreads):.0f} to {100 * max(spreads):.0f} %"
            cells = [f"`{name}`", block.partition(".attention")[0]]
            found.append([*cells, f"{statistics.mean(means):.2f}", between])
    return table("module | block | mean gate: | varies between images:", found)


def folded() -> str:
    """What the trained networks of the study lose when their gates become constants."""
    rows = results_rows("cifar10", "fold.csv")
    names = {"se": "SE", "spem": "SPEM", "spem-identity": "SPEM, identity start"}
    found: list[list[str]] = []
    for name, title in names.items():
        own = [row for row in rows if row["module"] == name]

        def mean(column: str, own: list[dict[str, str]] = own) -> float:
            return statistics.mean(float(row[column]) for row in own)

        spreads = ", ".join(f"{100 * mean(f'spread_{block}'):.1f}" for block in (1, 2, 3))
        cells = [title, f"{mean('accuracy'):.2f}", f"{mean('accuracy_folded'):.2f}"]
        found.append([*cells, f"{100 * mean('agreement'):.1f}", spreads])
    return table(
        "network | accuracy, %: | folded, %: | same class, %: | spread of the blocks' gates, %:",
        found,
    )


def lambdas() -> str:
    """Lambda of SPEM's three blocks at the end, a column a seed."""
    rows = [row for row in results_rows("cifar10", "mixes.csv") if row["module"] == "spem"]
    last = max(int(row["epoch"]) for row in rows)
    rows = [row for row in rows if int(row["epoch"]) == last]
    seeds = sorted({int(row["seed"]) for row in rows})
    found: list[list[str]] = []
    for mix in dict.fromkeys(row["mix"] for row in rows):
        by = {int(row["seed"]): float(row["lambda"]) for row in rows if row["mix"] == mix}
        found.append([mix.partition(".attention")[0], *(f"{by[seed]:.2f}" for seed in seeds)])
    return table("block | " + " | ".join(f"seed {seed}:" for seed in seeds), found)


def scratch() -> str:
    """Trained from scratch on CIFAR-10."""
    return compared("cifar10", "scratch-cifar10-study")


README_PARTS: dict[str, Callable[[], str]] = {
    "modules": readme_modules,
    "scratch": scratch,
    "speed": speed,
}
PARTS: dict[str, Callable[[], str]] = {
    "modules": modules,
    "modules_full": modules_full,
    "mixes": mixes,
    "architectures": architectures,
    "elsewhere": elsewhere,
    "export": export,
    "gpu": gpu,
    "speed": speed,
    "tails": tails,
    "scratch": scratch,
    "finetune_5000": lambda: compared("finetune", "finetune-5000-cifar10-study"),
    "finetune_1000": lambda: compared("finetune", "finetune-1000-cifar10-study"),
    "gates": gates,
    "folded": folded,
    "lambdas": lambdas,
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs: the text of a page with its generated parts."""
    return MARK.sub(lambda found: f"{PARTS[found[1]]()}\n", markdown)


def on_files(files: Any, config: Any) -> Any:
    """mkdocs: pictures that lie beside the rows they are drawn from."""
    from mkdocs.structure.files import File

    for name in PICTURES:
        path = ROOT / name
        uri = f"pictures/{path.name}"
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def main() -> None:
    page = ROOT / "README.md"
    text = page.read_text(encoding="utf-8")
    new = MARK.sub(
        lambda found: f"<!-- generated: {found[1]} -->\n{README_PARTS[found[1]]()}\n<!-- end -->\n",
        text,
    )
    if new == text:
        print("current: README.md")
    elif "--check" in sys.argv[1:]:
        sys.exit("not current: README.md. Run: python .ci/docs_tables.py")
    else:
        page.write_text(new, encoding="utf-8")
        print("rewritten: README.md")


if __name__ == "__main__":
    main()
