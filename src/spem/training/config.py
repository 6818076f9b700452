"""What a run is: frozen dataclasses, their checks, the run's id and its folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, cast

from spem.attention import AttentionSpec, spec_text
from spem.data import HUB_IDS, NORMALISATION
from spem.models import blocks_per_stage
from spem.ops.dispatch import IMPLEMENTATIONS, Impl

_NOT_IN_ID = ("root", "sha256", "test_sha256")
"""Fields of `DataConfig` that say where the images lie and what is checked, not what they are."""

_LATER = ("branch_start", "test_limit")
"""Optional fields younger than the first runs: left out of the id while they are not used."""

SCHEMA = 1
"""Number of the layout of `config.json`; a change of meaning of a field raises it."""


@dataclass(frozen=True)
class ModelConfig:
    """The network.

    Args:
        depth: 9n+2 for bottleneck blocks (11, 29, 83, 164 ...), 6n+2 for basic ones (20, 56 ...).
        attention: text of an attention spec, or "none"; kept in its canonical form.
        block: kind of residual block.
        init_scope: "backbone" leaves a module its own initialisation, "all" re-initialises the
            convolutions and norms inside modules too, as the official program does.
        branch_start: weight at which the last norm of every residual branch starts, a control for
            modules that start a branch small; None is the norm's own 1.
    """

    depth: int = 164
    attention: str = "spem"
    block: Literal["bottleneck", "basic"] = "bottleneck"
    init_scope: Literal["backbone", "all"] = "backbone"
    branch_start: float | None = None

    def __post_init__(self) -> None:
        blocks_per_stage(self.depth, self.block)
        _one_of("model.init_scope", self.init_scope, ("backbone", "all"))
        object.__setattr__(self, "attention", spec_text(AttentionSpec.parse(self.attention)))
        if self.branch_start is not None:
            _at_least("model.branch_start", self.branch_start, 0)
            object.__setattr__(self, "branch_start", float(self.branch_start))


@dataclass(frozen=True)
class DataConfig:
    """The images.

    Args:
        name: "digits", "cifar10", "cifar100", or a path of parquet files or image folders.
        root: folder that holds the CIFAR sets; not part of the run's id.
        val: training images held out for selecting the best epoch; 0 selects on the test set.
        limit: train on this many images only (a fixed subset, the same for every seed).
        test_limit: test on this many images only (likewise).
        augment: random crop after padding and, with `flip`, horizontal flip.
        flip: flip half of the images; wrong for digits and letters.
        pad: zeros added on each side before the crop, in pixels.
        normalisation: a key of `spem.data.NORMALISATION`.
        size: side in pixels to which the images are brought; None keeps theirs.
        sha256: expected SHA-256 of the raw files of the training split (see
            `spem.data.load_images`); not part of the run's id.
        test_sha256: the same for the test split.
    """

    name: str = "cifar10"
    root: str | None = None
    val: int = 0
    limit: int | None = None
    test_limit: int | None = None
    augment: bool = True
    flip: bool = True
    pad: int = 4
    normalisation: str = "paper"
    size: int | None = None
    sha256: str | None = None
    test_sha256: str | None = None

    def __post_init__(self) -> None:
        # A set has one name: its hub id must not give another run than its short name.
        short = {hub_id: name for name, hub_id in HUB_IDS.items()}
        object.__setattr__(self, "name", short.get(self.name, self.name))
        _one_of("data.normalisation", self.normalisation, tuple(NORMALISATION))
        _at_least("data.val", self.val, 0)
        _at_least("data.pad", self.pad, 0)
        for name in ("limit", "test_limit"):
            if getattr(self, name) is not None:
                _at_least(f"data.{name}", getattr(self, name), 1)
        if self.size is not None:
            _at_least("data.size", self.size, 1)


@dataclass(frozen=True)
class OptimConfig:
    """SGD with momentum and a rate that falls at milestones.

    Args:
        epochs: passes over the training images.
        batch: images a step; the last, smaller batch of an epoch is kept.
        lr: learning rate of epoch 0.
        momentum: of SGD, without Nesterov.
        weight_decay: L2 coefficient.
        milestones: epochs, counted from 0, before which the rate is multiplied by `factor`.
        factor: see `milestones`.
        penalty: coefficient of `spem.penalty` in the loss.
        rules: "host" decays every parameter (the paper), "declared" follows each module's own
            rules (`spem.param_groups`).
        mix_lr: rate of the learned mixes under `rules="declared"`; None means `lr`.
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

    def __post_init__(self) -> None:
        _at_least("optim.epochs", self.epochs, 1)
        _at_least("optim.batch", self.batch, 1)
        for name in ("lr", "momentum", "weight_decay", "factor", "penalty"):
            _at_least(f"optim.{name}", getattr(self, name), 0)
            # 1 and 1.0 are the same rate and must give the same id.
            object.__setattr__(self, name, float(getattr(self, name)))
        _one_of("optim.rules", self.rules, ("host", "declared"))
        if (
            list(self.milestones) != sorted(set(self.milestones))
            or min(self.milestones, default=1) < 1
        ):
            raise ValueError(
                f"optim.milestones={self.milestones} must be rising epoch numbers from 1 on. "
                "Sort them and drop repeats."
            )
        if self.mix_lr is not None and self.rules == "host":
            raise ValueError(
                f"optim.mix_lr={self.mix_lr} has no effect with optim.rules='host' (one group for "
                "everything). Use optim.rules='declared'."
            )


