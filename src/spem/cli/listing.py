"""`spem list`: every registered attention module and what there is to know about it."""

from typing import TYPE_CHECKING, Any

from spem.cli.options import Options, unknown
from spem.cli.output import print_json, print_table, say

if TYPE_CHECKING:
    from spem.attention import Needs

CHANNELS = (64, 128, 256)
_SHORT = {
    "tail": "blocks",
    "conv": "before convolutions",
    "norm": "norms",
    "middle": "3x3 convolutions",
    "between": "between stages",
    "stage": "after stages",
}
SIZES = {64: 32, 128: 16, 256: 8}
"""Side of the maps of so many channels in a CIFAR ResNet, for modules built for a size."""


def options() -> Options:
    """What the command takes."""
    o = Options("list", "The attention modules: parameters, gate at start, statistics, paper.")
    o.add("pattern", "PATTERN", "names; * stands for any characters", default="*", count="?")
    o.flag("--markdown", "print the table of the README")
    o.flag("--bibtex", "print how to cite them")
    return o.json()


def run(*, pattern: str, markdown: bool, bibtex: bool, json: bool) -> None:
    """Print what is registered."""
    if bibtex:
        from spem.attention.spec import bibtex as cite

        print("\n\n".join(cite(name) for name in _names(pattern)))
    elif markdown:
        print(markdown_table(pattern))
    else:
        _list(pattern, json)


def markdown_table(pattern: str = "*") -> str:
    """The README's table of the modules whose names match, one row each, from the registry."""
    rows = ["| module | paper | fused |", "|---|---|---|"]
    for name in _names(pattern):
        module = describe(name)
        title, _, link = module["paper"].partition(", http")
        source = f"[{title}](http{link})" if link else title
        rows.append(f"| `{name}` | {source} | {'yes' if module['fusable'] else 'no'} |")
    return "\n".join(rows)


def _names(pattern: str) -> list[str]:
    from spem.attention import list_attention

    names = list_attention(pattern)
    if not names:
        raise ValueError(unknown("attention module", pattern, list_attention()))
    return names


def _list(pattern: str, json: bool) -> None:
    modules = [describe(name) for name in _names(pattern)]
    if json:
        print_json(modules)
        return
    columns = ["name", *(f"C={channels}" for channels in CHANNELS), "gate at start"]
    rows = [_row(module) for module in modules]
    print_table([*columns, "statistics", "fused"], rows, align="lrrrrll")
    print()
    if pattern == "*":
        say(
            "C=64 ...: parameters for a map of that many channels. gate at start: its value before",
            "training, where no input changes it. statistics: the plane statistics that the gate",
            "is a function of; - if it needs the map. fused: norm, attention, addition and ReLU of",
            "a block run as one operation. Needs and paper of one: spem list NAME",
        )
        return
    for module in modules:
        say(
            f"{module['name']}: {module['paper']}.",
            f"Needs: {'; '.join(module['needs']) or 'nothing'}.",
            f"Weight decay leaves out: {', '.join(module['no_decay']) or 'nothing'}.",
        )


def describe(name: str) -> dict[str, Any]:
    """What the registry and a fresh instance say about a module."""
    from spem.attention import create_attention

    parameters: dict[str, int | None] = {}
    for channels in CHANNELS:
        try:
            module = create_attention(name, channels, size=SIZES[channels])
        except ValueError:  # declared: this module does not take that many channels
            parameters[str(channels)] = None
            continue
        parameters[str(channels)] = sum(p.numel() for p in module.parameters())
    module = create_attention(name, CHANNELS[-1], size=SIZES[CHANNELS[-1]])
    needs = module.needs
    gate = module.start_gate
    return {
        "name": name,
        "parameters": parameters,
        "start_gate": None if gate is None else float(gate),
        "fusable": needs.place == "tail" and module.why_composed() is None,
        "statistics": list(module.statistics) if module.takes_any_rank() else [],
        "no_decay": list(needs.no_decay),
        "place": _SHORT[needs.place] + (", one a stage" if needs.shared else ""),
        "needs": _needs(needs),
        "paper": type(module).paper,
    }


def _needs(needs: "Needs") -> list[str]:
    """What a caller must know before using the module, one short phrase each."""
    from spem.attention import PLACES

    phrases: list[str] = []
    if needs.place != "tail":
        phrases.append(f"stands {PLACES[needs.place]}")
    if needs.shared:
        phrases.append("the blocks of a stage share one")
    if needs.pixels > 1:
        phrases.append(f"maps of {needs.pixels} pixels or more")
    if needs.batch > 1:
        phrases.append(f"{needs.batch} images or more in training")
    if needs.values > 1:
        phrases.append(f"{needs.values} values (N H W) or more in training")
    if needs.batch_statistics:
        phrases.append("holds a batch norm")
    if needs.divides is not None:
        phrases.append(f"{needs.divides} divides the channels")
    if needs.size:
        phrases.append("the map's size" + (", no other" if needs.fixed_size else ""))
    if needs.adds:
        phrases.append("adds to the map")
    if needs.stops_gradients:
        phrases.append(f"no full gradient for {', '.join(needs.stops_gradients)}")
    return phrases


def _row(module: dict[str, Any]) -> list[str]:
    gate = module["start_gate"]
    return [
        module["name"],
        *_counts(module, "-"),
        "-" if gate is None else f"{gate:.7g}",
        ", ".join(module["statistics"]) or ("none" if module["fusable"] else "-"),
        "yes" if module["fusable"] else "no",
    ]


def _counts(module: dict[str, Any], missing: str) -> list[str]:
    """Parameters at the listed channels; ``missing`` where a module does not take so many."""
    counts = [module["parameters"][str(channels)] for channels in CHANNELS]
    return [missing if n is None else f"{n:,}" for n in counts]
