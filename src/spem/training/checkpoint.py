"""Files that are whole or refused: atomic writes, and a SHA-256 in each file checked on load.

Three kinds: `checkpoint.pt` (torch.save's bytes and a footer), JSON with a field "sha256", and
safetensors with the sum in the metadata. Nothing is ever unpickled beyond tensors and plain values.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from spem.attention import AttentionSpec
from spem.extras import require
from spem.models import ResNet, resnet
from spem.training.config import RunConfig, canonical_json

_MAGIC = b"SPEM-SHA256:"
_FOOTER = len(_MAGIC) + 32


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file such that a reader finds the old content or the new one, never a part.

    The content reaches the disk before the name does, and the folder's entry after it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk does not say which file it was
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write tensors and plain values as `torch.save` does, followed by their SHA-256."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    write_atomic(path, payload + _MAGIC + hashlib.sha256(payload).digest())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, on the CPU.

    Raises:
        ValueError: the file is damaged.
    """
    return unpack_checkpoint(path.read_bytes(), path)


def unpack_checkpoint(content: bytes, path: Path) -> dict[str, Any]:
    """Take apart the bytes of a file of `save_checkpoint`; the path is for messages.

    Raises:
        ValueError: the bytes are damaged.
    """
    payload, footer = content[:-_FOOTER], content[-_FOOTER:]
    if footer != _MAGIC + hashlib.sha256(payload).digest():
        raise _damaged(
            path, "its SHA-256 does not match", "Delete it to train this run from the start."
        )
    try:
        buffer = io.BytesIO(payload)
        state = torch.load(buffer, map_location="cpu", weights_only=True)
    except Exception as error:
        # The sum is right, so these bytes were written on purpose, by another program or version.
        raise _damaged(
            path, f"it cannot be read ({error})", "Train into another folder."
        ) from error
    return cast("dict[str, Any]", state)


def save_json(values: dict[str, Any], path: Path) -> None:
    """Write a table as JSON with the SHA-256 of its canonical form in the field "sha256"."""
    digest = hashlib.sha256(canonical_json(values)).hexdigest()
    text = json.dumps({**values, "sha256": digest}, indent=2, allow_nan=False)
    write_atomic(path, text.encode() + b"\n")


def load_json(path: Path, *, remedy: str) -> dict[str, Any]:
    """Read what `save_json` wrote, without the field "sha256".

    Args:
        path: the file.
        remedy: last sentence of the error: what to do when this file is damaged.

    Raises:
        ValueError: the file is damaged or was edited.
    """
    try:
        values = json.loads(path.read_bytes())
        digest = values.pop("sha256")
        whole = digest == hashlib.sha256(canonical_json(values)).hexdigest()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"it is not a table with a checksum ({error})", remedy) from error
    if not whole:
        raise _damaged(path, "its SHA-256 does not match (damaged, or edited by hand)", remedy)
    return cast("dict[str, Any]", values)


def save_answers(answers: Tensor, path: Path) -> None:
    """Write the class a network answered for each test image as a numpy array of small integers."""
    largest = int(answers.max()) if len(answers) else 0
    content = io.BytesIO()
    np.save(content, answers.numpy().astype(np.min_scalar_type(largest)), allow_pickle=False)
    write_atomic(path, content.getvalue())


def load_answers(path: Path) -> np.ndarray[Any, Any]:
    """Read what `save_answers` wrote, [n] integers.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        answers = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise _damaged(
            path, f"it is no array ({error})", "Delete the run's folder to train it again."
        ) from error
    if answers.ndim != 1 or answers.dtype.kind != "u":
        raise _damaged(path, "it is no list of classes", "Delete the run's folder to train again.")
    return answers


def save_weights(model: ResNet, config: RunConfig, path: Path) -> None:
    """Write a network's weights as safetensors, with the config and a SHA-256 in the metadata.

    Raises:
        ImportError: safetensors is not installed.
    """
    safetensors = require("safetensors.torch", extra="train", purpose="save_weights")
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    # Where the data lies and who ran it is nobody's business when the weights are passed on.
    published = config.to_dict()
    published["data"]["root"] = None
    published["data"]["name"] = Path(config.data.name).name
    text = canonical_json(published).decode()
    metadata = {"format": "pt", "config": text, "sha256": _weights_digest(tensors, text)}
    write_atomic(Path(path), safetensors.save(tensors, metadata))


def load_weights(path: Path) -> tuple[ResNet, RunConfig]:
    """Read what `save_weights` wrote: the network, in evaluation mode on the CPU, and its config.

    Raises:
        ValueError: the file is damaged or was not written by `save_weights`.
        ImportError: safetensors is not installed.
    """
    safetensors = require("safetensors.torch", extra="train", purpose="load_weights")
    path = Path(path)
    content = path.read_bytes()
    remedy = "Fetch it again, or train it anew."
    try:
        tensors = cast("dict[str, Tensor]", safetensors.load(content))
        length = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + length]).get("__metadata__") or {}
    except Exception as error:  # safetensors has its own exception types for broken files
        raise _damaged(path, f"it is not a whole safetensors file ({error})", remedy) from error
    text, digest = metadata.get("config"), metadata.get("sha256")
    if not isinstance(text, str) or not isinstance(digest, str):
        raise _damaged(
            path, "its metadata holds no config and SHA-256", "Use a file of save_weights."
        )
    if digest != _weights_digest(tensors, text):
        raise _damaged(path, "its SHA-256 does not match", remedy)
    config = RunConfig.from_dict(json.loads(text))
    model = build_model(config, classes=tensors["fc.weight"].shape[0])
    model.load_state_dict(tensors)
    return model.eval(), config


def build_model(config: RunConfig, classes: int) -> ResNet:
    """Build the network of a config, not yet initialised by its seed."""
    attention = AttentionSpec.parse(config.model.attention)
    return resnet(config.model.depth, classes, attention=attention, block=config.model.block)


def _weights_digest(tensors: dict[str, Tensor], config: str) -> str:
    """SHA-256 over the config and over name, dtype, shape and bytes of every tensor, by name."""
    digest = hashlib.sha256(config.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _damaged(path: Path, finding: str, remedy: str) -> ValueError:
    return ValueError(f"load: {path} is damaged: {finding}. {remedy}")
