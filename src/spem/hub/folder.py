"""The folder that is shared: `model.safetensors`, `config.json` and the card, `README.md`."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spem.extras import require
from spem.hub.card import card
from spem.hub.fields import fields, sequence
from spem.hub.measured import Results, measured
from spem.hub.network import checked, describe, dtype_of, misfit, rebuild
from spem.hub.remote import fetch
from spem.hub.sameness import same_outputs
from spem.hub.sizes import misfit_of

SCHEMA = 1
"""Number of the layout of `config.json`; a change of meaning of a field raises it."""
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
FILES = (CARD, CONFIG, WEIGHTS)
_NONE = type(None)
_CONFIG = {
    "schema": (int,),
    "library_name": (str,),
    "version": (str,),
    "network": (dict,),
    "attach": (list,),
    "dtype": (str,),
    "images": (dict, _NONE),
    "classes": (list, _NONE),
    "weights_sha256": (str,),
}
_IMAGES = {"size": (int, _NONE), "mean": (list,), "std": (list,)}
_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Images:
    """How images are brought to a network: (pixels / 255 - mean) / std.

    Attributes:
        size: Height and width it was trained on, in pixels; None if it is not told.
        mean: Of red, green and blue, on the scale 0 to 1.
        std: Deviation of the same.
    """

    size: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Shared:
    """What a shared folder holds: the network, in evaluation mode, and what it takes and says."""

    model: nn.Module
    images: Images | None
    classes: tuple[str, ...] | None


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
    """Writes a network into a folder from which `from_pretrained` makes it again.

    The folder gets ``model.safetensors``, ``config.json`` (architecture, attention, arguments of
    `spem.attach`) and a model card, ``README.md``, which states measured results only. Before
    anything is written, the network is built from that config and compared: tensor by tensor, then
    by the outputs of both for one random input.

    Args:
        model: A network of `spem.resnet`, or one of timm or torchvision, with or without attached
            attention.
        folder: Is made if it is not there; what an earlier call wrote is replaced.
        results: What was measured, for the card: the folder of a finished run, or tables with
            ``dataset``, ``metric``, ``value`` and, if wished, ``split`` and ``note``.
        arch: The architecture, such as ``"torchvision:resnet50"``; timm's networks say it.
        options: What the architecture was built with, such as ``{"num_classes": 10}``
            (`spem.insert.architectures.OPTIONS`).
        images: ``size``, ``mean`` and ``std`` of the images it was trained on; timm's networks
            say it.
        classes: Names of the classes in the order of the outputs.
        license: Of the weights, as the hub spells it, such as ``"apache-2.0"``.
        repo_id: Where it will be found, for the card's example.

    Returns:
        The folder.

    Raises:
        ValueError: The network cannot be made from a config, is of several dtypes, a result is no
            number, or the folder holds files of these names that another program wrote.
        ImportError: An extra is missing; the message ends in the line that installs it.
    """
    from spem import __version__
    from spem.training.checkpoint import write_atomic

    asker = "save_pretrained"
    safetensors = require("safetensors.torch", extra="hub", purpose=asker)
    network, calls = describe(model, arch, options, asker=asker)
    dtype = dtype_of(model, asker=asker)
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    built = _built(network, calls, dtype, asker)
    wrong = misfit(tensors, built.state_dict())
    if wrong is not None:
        what = network.get("arch", "spem.resnet")
        raise ValueError(
            f"{asker}: {what}, built anew, is another network: {wrong}. "
            f"Pass arch= and options= as it was built, and change it by spem.attach alone."
        )
    built.load_state_dict(tensors)
    outputs = same_outputs(model, built, asker=asker)
    count = outputs[0].shape[1] if len(outputs) == 1 and outputs[0].dim() == 2 else None
    if network["kind"] == "torchvision" and count is not None:
        network["options"]["num_classes"] = count  # which the network itself does not tell
    content: bytes = safetensors.save(tensors, {"format": "pt"})
    config = {
        "schema": SCHEMA,
        "library_name": "spem",
        "version": __version__,
        "network": network,
        "attach": calls,
        "dtype": next(name for name, known in _DTYPES.items() if known == dtype),
        "images": _images_of(model) if images is None else dict(images),
        "classes": None if classes is None else list(classes),
        "weights_sha256": hashlib.sha256(content).hexdigest(),
    }
    _check(asker, config)
    text = card(model, config, measured(results), license=license, repo_id=repo_id)
    folder = Path(folder)
    _refuse_foreign(folder, asker)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / WEIGHTS, content)
    write_atomic(folder / CARD, text.encode())
    write_atomic(folder / CONFIG, json.dumps(config, indent=2).encode() + b"\n")
    return folder


def from_pretrained(
    repo_or_folder: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> nn.Module:
    """The network that `save_pretrained` or `push_to_hub` wrote, in evaluation mode on the CPU.

    Nothing in the folder is executed: weights are read from safetensors alone, the config from
    JSON with every field checked, and the network is built by this library, timm or torchvision.

    Args:
        repo_or_folder: A folder, or the id of a repository on the hub, ``owner/name``.
        revision: Branch, tag or commit of the repository; a commit is the only one that does not
            change.
        token: For private repositories; None takes that of `hf auth login`.
        cache_dir: Where fetched files lie; None is the hub's usual place.
        local_files_only: Fetch nothing; use what was fetched before.

    Raises:
        FileNotFoundError: No such folder and no such id, or a file is missing.
        ValueError: The config is of another layout, or the weights do not belong to it.
        OSError: The repository cannot be fetched.
        ImportError: An extra is missing; the message ends in the line that installs it.
    """
    folder = Path(repo_or_folder)
    if not folder.is_dir():
        folder = fetch(
            str(repo_or_folder),
            [CONFIG, WEIGHTS],
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
    return read_shared(folder).model


def read_shared(folder: str | Path) -> Shared:
    """The network of a folder with what is known of its images and classes.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: As for `from_pretrained`.
    """
    folder = Path(folder)
    asker = f"from_pretrained: {folder}"
    safetensors = require("safetensors.torch", extra="hub", purpose="from_pretrained")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{asker} holds no {name}. Use a folder that save_pretrained wrote."
            )
    config = _read_config(folder / CONFIG, asker)
    content = (folder / WEIGHTS).read_bytes()
    if hashlib.sha256(content).hexdigest() != config["weights_sha256"]:
        raise ValueError(
            f"{asker}: the SHA-256 of {WEIGHTS} is not the one in {CONFIG}; it is damaged or of "
            f"another network. Fetch it again."
        )
    try:
        tensors: dict[str, Tensor] = safetensors.load(content)
    except Exception as error:  # safetensors has its own exception types for broken files
        raise ValueError(f"{asker}: {WEIGHTS} is no safetensors file ({error}).") from error
    network, calls, dtype = config["network"], config["attach"], _DTYPES[config["dtype"]]
    with torch.random.fork_rng(devices=[]):
        wrong = misfit_of(tensors, network, calls, dtype, subject=asker)
    _refuse_misfit(wrong, asker)
    model = _built(network, calls, dtype, asker)
    _refuse_misfit(misfit(tensors, model.state_dict()), asker)
    model.load_state_dict(tensors)
    images = config["images"]
    return Shared(
        model,
        None if images is None else Images(images["size"], *_mean_std(asker, images)),
        None if config["classes"] is None else tuple(config["classes"]),
    )


def _refuse_foreign(folder: Path, asker: str) -> None:
    """Raises ValueError where a file would be replaced that `save_pretrained` did not write."""
    there = [name for name in FILES if (folder / name).exists()]
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        config = None
    ours = isinstance(config, dict) and config.get("library_name") == "spem"
    if there and not ours:
        raise ValueError(
            f"{asker}: {folder / there[0]} is there and was not written by save_pretrained. "
            f"Name another folder."
        )


def _refuse_misfit(wrong: str | None, asker: str) -> None:
    if wrong is not None:
        raise ValueError(
            f"{asker}: {wrong}. Weights and config belong to different networks; fetch both again."
        )


def _read_config(path: Path, asker: str) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{asker}: {path.name} is no JSON ({error}). Fetch it again.") from error
    schema = config.get("schema") if isinstance(config, dict) else None
    if schema != SCHEMA:
        raise ValueError(
            f"{asker}: {path.name} is of layout {schema!r}, this version of spem reads {SCHEMA}. "
            f"Use the version that wrote it, or write it anew with save_pretrained."
        )
    config = fields(f"{asker}: {path.name}", config, _CONFIG)
    _check(asker, config)
    return config


def _check(asker: str, config: dict[str, Any]) -> None:
    """Checks what a config says beside the network."""
    if config["dtype"] not in _DTYPES:
        raise ValueError(
            f"{asker}: dtype={config['dtype']!r} is unknown. Known: {', '.join(_DTYPES)}."
        )
    if config["images"] is not None:
        images = fields(f"{asker}: images", config["images"], _IMAGES)
        mean, std = _mean_std(asker, images)
        size = images["size"]
        finite = all(math.isfinite(value) for value in (*mean, *std))
        paired = finite and len(mean) == len(std) and min(std, default=0) > 0
        if not paired or (size is not None and size < 1):
            raise ValueError(f"{asker}: images={images!r} is no size with means and deviations.")
    classes = sequence(asker, "classes", config["classes"], str)
    kind, given = checked(config["network"], subject=asker)
    count = given["classes"] if kind == "spem.resnet" else given["options"].get("num_classes")
    if classes is not None and count is not None and len(classes) != count:
        raise ValueError(
            f"{asker}: {len(classes)} names of classes for {count} outputs. Name each of them."
        )


def _mean_std(asker: str, images: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    mean = sequence(asker, "mean", images["mean"], float)
    std = sequence(asker, "std", images["std"], float)
    return mean or (), std or ()


def _built(network: object, calls: object, dtype: torch.dtype, subject: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # the start that weights replace draws numbers
        return rebuild(network, calls, subject=subject).to(dtype)


def _images_of(model: nn.Module) -> dict[str, Any] | None:
    """What a timm network says of the images it was trained on."""
    said = getattr(model, "pretrained_cfg", None)
    if not isinstance(said, dict) or "mean" not in said or "std" not in said:
        return None
    size = said.get("input_size")
    side = size[-1] if isinstance(size, (list, tuple)) else None
    return {"size": side, "mean": list(said["mean"]), "std": list(said["std"])}
