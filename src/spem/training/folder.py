"""The files of a run. Damaged ones are refused; only tensors and plain values are unpickled."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import socket
from collections.abc import Generator, Iterable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from spem.extras import rephrased, require
from spem.files import (
    canonical_json,
    damaged,
    load_json,
    read_regular,
    require_regular,
    save_json,
    write_atomic,
)
from spem.insert import attach
from spem.models import ResNet, resnet
from spem.training.config import SCHEMA, RunConfig, RuntimeConfig

CONFIG = "config.json"  # what was requested, how it was run, on which data and machine
METRICS = "metrics.jsonl"  # one line per epoch
CHECKPOINT = "checkpoint.pt"  # the latest state; deleted when the run finishes
WEIGHTS = "model.safetensors"
RESULT = "result.json"  # written last, with the SHA-256 of each remaining file: the run is finished
LOCK = ".lock"  # held by the process that trains
FILES = (CONFIG, METRICS, CHECKPOINT, WEIGHTS, RESULT, LOCK)
_LEFTOVER = re.compile(rf"\.({'|'.join(map(re.escape, FILES))})\.[0-9a-f]{{8}}\.tmp")
"""Left by a process that was killed while writing (`spem.files.write_atomic`)."""

_MAGIC = b"SPEM-SHA256:"
_FOOTER = len(_MAGIC) + 32
_AGAIN = "Delete the folder to train the run again."
_OTHER = "{} does not fit this version of spem"  # a whole file, written by another one

T = TypeVar("T")
dacite = require("dacite", extra="train", purpose="training")


def _build(kind: type[T], values: Any) -> T:
    """Build a dataclass of this module from JSON; errors of any kind if the values do not fit."""
    rules = dacite.Config(cast=[tuple], type_hooks={RunConfig: RunConfig.from_dict})
    return dacite.from_dict(kind, values, rules)


class HeldError(RuntimeError):
    """Another process is training in the run folder."""


@dataclass(frozen=True)
class DataIdentity:
    """The data of a network: class names by label and `ImageSet.sha256` of the images.

    The name is only a label; shared weights keep just the last part of a path.
    """

    name: str
    classes: tuple[str, ...]
    train_sha256: str
    test_sha256: str


@dataclass(frozen=True)
class Result:
    """Contents of `result.json`; accuracies in percent, times in seconds.

    `accuracy` and `loss` are those of the last epoch on the test set; `best_accuracy` is the test
    accuracy of `best_epoch`, selected on the set named by `best_selected_on`. `step_seconds` is the
    median over epochs of the time per training step. `commit` is the checkout that finished the run
    ("-dirty" if modified), at `date` (UTC). `impl` ran the tails of the blocks
    (`spem.ops.use_impl`); `step` is how steps were executed. `gates` describes each module's gate
    on the first test images (`describe_gates`); `files` has the SHA-256 of each remaining file.
    """

    id: str
    seed: int
    dataset: str
    depth: int
    attention: str
    epochs: int
    accuracy: float
    loss: float
    train_accuracy: float
    train_loss: float
    validation_accuracy: float | None
    best_accuracy: float
    best_epoch: int
    best_selected_on: str
    parameters: int
    attention_parameters: int
    flops: int
    steps: int
    train_seconds: float
    evaluation_seconds: float
    step_seconds: float
    images_per_second: float
    hardware: str
    versions: dict[str, str]
    train_sha256: str
    test_sha256: str
    commit: str | None
    date: str
    impl: str
    step: str
    gates: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    files: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Run:
    """A run folder as it was planned or read.

    `config` is what was requested, `runtime` how it runs: the device, implementation, step and
    threads resolved at planning. `starts` has date, hardware, versions and commit of each process
    that started or resumed it. `result` is None if the run is unfinished or failed, and `error` why
    it cannot finish (it diverged). `epochs` are the lines of `metrics.jsonl`.
    """

    folder: Path
    config: RunConfig
    runtime: RuntimeConfig
    data: DataIdentity
    starts: list[dict[str, Any]]
    result: Result | None = None
    error: str | None = None
    epochs: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def to_dict(self) -> dict[str, Any]:
        """Contents of `config.json`, as nested plain values."""
        parts = {name: asdict(getattr(self, name)) for name in ("config", "runtime", "data")}
        return {"schema": SCHEMA, "id": self.config.id, **parts, "starts": self.starts}

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to train."""
        return self.result is not None or self.error is not None

    def weights(self) -> Weights:
        """The trained weights; ValueError if the run is unfinished or did not write this file."""
        if self.result is None:
            why = self.error or "It has not finished: run the same training again to resume."
            raise ValueError(f"{self.folder}: the run has no trained weights. {why}")
        _require_sum(self.folder / WEIGHTS, self.result.files)
        return read_weights(self.folder / WEIGHTS)

    def network(self) -> ResNet:
        """The trained network, in evaluation mode on the CPU; raises as `weights`."""
        return self.weights().network


