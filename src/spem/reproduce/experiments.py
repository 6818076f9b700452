"""Every table and figure of the paper, and some of our own, as run configs: nothing else says what.

An experiment is a function of a `Scale` that yields cells; a cell is one row of a table: a config
for every seed, beside what the paper prints there.
"""

import csv
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from typing import Literal, get_args

import torch

from spem.attention import AttentionSpec, list_attention, spec_text
from spem.attention.spec import attention_class
from spem.attention.spem import Reweight
from spem.training import DataConfig, ModelConfig, OptimConfig, RunConfig, recipes
from spem.training.recipes import scaled_milestones

MODULES = ("none", "se", "cbam", "eca", "srm", "sge", "spem")
"""The rows of Table 1."""
CONTROL = "control"
BRANCH_START = 0.0320586
"""SPEM's gate at the start, which is the size it gives every branch."""
LAMBDAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SHORT_IMAGES, SHORT_EPOCHS, SMOKE_EPOCHS = 5000, 5, 4
STUDY_EPOCHS = 20
FIRST = "results/finetune/plain-cifar100.safetensors"
"""The network that `finetune` starts from: plain, depth 11, 12 epochs of CIFAR-100 (43.95 %)."""
FIRST_SHA256 = "e3cdb1c42b66d212a9193415a6471350f86ffcda295e4f4882a7dac94da3ed40"
TUNING_RATE = 0.02


@dataclass(frozen=True)
class Scale:
    """How large an experiment is trained: the paper's recipe, or the same scaled down by name.

    Args:
        name: `paper`, `short` or `smoke`; also the folder of its runs.
        title: What differs from the paper, in one line.
        base: The config for a data set of the paper: the plain network of `depth`, seed 0.
        depth: What stands for the paper's ResNet164 wherever depth is not the question.
        ladder: What stands for each of the paper's four depths where it is.
        datasets: The paper's data sets that are trained at this scale.
        seeds: Seeds of a cell.
        control_seeds: Seeds of a cell of the controls, the one question fixed beforehand.
    """

    name: str
    title: str
    base: Callable[[str], RunConfig]
    depth: int
    ladder: Mapping[int, int]
    datasets: tuple[str, ...]
    seeds: tuple[int, ...]
    control_seeds: tuple[int, ...]


def _paper(dataset: str) -> RunConfig:
    return _settled(recipes.fast(dataset, attention="none"))


def _short(dataset: str) -> RunConfig:
    full = recipes.fast(dataset, depth=11, attention="none")
    return _settled(
        replace(
            full,
            data=DataConfig(name=dataset, limit=SHORT_IMAGES),
            optim=OptimConfig(epochs=SHORT_EPOCHS, milestones=scaled_milestones(SHORT_EPOCHS)),
            # Compiling a network of this size costs more than its few steps gain.
            runtime=replace(full.runtime, step="eager"),
        )
    )


def _smoke(dataset: str) -> RunConfig:
    del dataset  # the digits stand for it
    return _settled(recipes.smoke("none", epochs=SMOKE_EPOCHS))


def _study(dataset: str) -> RunConfig:
    full = recipes.fast(dataset, depth=11, attention="none")
    return replace(
        full,
        optim=OptimConfig(
            epochs=STUDY_EPOCHS, milestones=(STUDY_EPOCHS // 2, 3 * STUDY_EPOCHS // 4)
        ),
        runtime=replace(full.runtime, precision="bf16", step="auto", threads=1),
    )


def _settled(config: RunConfig) -> RunConfig:
    """One thread a run, since a grid has many, and tails composed of torch's own operations."""
    # Fused kernels round differently; they may enter a table of the paper only after the experiment
    # `equivalence` has shown that this does not move accuracy.
    return replace(config, runtime=replace(config.runtime, threads=1, impl="reference"))


_SMALL = {83: 11, 164: 20, 245: 29, 326: 38}
SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            "paper",
            "the paper's recipe: 164 epochs on 50,000 images",
            _paper,
            164,
            {83: 83, 164: 164, 245: 245, 326: 326},
            ("cifar10", "cifar100"),
            (0, 1, 2),
            tuple(range(8)),
        ),
        Scale(
            "short",
            f"another recipe than the paper's: depth 11, {SHORT_IMAGES:,} training images, "
            f"{SHORT_EPOCHS} epochs",
            _short,
            11,
            _SMALL,
            ("cifar10", "cifar100"),
            (0, 1, 2),
            tuple(range(8)),
        ),
        Scale(
            "study",
            "another recipe than the paper's, in bfloat16",
            _study,
            11,
            _SMALL,
            ("cifar10",),
            tuple(range(6)),
            tuple(range(8)),
        ),
        Scale(
            "smoke",
            f"a test of the machinery: depth 11, {SMOKE_EPOCHS} epochs on scikit-learn's digits",
            _smoke,
            11,
            _SMALL,
            ("cifar10",),
            (0, 1, 2),
            (0, 1, 2),
        ),
    )
}


