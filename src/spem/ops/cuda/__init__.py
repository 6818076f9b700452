"""The four passes on CUDA devices: fast eager and in CUDA graphs, the same bytes in any layout.

Nothing is tuned or decided at run time: sizes alone choose the tiles (`spem.ops.cuda.tiles`). No
pass uses atomics or waits for the device, so results repeat bit for bit, and launches can be
captured in a CUDA graph once every kernel has run. Maps are float32, float16 or bfloat16,
contiguous or channels_last, all maps of one call alike; sums and coefficients are float32.

With TRITON_INTERPRET=1 in the environment before this module is imported, the kernels run in
Triton's interpreter, on tensors of any device: slow, for tests.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from spem.ops.cuda import kernels
from spem.ops.cuda.kernels import INTERPRETED
from spem.ops.cuda.tiles import plan_for
from spem.ops.formula import RawStats, empty_stats
from spem.ops.library import check_maps

_MERGED = 128  # planes of a merging program


def plane_stats(z: Tensor, moments: bool, extrema: bool) -> RawStats:
    """Pass F1, see ``formula.plane_stats``; reads N bytes of the map, writes [B, C] scalars.

    Formula:
        shift = z_0 if finite, else 0;  s1 = sum_k (z_k - shift);  s2 = sum_k (z_k - shift)^2
        mean = shift + s1/K;  var = max(0, (s2 - s1^2/K)/K); a NaN in a plane makes all four NaN.
    """
    plan = plan_for(z, statistics=True)
    out = gathered = empty_stats(z, moments, extrema)
    if not (moments or extrema):
        return out
    split = plan.parts > 1
    if split:
        # Every statistic as [parts, B, C]; the first value, which all parts need, once.
        first = out.first if extrema else z.new_empty((plan.B, plan.C), dtype=torch.float32)
        gathered = empty_stats(z, moments, extrema, plan.parts)._replace(first=first)
    flags = {"MOMENTS": moments, "EXTREMA": extrema}
    _launch(
        kernels.plane_stats_kernel,
        plan.groups * plan.parts,
        *(z, *gathered, *plan.sizes, plan.parts, plan.tiles),
        **{**flags, **plan.constants, "LOOP": plan.tiles > 1, "PARTIAL": split},
    )
    if split:
        planes = plan.B * plan.C
        _launch(
            kernels.merge_stats_kernel,
            -(-planes // _MERGED),
            *(*gathered, out.mean, out.var, out.high, out.low, out.at_high, out.at_low),
            *(planes, plan.parts, plan.K // plan.K_unit),
            **{**flags, "K_UNIT": plan.K_unit, "P": _MERGED},
        )
    return out


def affine_tail(z: Tensor, r: Tensor, mu: Tensor, v: Tensor, a: Tensor, beta: Tensor) -> Tensor:
    """Pass F2, see ``formula.affine_tail``; reads 2N bytes, writes N."""
    check_maps(z, r)
    plan = plan_for(z)
    y = torch.empty_like(z)
    _launch(
        kernels.affine_tail_kernel,
        plan.groups * plan.blocks,
        *(z, r, mu.contiguous(), v.contiguous(), a.contiguous(), beta.contiguous(), y),
        *(*plan.sizes, plan.blocks),
        **plan.constants,
    )
    return y


def affine_tail_backward(
    g: Tensor, y: Tensor, z: Tensor, mu: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Pass B1, see ``formula.affine_tail_backward``; reads 3N bytes, writes N."""
    check_maps(z, y, g)
    plan = plan_for(z)
    d = torch.empty_like(y)
    # The sums of every part; two tensors, since results of an operator must not share memory.
    total, moment = (
        z.new_empty((plan.parts, plan.B, plan.C), dtype=torch.float32) for _ in range(2)
    )
    _launch(
        kernels.affine_tail_backward_kernel,
        plan.groups * plan.parts,
        *(g, y, z, mu.contiguous(), d, total, moment),
        *(*plan.sizes, plan.parts, plan.tiles),
        **plan.constants,
        LOOP=plan.tiles > 1,
    )
    if plan.parts > 1:
        return d, total.sum(0), moment.sum(0)
    return d, total[0], moment[0]


def stats_backward(d: Tensor, z: Tensor, mu: Tensor, p: Tensor, *terms: Tensor | None) -> Tensor:
    """Pass B2, see ``formula.stats_backward``; reads 2N bytes (N without q and t), writes N."""
    q, t, i, j, s_i, s_j = terms
    plan, dz = plan_for(d), torch.empty_like(d)
    flags = {"AFFINE": False, "SHARED": False, "SPIKES": False}
    # What is absent is never read; any pointer does in its place.
    affine, peaks = (p, p), (p, p, p, p)
    if q is not None and t is not None:
        check_maps(d, z)
        # Coefficients of the channel alone come expanded over the images.
        shared = q.stride() == t.stride() == (0, 1)
        affine = (q, t) if shared else (q.contiguous(), t.contiguous())
        flags |= {"AFFINE": True, "SHARED": shared}
    if i is not None and j is not None and s_i is not None and s_j is not None:
        peaks = (i.contiguous(), j.contiguous(), s_i.contiguous(), s_j.contiguous())
        flags |= {"SPIKES": True}
    _launch(
        kernels.stats_backward_kernel,
        plan.groups * plan.blocks,
        *(d, z, mu.contiguous(), p.contiguous(), *affine, *peaks, dz, *plan.sizes, plan.blocks),
        **{**plan.constants, **flags},
    )
    return dz


def _launch(kernel: Any, programs: int, x: Tensor, *arguments: Any, **constants: Any) -> None:
    """Starts the programs of a kernel on the device of its first tensor."""
    # The interpreter computes with numpy, which warns of infinities and NaN; a device does not.
    place = np.errstate(all="ignore") if INTERPRETED else torch.cuda.device_of(x)
    with place:
        # Fused multiply-adds are asked for explicitly: Triton plans to change the default.
        kernel[(programs,)](x, *arguments, **constants, enable_fp_fusion=True)
