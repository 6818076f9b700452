"""What a measurement ran on: the columns in which every row of every table ends."""

from __future__ import annotations

import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def facts(device: torch.device) -> dict[str, str]:
    """Hardware, versions, commit and date."""
    from spem.training.environment import hardware

    threads = torch.get_num_threads()
    name = hardware(device, threads)
    if device.type == "cpu":
        name = name.rpartition(", ")[0]  # the threads have a column of their own
    return {
        "device": device.type,
        "hardware": name,
        "driver": _driver() if device.type == "cuda" else "",
        "threads": str(threads),
        "torch": torch.__version__,
        "numba": _version("numba"),
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def machine(device: torch.device) -> str:
    """The part of a file's name that says what was measured: ``cpu``, or the GPU's name."""
    if device.type != "cuda":
        return device.type
    name = torch.cuda.get_device_name(device)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit(folder: Path | None = None) -> str:
    """The commit of this package's source, marked where the source differs from it."""
    here = folder or Path(__file__).resolve().parents[1]
    if _git(here, "ls-files", "--error-unmatch", "__init__.py") is None:
        return f"installed {_version('spem')}"  # perhaps inside somebody else's checkout
    name = _git(here, "rev-parse", "--short=12", "HEAD") or "unknown"
    return name + ("+changes" if _git(here, "status", "--porcelain", "--", ".") else "")


def _git(folder: Path, *arguments: str) -> str | None:
    return _output("git", "-C", str(folder), *arguments)


def _driver() -> str:
    found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or ""
    return found.partition("\n")[0]


def _output(*command: str) -> str | None:
    """What a command prints, None where it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
