"""`spem list`: every registered attention module and what there is to know about it."""

from typing import TYPE_CHECKING, Any

from spem.cli.output import print_json, print_table, unknown

if TYPE_CHECKING:
    from spem.attention import Needs

CHANNELS = (64, 128, 256)
SIZES = {64: 32, 128: 16, 256: 8}
"""Side of the maps of so many channels in a CIFAR ResNet, for modules built for a size."""


def run(args: list[str]) -> None:
    """Run `spem list` with these arguments."""
    import tyro
    from tyro.conf import Positional

    def list_modules(pattern: Positional[str] = "*", /, *, json: bool = False) -> None:
        """List the attention modules: parameters, gate at start, statistics, needs, paper.

        Args:
            pattern: Names to show; * and ? stand for any characters.
            json: Print JSON.
        """
        _list(pattern, json)

    tyro.cli(list_modules, prog="spem list", args=args)


def _list(pattern: str, json: bool) -> None:
    from spem.attention import list_attention

    names = list_attention(pattern)
    if not names:
        raise ValueError(unknown("attention module", pattern, list_attention()))
    modules = [_describe(name) for name in names]
    if json:
        print_json(modules)
        return
    columns = ["name", *(f"C={channels}" for channels in CHANNELS), "gate at start"]
    columns += ["statistics", "fused", "no decay"]
    print_table(columns, [_numbers(module) for module in modules], align="lrrrrlll")
    print("C=64 ...: parameters for a map of that many channels.")
    print("gate at start: its value before training, where no input changes it.")
    print("statistics: the plane statistics that the gate is a function of; - if it needs the map.")
    print("fused: norm, attention, addition and ReLU of a block run as one operation.\n")
    columns = ["name", "needs", "paper"]
    print_table(columns, [_words(module) for module in modules], align="lll")


def _describe(name: str) -> dict[str, Any]:
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
        "fusable": module.takes_any_rank(),
        "statistics": list(module.statistics) if module.takes_any_rank() else [],
        "no_decay": list(needs.no_decay),
        "needs": _needs(needs),
        "paper": type(module).paper,
    }


def _needs(needs: "Needs") -> list[str]:
    """What a caller must know before using the module, one short phrase each."""
    phrases: list[str] = []
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


def _numbers(module: dict[str, Any]) -> list[str]:
    gate = module["start_gate"]
    counts = [module["parameters"][str(channels)] for channels in CHANNELS]
    return [
        module["name"],
        *("-" if n is None else f"{n:,}" for n in counts),
        "-" if gate is None else f"{gate:.7g}",
        ", ".join(module["statistics"]) or ("none" if module["fusable"] else "-"),
        "yes" if module["fusable"] else "-",
        ", ".join(module["no_decay"]) or "-",
    ]


def _words(module: dict[str, Any]) -> list[str]:
    return [module["name"], "; ".join(module["needs"]) or "-", module["paper"]]
