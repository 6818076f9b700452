"""`spem list`: every registered attention module and what there is to know about it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from spem.cli.options import Json, unknown
from spem.cli.output import print_json, print_table, say

if TYPE_CHECKING:
    from spem.attention import Needs

SIZES = {64: 32, 128: 16, 256: 8}
"""Channels, and the side of their maps in a CIFAR ResNet, for modules built for a size."""


def run(
    pattern: Annotated[str, "PATTERN", "names; * stands for any characters"] = "*",
    *,
    markdown: Annotated[bool, "print the table of the README"] = False,
    bibtex: Annotated[bool, "print how to cite them"] = False,
    json: Json = False,
) -> None:
    """The attention modules: parameters, gate at start, statistics, paper."""
    if markdown + bibtex + json > 1:
        raise ValueError("--markdown, --bibtex and --json exclude each other. Give one of them.")
    if bibtex:
        from spem.attention.spec import bibtex as cite

        print("\n\n".join(map(cite, _names(pattern))))
        return
    if markdown:
        print(markdown_table(pattern))
        return
    modules = [describe(name) for name in _names(pattern)]
    if json:
        print_json(modules)
        return
    rows: list[list[object]] = []
    for module in modules:
        gate, fused = module["start_gate"], module["fusable"]
        statistics = ", ".join(module["statistics"]) or ("none" if fused else None)
        row = [*module["parameters"].values(), None if gate is None else f"{gate:.7g}", statistics]
        rows.append([module["name"], *row, "yes" if fused else "no"])
    columns = ["name", *(f"C={channels}" for channels in SIZES), "gate at start", "statistics"]
    print_table([*columns, "fused"], rows)
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
            f"{module['name']}: {module['paper']}. Goes {module['place']}.",
            f"Needs: {'; '.join(module['needs']) or 'nothing'}.",
            f"Weight decay leaves out: {', '.join(module['no_decay']) or 'nothing'}.",
        )


def markdown_table(pattern: str = "*") -> str:
    """The README's table of the modules whose names match, one row each, from the registry."""
    rows = ["| module | paper | fused |", "|---|---|---|"]
    for module in map(describe, _names(pattern)):
        title, _, link = module["paper"].partition(", http")
        source = f"[{title}](http{link})" if link else title
        rows.append(f"| `{module['name']}` | {source} | {'yes' if module['fusable'] else 'no'} |")
    return "\n".join(rows)


def _names(pattern: str) -> list[str]:
    from spem.attention import list_attention

    names = list_attention(pattern)
    if not names:
        raise ValueError(unknown("attention module", pattern, list_attention()))
    return names


def describe(name: str) -> dict[str, Any]:
    """What the registry and fresh instances say about a module."""
    from spem.attention import PLACES, create_attention

    parameters: dict[str, int | None] = {}
    module = None
    for channels, size in SIZES.items():
        try:
            module = create_attention(name, channels, size=size)
            parameters[str(channels)] = sum(p.numel() for p in module.parameters())
        except ValueError:  # declared: this module does not take that many channels
            parameters[str(channels)] = None
    assert module is not None
    needs, gate = module.needs, module.start_gate
    return {
        "name": name,
        "parameters": parameters,
        "start_gate": None if gate is None else float(gate),
        "fusable": needs.place == "tail" and module.why_composed() is None,
        "statistics": list(module.statistics) if module.takes_any_rank() else [],
        "no_decay": list(needs.no_decay),
        "place": PLACES[needs.place] + ", one for all blocks of a stage" * needs.shared,
        "needs": _needs(needs),
        "paper": type(module).paper,
    }


def _needs(needs: Needs) -> list[str]:
    """What a caller must know before using the module, one short phrase each."""
    phrases = {
        f"maps of {needs.pixels} pixels or more": needs.pixels > 1,
        f"{needs.batch} images or more in training": needs.batch > 1,
        f"{needs.values} values (N H W) or more in training": needs.values > 1,
        "holds a batch norm": needs.batch_statistics,
        f"{needs.divides} divides the channels": needs.divides is not None,
        "the map's size" + (", no other" if needs.fixed_size else ""): needs.size,
        "adds to the map": needs.adds,
        f"no full gradient for {', '.join(needs.stops_gradients)}": bool(needs.stops_gradients),
    }
    return [phrase for phrase, holds in phrases.items() if holds]