@dataclass(frozen=True)
class RuntimeConfig:
    """How the run is carried out. Of these only `precision` is part of the run's id.

    `device`, `impl`, `step` and `threads` are resolved when the run is planned, written to
    `config.json` and kept when it is resumed, because each of them can change the last bits.

    Args:
        device: "auto" (CUDA if there is any, else the CPU) or a torch device.
        precision: "fp32", or "bf16" for autocast with float32 weights, norms, gates and loss.
        channels_last: memory format of maps and weights.
        step: "compile" runs forward and loss of a step through `torch.compile`, "graph" captures
            the compiled step as a CUDA graph. "auto" is "graph" on CUDA; on a CPU it compiles once
            and measures whether that is faster than "eager".
        impl: implementation of the blocks' tails (`spem.ops`), in training and evaluation; None
            takes the library's choice for the device and the dtype of the maps.
        threads: CPU threads; 0 takes torch's number at planning.
        deterministic: ask torch for deterministic algorithms only.
        checkpoint_minutes: time between checkpoints within an epoch (each epoch ends in one).
        tensorboard: also write the metrics for TensorBoard.
        keep_checkpoint: keep `checkpoint.pt` after the run has finished.
    """

    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = True
    step: Literal["auto", "eager", "compile", "graph"] = "eager"
    impl: Impl | None = None
    threads: int = 0
    deterministic: bool = False
    checkpoint_minutes: float = 10.0
    tensorboard: bool = False
    keep_checkpoint: bool = False

    def __post_init__(self) -> None:
        _one_of("runtime.precision", self.precision, ("fp32", "bf16"))
        _one_of("runtime.step", self.step, ("auto", "eager", "compile", "graph"))
        if self.impl is not None:
            _one_of("runtime.impl", self.impl, IMPLEMENTATIONS)
        _at_least("runtime.threads", self.threads, 0)
        _at_least("runtime.checkpoint_minutes", self.checkpoint_minutes, 0)


