"""Every table and figure of the paper, and some of our own, as run configs.

An experiment is a list of cells, the rows of its table; a scale turns each into a run.
"""

import csv
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from itertools import product
from typing import Any, NamedTuple, get_args

import torch

from spem.attention import AttentionSpec, list_attention, spec_text
from spem.attention.spec import attention_class
from spem.attention.spem import Reweight
from spem.training import ModelConfig, RunConfig, recipes
from spem.training.recipes import scaled_milestones

MODULES = ("none", "se", "cbam", "eca", "srm", "sge", "spem")  # the rows of Table 1
CIFAR = ("cifar10", "cifar100")
CONTROL = "control"  # the plain network whose branches start as small as SPEM's
BRANCH_START = 0.0320586  # SPEM's gate at the start
LAMBDAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SMOKE_EPOCHS = 4
# The network that `finetune` starts from: plain, depth 11, 12 epochs of CIFAR-100 (43.95 %).
FIRST = "results/finetune/plain-cifar100.safetensors"
FIRST_SHA256 = "e3cdb1c42b66d212a9193415a6471350f86ffcda295e4f4882a7dac94da3ed40"
TUNING_RATE = 0.02
Changes = Mapping[str, Mapping[str, Any]]  # of a config, by section: {"optim": {"lr": 0.1}}

# Fused kernels round differently: they may enter a table of the paper only after the experiment
# `equivalence` has shown that this does not move accuracy.
COMPOSED: Changes = {"runtime": {"impl": "reference"}}
LADDER = {83: 11, 164: 20, 245: 29, 326: 38}  # replaces the paper's depths on a CPU


class Scale(NamedTuple):
    """The size of an experiment: the paper's recipe, or a scaled-down one."""

    name: str  # also the folder of its runs
    title: str  # how it differs from the paper
    changes: Changes  # to the paper's recipe
    depth: int = 11  # instead of the paper's ResNet164, wherever depth is not the question
    ladder: Mapping[int, int] = LADDER  # instead of the paper's depths, where it is
    datasets: tuple[str, ...] = CIFAR  # of the paper, those trained at this scale
    seeds: tuple[int, ...] = (0, 1, 2)  # per cell
    control_seeds: tuple[int, ...] = tuple(range(8))  # the one question fixed in advance

    def base(self, dataset: str) -> RunConfig:
        """The config of the plain network with seed 0, on one thread: a grid has many runs."""
        full = recipes.fast(dataset, attention="none")
        if self.name == "smoke":  # the digits stand for every data set
            full = recipes.smoke("none", epochs=SMOKE_EPOCHS)
        return _changed(_changed(full, {"runtime": {"threads": 1}}), self.changes)


_SHORT: Changes = {
    "data": {"limit": 5000},
    "optim": {"epochs": 5, "milestones": scaled_milestones(5)},
    # Compiling a network of this size costs more than its few steps gain.
    "runtime": {"impl": "reference", "step": "eager"},
}
_STUDY: Changes = {
    "optim": {"epochs": 20, "milestones": (10, 15)},
    "runtime": {"precision": "bf16"},
}
_SHORTER = "another recipe than the paper's"
_MACHINERY = f"a test of the machinery: depth 11, {SMOKE_EPOCHS} epochs on scikit-learn's digits"
_ALL = (
    Scale("paper", "the paper's recipe: 164 epochs on 50,000 images", COMPOSED, 164, ladder={}),
    Scale("short", f"{_SHORTER}: depth 11, 5,000 training images, 5 epochs", _SHORT),
    Scale("study", f"{_SHORTER}, in bfloat16", _STUDY, datasets=CIFAR[:1], seeds=tuple(range(6))),
    Scale("smoke", _MACHINERY, COMPOSED, datasets=CIFAR[:1], control_seeds=(0, 1, 2)),
)
SCALES = {scale.name: scale for scale in _ALL}


class Printed(NamedTuple):
    """A cell of a table of the paper: top-1 in percent at one run's best test epoch."""

    top1: float
    parameters_millions: float  # NaN in Table 3, which prints none


@cache
def printed() -> dict[tuple[str, ...], Printed]:
    """Every cell of `paper.csv`, by table, data set, attention, depth and variant ("" for none)."""
    text = files("spem.reproduce").joinpath("paper.csv").read_text(encoding="utf-8")
    return {
        (row["table"], row["dataset"].lower(), row["attention"], row["depth"], row["variant"]): (
            Printed(float(row["top1_percent"]), float(row["params_millions"] or "nan"))
        )
        for row in csv.DictReader(text.splitlines())
    }


