"""Sharing networks: a folder of weights, config and card, here or on the Hugging Face hub.

Nothing in a folder is executed when it is read: the config is JSON, every field of it is checked,
and the network is built by this library, timm or torchvision.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import inspect
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spem.architectures import OPTIONS, build, library_of
from spem.attention import ChannelAttention, attention_class, attention_parameters, spec_text
from spem.attention.spec import bibtex
from spem.data.names import HUB_IDS, known_name
from spem.export import difference, tensors
from spem.extras import rephrased, require
from spem.files import load_json, read_regular, write_atomic
from spem.insert import IdentityStart, attach, true_keys
from spem.insert.attach import Attached, remembered
from spem.insert.sites import default_input, unwrapped
from spem.models import ResNet, resnet
from spem.ops import use_impl
from spem.version import __version__

__all__ = ["Images", "Shared", "from_pretrained", "push_to_hub", "read_shared", "save_pretrained"]

SCHEMA = 1
"""Layout version of `config.json`, raised when a field changes meaning."""
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
FILES = (CARD, CONFIG, WEIGHTS)
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DTYPES = ("float32", "float64", "bfloat16", "float16")
_LARGEST_INPUT = 2**26
"""Largest number of values in an input that attention was traced with."""

Results = str | Path | Mapping[str, Any] | Sequence[Mapping[str, Any]] | None


# ---- what config.json says


@dataclass(frozen=True)
class Images:
    """How images of ``size`` pixels (None: unknown) are normalised: (pixels / 255 - mean) / std.

    Mean and std are per channel (RGB), on the scale 0 to 1.
    """

    size: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        finite = all(math.isfinite(value) for value in (*self.mean, *self.std))
        paired = finite and len(self.mean) == len(self.std) and min(self.std, default=0) > 0
        if not paired or (self.size is not None and self.size < 1):
            raise ValueError(f"images={self} is not a size with means and deviations.")


@dataclass(frozen=True)
class _Ours:
    """A network of `spem.resnet`."""

    kind: str
    depth: int
    classes: int
    attention: str
    block: str


@dataclass(frozen=True)
class _Theirs:
    """An architecture of timm or torchvision, which ``kind`` names."""

    kind: str
    arch: str
    options: dict[str, Any]


@dataclass(frozen=True)
class _Call(Attached):
    """One call of `spem.attach`, on the named part of the network."""

    where: bool = False
    part: str = ""

    def __post_init__(self) -> None:
        if self.where:
            said = f"{self.attention} was attached with where=, a rule that no file can hold"
            raise ValueError(f"{said}. Use include= or stages=, or share weights with your code.")
        shape = self.input_shape
        if shape is not None and (min(shape, default=0) < 1 or math.prod(shape) > _LARGEST_INPUT):
            raise ValueError(f"attach: input_shape={list(shape)} is not the shape of an input.")


@dataclass(frozen=True)
class _Config:
    """`config.json`."""

    schema: int
    library_name: str
    version: str
    network: dict[str, Any]
    attach: tuple[_Call, ...]
    dtype: str
    images: Images | None
    classes: tuple[str, ...] | None
    weights_sha256: str

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is unknown. Known: {', '.join(_DTYPES)}.")
        host = self.host
        count = host.classes if isinstance(host, _Ours) else host.options.get("num_classes")
        if self.classes is not None and count is not None and len(self.classes) != count:
            named = f"{len(self.classes)} names of classes for {count} outputs"
            raise ValueError(f"{named}. Name each of them.")

    @property
    def host(self) -> _Ours | _Theirs:
        """The network without attached attention."""
        kinds = {"spem.resnet": _Ours} | dict.fromkeys(OPTIONS, _Theirs)
        kind = self.network.get("kind")
        if str(kind) not in kinds:
            raise ValueError(f"network is of an unknown kind {kind!r}. Known: {', '.join(kinds)}.")
        return _read(kinds[str(kind)], self.network, "network")


class Shared(NamedTuple):
    """Contents of a shared folder: the network, in evaluation mode, its images and classes."""

    model: nn.Module
    images: Images | None
    classes: tuple[str, ...] | None


def _read(kind: type[Any], values: Any, subject: str) -> Any:
    """A dataclass from a table with exactly its fields and types; else ValueError."""
    dacite = require("dacite", extra="hub", purpose="a shared folder")
    try:
        return dacite.from_dict(kind, values, dacite.Config(strict=True, cast=[tuple]))
    except (dacite.DaciteError, AttributeError, TypeError) as error:
        names = ", ".join(field.name for field in dataclasses.fields(kind))
        raise ValueError(f"{subject}: {error}. It takes {names}.") from error


# ---- writing


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    results: Results = None,
    arch: str | None = None,
    options: Mapping[str, Any] | None = None,
    images: Mapping[str, Any] | None = None,
    classes: Sequence[str] | None = None,
    license: str | None = None,
    repo_id: str | None = None,
) -> Path:
    """Write a network, its config and a model card into a folder that `from_pretrained` can load.

    Before anything is written, the network is rebuilt from that config and compared, first tensor
    by tensor, then by its outputs for one random input.

    Args:
        model: A network of `spem.resnet`, timm or torchvision, with or without attached attention.
        folder: Created if missing; files of an earlier call are replaced.
        results: For the card: the folder of a finished run, or tables with ``dataset``, ``metric``,
            ``value`` and optionally ``split`` and ``note``.
        arch: Such as ``"torchvision:resnet50"``; timm's networks know theirs.
        options: Its constructor's, such as ``{"num_classes": 10}`` (`spem.architectures.OPTIONS`).
        images: ``size``, ``mean`` and ``std`` of its training images; timm's networks know them.
        classes: Names of the classes in the order of the outputs.
        license: Of the weights, as the hub spells it, such as ``"apache-2.0"``.
        repo_id: Its future repository, for the card's example.

    Raises:
        ValueError: The network cannot be made from a config, is of several dtypes, a result is no
            number, or the folder holds files of these names that another program wrote.
        ImportError: An extra is missing.
    """
    folder = Path(folder)
    safetensors = require("safetensors.torch", extra="hub", purpose="save_pretrained")
    model = unwrapped(model)
    state = {
        name: value.detach().cpu().contiguous().clone()
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor)
    }
    content: bytes = safetensors.save(state, {"format": "pt"})
    said: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}  # timm's
    if images is None and {"mean", "std"} <= said.keys():
        size = (said.get("input_size") or [None])[-1]
        images = {"size": size, "mean": list(said["mean"]), "std": list(said["std"])}
    try:
        dtypes = sorted({str(t.dtype) for t in state.values() if t.is_floating_point()})
        if len(dtypes) > 1:
            names = " and ".join(dtypes)
            raise ValueError(f"the network has tensors of {names}. Convert it: model.float().")
        config = _Config(
            schema=SCHEMA,
            library_name="spem",
            version=__version__,
            network=_described(model, arch or said.get("architecture"), options),
            attach=tuple(_Call(**vars(call), part=part) for part, call in remembered(model)),
            dtype=dtypes[0].removeprefix("torch.") if dtypes else "float32",
            images=None if images is None else _read(Images, dict(images), "images"),
            classes=None if classes is None else tuple(classes),
            weights_sha256=hashlib.sha256(content).hexdigest(),
        )
        built = _built(config)
        if wrong := _misfit(state, built.state_dict()):
            other = f"{config.network.get('arch', 'spem.resnet')}, rebuilt, is another network"
            remedy = "Pass arch= and options= as it was built, and change it by spem.attach alone."
            raise ValueError(f"{other}: {wrong}. {remedy}")
        built.load_state_dict(state)
        outputs = _compared(model, built)
        if config.network["kind"] == "torchvision" and [t.dim() for t in outputs] == [2]:
            # The number of outputs, which the network itself does not store.
            config.network["options"]["num_classes"] = outputs[0].shape[1]
            config = dataclasses.replace(config)  # checks the names of classes
        written = json.dumps(asdict(config), indent=2)
        _read(_Config, json.loads(written), CONFIG)  # what could not be read is not written
        card = _card(model, config, _measured(results), license, repo_id)
    except ValueError as error:
        raise ValueError(f"save_pretrained: {error}") from error
    there = [folder / name for name in FILES if os.path.lexists(folder / name)]
    if there and not is_shared(folder):
        strange = f"{there[0]} is there and was not written by save_pretrained"
        raise ValueError(f"save_pretrained: {strange}. Name another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    # The config last: a folder that has one is complete.
    write_atomic(folder / WEIGHTS, content)
    write_atomic(folder / CARD, card.encode())
    write_atomic(folder / CONFIG, written.encode() + b"\n")
    return folder


def is_shared(folder: Path) -> bool:
    """Whether `save_pretrained` wrote it: a run has a config.json too, of other fields."""
    try:
        config = json.loads(read_regular(folder / CONFIG))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and config.get("library_name") == "spem"


def _described(
    model: nn.Module, arch: str | None, options: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The network as plain values, without attached attention."""
    if isinstance(model, ResNet):
        if arch is not None or options:
            raise ValueError("a network of spem.resnet has no arch= and options=.")
        spec = spec_text(model.spec)
        return asdict(_Ours("spem.resnet", model.depth, model.classes, spec, model.block))
    if arch is None:
        remedy = "Pass arch=, its name in timm or torchvision, such as 'torchvision:resnet50'."
        raise ValueError(f"{type(model).__name__} does not say what it is called. {remedy}")
    library, name = library_of(arch, "arch")
    given: dict[str, Any] = {}
    if library == "timm":  # whose networks show some of their options
        found = {option: getattr(model, option, None) for option in ("num_classes", "in_chans")}
        given = {option: value for option, value in found.items() if isinstance(value, int)}
        for owner in (getattr(model, "head", None), model):
            pool = getattr(owner, "global_pool", None)
            kind = getattr(pool, "pool_type", pool)
            given |= {"global_pool": kind} if isinstance(kind, str) else {}
    return {"kind": library, "arch": name, "options": given | dict(options or {})}


