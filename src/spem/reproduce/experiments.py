"""Every table and figure of the paper, and some of our own, as run configs: nothing else says what.

An experiment is a function of a `Scale` that yields cells; a cell is what stands in one place of a
table: a config for every seed, beside what the paper prints there.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import get_args

import torch

from spem.attention import AttentionSpec, list_attention, spec_text
from spem.attention.spec import attention_class
from spem.attention.spem import Reweight
from spem.reproduce.paper import Printed, find_printed
from spem.reproduce.scales import SCALES, Scale
from spem.training import RunConfig

PAPER = ("table1", "table2", "table3", "table4", "figure2")
"""What `all` stands for."""
MODULES = ("none", "se", "cbam", "eca", "srm", "sge", "spem")
"""The rows of Table 1."""
NAMES = {"none": "plain", "scale": "scale (control)"}
BRANCH_START = 0.0320586
"""SPEM's gate at the start, which is the size it gives every branch."""
LAMBDAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Cell:
    """One place of a table or figure.

    Args:
        row: What people call it; unique within (experiment, data).
        data: The paper's data set, `cifar10` or `cifar100`.
        config: The run of seed 0; None where nothing can be run (a row whose formula is not known,
            a data set that the scale leaves out).
        reference: Whom others are compared with: `plain`, `se`, `control` or `base`; else empty.
        paper: What the paper prints here.
        note: What a reader of the cell must know.
    """

    row: str
    data: str
    config: RunConfig | None
    reference: str = ""
    paper: Printed | None = None
    note: str = ""


@dataclass(frozen=True)
class Experiment:
    """A table or figure: its cells, and the seeds with which each is run."""

    name: str
    title: str
    question: str
    scale: Scale
    cells: tuple[Cell, ...]
    seeds: tuple[int, ...]


def experiment(name: str, scale: str, *, seeds: Sequence[int] | None = None) -> Experiment:
    """Build an experiment.

    Args:
        name: One of `EXPERIMENTS`.
        scale: One of `spem.reproduce.scales.SCALES`.
        seeds: Other seeds than the scale's.

    Raises:
        ValueError: No experiment or scale has this name, or a seed is named twice.
    """
    title, question, cells = _EXPERIMENTS[_known("experiment", name, EXPERIMENTS)]
    size = SCALES[_known("scale", scale, SCALES)]
    own = size.control_seeds if name in ("controls", "equivalence") else size.seeds
    chosen = own if seeds is None else tuple(seeds)
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"reproduce: seeds {chosen} must be some, each named once.")
    return Experiment(name, title, question, size, tuple(cells(size)), chosen)


def run_configs(experiments: Iterable[Experiment]) -> list[RunConfig]:
    """Every run of some experiments once, in the order in which to run them.

    All cells of a seed come before the next seed, so that what is stopped early holds whole pairs.
    """
    experiments = list(experiments)
    found: dict[tuple[str, str, int], RunConfig] = {}
    for seed in sorted({seed for one in experiments for seed in one.seeds}):
        for one in experiments:
            for cell in one.cells if seed in one.seeds else ():
                if cell.config is not None:
                    config = replace(cell.config, seed=seed)
                    found.setdefault((config.experiment, config.id, seed), config)
    return list(found.values())


def _known(kind: str, name: str, names: Iterable[str]) -> str:
    names = list(names)
    if name in names:
        return name
    near = get_close_matches(name, names, n=2)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(f"reproduce: unknown {kind} {name!r}.{hint} Known: {', '.join(names)}.")


def _config(
    scale: Scale,
    data: str,
    attention: str,
    *,
    depth: int | None = None,
    branch_start: float | None = None,
    penalty: float | None = None,
) -> RunConfig | None:
    """The run of seed 0; None for a data set that the scale leaves out."""
    if data not in scale.datasets:
        return None
    base = replace(scale.base(data), experiment=scale.name)
    depth = scale.depth if depth is None else depth
    model = replace(base.model, depth=depth, attention=attention, branch_start=branch_start)
    optim = base.optim if penalty is None else replace(base.optim, penalty=penalty)
    return replace(base, model=model, optim=optim)


def _label(attention: str) -> str:
    name, _, options = attention.partition("(")
    return NAMES.get(name, name.upper()) + (f" ({options}" if options else "")


