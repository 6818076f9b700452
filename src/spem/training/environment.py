"""The environment of a run: versions, hardware, commit."""

from __future__ import annotations

import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def versions() -> dict[str, str]:
    """Versions of the packages that compute a result."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("spem", "numpy", "numba", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def hardware(device: torch.device, threads: int) -> str:
    """Name of the GPU, or of the processor and its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    model = re.search(r"^model name\s*:\s*(.*\S)", text, re.MULTILINE)
    name = model[1] if model else platform.processor() or platform.machine()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def commit() -> str | None:
    """Commit of this package's source, "-dirty" if changed; None if it is installed."""
    here = Path(__file__).resolve()
    quiet: Any = {"cwd": here.parent, "stderr": subprocess.DEVNULL, "text": True}
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:  # an installed package may be inside another project's checkout
        subprocess.check_output(["git", "ls-files", "--error-unmatch", here.name], **quiet)
        return subprocess.check_output(describe, **quiet).strip()
    except (OSError, subprocess.CalledProcessError):
        return None