@dataclass(frozen=True)
class Cell:
    """One row of a table or figure."""

    row: str  # unique within (experiment, data)
    attention: str | None  # a spec as text, or `CONTROL`; None if the formula is unknown
    data: str = "cifar10"
    reference: bool = False  # the rest of its group is compared with it
    group: str = ""  # rows of the same depth or module, which are compared with each other
    paper: Printed | None = None
    note: str = ""  # for the reader of the row
    depth: int | None = None  # the paper's, where depth is the question
    changes: Changes = field(default_factory=dict[str, Mapping[str, Any]])  # to its config
    folder: str = ""  # of its runs, where the network alone does not identify them
    config: RunConfig | None = None  # of seed 0; None if nothing can be run, or before `at`

    def at(self, scale: Scale) -> "Cell":
        """This cell with its run at a scale, if the scale trains its data set."""
        depth = scale.ladder.get(self.depth, self.depth) if self.depth else scale.depth
        stands = self.depth not in (None, depth)
        note = f"depth {depth} instead of {self.depth}" if stands else self.note
        if self.attention is None or self.data not in scale.datasets:
            return replace(self, note=note)
        base = replace(scale.base(self.data), experiment=scale.name + self.folder)
        config = _changed(base, {"model": {"depth": depth} | _network(self.attention)})
        return replace(self, note=note, config=_changed(config, self.changes))


@dataclass(frozen=True)
class Experiment:
    """A table or figure: its cells, and the seeds of each."""

    name: str
    title: str
    question: str
    scale: Scale
    cells: tuple[Cell, ...]
    seeds: tuple[int, ...]


def experiment(name: str, scale: str, *, seeds: Sequence[int] | None = None) -> Experiment:
    """Build one of `EXPERIMENTS` at one of `SCALES`, by default with the scale's seeds."""
    title, cells = _EXPERIMENTS[name]
    size = SCALES[scale]
    many = name in ("controls", "equivalence", "finetune-1000", "finetune-5000")
    own = tuple(seeds or (size.control_seeds if many else size.seeds))
    at_scale = tuple(cell.at(size) for cell in cells())
    return Experiment(name, title, cells.__doc__ or "", size, at_scale, own)


def comparison(
    base: RunConfig, arms: Sequence[str], seeds: Sequence[int]
) -> tuple[list[RunConfig], str]:
    """The runs of a comparison with given arms, and the name of the reference.

    Arms are attention specs or `CONTROL`; the first is the reference. All arms of a seed come
    before the next seed, so stopping early leaves complete pairs.

    Raises:
        ValueError: An unknown module, or an arm named twice.
    """
    names = [text if text == CONTROL else spec_text(AttentionSpec.parse(text)) for text in arms]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"compare: arm {', '.join(twice)} is named twice. Name each once.")
    networks = [_changed(base, {"model": _network(name)}) for name in names]
    configs = [replace(config, seed=seed) for seed in seeds for config in networks]
    return configs, module_name(configs[0].model)


def module_name(model: ModelConfig) -> str:
    """The name of a network in tables: its attention, and whatever else is special.

    >>> module_name(ModelConfig(attention="none", branch_start=BRANCH_START))
    'control'
    """
    if model.attention == "none" and model.branch_start == BRANCH_START:
        return CONTROL
    # Weights are left out: where training began is the same for all arms.
    special = {name: getattr(model, name) for name in ("init_scope", "branch_start", "start")}
    named = [f"{k}={v}" for k, v in special.items() if v != getattr(ModelConfig, k)]
    return ", ".join([model.attention, *named])


def run_configs(experiments: Iterable[Experiment]) -> dict[RunConfig, list[str]]:
    """Every run of some experiments once, with the experiments it belongs to, in running order.

    All cells of a seed come before the next seed, so stopping early leaves complete pairs. Arms of
    `equivalence` whose kernels this machine lacks are left out.
    """
    experiments = list(experiments)
    absent = "numba" if torch.cuda.is_available() else "triton"
    found: dict[RunConfig, list[str]] = {}
    for seed in sorted({seed for one in experiments for seed in one.seeds}):
        for one in experiments:
            for cell in one.cells if seed in one.seeds else ():
                if cell.config is not None and cell.config.runtime.impl != absent:
                    names = found.setdefault(replace(cell.config, seed=seed), [])
                    names += [] if one.name in names else [one.name]
    return found


def _changed(config: RunConfig, changes: Changes) -> RunConfig:
    parts: dict[str, Any] = {n: replace(getattr(config, n), **own) for n, own in changes.items()}
    return replace(config, **parts)