def _table1(scale: Scale) -> Iterator[Cell]:
    for data in ("cifar10", "cifar100"):
        for name in MODULES:
            yield Cell(
                _label(name),
                data,
                _config(scale, data, name),
                {"none": "plain", "se": "se"}.get(name, ""),
                find_printed(1, data, attention=name),
            )


def _table2(scale: Scale) -> Iterator[Cell]:
    for data in ("cifar10", "cifar100"):
        for depth, ours in scale.ladder.items():
            for name in ("none", "spem"):
                yield Cell(
                    f"ResNet{depth}, {_label(name)}",
                    data,
                    _config(scale, data, name, depth=ours),
                    "plain" if name == "none" else "",
                    find_printed(2, data, depth=depth, attention=name),
                    "" if ours == depth else f"depth {ours} stands for {depth}",
                )


def _table3(scale: Scale) -> Iterator[Cell]:
    for data in ("cifar10", "cifar100"):
        for lam in (0.1, 0.3, 0.5, 0.7, 0.9):
            config = _config(scale, data, f"spem(pool=mix({lam}))")
            paper = find_printed(3, data, variant=f"lambda={lam}")
            yield Cell(f"lambda = {lam}", data, config, "", paper)
        yield Cell(
            "learned",
            data,
            _config(scale, data, "spem"),
            "base",
            find_printed(3, data, variant="learned"),
        )


_LETTERS = {"shared_sum": "ours", "unshared_sum": "a", "none": "without"}
"""The reweight variants whose row in Table 4 is certain."""


def _table4(scale: Scale) -> Iterator[Cell]:
    for data in ("cifar10", "cifar100"):
        for variant in get_args(Reweight):
            letter = _LETTERS.get(variant)
            pools = {"max_only", "min_only"}
            note = f"candidate for {'(f) or (g)' if variant in pools else '(b) to (e)'}"
            attention = "spem" if variant == "shared_sum" else f"spem(reweight={variant})"
            yield Cell(
                variant,
                data,
                _config(scale, data, attention),
                "base" if variant == "shared_sum" else "",
                find_printed(4, data, variant=letter) if letter else None,
                f"the paper's '{letter}'" if letter else note,
            )
        for letter in "bcdefg":
            printed = find_printed(4, data, variant=letter)
            note = "which formula this is cannot be recovered from the paper"
            yield Cell(f"the paper's ({letter})", data, None, "", printed, note)


def _figure2(scale: Scale) -> Iterator[Cell]:
    for data in ("cifar10", "cifar100"):
        average = find_printed(1, data, attention="se")
        yield Cell("average pooling", data, _config(scale, data, "se"), "base", average)
        for lam in LAMBDAS:
            config = _config(scale, data, f"se(pool=mix({lam}))")
            yield Cell(f"lambda = {lam}", data, config)


def _controls(scale: Scale) -> Iterator[Cell]:
    data = "cifar10"
    yield Cell("plain", data, _config(scale, data, "none"), "plain")
    small = _config(scale, data, "none", branch_start=BRANCH_START)
    yield Cell("plain, branches start at 0.032", data, small, "control")
    yield Cell("scale", data, _config(scale, data, "scale"), "control")
    yield Cell("SE", data, _config(scale, data, "se"), "se")
    yield Cell("SPEM (text)", data, _config(scale, data, "spem"))
    yield Cell("SPEM (code)", data, _config(scale, data, "spem(form=code)"))


def _specs(*rows: tuple[str, str, str]) -> Callable[[Scale], Iterator[Cell]]:
    """An experiment on CIFAR-10 whose rows differ by attention: (row, spec, reference)."""

    def cells(scale: Scale) -> Iterator[Cell]:
        for row, attention, reference in rows:
            yield Cell(row, "cifar10", _config(scale, "cifar10", attention), reference)

    return cells


_forms = _specs(
    ("plain", "none", "plain"),
    ("text", "spem", "base"),
    ("code", "spem(form=code)", ""),
    ("figure", "spem(form=figure)", ""),
)
_parametrisations = _specs(
    ("squares (the paper's)", "spem", "base"),
    ("anchored", "spem(pool=mix(parametrization=anchored))", ""),
    ("sigmoid", "spem(pool=mix(parametrization=sigmoid))", ""),
    ("constant 0.5", "spem(pool=mix(0.5))", ""),
)