# ---- the network of a config


def _built(config: _Config) -> nn.Module:
    """The network of a config with random weights; only constructors of ours and packages run."""
    host = config.host
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # Weights that do not go over into attention come from the file.
        warnings.filterwarnings("ignore", message="attach: the weights of")
        if isinstance(host, _Ours):
            block: Any = host.block
            model = resnet(host.depth, host.classes, attention=host.attention, block=block).eval()
        else:
            model = build(f"{host.kind}:{host.arch}", host.options, asker="network")
        for call in config.attach:
            arguments: dict[str, Any] = vars(call) | {"where": None}
            try:
                part = model.get_submodule(arguments.pop("part"))
            except AttributeError as error:
                raise ValueError(f"attach: the network has no part {call.part!r}.") from error
            attach(part, **arguments)
        return model.to(getattr(torch, config.dtype))


def _misfit(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str | None:
    """How a file's tensors differ from those that a network needs; None if they do not."""
    lacking, beside = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    for names, what in ((lacking, "lack"), (beside, "also hold, and the network lacks,")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            return f"the weights {what} {names[0]!r}{more}"
    for name, own in wanted.items():
        one = found[name]
        if one.shape != own.shape:
            return f"{name!r} has the shape {list(one.shape)}, the network's is {list(own.shape)}"
        if one.dtype != own.dtype:
            return f"{name!r} has the dtype {one.dtype}, the network's is {own.dtype}"
    return None


def _too_large(state: Mapping[str, Tensor], config: _Config) -> str | None:
    """How weights differ from those of a config, checked before allocating memory for its network.

    What cannot be built on the meta device is left to the real build, if its host has a sane size.
    """
    # Every layer counted in a depth has a tensor.
    if isinstance(config.host, _Ours) and config.host.depth > len(state):
        return f"depth={config.host.depth} is too large for {len(state)} tensors"
    total = sum(tensor.numel() for tensor in state.values())
    for each in (config, dataclasses.replace(config, attach=())):
        with suppress(Exception), torch.device("meta"):
            model = _built(each)
            if each is config:
                return _misfit(true_keys(model, state), model.state_dict())
            needed = sum(tensor.numel() for tensor in model.state_dict().values())
            if needed > 2 * total:
                return f"the network without attention has {needed:,} numbers, the file {total:,}"
    return None


def _compared(model: nn.Module, again: nn.Module) -> list[Tensor]:
    """The outputs of a network on one random input; ValueError unless the other gives the same.

    Copies of both run in float64, with scales raised that would hide what they multiply.
    """
    shape = next((c.input_shape for part, c in remembered(model) if not part), None)
    if shape is None:
        shape = (1, 3, 32, 32) if isinstance(model, ResNet) else default_input(model)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((1, *shape[1:]), generator=generator, dtype=torch.float64)
    outputs: list[list[Tensor]] = []
    for network in (model, again):
        twin = copy.deepcopy(network).to("cpu", torch.float64).eval()
        with (
            rephrased(f"the network does not run on an input {list(x.shape)}, to compare outputs"),
            torch.no_grad(),
            use_impl("reference"),
        ):
            open_scales(twin)
            outputs.append(tensors(twin(x)))
    found = difference(x.shape, *outputs)
    if math.isnan(found.largest):
        raise ValueError("the network's outputs are not finite numbers. Look at its weights.")
    if found.relative > 1e-9:  # rounding in float64 is less
        said = "the network, rebuilt with the same weights, computes other outputs"
        raise ValueError(f"{said}: pass options= as it was built, and change it by attach alone.")
    return outputs[0]


@torch.no_grad()
def open_scales(model: nn.Module) -> None:
    """Set scales near zero to 0.5, so that outputs show what they multiply."""
    for module in model.modules():
        if isinstance(module, IdentityStart):
            module.alpha.fill_(0.5)
        if not isinstance(module, ChannelAttention):
            for name, own in module.named_parameters(recurse=False):
                if name != "bias" and own.dim() == 1 and own.numel() and own.abs().max() < 0.1:
                    own.fill_(0.5)


# ---- reading


def from_pretrained(
    repo_or_folder: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> nn.Module:
    """The network that `save_pretrained` or `push_to_hub` wrote, in evaluation mode on the CPU.

    Args:
        repo_or_folder: A folder, or the id of a repository on the hub, ``owner/name``.
        revision: Branch, tag or commit of the repository; only a commit never changes.
        token: For private repositories; None takes that of `hf auth login`.
        cache_dir: Where fetched files are kept; None is the hub's default.
        local_files_only: Fetch nothing; use files fetched earlier.

    Raises:
        FileNotFoundError: No such folder and no such id, or a file is missing.
        ValueError: The config has another layout, or the weights do not belong to it.
        OSError: The repository cannot be fetched.
        ImportError: An extra is missing.
    """
    if Path(repo_or_folder).is_dir():
        return read_shared(repo_or_folder).model
    if _ID.fullmatch(str(repo_or_folder)) is None:
        said = f"{repo_or_folder} is neither a folder nor the id of a repository (owner/name)"
        raise FileNotFoundError(f"from_pretrained: {said}.")
    hub = require("huggingface_hub", extra="hub", purpose="from_pretrained")
    said = f"from_pretrained: there is no folder {repo_or_folder}, and the repository of this name"
    remedy = "Check the name and the connection, or name a folder."
    with rephrased(f"{said} cannot be fetched", remedy, kind=OSError):
        folder = hub.snapshot_download(
            str(repo_or_folder),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=[CONFIG, WEIGHTS],
            library_name="spem",
        )
    return read_shared(folder).model


def read_shared(folder: str | Path) -> Shared:
    """The network of a folder, with its images and classes. Raises as `from_pretrained` does."""
    asker, folder = f"from_pretrained: {folder}", Path(folder)
    safetensors = require("safetensors.torch", extra="hub", purpose="from_pretrained")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            remedy = "Use a folder that save_pretrained wrote."
            raise FileNotFoundError(f"{asker} holds no {name}. {remedy}")
    content = read_regular(folder / WEIGHTS)
    try:
        with rephrased(f"{CONFIG} is not JSON", "Fetch it again."):
            values = json.loads(read_regular(folder / CONFIG))
        schema = values.get("schema") if isinstance(values, dict) else None
        if schema != SCHEMA:
            said = f"{CONFIG} is of layout {schema!r}, this version of spem reads {SCHEMA}"
            raise ValueError(f"{said}. Use the version that wrote it, or write it again with this.")
        config: _Config = _read(_Config, values, CONFIG)
        if hashlib.sha256(content).hexdigest() != config.weights_sha256:
            said = f"the SHA-256 of {WEIGHTS} is not the one in {CONFIG}"
            raise ValueError(f"{said}; it is damaged or of another network. Fetch it again.")
        with rephrased(f"{WEIGHTS} is not a safetensors file"):
            state: dict[str, Tensor] = safetensors.load(content)
        wrong, model = _too_large(state, config), nn.Module()
        if not wrong:
            with rephrased(f"{CONFIG} describes no network that can be built"):
                model = _built(config)
            state = true_keys(model, state)
            wrong = _misfit(state, model.state_dict())
        if wrong:
            remedy = "Weights and config belong to different networks; fetch both again."
            raise ValueError(f"{wrong}. {remedy}")
    except ValueError as error:
        raise ValueError(f"{asker}: {error}") from error
    model.load_state_dict(state)
    return Shared(model, config.images, config.classes)


# ---- the hub


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Weights, config and card written by spem",
    **describing: Any,
) -> str:
    """Write a network as `save_pretrained` does, upload it to the hub, return the commit's URL.

    Args:
        repo_id: ``owner/name``; created if missing.
        private: Whether a new repository is private; None is the owner's default.
        token: With write access; None takes that of `hf auth login`.
        revision: The branch; None is the default branch.
        create_pr: Open a pull request instead of committing to the branch.
        describing: Further arguments of `save_pretrained`, whose errors are raised too.

    Raises:
        OSError: The hub refuses or cannot be reached.
    """
    check_id(repo_id, "push_to_hub")
    hub = require("huggingface_hub", extra="hub", purpose="push_to_hub")
    api = hub.HfApi(token=token, library_name="spem")
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, repo_id=repo_id, **describing)
        remedy = "Look at your connection, and log in with `hf auth login` to write there."
        with rephrased(f"push_to_hub: cannot write to {repo_id}", remedy, kind=OSError):
            api.whoami()  # fails at once; other calls retry for half a minute
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
            )
    return str(commit.commit_url)