@dataclass(frozen=True)
class Weights:
    """Contents of a file of weights: the network in evaluation mode on the CPU.

    `data` is None in older files, which do not record it; `impl` ran the tails of the blocks.
    """

    network: ResNet
    config: RunConfig
    data: DataIdentity | None
    impl: str | None


# ---- the folder


@contextlib.contextmanager
def held(folder: Path) -> Generator[None]:
    """Lock a run folder, created if needed, for a `with` block; HeldError if it is held.

    The operating system keeps the lock while this process lives, even suspended, and frees it when
    it ends: no other process can take over a folder that may still be written to.
    """
    filelock = require("filelock", extra="train", purpose="training")
    require_own(folder)
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / LOCK
    lock = filelock.FileLock(note)

    def say(text: str) -> None:
        if not isinstance(lock, filelock.SoftFileLock):  # there filelock itself says who holds it
            with contextlib.suppress(OSError):  # on Windows nobody may write into a locked file
                note.write_text(text)

    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        who = ""
        with contextlib.suppress(OSError, ValueError):
            who = note.read_text().strip().replace("\n", " on ", 1).partition("\n")[0]
        raise HeldError(
            f"train: {folder} is in use by {who or 'another process'}. Wait for it to end, stop "
            "it, or train into another folder."
        ) from None
    try:
        say(f"process {os.getpid()} on {socket.gethostname()} since {now()}")
        for path in folder.iterdir():
            if _LEFTOVER.fullmatch(path.name):
                path.unlink()
        yield
    finally:
        say("")
        lock.release()


def require_own(folder: Path) -> None:
    """Raise ValueError if the folder is not a run's, or one of its files is not a regular file."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"train: {folder} is a file. Name a folder for the run.")
    entries = {path.name: path for path in folder.iterdir()} if folder.exists() else {}
    for name in entries.keys() & set(FILES):
        require_regular(entries[name])
    ours = entries.keys() & {CONFIG, CHECKPOINT, RESULT}
    foreign = sorted(n for n in entries if n != LOCK and not _LEFTOVER.fullmatch(n))
    if foreign and not any(_is_ours(entries[name]) for name in ours):
        few = ", ".join(foreign[:3]) + (" ..." if len(foreign) > 3 else "")
        raise ValueError(
            f"train: {folder} holds files that are not a run's ({few}). They are left as they "
            "are; name a new folder."
        )


def _is_ours(path: Path) -> bool:
    """Whether a file looks like one that a run writes, even if damaged."""
    content = path.read_bytes()
    if path.name == CHECKPOINT:
        return _MAGIC in content[-2 * _FOOTER :]
    return b'"sha256"' in content or (path.name == CONFIG and b'"runtime"' in content)


def now() -> str:
    """UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


# ---- config.json and metrics.jsonl


def read_plan(folder: Path) -> Run | None:
    """Read `config.json`, or the checkpoint's copy if it is lost; None without both."""
    path = folder / CONFIG
    if path.exists():
        remedy = _AGAIN
        if (folder / CHECKPOINT).exists():
            remedy = "Delete it: the run resumes from its checkpoint, which holds a copy."
        elif not (folder / METRICS).exists():  # a shared network
            remedy = "Fetch the folder again, or share the network again."
        values = load_json(path, remedy=remedy)
    elif (folder / CHECKPOINT).exists():
        path = folder / CHECKPOINT
        values = load_checkpoint(path).get("plan", {})
    else:
        return None
    with rephrased(_OTHER.format(path)):
        return _build(Run, {**values, "folder": folder})