@dataclass(frozen=True)
class Printed:
    """One cell of a table of the paper (`paper.csv`).

    Args:
        table: Number of the table, 1 to 4.
        label: What the paper calls the row: its number, or the variant (`lambda=0.1`, `a`, `ours`).
        depth: Depth of the network.
        attention: `none`, `se`, `cbam`, `eca`, `srm`, `sge` or `spem`.
        dataset: `cifar10` or `cifar100`.
        parameters_millions: Parameters as printed; None in Table 3, which prints none.
        top1: Accuracy in percent: the best test epoch of one run.
    """

    table: int
    label: str
    depth: int
    attention: str
    dataset: str
    parameters_millions: float | None
    top1: float


@cache
def printed() -> tuple[Printed, ...]:
    """Every cell of the paper's tables, in their order."""
    text = files("spem.reproduce").joinpath("paper.csv").read_text(encoding="utf-8")
    return tuple(
        Printed(
            table=int(row["table"]),
            label=row["variant"] or row["row"],
            depth=int(row["depth"]),
            attention=row["attention"],
            dataset=row["dataset"].lower(),
            parameters_millions=float(size) if (size := row["params_millions"]) else None,
            top1=float(row["top1_percent"]),
        )
        for row in csv.DictReader(text.splitlines())
    )


def find_printed(
    table: int, dataset: str, *, depth: int = 164, attention: str = "spem", variant: str = ""
) -> Printed:
    """The cell of a table; `variant` is the label of a row of Table 3 or 4.

    Raises:
        KeyError: The table has no such cell.
    """
    for cell in printed():
        where = (cell.table, cell.dataset, cell.depth, cell.attention)
        if where == (table, dataset, depth, attention) and variant in ("", cell.label):
            return cell
    raise KeyError((table, dataset, depth, attention, variant))