def check_id(repo_id: str, asker: str) -> None:
    """Raise ValueError unless this is a repository id."""
    if _ID.fullmatch(repo_id) is None:
        raise ValueError(f"{asker}: {repo_id!r} is not the id of a repository. Write owner/name.")


# ---- the card


@dataclass(frozen=True)
class _Measured:
    """One measured number; accuracies are in percent."""

    dataset: str
    metric: str
    value: float
    split: str = "test"
    note: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.value, bool) or not math.isfinite(self.value):
            raise ValueError(f"a result's value={self.value!r} is not a number.")


def _measured(results: Results) -> list[_Measured]:
    """Results in any of the forms that `save_pretrained` takes."""
    if isinstance(results, (str, Path)):
        return [_of_run(Path(results))]
    tables = [results] if isinstance(results, Mapping) else results or []
    return [_read(_Measured, dict(table), "a result") for table in tables]


def _of_run(folder: Path) -> _Measured:
    """The accuracy after the last epoch of a finished run."""
    path = folder / "result.json"
    if not path.is_file():
        said = f"{folder} holds no result.json, so its run has not finished"
        raise ValueError(f"{said}. Finish it, or leave results out.")
    run = load_json(path, remedy="Delete it and run the same training again.")
    if "accuracy" not in run:
        raise ValueError(f"{path} holds no accuracy. Has the run failed?")
    note = (
        f"after the last of {run['epochs']} epochs, seed {run['seed']}, run {run['id']}, "
        f"SHA-256 of the decoded test images {run['test_sha256']}, on {run['hardware']}"
    )
    note += f", commit {run['commit']}" if run.get("commit") else ""
    # A folder's path is private, and its name does not make it the known set of that name.
    name = known_name(run["dataset"]) or f"{Path(run['dataset']).name} (a folder of the author's)"
    return _Measured(name, "accuracy", run["accuracy"], note=note)