def require_same_run(stored: RunConfig, asked: RunConfig, folder: Path) -> None:
    """Raise ValueError if seed or identity differ, listing the fields that do."""
    a, b = (_flat({**config.identity, "seed": config.seed}) for config in (stored, asked))
    changed = [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
    if changed:
        fields = ", ".join(f"{name} {a.get(name)} -> {b.get(name)}" for name in changed)
        raise ValueError(f"train: {folder} belongs to another run ({fields}). Use another folder.")


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Nested values by name, such as "optim.lr"."""
    sections = {k: v if isinstance(v, dict) else {"": v} for k, v in values.items()}
    return {f"{k}.{name}".strip("."): v for k, s in sections.items() for name, v in s.items()}


def write_metrics(history: Iterable[dict[str, Any]], folder: Path) -> None:
    """Write `metrics.jsonl` atomically."""
    lines = [json.dumps(line, allow_nan=False) + "\n" for line in history]
    write_atomic(folder / METRICS, "".join(lines).encode())


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read the epochs of a run folder; raises ValueError for a damaged file."""
    path = folder / METRICS
    if not path.exists():
        return []
    content = read_regular(path)
    remedy = "Resume the run, which rewrites the file from its checkpoint."
    with rephrased(f"{path} is damaged: a line cannot be read", remedy):
        return [{**json.loads(line)} for line in content.splitlines()]


# ---- checkpoint.pt


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write tensors and plain values as `torch.save` does, followed by their SHA-256."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    write_atomic(path, payload + _MAGIC + hashlib.sha256(payload).digest())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, on the CPU; raises ValueError for a damaged file."""
    content = read_regular(path)
    payload, footer = content[:-_FOOTER], content[-_FOOTER:]
    if footer != _MAGIC + hashlib.sha256(payload).digest():
        remedy = "Delete it to train this run from the start."
        raise damaged(path, "its SHA-256 does not match", remedy)
    # The checksum matches, so what fails here was written by another program or version.
    with rephrased(f"{path} cannot be read", "Train into another folder."):
        return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)


# ---- model.safetensors


def build_network(config: RunConfig, classes: int) -> ResNet:
    """Build the network of a config, before its seeded initialisation."""
    model, spec = config.model, config.model.spec
    if model.start == "identity" and spec is not None:
        plain = resnet(model.depth, classes, block=model.block)
        attach(plain, spec, start="identity")
        return plain
    return resnet(model.depth, classes, attention=spec, block=model.block)


def start_from(model: ResNet, path: str, sha256: str | None) -> None:
    """Load weights of the same backbone, from exactly this file; head and attention keep theirs."""
    safetensors = require("safetensors.torch", extra="train", purpose="model.weights")
    content = read_regular(Path(path))
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(
            f"train: the SHA-256 of {path} is {found}, expected {sha256}. Use the file that the "
            "config means, or set model.weights_sha256 to this sum."
        )
    try:
        kept = {k: v for k, v in safetensors.load(content).items() if not k.startswith("fc.")}
        missing, other = model.load_state_dict(kept, strict=False)
        lacking = [k for k in missing if not k.startswith("fc.") and ".attention." not in k]
        if lacking or other:
            raise ValueError(f"it lacks {lacking[0]}" if lacking else f"it also holds {other[0]}")
    except Exception as error:
        reason = str(error).strip().splitlines()[-1].strip().rstrip(".")
        raise ValueError(
            f"train: {path} does not fit the network: {reason}. Use weights of the same depth and "
            "block."
        ) from error


def save_weights(
    model: ResNet,
    config: RunConfig,
    path: Path,
    *,
    data: DataIdentity | None = None,
    impl: str | None = None,
) -> None:
    """Write a network's weights as safetensors: equal weights of equal runs give equal files.

    The metadata hold the config, the data's identity, what ran the tails (`impl`), and a SHA-256
    over everything. Paths are cut to their last part, since weights are shared.
    """
    safetensors = require("safetensors.torch", extra="train", purpose="save_weights")
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    weights = config.model.weights and Path(config.model.weights).name
    published = config.to_dict()
    published["data"] |= {"root": None, "name": Path(config.data.name).name}
    published["model"]["weights"] = weights
    about = {"impl": impl, "data": data and {**asdict(data), "name": Path(data.name).name}}
    texts = {"config": canonical_json(published).decode(), "about": canonical_json(about).decode()}
    metadata = {"format": "pt", **texts, "sha256": _weights_sum(tensors, texts)}
    content = safetensors.save(tensors, metadata)
    length, header = _header(content)
    header["__metadata__"] = dict(sorted(metadata.items()))  # the library's order varies
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write_atomic(Path(path), len(text).to_bytes(8, "little") + text + content[8 + length :])


def _header(content: bytes) -> tuple[int, dict[str, Any]]:
    """Length and contents of a safetensors file's header."""
    length = int.from_bytes(content[:8], "little")
    return length, json.loads(content[8 : 8 + length])