@dataclass(frozen=True)
class Cell:
    """One row of a table or figure.

    Args:
        row: What people call it; unique within (experiment, data).
        data: The paper's data set, `cifar10` or `cifar100`.
        config: The run of seed 0; None where nothing can be run (a row whose formula is not known,
            a data set that the scale leaves out).
        reference: Whether the others of its group are compared with it.
        group: Rows are compared within their group: the same depth, the same module.
        paper: What the paper prints here.
        note: What a reader of the row must know.
    """

    row: str
    data: str
    config: RunConfig | None
    reference: bool = False
    group: str = ""
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
        scale: One of `SCALES`.
        seeds: Other seeds than the scale's.

    Raises:
        ValueError: No experiment or scale has this name, or a seed is named twice.
    """
    title, question, cells = _EXPERIMENTS[_known("experiment", name, EXPERIMENTS)]
    size = SCALES[_known("scale", scale, SCALES)]
    many = name in ("controls", "equivalence", "finetune-1000", "finetune-5000")
    own = size.control_seeds if many else size.seeds
    chosen = own if seeds is None else tuple(seeds)
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"reproduce: seeds {chosen} must be some, each named once.")
    return Experiment(name, title, question, size, tuple(cells(size)), chosen)


def comparison(
    base: RunConfig, arms: Sequence[str], seeds: Sequence[int]
) -> tuple[list[RunConfig], str]:
    """The runs of a comparison whose arms were typed in, and the name of the reference.

    All arms of a seed come before the next seed, so what is stopped early holds whole pairs.

    Args:
        base: The config they share.
        arms: Attention specs, or "control": the plain network whose branches start as small as
            SPEM's. The first is what the others are compared with.
        seeds: Seeds.

    Raises:
        ValueError: Nothing to compare, an unknown module, or an arm or seed named twice.
    """
    names = [text if text == CONTROL else spec_text(AttentionSpec.parse(text)) for text in arms]
    if len(names) < 2:
        what = f"only {names[0]} is named" if names else "nothing is named"
        raise ValueError(
            f"compare: {what}, so there is nothing to compare. Name two or more, the reference "
            f"first: spem compare none {names[0] if names and names[0] != 'none' else 'spem'}"
        )
    if not seeds:
        raise ValueError("compare: no seed. Use a number of seeds such as 3, or a list: 0,1,2.")
    for kind, found in (("arm", names), ("seed", list(map(str, seeds)))):
        twice = sorted({name for name in found if found.count(name) > 1})
        if twice:
            raise ValueError(f"compare: {kind} {', '.join(twice)} is named twice. Name each once.")
    configs = [
        replace(
            base,
            seed=seed,
            model=replace(
                base.model,
                attention="none" if name == CONTROL else name,
                branch_start=BRANCH_START if name == CONTROL else base.model.branch_start,
            ),
        )
        for seed in seeds
        for name in names
    ]
    return configs, module_name(configs[0].model)


def module_name(model: ModelConfig) -> str:
    """What the runs of a network are called in tables: its attention, and what else is special.

    >>> module_name(ModelConfig(attention="none", branch_start=BRANCH_START))
    'control'
    """
    if model.attention == "none" and model.branch_start == BRANCH_START:
        return CONTROL
    usual = ModelConfig(depth=model.depth, attention=model.attention, block=model.block)
    special = [
        f"{f.name}={getattr(model, f.name)}"
        for f in fields(model)
        if not f.name.startswith("weights")  # where it began is the same for all arms
        and getattr(model, f.name) != getattr(usual, f.name)
    ]
    return ", ".join([model.attention, *special])


def run_configs(experiments: Iterable[Experiment]) -> dict[RunConfig, list[str]]:
    """Every run of some experiments once, with the experiments it belongs to, in running order.

    All cells of a seed come before the next seed, so that what is stopped early holds whole pairs.
    """
    experiments = list(experiments)
    found: dict[RunConfig, list[str]] = {}
    for seed in sorted({seed for one in experiments for seed in one.seeds}):
        for one in experiments:
            for cell in one.cells if seed in one.seeds else ():
                if cell.config is not None and _runnable(cell.config):
                    names = found.setdefault(replace(cell.config, seed=seed), [])
                    names += [] if one.name in names else [one.name]
    return found


def _runnable(config: RunConfig) -> bool:
    """Whether the kernels of this kind are those of the machine: an arm of `equivalence`."""
    return config.runtime.impl != ("numba" if torch.cuda.is_available() else "triton")


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
    start: Literal["identity"] | None = None,
    penalty: float | None = None,
) -> RunConfig | None:
    """The run of seed 0; None for a data set that the scale leaves out."""
    if data not in scale.datasets:
        return None
    base = replace(scale.base(data), experiment=scale.name)
    depth = scale.depth if depth is None else depth
    model = replace(
        base.model, depth=depth, attention=attention, branch_start=branch_start, start=start
    )
    optim = base.optim if penalty is None else replace(base.optim, penalty=penalty)
    return replace(base, model=model, optim=optim)


def _label(attention: str) -> str:
    name, _, options = attention.partition("(")
    names = {"none": "plain", "scale": "scale (control)"}
    return names.get(name, name.upper()) + (f" ({options}" if options else "")


def _table1(scale: Scale) -> Iterator[Cell]:
    for data in ("cifar10", "cifar100"):
        for name in MODULES:
            paper = find_printed(1, data, attention=name)
            yield Cell(_label(name), data, _config(scale, data, name), name == "none", "", paper)


def _table2(scale: Scale) -> Iterator[Cell]:
    for data in ("cifar10", "cifar100"):
        for depth, ours in scale.ladder.items():
            for name in ("none", "spem"):
                yield Cell(
                    f"ResNet{depth}, {_label(name)}",
                    data,
                    _config(scale, data, name, depth=ours),
                    name == "none",
                    str(depth),
                    find_printed(2, data, depth=depth, attention=name),
                    "" if ours == depth else f"depth {ours} stands for {depth}",
                )


def _table3(scale: Scale) -> Iterator[Cell]:
    for data in ("cifar10", "cifar100"):
        for lam in (0.1, 0.3, 0.5, 0.7, 0.9):
            config = _config(scale, data, f"spem(pool=mix({lam}))")
            paper = find_printed(3, data, variant=f"lambda={lam}")
            yield Cell(f"lambda = {lam}", data, config, paper=paper)
        learned = find_printed(3, data, variant="learned")
        yield Cell("learned", data, _config(scale, data, "spem"), True, paper=learned)


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
                variant == "shared_sum",
                paper=find_printed(4, data, variant=letter) if letter else None,
                note=f"the paper's '{letter}'" if letter else note,
            )
        for letter in "bcdefg":
            paper = find_printed(4, data, variant=letter)
            note = "which formula this is cannot be recovered from the paper"
            yield Cell(f"the paper's ({letter})", data, None, paper=paper, note=note)


def _figure2(scale: Scale) -> Iterator[Cell]:
    for data in ("cifar10", "cifar100"):
        average = find_printed(1, data, attention="se")
        yield Cell("average pooling", data, _config(scale, data, "se"), True, paper=average)
        for lam in LAMBDAS:
            yield Cell(f"lambda = {lam}", data, _config(scale, data, f"se(pool=mix({lam}))"))


def _controls(scale: Scale) -> Iterator[Cell]:
    data = "cifar10"
    small = _config(scale, data, "none", branch_start=BRANCH_START)
    yield Cell("plain, branches start at 0.032", data, small, True)
    yield Cell("plain", data, _config(scale, data, "none"))
    yield Cell("scale", data, _config(scale, data, "scale"))
    yield Cell("SE", data, _config(scale, data, "se"))
    yield Cell("SPEM (text)", data, _config(scale, data, "spem"))
    yield Cell("SPEM (code)", data, _config(scale, data, "spem(form=code)"))


def _scratch(scale: Scale) -> Iterator[Cell]:
    data = "cifar10"
    yield Cell("plain", data, _config(scale, data, "none"), True)
    small = _config(scale, data, "none", branch_start=BRANCH_START)
    yield Cell("plain, branches start at 0.032", data, small)
    yield Cell("SE", data, _config(scale, data, "se"))
    yield Cell("SPEM", data, _config(scale, data, "spem"))
    yield Cell("SPEM, identity start", data, _config(scale, data, "spem", start="identity"))


def _finetune(images: int, epochs: int) -> Callable[[Scale], Iterator[Cell]]:
    """From CIFAR-100 to so many images of CIFAR-10, attached as the identity unless a row says."""
    arms: tuple[tuple[str, str, Literal["identity"] | None, float], ...] = (
        ("plain", "none", None, TUNING_RATE),
        ("scale", "scale", "identity", TUNING_RATE),
        ("SE", "se", "identity", TUNING_RATE),
        ("ECA", "eca", "identity", TUNING_RATE),
        ("SPEM", "spem", "identity", TUNING_RATE),
        ("SPEM, module start", "spem", None, TUNING_RATE),
        ("plain, 3 times the rate", "none", None, 3 * TUNING_RATE),
        ("plain, a quarter of the rate", "none", None, TUNING_RATE / 4),
    )

    def cells(scale: Scale) -> Iterator[Cell]:
        for row, attention, start, rate in arms:
            config = _config(scale, "cifar10", attention, start=start)
            if config is not None:
                config = replace(
                    config,
                    model=replace(config.model, weights=FIRST, weights_sha256=FIRST_SHA256),
                    data=replace(config.data, limit=images, limit_seed=True),
                    optim=OptimConfig(
                        epochs=epochs,
                        batch=64,
                        lr=rate,
                        milestones=(),
                        schedule="cosine",
                        rules="declared",
                    ),
                )
            yield Cell(row, "cifar10", config, row == "plain")

    return cells


def _specs(*rows: tuple[str, str], reference: str) -> Callable[[Scale], Iterator[Cell]]:
    """An experiment on CIFAR-10 whose rows differ by attention: (row, spec)."""

    def cells(scale: Scale) -> Iterator[Cell]:
        for row, attention in rows:
            yield Cell(row, "cifar10", _config(scale, "cifar10", attention), row == reference)

    return cells


_forms = _specs(
    ("text", "spem"),
    ("code", "spem(form=code)"),
    ("figure", "spem(form=figure)"),
    ("plain", "none"),
    reference="text",
)
_parametrisations = _specs(
    ("squares (the paper's)", "spem"),
    ("anchored", "spem(pool=mix(parametrization=anchored))"),
    ("sigmoid", "spem(pool=mix(parametrization=sigmoid))"),
    ("constant 0.5", "spem(pool=mix(0.5))"),
    reference="squares (the paper's)",
)


def _mixes(scale: Scale) -> Iterator[Cell]:
    for name in list_attention():
        if "pool" not in inspect.signature(attention_class(name)).parameters or name == "spem":
            continue  # a learned mix is SPEM's own pool
        for attention in (name, f"{name}(pool=mix())"):
            own = attention == name
            row = f"{_label(name)}, {'own pool' if own else 'learned mix'}"
            config = _config(scale, "cifar10", spec_text(AttentionSpec.parse(attention)))
            yield Cell(row, "cifar10", config, own, name)


def _penalty(scale: Scale) -> Iterator[Cell]:
    for penalty in (0.1, 0.0):
        config = _config(scale, "cifar10", "spem", penalty=penalty)
        yield Cell(f"penalty {penalty:g}", "cifar10", config, penalty > 0)


def _gradients(scale: Scale) -> Iterator[Cell]:
    for cell in _table2(scale):
        if cell.data == "cifar10":
            yield replace(cell, paper=None)


def _equivalence(scale: Scale) -> Iterator[Cell]:
    data = "cifar10"
    for name in ("none", "spem"):
        config = _config(scale, data, name)
        assert config is not None
        yield Cell(f"{_label(name)}, float32, composed", data, config, True, name)
        for arm, precision, impl in (
            ("float32, fused by numba", "fp32", "numba"),
            ("float32, fused by triton", "fp32", "triton"),
            ("bfloat16, composed", "bf16", "reference"),
        ):
            runtime = replace(config.runtime, precision=precision, impl=impl)
            # A folder of their own: these are the same networks by other arithmetic.
            folder = f"{scale.name}-{impl if precision == 'fp32' else precision}"
            other = replace(config, runtime=runtime, experiment=folder)
            yield Cell(f"{_label(name)}, {arm}", data, other, False, name)


def _family(scale: Scale) -> Iterator[Cell]:
    for name in ("none", *list_attention()):
        yield Cell(_label(name), "cifar10", _config(scale, "cifar10", name), name == "none")


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
    "scratch": (
        "Trained from scratch",
        "Do SE and SPEM help a network that is trained from scratch?",
        _scratch,
    ),
    "finetune-1000": (
        "Fine-tuned on 1,000 images",
        "Does attention help a trained network that is fine-tuned on 1,000 images?",
        _finetune(1000, epochs=40),
    ),
    "finetune-5000": (
        "Fine-tuned on 5,000 images",
        "Does attention help a trained network that is fine-tuned on 5,000 images?",
        _finetune(5000, epochs=12),
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