@dataclass(frozen=True)
class RunConfig:
    """One training run, completely.

    `id` names what can change the result (model, data, optimiser, precision); seed, device and
    everything else about the execution are left out, so all seeds of a configuration share it.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    seed: int = 0
    experiment: str = "train"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.experiment):
            raise ValueError(
                f"experiment={self.experiment!r} must be a folder name of letters, digits, dots, "
                "hyphens and underscores. Rename it."
            )

    @property
    def identity(self) -> dict[str, Any]:
        """The fields behind `id`, as nested plain values."""
        full = self.to_dict()
        for section in (full["model"], full["data"]):
            for name in _LATER:
                if section.get(name, ...) is None:
                    del section[name]
        data = {k: v for k, v in full["data"].items() if k not in _NOT_IN_ID}
        return {
            "schema": SCHEMA,
            "model": full["model"],
            "data": data,
            "optim": full["optim"],
            "precision": self.runtime.precision,
        }

    @property
    def id(self) -> str:
        """First 10 hex digits of the SHA-256 of the canonical JSON of `identity`."""
        return hashlib.sha256(canonical_json(self.identity)).hexdigest()[:10]

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
        """Nested plain values, as `from_dict` takes them and JSON holds them."""
        return cast("dict[str, Any]", json.loads(json.dumps(dataclasses.asdict(self))))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        """Build a config from `to_dict`'s values.

        Raises:
            ValueError: a field is unknown, missing or has a value of the wrong type.
        """
        parts: dict[str, Any] = {}
        sections = {
            "model": ModelConfig,
            "data": DataConfig,
            "optim": OptimConfig,
            "runtime": RuntimeConfig,
        }
        _same_keys("config", values, cls)
        for name, value in values.items():
            parts[name] = _section(name, value, sections[name]) if name in sections else value
        _typed("config", "seed", parts["seed"], int)
        _typed("config", "experiment", parts["experiment"], str)
        return cls(**parts)


def differing_fields(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Name the fields in which two nested dicts differ: "optim.lr 0.1 -> 0.05, ..."."""
    a, b = _flat(old), _flat(new)
    changed = [k for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
    return ", ".join(f"{k} {a.get(k)} -> {b.get(k)}" for k in changed)


def canonical_json(values: object) -> bytes:
    """JSON with sorted keys and no spaces; equal values give equal bytes."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode()


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(cast("dict[str, Any]", value), f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _section(name: str, values: Any, kind: type) -> Any:
    """Build one of the four parts, checking names and types of its fields."""
    if not isinstance(values, dict):
        raise ValueError(
            f"config: {name} must be a table of fields, found {type(values).__name__}."
        )
    fields = cast("dict[str, Any]", values)
    default = kind()
    # None stands for "not asked for": files from before such a field existed lack it.
    fields = {f.name: None for f in dataclasses.fields(kind) if f.default is None} | fields
    _same_keys(f"config: {name}", fields, kind)
    built: dict[str, Any] = {}
    for key, value in fields.items():
        known = getattr(default, key)
        if isinstance(known, tuple):
            _typed(name, key, value, list)
            built[key] = tuple(cast("list[int]", value))
        else:
            # Fields whose default is None are optional texts or numbers; the checks of the
            # dataclass and of their users cover those.
            if known is not None:
                _typed(name, key, value, type(known))
            built[key] = value
    return kind(**built)


def _same_keys(subject: str, values: dict[str, Any], kind: type) -> None:
    allowed = {f.name for f in dataclasses.fields(kind)}
    unknown, missing = sorted(values.keys() - allowed), sorted(allowed - values.keys())
    if unknown:
        raise ValueError(
            f"{subject} has no field {', '.join(unknown)}; it takes {', '.join(sorted(allowed))}. "
            "The file comes from another version; train into another folder."
        )
    if missing:
        raise ValueError(
            f"{subject} lacks the field {', '.join(missing)}. "
            "The file comes from another version; train into another folder."
        )


def _typed(subject: str, name: str, value: object, kind: type) -> None:
    right = isinstance(value, kind) or (kind is float and isinstance(value, int))
    if not right or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{subject}.{name}={value!r} must be of type {kind.__name__}.")


def _at_least(name: str, value: float, lowest: float) -> None:
    if not value >= lowest:
        raise ValueError(f"{name}={value} is too small. Use at least {lowest}.")


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        near = get_close_matches(str(value), allowed, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}={value!r} is unknown. Use one of {', '.join(allowed)}.{hint}")
