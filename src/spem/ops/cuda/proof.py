"""The Triton kernels prove themselves on a device before they are used there unasked.

Whole tails, forward and backward, are compared with composed modules in float64 on the CPU: small
random maps with ties, in both layouts, float32 and bfloat16. The verdict on a kind of device, for
these kernels, this torch and this Triton, is kept in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from torch import Tensor, nn

from spem.extras import first_line
from spem.ops.stats import PlaneStats
from spem.ops.tail import bn_gate_tail

_LOG = logging.getLogger("spem.ops")
# In one plane; cut into parts that are merged, by loops; many channels.
_SHAPES = ((2, 5, 7, 7), (1, 3, 56, 56), (2, 33, 16, 16))
_LAYOUTS = (torch.contiguous_format, torch.channels_last)
# Against the largest value: as far as composed modules themselves are from float64, and a half.
_TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 3e-2}
_known: dict[str, str] = {}
_running = threading.RLock()


def objection(device: torch.device) -> str | None:
    """Why the kernels are not used on a device; None where they compute what they should.

    Compares on the first call unless the verdict is on disk; an error counts for this process only.
    """
    key = _key(device)
    with _running:
        if key not in _known:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return "kernels have not been tried on this device before the capture of a graph"
            verdict = _stored().get(key)
            _known[key] = _prove(device, key) if verdict is None else verdict
        return _known[key] or None


def _prove(device: torch.device, key: str) -> str:
    start = time.perf_counter()
    try:
        verdict = difference(device)
    except Exception as error:  # noqa: BLE001  # of a driver, a compiler, a device without memory
        reason = f"kernels failed on this device: {type(error).__name__}: {first_line(error)}"
        _LOG.warning("Triton %s; tails are composed", reason)
        return reason
    _keep(key, verdict)
    if verdict:
        _LOG.warning("Triton %s; tails are composed", verdict)
    else:
        seconds = time.perf_counter() - start
        _LOG.info("Triton kernels compute what they should on %s (tried in %.1f s)", key, seconds)
    return verdict


def difference(device: torch.device) -> str:
    """What the kernels compute wrongly on a device; an empty string if nothing."""
    with torch.inference_mode(False), torch.enable_grad():
        for dtype, layout, shape in _cases():
            found = _tail(shape, dtype, layout, device, "triton")
            for name, expected in _tail(shape, dtype, layout, torch.device("cpu"), None).items():
                wrong = (found[name].double().cpu() - expected).abs().max()
                scale = float(expected.abs().max()) + 1e-3
                if not float(wrong) <= _TOLERANCE[dtype] * scale:  # a NaN is wrong, too
                    kind = str(dtype).removeprefix("torch.")
                    return (
                        f"kernels differ from the reference: {name} by {float(wrong) / scale:.2g} "
                        f"({kind}, {list(shape)}, {str(layout).removeprefix('torch.')})"
                    )
    return ""


def _cases() -> Iterator[tuple[torch.dtype, torch.memory_format, tuple[int, ...]]]:
    for layout in _LAYOUTS:
        for shape in _SHAPES:
            yield torch.float32, layout, shape
        yield torch.bfloat16, layout, _SHAPES[1]


def _gate(stats: PlaneStats) -> Tensor:
    mean, var, high, low = (s for s in stats[:4] if s is not None)
    return torch.sigmoid(mean + 0.5 * var) + torch.tanh(0.3 * high + 0.2 * low)


def _tail(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: torch.memory_format,
    device: torch.device,
    impl: str | None,
) -> dict[str, Tensor]:
    """Results and gradients of one tail; ``impl`` None is the reference in float64."""
    rng = torch.Generator().manual_seed(len(shape) * shape[1])

    def drawn(*size: int) -> Tensor:
        # Halves: exact in every dtype, with extrema that tie and values that ReLU sets to zero.
        return (2 * torch.randn(size, generator=rng)).round() / 2

    kind = torch.float64 if impl is None else dtype
    channels = shape[1]
    z, r, g = (drawn(*shape).to(device, kind).contiguous(memory_format=layout) for _ in range(3))
    wide = torch.promote_types(kind, torch.float32)
    norm = nn.BatchNorm2d(channels, device=device, dtype=wide)
    with torch.no_grad():
        norm.weight.copy_(drawn(channels) + 0.25)
        norm.weight[-1] = 0.0
        norm.bias.copy_(drawn(channels))
    z.requires_grad_()
    r.requires_grad_()
    y = bn_gate_tail(z, r, norm, _gate, impl=impl or "reference")
    inputs = (z, r, norm.weight, norm.bias)
    gradients = torch.autograd.grad(y, inputs, g)
    names = ("dz", "dr", "dgamma", "dbeta")
    return {"y": y.detach(), **dict(zip(names, gradients, strict=True))}


def _key(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return f"{name}, torch {torch.__version__}, triton {triton.__version__}, kernels {_SOURCES}"


_TEXTS = [file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))]
_SOURCES = hashlib.sha256(b"".join(_TEXTS)).hexdigest()[:12]  # kernels, and how they are launched


def _file() -> Path:
    """Where verdicts are kept; XDG_CACHE_HOME, or the cache folder of the system."""
    home = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    if home is None:
        home = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return Path(home) / "spem" / "kernels.json"


def _stored() -> dict[str, str]:
    """The verdicts on disk; nothing where they cannot be read."""
    try:
        found = json.loads(_file().read_text())
    except (OSError, ValueError, RuntimeError):  # RuntimeError: no home
        return {}
    return {k: v for k, v in found.items() if isinstance(v, str)} if isinstance(found, dict) else {}


def _keep(key: str, verdict: str) -> None:
    """Adds a verdict to those on disk, if there is a place for it."""
    try:
        file = _file()
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_name(f"{file.name}.{os.getpid()}")
        fresh.write_text(json.dumps(_stored() | {key: verdict}, indent=2))
        fresh.replace(file)
    except (OSError, RuntimeError) as reason:
        _LOG.debug("the verdict on the Triton kernels is not kept on disk: %s", reason)
