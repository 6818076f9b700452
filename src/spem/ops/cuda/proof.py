"""The Triton kernels prove themselves on a device before they are used there unasked.

Whole tails, forward and backward, are compared with composed modules in float64 on the CPU: small
random maps with ties, in both layouts, float32 and bfloat16. The verdict on a kind of device, for
these kernels, this torch and this Triton, is kept in Triton's cache folder, where they lie as well.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import threading
import time
from pathlib import Path

import torch
import triton
from torch import Tensor, nn
from triton.runtime.cache import get_cache_manager

from spem.extras import first_line
from spem.ops.stats import PlaneStats
from spem.ops.tail import bn_gate_tail

_LOG = logging.getLogger("spem.ops")
# In one plane; cut into parts that are merged, by loops; many channels.
_CASES = (
    (torch.float32, (2, 5, 7, 7)),
    (torch.float32, (1, 3, 56, 56)),
    (torch.float32, (2, 33, 16, 16)),
    (torch.bfloat16, (1, 3, 56, 56)),
)
_LAYOUTS = (torch.contiguous_format, torch.channels_last)
# Against the largest value: as far as composed modules themselves are from float64, and a half.
_TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 3e-2}
_FILE = "spem.txt"
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
            verdict = _stored(key)
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
    try:
        get_cache_manager(key).put(verdict, _FILE, binary=False)
    except (OSError, RuntimeError) as reason:
        _LOG.debug("the verdict on the Triton kernels is not kept on disk: %s", reason)
    if verdict:
        _LOG.warning("Triton %s; tails are composed", verdict)
    else:
        seconds = time.perf_counter() - start
        _LOG.info("Triton kernels compute what they should (%s, tried in %.1f s)", device, seconds)
    return verdict


def difference(device: torch.device) -> str:
    """What the kernels compute wrongly on a device; an empty string if nothing."""
    with torch.inference_mode(False), torch.enable_grad():
        for layout, (dtype, shape) in itertools.product(_LAYOUTS, _CASES):
            found = _tail(shape, dtype, layout, device, "triton")
            expected = _tail(shape, torch.float64, layout, torch.device("cpu"), "reference")
            for name, exact in expected.items():
                wrong = (found[name].double().cpu() - exact).abs().max()
                scale = float(exact.abs().max()) + 1e-3
                if not float(wrong) <= _TOLERANCE[dtype] * scale:  # a NaN is wrong, too
                    kind = str(dtype).removeprefix("torch.")
                    return (
                        f"kernels differ from the reference: {name} by {float(wrong) / scale:.2g} "
                        f"({kind}, {list(shape)}, {str(layout).removeprefix('torch.')})"
                    )
    return ""


def _gate(stats: PlaneStats) -> Tensor:
    mean, var, high, low = (s for s in stats[:4] if s is not None)
    return torch.sigmoid(mean + 0.5 * var) + torch.tanh(0.3 * high + 0.2 * low)


def _tail(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: torch.memory_format,
    device: torch.device,
    impl: str,
) -> dict[str, Tensor]:
    """Results and gradients of one tail."""
    rng = torch.Generator("cpu").manual_seed(len(shape) * shape[1])

    def drawn(*size: int) -> Tensor:
        # Halves: exact in every dtype, with extrema that tie and values that ReLU sets to zero.
        x = torch.randn(size, generator=rng, dtype=torch.float32, device="cpu")
        return (2 * x).round() / 2

    channels = shape[1]
    z, r, g = (drawn(*shape).to(device, dtype).contiguous(memory_format=layout) for _ in range(3))
    wide = torch.promote_types(dtype, torch.float32)
    norm = nn.BatchNorm2d(channels, device=device, dtype=wide)
    with torch.no_grad():
        norm.weight.copy_(drawn(channels) + 0.25)
        norm.weight[-1] = 0.0
        norm.bias.copy_(drawn(channels))
    inputs = (z.requires_grad_(), r.requires_grad_(), norm.weight, norm.bias)
    y = bn_gate_tail(z, r, norm, _gate, impl=impl)
    gradients = torch.autograd.grad(y, inputs, g)
    return dict(zip(("y", "dz", "dr", "dgamma", "dbeta"), (y.detach(), *gradients), strict=True))


_TEXTS = [file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))]
_SOURCES = hashlib.sha256(b"".join(_TEXTS)).hexdigest()  # kernels, and how they are launched


def _key(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    parts = (name, torch.__version__, triton.__version__, _SOURCES)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _stored(key: str) -> str | None:
    """The verdict on disk; None where there is none, or it cannot be read."""
    try:
        file = get_cache_manager(key).get_file(_FILE)
        return None if file is None else Path(file).read_text()
    except (OSError, RuntimeError):
        return None
