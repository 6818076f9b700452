"""A run's config: frozen dataclasses, their checks, the run's id and folder. Needs no torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from numbers import Integral
from os import PathLike, fspath
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, cast, get_args, get_origin, get_type_hints

from spem.data.names import NORMALISATION, known_name
from spem.depths import blocks_per_stage

if TYPE_CHECKING:
    from spem.attention import AttentionSpec

Impl = Literal["reference", "formula", "numba", "triton"]
Step = Literal["auto", "eager", "compile", "graph"]

_RANGES: dict[str, tuple[int, int | None]] = {
    # The deepest published network of these blocks has 1,202; a file asking for more is crafted.
    "model.depth": (1, 5_000),
    **dict.fromkeys(("data.pad", "runtime.threads"), (0, 4_096)),
    "data.size": (1, 4_096),
    **dict.fromkeys(("data.limit", "data.test_limit", "optim.epochs", "optim.batch"), (1, None)),
    "optim.milestones": (1, None),
    "seed": (-(2**63), 2**63 - 1),
}
"""Smallest and largest value of integer fields; other fields start at 0."""

SCHEMA = 1
"""Layout version of `config.json`, raised when a field changes meaning."""

_NOT_IN_ID = ("weights", "root", "sha256", "test_sha256")
"""Fields that say where weights and images are or how to verify them: not part of the id."""
_CHOOSING = ("impl", "step", "channels_last", "deterministic")
"""Fields of `RuntimeConfig` that enter the id unless they have their defaults."""
_LATER = (
    *("branch_start", "start", "weights_sha256", "test", "test_limit", "limit_seed", "skip_broken"),
    "schedule",
)
"""Fields added after the first runs: they enter the id only when used."""


@dataclass(frozen=True)
class ModelConfig:
    """The network.

    Args:
        depth: 9n+2 for bottleneck blocks (11, 29, 83, 164 ...), 6n+2 for basic ones (20, 56 ...).
        attention: an attention spec as text, or "none"; stored in canonical form. A bare name is
            looked up on first use (`RunConfig.id`, `spec`).
        block: kind of residual block.
        init_scope: "backbone" keeps each module's own initialisation; "all" also re-initialises
            the convolutions and norms inside modules, as the official program does.
        branch_start: initial weight of the last norm of every residual branch, a control for
            modules that start a branch small; None keeps the norm's 1.
        start: "identity" attaches the attention as `spem.attach` does: the output is unchanged at
            first, and an alpha learned from 0 lets the gate in. "module" and None keep the
            module's own start.
        weights: file of weights to start from, except head and attention; its path is not part of
            the id.
        weights_sha256: SHA-256 of that file, part of the id; required with `weights`.
    """

    depth: int = 164
    attention: str = "spem"
    block: Literal["bottleneck", "basic"] = "bottleneck"
    init_scope: Literal["backbone", "all"] = "backbone"
    branch_start: float | None = None
    start: Literal["module", "identity"] | None = None
    weights: str | None = None
    weights_sha256: str | None = None

    def __post_init__(self) -> None:
        _check(self, "model.")
        blocks_per_stage(self.depth, self.block, label="model.depth")
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.attention):
            from spem.attention import AttentionSpec, spec_text  # loads torch

            object.__setattr__(self, "attention", spec_text(AttentionSpec.parse(self.attention)))
        if (self.weights is None) != (self.weights_sha256 is None):
            raise ValueError(
                "model.weights and model.weights_sha256, which identifies the run, go together. "
                "Give both (`sha256sum FILE`)."
            )

    @property
    def spec(self) -> AttentionSpec | None:
        """The attention, None for the plain network; ValueError if no module has this name."""
        from spem.attention import AttentionSpec

        return AttentionSpec.parse(self.attention)


@dataclass(frozen=True)
class DataConfig:
    """The images.

    Args:
        name: "digits", "cifar10", "cifar100", or the path of parquet files or image folders. Only
            a label: data are identified by checksum and class names.
        root: folder that holds the CIFAR sets; not part of the run's id.
        val: training images held out to select the best epoch; 0 selects on the test set.
        test: share of each class held out for testing if an image folder has no splits; None is a
            fifth.
        skip_broken: leave out image files that cannot be read.
        limit: train on this many images only (a fixed subset, the same for every seed).
        limit_seed: draw another subset for every seed, the same for all networks of a seed.
        test_limit: test on this many images only (likewise).
        augment: random crop after padding and, with `flip`, horizontal flip.
        flip: flip half of the images; wrong for digits and letters.
        pad: zeros added on each side before the crop, in pixels.
        normalisation: a key of `spem.data.NORMALISATION`.
        size: side in pixels to resize images to; None keeps theirs.
        sha256: expected `ImageSet.sha256` of the decoded training split; not part of the run's id.
        test_sha256: the same for the test split.
    """

    name: str = "cifar10"
    root: str | None = None
    val: int = 0
    test: float | None = None
    skip_broken: bool = False
    limit: int | None = None
    limit_seed: bool = False
    test_limit: int | None = None
    augment: bool = True
    flip: bool = True
    pad: int = 4
    normalisation: str = "paper"
    size: int | None = None
    sha256: str | None = None
    test_sha256: str | None = None

    def __post_init__(self) -> None:
        # A set's hub id and its short name must give the same run.
        object.__setattr__(self, "name", known_name(self.name) or self.name)
        _check(self, "data.")
        require_one_of("data.normalisation", self.normalisation, NORMALISATION)
        if self.test is not None and not 0 < self.test < 1:
            raise ValueError(
                f"data.test={self.test} is not a share of the images. Use a number between 0 and 1."
            )


@dataclass(frozen=True)
class OptimConfig:
    """SGD with momentum and a learning rate that drops at milestones.

    Args:
        epochs: passes over the training images.
        batch: images per step; an epoch's last, smaller batch is kept.
        lr: learning rate of epoch 0.
        momentum: of SGD, without Nesterov.
        weight_decay: L2 coefficient.
        milestones: epochs, from 0, at whose start the rate is multiplied by `factor`.
        factor: see `milestones`.
        penalty: coefficient of `spem.penalty` in the loss.
        rules: "host" decays every parameter (the paper); "declared" follows the rules of each
            module (`spem.param_groups`).
        mix_lr: rate of the learned mixes under `rules="declared"`; None means `lr`.
        schedule: "cosine" lowers the rate along half a cosine, epoch by epoch, and ignores the
            milestones; "steps" and None use them.
    """

    epochs: int = 164
    batch: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    milestones: tuple[int, ...] = (81, 122)
    factor: float = 0.1
    penalty: float = 0.1
    rules: Literal["host", "declared"] = "host"
    mix_lr: float | None = None
    schedule: Literal["steps", "cosine"] | None = None

    def __post_init__(self) -> None:
        _check(self, "optim.")
        if self.mix_lr is not None and self.rules == "host":
            raise ValueError(
                f"optim.mix_lr={self.mix_lr} has no effect with optim.rules='host' (one group for "
                "everything). Use optim.rules='declared'."
            )


@dataclass(frozen=True)
class RuntimeConfig:
    """How the run is carried out.

    Whatever changes the computation (precision, memory format, step, implementation, determinism)
    enters the run's id when it is set. Device and threads do not: planning resolves them and writes
    them to `config.json`, and resuming keeps them.

    Args:
        device: "auto" (CUDA if available, else the CPU) or a torch device.
        precision: "fp32", or "bf16" for autocast with float32 weights, norms, gates and loss.
        channels_last: memory format of maps and weights.
        step: "compile" runs a step's forward pass and loss through `torch.compile`; "graph"
            captures the step as a CUDA graph. "auto" is "graph" on CUDA, else "eager".
        impl: implementation of the blocks' tails (`spem.ops`), in training and evaluation; None
            lets the library choose by device and dtype.
        threads: CPU threads; 0 is torch's default when the run is planned.
        deterministic: ask torch for deterministic algorithms only.
        checkpoint_minutes: time between checkpoints within an epoch (each epoch ends in one).
    """

    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = True
    step: Step = "eager"
    impl: Impl | None = None
    threads: int = 0
    deterministic: bool = False
    checkpoint_minutes: float = 10.0

    def __post_init__(self) -> None:
        _check(self, "runtime.")


@dataclass(frozen=True)
class RunConfig:
    """One training run.

    `id` covers everything that can change the result except the seed, so seeds share it.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    seed: int = 0
    experiment: str = "train"

    def __post_init__(self) -> None:
        _check(self)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.experiment):
            raise ValueError(
                f"experiment={self.experiment!r} must be a folder name of letters, digits, dots, "
                "hyphens and underscores. Rename it."
            )

    @property
    def identity(self) -> dict[str, Any]:
        """The fields behind `id`, as nested plain values; ValueError for an unknown attention."""
        _ = self.model.spec
        full = self.to_dict()
        how, kept = full["runtime"], dict[str, Any]()
        for section in ("model", "data", "optim"):
            kept[section] = {
                name: value
                for name, value in full[section].items()
                if name not in _NOT_IN_ID and not (name in _LATER and value in (None, False))
            }
        chosen = {k: how[k] for k in _CHOOSING if how[k] != getattr(RuntimeConfig, k)}
        runtime = {"runtime": chosen} if chosen else {}
        return {"schema": SCHEMA, **kept, "precision": how["precision"], **runtime}

    @property
    def id(self) -> str:
        """First 10 hex digits of the SHA-256 of the canonical JSON of `identity`."""
        text = json.dumps(self.identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:10]

    @property
    def slug(self) -> str:
        """Depth, data set and attention as a readable part of a folder name."""
        dataset = Path(self.data.name).name
        text = f"{self.model.depth}-{dataset}-{self.model.attention}"
        return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")

    def folder(self, runs: Path) -> Path:
        """`runs/<experiment>/<slug>-<id>/seed<k>`."""
        return Path(runs) / self.experiment / f"{self.slug}-{self.id}" / f"seed{self.seed}"

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values for `from_dict` and JSON."""
        return cast("dict[str, Any]", json.loads(json.dumps(dataclasses.asdict(self))))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        """Build a config from `to_dict`'s values; missing fields take their defaults.

        Unknown fields under "runtime" are ignored: another version decided by them how to train.

        Raises:
            ValueError: a field is unknown or has a value of the wrong type.
        """
        import dacite

        def real(value: Any) -> Any:
            return float(value) if type(value) is int else value

        if isinstance(values.get("runtime"), dict):
            known = values["runtime"].keys() & {f.name for f in dataclasses.fields(RuntimeConfig)}
            values = {**values, "runtime": {name: values["runtime"][name] for name in known}}
        try:
            config = dacite.from_dict(
                cls, values, dacite.Config(cast=[tuple], type_hooks={float: real}, strict=True)
            )
        except (dacite.DaciteError, TypeError, OverflowError) as error:
            raise ValueError(
                f"config: {error}. The file comes from another version; train into another folder."
            ) from error
        _ = config.model.spec
        return config


_hints = cache(get_type_hints)


def _check(part: Any, section: str = "") -> None:
    """Check every field against its type: a listed word, a text, an integer, a number >= 0."""
    for field_name, hint in _hints(type(part)).items():
        name, value = f"{section}{field_name}", getattr(part, field_name)
        optional = NoneType in get_args(hint)
        if optional and value is None:
            continue
        kind = get_args(hint)[0] if optional else hint
        if get_origin(kind) is Literal:
            require_one_of(name, value, get_args(kind))
        elif kind is float:
            if isinstance(value, (bool, str)) or not 0 <= value < math.inf:
                raise ValueError(f"{name}={value!r} must be a number from 0 on.")
            object.__setattr__(part, field_name, float(value))  # 1 and 1.0 give one id
        elif kind in (str, bool):
            text = fspath(value) if isinstance(value, PathLike) else value
            if not isinstance(text, kind):
                what = "True or False" if kind is bool else "a text"
                raise ValueError(f"{name}={value!r} must be {what}.")
            object.__setattr__(part, field_name, text)
        elif kind is int or get_origin(kind) is tuple:
            numbers = (value,) if kind is int else tuple(value)
            lowest, highest = _RANGES.get(name, (0, None))
            for number in numbers:
                if not isinstance(number, Integral) or isinstance(number, bool):
                    raise ValueError(f"{name}={number!r} must be a whole number.")
                if number < lowest:
                    raise ValueError(f"{name}={number} is too small. Use at least {lowest}.")
                if highest is not None and int(number) > highest:
                    raise ValueError(f"{name}={number} is too large. Use at most {highest}.")
            whole = sorted(map(int, numbers))  # numpy's, and another order, give one id too
            object.__setattr__(part, field_name, whole[0] if kind is int else tuple(whole))


def require_one_of(name: str, value: object, allowed: Collection[str]) -> None:
    """Raise ValueError for another word than these, with the nearest."""
    if value not in allowed:
        near = get_close_matches(str(value), allowed, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}={value!r} is unknown. Use one of {', '.join(allowed)}.{hint}")