def read_weights(path: Path) -> Weights:
    """Read a file of `save_weights`; ValueError if it is damaged, or not one.

    The network gets its memory from the file, so that a crafted one takes no more.
    """
    safetensors = require("safetensors.torch", extra="train", purpose="reading weights")
    path = Path(path)
    content = read_regular(path)
    remedy = "Fetch it again, or train it again."
    with rephrased(f"{path} is damaged: it is not a complete safetensors file", remedy):
        tensors = cast("dict[str, Tensor]", safetensors.load(content))
        metadata = _header(content)[1].get("__metadata__") or {}
    texts = {name: metadata[name] for name in ("config", "about") if name in metadata}
    if "config" not in texts or "sha256" not in metadata:
        finding = "its metadata holds no config and SHA-256"
        raise damaged(path, finding, "Use a file of save_weights.")
    if metadata["sha256"] != _weights_sum(tensors, texts):
        raise damaged(path, "its SHA-256 does not match", remedy)
    with rephrased(_OTHER.format(path)):
        config = RunConfig.from_dict(json.loads(texts["config"]))
        about = json.loads(texts.get("about", "{}"))
        data = about.get("data") and _build(DataIdentity, about["data"])
        network = _fitting(config, tensors, data)
    return Weights(network.eval(), config, data, about.get("impl") or config.runtime.impl)


def _fitting(config: RunConfig, tensors: dict[str, Tensor], data: DataIdentity | None) -> ResNet:
    """The network of a config with these weights; ValueError if they do not fit."""
    head = tensors.get("fc.weight")
    if head is None or head.dim() != 2 or not 0 < head.shape[0] <= head.numel():
        raise ValueError("The weights have no classifier fc.weight.")
    if data is not None and len(data.classes) != head.shape[0]:
        raise ValueError(f"{len(data.classes)} class names for {head.shape[0]} outputs.")
    if config.model.depth > len(tensors):  # a layer has one at least; building many takes minutes
        raise ValueError(f"There are {len(tensors)} tensors for a depth of {config.model.depth}.")
    with torch.device("meta"):  # where a network of any size takes no memory
        network = build_network(config, classes=head.shape[0])
    network.load_state_dict(tensors, assign=True)
    network.float()  # assigned in the file's dtype
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise ValueError("Some weights are infinite or NaN, so the network computes nothing.")
    return network


def _weights_sum(tensors: dict[str, Tensor], texts: dict[str, str]) -> str:
    """SHA-256 over the texts and over name, dtype, shape and bytes of every tensor, by name."""
    digest = hashlib.sha256("".join(texts.values()).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# ---- result.json


def write_result(result: dict[str, Any], folder: Path) -> dict[str, str]:
    """Write `result.json`, which marks the run finished; return the sums of the remaining files.

    It holds the fields of `Result`, or id, seed and error of a run that always fails that way.
    """
    staying = (folder / name for name in (CONFIG, METRICS, WEIGHTS))
    sums = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in staying if p.exists()}
    save_json({**result, "files": sums}, folder / RESULT)
    return sums


def _require_sum(path: Path, sums: dict[str, str]) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing. {_AGAIN}")
    if sums.get(path.name) != hashlib.sha256(read_regular(path)).hexdigest():
        raise damaged(path, "it is not the file that result.json was written for", _AGAIN)


def read_result(folder: Path) -> Result | None:
    """The result of a run folder, None if the run has not finished; raises as `read_run`."""
    return read_run(folder).result


def read_run(folder: str | Path) -> Run:
    """Read a run folder, finished or not; checksums verify the files of a finished run.

    Raises:
        FileNotFoundError: the folder does not exist or holds no run.
        ValueError: a file is damaged, edited, or from another version.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder.")
    run = read_plan(folder)
    if run is None:
        raise FileNotFoundError(f"{folder}: this folder holds no run (no {CONFIG}).")
    path, result, error, sums = folder / RESULT, None, None, dict[str, str]()
    if path.exists():
        remedy = "Delete it and run the same training again."
        values = load_json(path, remedy=remedy)
        with rephrased(_OTHER.format(path), remedy):
            error, sums = values.get("error"), dict(values["files"])
            result = None if error else _build(Result, values)
    for name in sums.keys() & {CONFIG, METRICS}:
        _require_sum(folder / name, sums)
    return replace(run, result=result, error=error, epochs=read_metrics(folder))