def _card(
    model: nn.Module,
    config: _Config,
    results: Sequence[_Measured],
    license: str | None,
    repo_id: str | None,
) -> str:
    """The text of `README.md`."""
    hub = require("huggingface_hub", extra="hub", purpose="save_pretrained")
    host, images, task = config.host, config.images, "image-classification"
    found = [config.network.get("attention", "none"), *(call.attention for call in config.attach)]
    specs = [text for text in dict.fromkeys(found) if text != "none"]
    names = list(dict.fromkeys(spec.partition("(")[0] for spec in specs))
    if isinstance(host, _Ours):
        arch, extras = f"resnet{host.depth}", "hub"
        what = f"CIFAR ResNet of depth {host.depth} ({host.block} blocks), {host.classes} classes."
    else:
        starts = " and ".join(sorted({call.start for call in config.attach}))
        how = f", attention attached with start={starts}" if starts else ""
        arch, extras, what = host.arch, "hub,timm", f"{host.kind}'s {host.arch}{how}."
    title = " + ".join([arch, *specs])
    stated = [
        hub.EvalResult(
            task_type=task,
            dataset_type=HUB_IDS.get(r.dataset, r.dataset),
            dataset_name=r.dataset,
            dataset_split=r.split,
            metric_type=r.metric,
            metric_value=r.value,
        )
        for r in results
    ]
    data = hub.ModelCardData(
        library_name="spem",
        pipeline_tag=task,
        license=license,
        tags=["spem", "channel-attention", task, "pytorch", *names],
        datasets=list(dict.fromkeys(r.dataset_type for r in stated if "/" in r.dataset_type))
        or None,
        metrics=list(dict.fromkeys(r.metric for r in results)) or None,
        model_name=title if results else None,
        eval_results=stated or None,
    )
    total, own = sum(p.numel() for p in model.parameters()), attention_parameters(model)
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {title}",
        f"{what} Attention: `{', '.join(specs) or 'none'}`. {total:,} parameters, {own:,} of them "
        f"attention's; {config.dtype}.",
        "## Load",
        f"```python\nimport spem\n\nmodel = spem.from_pretrained("
        f"{json.dumps(repo_id or 'path/to/this/folder')})  # in evaluation mode, on the CPU\n```",
        f"Nothing in the folder is executed: the weights are safetensors, the config is JSON. "
        f'Install, from a checkout of spem: `pip install ".[{extras}]"`.',
    ]
    if images is not None:
        size = f" of {images.size}x{images.size} pixels" if images.size else ""
        how = f"with mean {list(images.mean)} and std {list(images.std)}"
        parts.append(f"Images{size}, red, green and blue, as (pixels / 255 - mean) / std {how}.")
    rows = ["| on | metric | value | how |", "|---|---|---|---|"]
    for r in results:
        cells = (f"{r.dataset}, {r.split}", r.metric, f"{r.value:.6g}", r.note or "-")
        plain = (" ".join(cell.split()).replace("|", "\\|") for cell in cells)
        rows.append(f"| {' | '.join(plain)} |")
    measured = ["Measured; accuracies in percent.", "\n".join(rows)]
    parts += ["## Results", *(measured if results else ["No results are stated."])]
    if names:
        formulas = (f"`{name}`:\n\n```text\n{formula(name)}\n```" for name in names)
        cited = "\n".join(bibtex(name) for name in names if attention_class(name).paper)
        parts += ["## Attention", *formulas, "## Citation", f"```bibtex\n{cited}\n```"]
    return "\n\n".join(parts) + "\n"


def formula(name: str) -> str:
    """The formula in the docstring of a registered attention, else the docstring's first line."""
    text = inspect.getdoc(attention_class(name)) or ""
    found = re.search(r"^Formula:\n((?:    .*\n|\n)+)", text + "\n", re.MULTILINE)
    return text.partition("\n")[0] if found is None else inspect.cleandoc(found[1])
