"""SPEM's tail by hand: forward and every gradient, written down in numpy, equal the fused one.

This oracle shares nothing with the library: no autograd, no plane statistics, no passes.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ops.tails import error, pairwise
from torch import nn

import spem

Arrays = dict[str, np.ndarray]


def sigmoid(t: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-t))


def forward(a: Arrays, form: str, lam: float) -> Arrays:
    """x [B, C, K] to y, with everything that the gradient needs."""
    x = a["x"]
    i, j = x.argmax(2), x.argmin(2)
    high, low = x.max(2), x.min(2)
    u, total = lam * high + (1 - lam) * low, high + low
    factor = sigmoid(a["w_r"] * total + 2 * a["b_r"])
    h = a["w_r"] * u + a["b_r"] if form == "code" else u
    e = a["w_e"] * h + a["b_e"]
    v = sigmoid(e * factor) if form == "figure" else sigmoid(e) * factor
    y = np.maximum(v[:, :, None] * x + a["r"], 0)
    return {
        **{"i": i, "j": j, "u": u, "total": total, "R": factor},
        **{"h": h, "e": e, "v": v, "y": y, "range": high - low},
    }


def backward(a: Arrays, f: Arrays, form: str, lam: float, p: np.ndarray) -> Arrays:
    """All gradients of sum(g y)."""
    x, v, e, factor = a["x"], f["v"], f["e"], f["R"]
    d = np.where(f["y"] > 0, a["g"], 0)
    dv = (d * x).sum(2)
    if form == "figure":
        q = dv * v * (1 - v)
        de, dq = q * factor, q * e * factor * (1 - factor)
    else:
        gate = sigmoid(e)
        de, dq = dv * factor * gate * (1 - gate), dv * gate * factor * (1 - factor)
    dh = a["w_e"] * de
    du = a["w_r"] * dh if form == "code" else dh
    dw_r, db_r = dq * f["total"], 2 * dq
    if form == "code":
        dw_r, db_r = dw_r + dh * f["u"], db_r + dh
    dlam = (du * f["range"]).sum()
    norm = (p[0] ** 2 + p[1] ** 2) ** 2
    dx = v[:, :, None] * d
    rows, columns = np.indices(dv.shape)
    np.add.at(dx, (rows, columns, f["i"]), lam * du + a["w_r"] * dq)
    np.add.at(dx, (rows, columns, f["j"]), (1 - lam) * du + a["w_r"] * dq)
    return {
        "x": dx,
        "residual": d,
        "w_e": (de * f["h"]).sum(0),
        "b_e": de.sum(0),
        "w_r": dw_r.sum(0),
        "b_r": db_r.sum(0),
        "p": dlam * np.array([2 * p[0] * p[1] ** 2, -2 * p[1] * p[0] ** 2]) / norm,
    }


def through_norm(dx: np.ndarray, z: np.ndarray, gamma: np.ndarray, eps: float) -> Arrays:
    """The textbook gradient of a batch norm in training, from that of its output."""
    mu = z.mean((0, 2), keepdims=True)
    rstd = 1 / np.sqrt(z.var((0, 2), keepdims=True) + eps)
    normal = (z - mu) * rstd
    centred = dx - dx.mean((0, 2), keepdims=True)
    dz = centred - normal * (dx * normal).mean((0, 2), keepdims=True)
    return {
        "z": gamma[:, None] * rstd * dz,
        "gamma": (dx * normal).sum((0, 2)),
        "beta": dx.sum((0, 2)),
    }


@pairwise(
    form=("text", "code", "figure"),
    normed=(True, False),
    shape=((3, 4, 5, 6), (6, 2, 1, 1), (2, 3, 8, 8)),
    coarse=(False, True),
    impl=("formula", "numba"),
)
def test_by_hand(
    form: str, normed: bool, shape: tuple[int, int, int, int], coarse: bool, impl: str
) -> None:
    if spem.ops.choose("t", "cpu", torch.float64).impl != "numba" and impl == "numba":
        pytest.skip("numba is not installed")
    rng = np.random.default_rng(7)
    batch, channels, *_ = shape
    z = rng.normal(size=(batch, channels, shape[2] * shape[3]))
    if coarse:
        z = np.round(2 * z) / 2
    p = np.array([0.7, -0.4])
    lam = p[0] ** 2 / (p[0] ** 2 + p[1] ** 2)
    a = {name: rng.normal(size=channels) for name in ("w_e", "b_e", "w_r", "b_r")}
    a |= {"r": rng.normal(size=z.shape), "g": rng.normal(size=z.shape)}
    gamma, beta, eps = rng.normal(size=channels), rng.normal(size=channels), 1e-5
    a["x"] = z
    if normed:
        spread = np.sqrt(z.var((0, 2), keepdims=True) + eps)
        centred = (z - z.mean((0, 2), keepdims=True)) / spread
        a["x"] = gamma[:, None] * centred + beta[:, None]
    f = forward(a, form, lam)
    expected = backward(a, f, form, lam, p)
    if normed:
        expected |= through_norm(expected.pop("x"), z, gamma, eps)
    else:
        expected["z"] = expected.pop("x")

    module = spem.SPEM(channels, form=form).double()
    norm = nn.BatchNorm2d(channels, eps=eps).double() if normed else None

    def map_of(value: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(value).reshape(shape).clone().requires_grad_()

    with torch.no_grad():
        for name in ("w_e", "b_e", "w_r", "b_r"):
            module.get_parameter(name).copy_(torch.from_numpy(a[name]))
        module.pool.p.copy_(torch.from_numpy(p))
        if norm is not None:
            norm.weight.copy_(torch.from_numpy(gamma))
            norm.bias.copy_(torch.from_numpy(beta))
    inputs = {"z": map_of(z), "residual": map_of(a["r"])}
    with spem.ops.use_impl(impl):
        y = module.tail(inputs["z"], inputs["residual"], norm)
    y.backward(map_of(a["g"]).detach())
    assert error(y.detach().flatten(2), torch.from_numpy(f["y"])) <= 1e-9
    found = {name: t.grad for name, t in inputs.items()}
    found |= {n: module.get_parameter(n).grad for n in ("w_e", "b_e", "w_r", "b_r")}
    found["p"] = module.pool.p.grad
    if norm is not None:
        found |= {"gamma": norm.weight.grad, "beta": norm.bias.grad}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        wrong = error(found[name], torch.from_numpy(value).reshape(found[name].shape))
        assert wrong <= 1e-8, f"{name} is off by {wrong:.2g}"