def _network(name: str) -> dict[str, Any]:
    """The model fields that an arm's name means."""
    if name == CONTROL:
        return {"attention": "none", "branch_start": BRANCH_START}
    return {"attention": name}


# ---- the cells of each experiment; the docstring is its question -------------------------------


def _paper(
    table: int, data: str, attention: str = "spem", depth: int = 164, variant: str = ""
) -> Printed:
    return printed()[str(table), data, attention, str(depth), variant]


def _label(attention: str) -> str:
    name, _, options = attention.partition("(")
    names = {"none": "plain", "scale": "scale (control)"}
    return names.get(name, name.upper()) + (f" ({options}" if options else "")


def _rows(arms: Mapping[str, str]) -> list[Cell]:
    """Rows on CIFAR-10 that differ in attention, the reference first."""
    return [
        Cell(row, attention, reference=not i) for i, (row, attention) in enumerate(arms.items())
    ]


def _table1() -> Iterator[Cell]:
    """Is SPEM above the other modules on ResNet164?"""
    for data, name in product(CIFAR, MODULES):
        yield Cell(_label(name), name, data, name == "none", paper=_paper(1, data, name))


def _table2() -> Iterator[Cell]:
    """Does the gain of SPEM hold at every depth?"""
    for data, depth, name in product(CIFAR, LADDER, ("none", "spem")):
        row, paper = f"ResNet{depth}, {_label(name)}", _paper(2, data, name, depth)
        yield Cell(row, name, data, name == "none", str(depth), paper, depth=depth)


def _table3() -> Iterator[Cell]:
    """Is a learned lambda above every constant one?"""
    for data in CIFAR:
        for lam in (0.1, 0.3, 0.5, 0.7, 0.9):
            paper = _paper(3, data, variant=f"lambda={lam}")
            yield Cell(f"lambda = {lam}", f"spem(pool=mix({lam}))", data, paper=paper)
        yield Cell("learned", "spem", data, True, paper=_paper(3, data, variant="learned"))


def _table4() -> Iterator[Cell]:
    """Which reweight variant is best?"""
    certain = {"shared_sum": "ours", "unshared_sum": "a", "none": "without"}
    for data in CIFAR:
        for variant in get_args(Reweight):
            own = variant == "shared_sum"
            attention = "spem" if own else f"spem(reweight={variant})"
            alone = variant in ("max_only", "min_only")
            paper, note = None, f"candidate for {'(f) or (g)' if alone else '(b) to (e)'}"
            if variant in certain:
                paper = _paper(4, data, variant=certain[variant])
                note = f"the paper's '{certain[variant]}'"
            yield Cell(variant, attention, data, own, paper=paper, note=note)
        note = "which formula this is cannot be recovered from the paper"
        for letter in "bcdefg":
            paper = _paper(4, data, variant=letter)
            yield Cell(f"the paper's ({letter})", None, data, paper=paper, note=note)


def _figure2() -> Iterator[Cell]:
    """Does a mix of max and min match or beat the average?"""
    for data in CIFAR:
        yield Cell("average pooling", "se", data, True, paper=_paper(1, data, "se"))
        for lam in LAMBDAS:
            yield Cell(f"lambda = {lam}", f"se(pool=mix({lam}))", data)


_SMALL_START = "plain, branches start at 0.032"


def _scratch() -> list[Cell]:
    """Do SE and SPEM help a network that is trained from scratch?"""
    rows = _rows({"plain": "none", _SMALL_START: CONTROL, "SE": "se", "SPEM": "spem"})
    identity: Changes = {"model": {"start": "identity"}}
    return [*rows, Cell("SPEM, identity start", "spem", changes=identity)]


def _finetune(images: int, epochs: int) -> Iterator[Cell]:
    """From CIFAR-100 to N images of CIFAR-10, identity start unless a row says otherwise."""
    arms = {
        "plain": ("none", None, TUNING_RATE),
        "scale": ("scale", "identity", TUNING_RATE),
        "SE": ("se", "identity", TUNING_RATE),
        "ECA": ("eca", "identity", TUNING_RATE),
        "SPEM": ("spem", "identity", TUNING_RATE),
        "SPEM, module start": ("spem", None, TUNING_RATE),
        "plain, 3 times the rate": ("none", None, 3 * TUNING_RATE),
        "plain, a quarter of the rate": ("none", None, TUNING_RATE / 4),
    }
    usual = {"epochs": epochs, "batch": 64, "milestones": (), "schedule": "cosine"}
    for row, (attention, start, rate) in arms.items():
        changes: Changes = {
            "model": {"start": start, "weights": FIRST, "weights_sha256": FIRST_SHA256},
            "data": {"limit": images, "limit_seed": True},
            "optim": {**usual, "lr": rate, "rules": "declared"},
        }
        yield Cell(row, attention, reference=row == "plain", changes=changes)