def _mixes(scale: Scale) -> Iterator[Cell]:
    for name in list_attention():
        if "pool" not in inspect.signature(attention_class(name)).parameters:
            continue
        for attention in (name, f"{name}(pool=mix())"):
            text = spec_text(AttentionSpec.parse(attention))
            if name == "spem" and text != "spem":
                continue  # a learned mix is its own pool
            own = attention == name
            row = f"{_label(name)}, {'own pool' if own else 'learned mix'}"
            yield Cell(row, "cifar10", _config(scale, "cifar10", text), "base" if own else "")


def _penalty(scale: Scale) -> Iterator[Cell]:
    for penalty, reference in ((0.1, "base"), (0.0, "")):
        config = _config(scale, "cifar10", "spem", penalty=penalty)
        yield Cell(f"penalty {penalty:g}", "cifar10", config, reference)


def _gradients(scale: Scale) -> Iterator[Cell]:
    for cell in _table2(scale):
        if cell.data == "cifar10":
            yield replace(cell, paper=None)


def _equivalence(scale: Scale) -> Iterator[Cell]:
    data = "cifar10"
    for name in ("none", "spem"):
        config = _config(scale, data, name)
        assert config is not None
        yield Cell(f"{_label(name)}, float32, composed", data, config, "base")
        # By name: left to the library, a machine without the kernels would compose this arm too.
        fused = "triton" if torch.cuda.is_available() else "numba"
        for arm, precision, impl in (("fused", "fp32", fused), ("bf16", "bf16", "reference")):
            runtime = replace(config.runtime, precision=precision, impl=impl)
            other = replace(config, runtime=runtime, experiment=f"{scale.name}-{arm}")
            words = "float32, fused" if arm == "fused" else "bfloat16, composed"
            yield Cell(f"{_label(name)}, {words}", data, other)


def _family(scale: Scale) -> Iterator[Cell]:
    marks = {"none": "plain", "se": "se", "scale": "control"}
    for name in ("none", *list_attention()):
        config = _config(scale, "cifar10", name)
        yield Cell(_label(name), "cifar10", config, marks.get(name, ""))


_EXPERIMENTS: dict[str, tuple[str, str, Callable[[Scale], Iterator[Cell]]]] = {
    "table1": (
        "Table 1: modules",
        "Is SPEM above the other modules on ResNet164?",
        _table1,
    ),
    "table2": (
        "Table 2: depth",
        "Does the gain of SPEM hold at every depth?",
        _table2,
    ),
    "table3": (
        "Table 3: the mix",
        "Is a learned lambda above every constant one?",
        _table3,
    ),
    "table4": (
        "Table 4: the reweight module",
        "Which reweight variant is best?",
        _table4,
    ),
    "figure2": (
        "Figure 2: SE with a fixed mix",
        "Does a mix of max and min match or beat the average?",
        _figure2,
    ),
    "controls": (
        "Controls",
        "Does SPEM beat its control, a network whose branches start as small without attention?",
        _controls,
    ),
    "forms": (
        "The three forms of SPEM",
        "Do text, official code and figure 3 differ in accuracy?",
        _forms,
    ),
    "parametrisations": (
        "Parametrisations of lambda",
        "Does it matter how a learned lambda is parametrised?",
        _parametrisations,
    ),
    "mixes": (
        "A learned mix in every module that pools",
        "Is a learned mix of max and min better than a module's own pool?",
        _mixes,
    ),
    "penalty": (
        "The penalty",
        "Does the penalty of 0.1 on p prevent an explosion?",
        _penalty,
    ),
    "gradients": (
        "Gradients by depth",
        "Does SPEM mitigate vanishing gradients?",
        _gradients,
    ),
    "equivalence": (
        "Equivalence of faster arithmetic",
        "Do fused kernels or bfloat16 move accuracy?",
        _equivalence,
    ),
    "family": (
        "The whole family",
        "What does each registered module reach?",
        _family,
    ),
}
EXPERIMENTS = tuple(_EXPERIMENTS)