def _finetune_1000() -> Iterator[Cell]:
    """Does attention help a trained network that is fine-tuned on 1,000 images?"""
    return _finetune(1000, epochs=40)


def _finetune_5000() -> Iterator[Cell]:
    """Does attention help a trained network that is fine-tuned on 5,000 images?"""
    return _finetune(5000, epochs=12)


def _controls() -> list[Cell]:
    """Does SPEM beat its control, a network without attention whose branches start as small?"""
    arms = {_SMALL_START: CONTROL, "plain": "none", "scale": "scale", "SE": "se"}
    return _rows(arms | {"SPEM (text)": "spem", "SPEM (code)": "spem(form=code)"})


def _forms() -> list[Cell]:
    """Do the paper's text, its official code and its figure 3 differ in accuracy?"""
    arms = {"text": "spem", "code": "spem(form=code)", "figure": "spem(form=figure)"}
    return _rows(arms | {"plain": "none"})


def _parametrisations() -> list[Cell]:
    """Does it matter how a learned lambda is parametrised?"""
    own = {kind: f"spem(pool=mix(parametrization={kind}))" for kind in ("anchored", "sigmoid")}
    return _rows({"squares (the paper's)": "spem", **own, "constant 0.5": "spem(pool=mix(0.5))"})


def _mixes() -> Iterator[Cell]:
    """Is a learned mix of max and min better than a module's own pool?"""
    for name in list_attention():
        if "pool" not in inspect.signature(attention_class(name)).parameters or name == "spem":
            continue  # a learned mix is SPEM's own pool
        yield Cell(f"{_label(name)}, own pool", name, reference=True, group=name)
        mixed = spec_text(AttentionSpec.parse(f"{name}(pool=mix())"))
        yield Cell(f"{_label(name)}, learned mix", mixed, group=name)


def _penalty() -> Iterator[Cell]:
    """Does the penalty of 0.1 on p prevent an explosion?"""
    for penalty in (0.1, 0.0):
        changes: Changes = {"optim": {"penalty": penalty}}
        yield Cell(f"penalty {penalty:g}", "spem", reference=penalty > 0, changes=changes)


def _gradients() -> list[Cell]:
    """Does SPEM mitigate vanishing gradients?"""
    return [replace(cell, paper=None) for cell in _table2() if cell.data == "cifar10"]


def _equivalence() -> Iterator[Cell]:
    """Do fused kernels or bfloat16 move accuracy?"""
    arms = {
        "float32, fused by numba": {"precision": "fp32", "impl": "numba"},
        "float32, fused by triton": {"precision": "fp32", "impl": "triton"},
        "bfloat16, composed": {"precision": "bf16", "impl": "reference"},
    }
    for name in ("none", "spem"):
        yield Cell(f"{_label(name)}, float32, composed", name, reference=True, group=name)
        for arm, own in arms.items():
            folder = f"-{own['impl'] if own['precision'] == 'fp32' else 'bf16'}"
            row, changes = f"{_label(name)}, {arm}", {"runtime": own}
            yield Cell(row, name, group=name, changes=changes, folder=folder)


def _family() -> list[Cell]:
    """What does each registered module reach?"""
    return _rows({_label(name): name for name in ("none", *list_attention())})


_EXPERIMENTS: dict[str, tuple[str, Callable[[], Iterable[Cell]]]] = {
    "table1": ("Table 1: modules", _table1),
    "table2": ("Table 2: depth", _table2),
    "table3": ("Table 3: the mix", _table3),
    "table4": ("Table 4: the reweight module", _table4),
    "figure2": ("Figure 2: SE with a fixed mix", _figure2),
    "scratch": ("Trained from scratch", _scratch),
    "finetune-1000": ("Fine-tuned on 1,000 images", _finetune_1000),
    "finetune-5000": ("Fine-tuned on 5,000 images", _finetune_5000),
    "controls": ("Controls", _controls),
    "forms": ("The three forms of SPEM", _forms),
    "parametrisations": ("Parametrisations of lambda", _parametrisations),
    "mixes": ("A learned mix in every module that pools", _mixes),
    "penalty": ("The penalty", _penalty),
    "gradients": ("Gradients by depth", _gradients),
    "equivalence": ("Equivalence of faster arithmetic", _equivalence),
    "family": ("The whole family", _family),
}
EXPERIMENTS = tuple(_EXPERIMENTS)
