"""The gates of further published modules in plain numpy, written from their formulas.

As in `oracles`: parameters by name, a map ``x`` [N, C, ...], the factor the map is multiplied by.
"""

from __future__ import annotations

import math

import numpy as np
from attention.oracles import (
    BN_EPS,
    Array,
    Parameters,
    Pool,
    mix_parameter,
    pooled,
    sigmoid,
    spread,
)


def normalised(parameters: Parameters, prefix: str, v: Array, *, training: bool) -> Array:
    """Batch norm of [N, C, ...] with the parameters ``prefix.*``."""
    shape = (1, -1) + (1,) * (v.ndim - 2)
    if training:
        axes = (0, *range(2, v.ndim))
        mean, var = v.mean(axes), v.var(axes)
    else:
        mean, var = parameters[f"{prefix}.running_mean"], parameters[f"{prefix}.running_var"]
    weight, bias = parameters[f"{prefix}.weight"], parameters[f"{prefix}.bias"]
    standard = (v - mean.reshape(shape)) / np.sqrt(var.reshape(shape) + BN_EPS)
    return standard * weight.reshape(shape) + bias.reshape(shape)


def hard_sigmoid(v: Array) -> Array:
    return np.clip(v + 3.0, 0.0, 6.0) / 6.0


def gct(parameters: Parameters, x: Array, *, mode: str) -> Array:
    """GCT: 1 + tanh(gamma times the embedding over its size, plus beta)."""
    axes = tuple(range(2, x.ndim))
    if mode == "l2":
        # a plane with an infinite value has no variance
        finite = np.isfinite(x).all(axes)
        e = np.sqrt(np.where(finite, (x**2).sum(axes), np.nan) + 1e-5) * parameters["alpha"]
        size = np.sqrt((e**2).mean(1, keepdims=True) + 1e-5)
    else:
        e = np.abs(x).sum(axes) * parameters["alpha"]
        size = np.abs(e).mean(1, keepdims=True) + 1e-5
    return spread(1.0 + np.tanh(parameters["gamma"] * e / size + parameters["beta"]), x)


def ese(parameters: Parameters, x: Array, *, pool: Pool) -> Array:
    """eSE: one linear layer and the hard sigmoid."""
    z = pooled(x, pool, mix_parameter(parameters))
    return spread(hard_sigmoid(z @ parameters["fc.weight"].T + parameters["fc.bias"]), x)


def ge_minus(parameters: Parameters, x: Array, *, pool: Pool) -> Array:
    """GE theta-: the descriptor itself."""
    return spread(sigmoid(pooled(x, pool, mix_parameter(parameters))), x)


def ge_windows(parameters: Parameters, x: Array, *, extent: int) -> Array:
    """GE theta- of an extent: windows of 2e - 1 every e positions, repeated over the map."""
    del parameters
    height, width = x.shape[2:]
    down, right = -(-height // extent), -(-width // extent)
    gate = np.zeros_like(x)
    for a in range(height):
        for b in range(width):
            i, j = (a * down) // height * extent, (b * right) // width * extent
            window = x[
                :, :, max(0, i - extent + 1) : i + extent, max(0, j - extent + 1) : j + extent
            ]
            gate[:, :, a, b] = sigmoid(window.mean((2, 3)))
    return gate


def ge_theta(parameters: Parameters, x: Array, *, form: str, training: bool) -> Array:
    """GE theta and theta+: a kernel as large as the map, a norm, and in theta+ a network."""
    gathered = (x * parameters["gather.weight"][:, 0]).sum((2, 3))
    gathered = gathered + parameters.get("gather.bias", 0.0)
    z = normalised(parameters, "norm", gathered, training=training)
    if form == "theta_plus":
        hidden = np.maximum(z, 0.0) @ parameters["fc1.weight"].T + parameters["fc1.bias"]
        z = np.maximum(hidden, 0.0) @ parameters["fc2.weight"].T + parameters["fc2.bias"]
    return spread(sigmoid(z), x)


def simam(parameters: Parameters, x: Array, *, lam: float) -> Array:
    """simAM: a position's squared deviation over four times the (unbiased) variance."""
    del parameters
    variance = x.var((2, 3), ddof=1, keepdims=True)
    deviation = (x - x.mean((2, 3), keepdims=True)) ** 2
    return sigmoid(deviation / (4.0 * (variance + lam)) + 0.5)


def nam(parameters: Parameters, x: Array, *, training: bool) -> Array:
    """NAM: the batch-normed map, every channel times its share of the scales."""
    share = np.abs(parameters["norm.weight"]) / np.abs(parameters["norm.weight"]).sum()
    normed = normalised(parameters, "norm", x, training=training)
    return sigmoid(share.reshape(1, -1, 1, 1) * normed)


def regions(extent: int, count: int) -> list[slice]:
    """The regions of adaptive pooling along an axis."""
    return [
        slice(math.floor(i * extent / count), math.ceil((i + 1) * extent / count))
        for i in range(count)
    ]


def averaged(x: Array, height: int, width: int) -> Array:
    """Adaptive average pooling to [N, C, height, width]."""
    rows, columns = regions(x.shape[2], height), regions(x.shape[3], width)
    means = [[x[:, :, row, column].mean((2, 3)) for column in columns] for row in rows]
    return np.moveaxis(np.array(means), (0, 1), (2, 3))


FREQUENCIES = [
    "00",
    "01",
    "60",
    "05",
    "02",
    "10",
    "12",
    "40",
    "50",
    "16",
    "30",
    "04",
    "06",
    "03",
    "35",
    "22",
]  # vertical, horizontal on a 7 x 7 grid


def cosine(u: int, t: int, total: int) -> float:
    value = math.cos(math.pi * u * (t + 0.5) / total) / math.sqrt(total)
    return value * math.sqrt(2.0) if u > 0 else value


def fca(parameters: Parameters, x: Array, *, size: tuple[int, int], frequencies: int) -> Array:
    """FcaNet: every group of channels summed against its own two-dimensional cosine."""
    height, width = size
    # Averaging to the size is linear: what every position of the map alone becomes, [K, h, w].
    alone = np.eye(x[0, 0].size).reshape(-1, 1, *x.shape[2:])
    alone = (alone if x.shape[2:] == size else averaged(alone, height, width))[:, 0]
    z = np.zeros(x.shape[:2])
    together = x.shape[1] // frequencies
    for c in range(x.shape[1]):
        vertical, horizontal = map(int, FREQUENCIES[c // together])
        down = [cosine(vertical * (height // 7), a, height) for a in range(height)]
        right = [cosine(horizontal * (width // 7), b, width) for b in range(width)]
        weight = (alone * np.outer(down, right)).sum((1, 2))
        z[:, c] = (x[:, c].reshape(len(x), -1) * weight).sum(1)
    hidden = np.maximum(z @ parameters["fc1.weight"].T, 0.0)
    return sigmoid(hidden @ parameters["fc2.weight"].T)[:, :, None, None]


def coord(parameters: Parameters, x: Array, *, training: bool) -> Array:
    """Coordinate attention: both axes through one layer, then a gate for each."""

    def layer(name: str, v: Array) -> Array:
        weight, bias = parameters[f"{name}.weight"][:, :, 0, 0], parameters[f"{name}.bias"]
        return np.einsum("oi,nil->nol", weight, v) + bias[:, None]

    height = x.shape[2]
    joined = np.concatenate([x.mean(3), x.mean(2)], axis=2)
    v = normalised(parameters, "norm", layer("conv", joined), training=training)
    v = v * hard_sigmoid(v)
    down = sigmoid(layer("conv_h", v[:, :, :height]))
    across = sigmoid(layer("conv_w", v[:, :, height:]))
    return down[:, :, :, None] * across[:, :, None, :]


def gc_delta(parameters: Parameters, x: Array, branch: str) -> Array:
    """GC: the context of the softmax over positions, through a network with a layer norm."""
    flat = x.reshape(*x.shape[:2], -1)
    score = np.einsum("c,nck->nk", parameters["mask.weight"].reshape(-1), flat)
    score = score + parameters["mask.bias"]
    weight = np.exp(score - score.max(1, keepdims=True))
    weight = weight / weight.sum(1, keepdims=True)
    context = (flat * weight[:, None]).sum(2)
    p = {k.removeprefix(f"{branch}."): v for k, v in parameters.items() if k.startswith(branch)}
    hidden = context @ p["fc1.weight"].T + p["fc1.bias"]
    centred = hidden - hidden.mean(1, keepdims=True)
    hidden = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
    hidden = np.maximum(hidden * p["norm.weight"] + p["norm.bias"], 0.0)
    return (hidden @ p["fc2.weight"].T + p["fc2.bias"])[:, :, None, None]


def gc_gate(parameters: Parameters, x: Array, *, fusion: str) -> Array:
    """What GC multiplies by."""
    if fusion == "add":
        return np.ones((*x.shape[:2], 1, 1))
    return sigmoid(gc_delta(parameters, x, "mul"))


def gc_shift(parameters: Parameters, x: Array, *, fusion: str) -> Array:
    """What GC adds."""
    return np.zeros((1, 1, 1, 1)) if fusion == "mul" else gc_delta(parameters, x, "add")


def correlated(maps: Array, weight: Array) -> Array:
    """[N, I, A, B] with a kernel [1, I, k, k], zero padding: [N, 1, A, B]."""
    k = weight.shape[-1]
    margin = (k - 1) // 2
    padded = np.pad(maps, ((0, 0), (0, 0), (margin, margin), (margin, margin)))
    out = np.zeros((maps.shape[0], 1, *maps.shape[2:]))
    for a in range(maps.shape[2]):
        for b in range(maps.shape[3]):
            out[:, 0, a, b] = (padded[:, :, a : a + k, b : b + k] * weight).sum((1, 2, 3))
    return out


def triplet(parameters: Parameters, x: Array, *, training: bool) -> Array:
    """Triplet: per plane of two axes the max and mean over the third, convolved."""

    def gate(name: str, over: int) -> Array:
        seen = np.stack([x.max(over), x.mean(over)], axis=1)
        if over == 3:
            seen = seen.swapaxes(2, 3)  # the plane (H, C), not (C, H)
        v = correlated(seen, parameters[f"{name}.conv.weight"])
        out = sigmoid(normalised(parameters, f"{name}.norm", v, training=training))[:, 0]
        return np.expand_dims(out.swapaxes(1, 2) if over == 3 else out, over)

    return (gate("cw", 2) + gate("hc", 3) + gate("hw", 1)) / 3.0


def ela(parameters: Parameters, x: Array, *, norm_groups: int) -> Array:
    """ELA: both axes through the same grouped convolution and group norm."""
    weight = parameters["conv.weight"]
    channels, together, k = weight.shape
    affine = parameters["norm.weight"][:, None], parameters["norm.bias"][:, None]

    def along(p: Array) -> Array:
        padded = np.pad(p, ((0, 0), (0, 0), (k // 2, k // 2)))
        out = np.zeros_like(p)
        for c in range(channels):
            first = c // together * together
            for t in range(p.shape[2]):
                window = padded[:, first : first + together, t : t + k]
                out[:, c, t] = (window * weight[c]).sum((1, 2))
        grouped = out.reshape(p.shape[0], norm_groups, -1)
        mean, var = grouped.mean(2, keepdims=True), grouped.var(2, keepdims=True)
        normed = ((grouped - mean) / np.sqrt(var + 1e-5)).reshape(p.shape)
        return sigmoid(normed * affine[0] + affine[1])

    return along(x.mean(3))[:, :, :, None] * along(x.mean(2))[:, :, None, :]


def spa(parameters: Parameters, x: Array) -> Array:
    """SPA: averages over 1, 4 and 16 regions side by side, through a network without biases."""
    # a channel with an infinite value has no averages
    x = np.where(np.isinf(x).any((2, 3), keepdims=True), np.nan, x)
    z = np.concatenate([averaged(x, n, n).reshape(len(x), -1) for n in (1, 2, 4)], axis=1)
    hidden = np.maximum(z @ parameters["fc1.weight"].T, 0.0)
    return sigmoid(hidden @ parameters["fc2.weight"].T)[:, :, None, None]


def gsop(parameters: Parameters, x: Array, *, stride: int, training: bool) -> Array:
    """GSoP: covariances of a reduced map, each row through its own linear maps."""
    seen = np.maximum(x, 0.0)[:, :, ::stride, ::stride]
    reduced = np.einsum("dc,nchw->ndhw", parameters["reduce.weight"][:, :, 0, 0], seen)
    reduced = reduced + parameters["reduce.bias"].reshape(1, -1, 1, 1)
    t = np.maximum(normalised(parameters, "norm", reduced, training=training), 0.0)
    t = t.reshape(*t.shape[:2], -1)
    dims = t.shape[1]
    covariance = np.stack([np.cov(image, bias=True).reshape(dims, dims) for image in t])
    covariance = normalised(parameters, "row_norm", covariance, training=training)
    weight = parameters["rows.weight"].reshape(dims, 4, dims)  # row, its maps, columns
    rows = np.einsum("nrc,rmc->nrm", covariance, weight).reshape(len(x), -1)
    rows = rows + parameters["rows.bias"]
    excited = rows @ parameters["excite.weight"][:, :, 0, 0].T + parameters["excite.bias"]
    return sigmoid(excited)[:, :, None, None]


def dia(
    parameters: Parameters, x: Array, state: tuple[Array, Array] | None = None, *, pool: Pool
) -> tuple[Array, tuple[Array, Array]]:
    """DIANet: one step of its unit; the gate [N, C, 1, ...], and the state after it."""
    z = pooled(x, pool, mix_parameter(parameters))
    hidden, cell = (np.zeros_like(z), np.zeros_like(z)) if state is None else state

    def network(side: str, v: Array) -> Array:
        first = v @ parameters[f"{side}1.weight"].T + parameters[f"{side}1.bias"]
        last = np.maximum(first, 0.0) @ parameters[f"{side}2.weight"].T
        return last + parameters[f"{side}2.bias"]

    i, f, g, o = np.split(network("input", z) + network("state", hidden), 4, axis=1)
    cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
    hidden = sigmoid(o) * sigmoid(cell)
    return spread(hidden, x), (hidden, cell)


def iebn_gate(parameters: Parameters, x: Array, *, pool: Pool) -> Array:
    """IEBN: what the weight of the norm is multiplied by, from the norm's input."""
    z = pooled(x, pool, mix_parameter(parameters))
    return spread(sigmoid(parameters["w"] * z + parameters["b"]), x)


def iebn(parameters: Parameters, x: Array, *, pool: Pool, training: bool) -> Array:
    """IEBN: a batch norm with its weight gated per image."""
    gate = iebn_gate(parameters, x, pool=pool)
    plain = {f"norm.{k}": v for k, v in parameters.items()}
    plain["norm.weight"], plain["norm.bias"] = np.ones(x.shape[1]), np.zeros(x.shape[1])
    standard = normalised(plain, "norm", x, training=training)
    gamma, beta = (spread(parameters[k][None], x) for k in ("weight", "bias"))
    return standard * (gamma * gate) + beta


def convolved(x: Array, weight: Array, *, groups: int, dilation: int, stride: int = 1) -> Array:
    """A grouped, dilated 3x3 convolution whose zero padding is the dilation."""
    outputs, together = weight.shape[:2]
    d = dilation
    padded = np.pad(x, ((0, 0), (0, 0), (d, d), (d, d)))
    height, width = x.shape[2:]
    out = np.zeros((x.shape[0], outputs, -(-height // stride), -(-width // stride)))
    for o in range(outputs):
        first = o // (outputs // groups) * together
        for a in range(3):
            for b in range(3):
                moved = padded[:, first : first + together, a * d : a * d + height]
                moved = moved[:, :, :, b * d : b * d + width][:, :, ::stride, ::stride]
                out[:, o] += (moved * weight[o, :, a, b].reshape(1, -1, 1, 1)).sum(1)
    return out


def bam(
    parameters: Parameters, x: Array, *, fusion: str, dilation: int, pool: Pool, training: bool
) -> Array:
    """BAM: one plus the sigmoid of a channel network times (or plus) a spatial one."""
    p = parameters
    z = pooled(x, pool, mix_parameter(p)) @ p["fc1.weight"].T + p["fc1.bias"]
    z = np.maximum(normalised(p, "norm", z, training=training), 0.0)
    channel = (z @ p["fc2.weight"].T + p["fc2.bias"])[:, :, None, None]

    def one(name: str, v: Array) -> Array:
        mixed = np.einsum("oi,nihw->nohw", p[f"{name}.weight"][:, :, 0, 0], v)
        return mixed + p[f"{name}.bias"].reshape(1, -1, 1, 1)

    v = np.maximum(normalised(p, "reduce_norm", one("reduce", x), training=training), 0.0)
    for name in ("context1", "context2"):
        v = convolved(v, p[f"{name}.weight"], groups=1, dilation=dilation)
        v = v + p[f"{name}.bias"].reshape(1, -1, 1, 1)
        v = np.maximum(normalised(p, f"{name}_norm", v, training=training), 0.0)
    spatial = one("spatial", v)
    return 1.0 + sigmoid(channel * spatial if fusion == "mul" else channel + spatial)


def sk(
    parameters: Parameters, x: Array, *, groups: int, pool: Pool, training: bool, stride: int = 1
) -> tuple[Array, Array]:
    """SK: the share of the first branch, and the branches mixed by their shares."""
    p = parameters
    branches = []
    for dilation, name in ((1, "near"), (2, "far")):
        u = convolved(x, p[f"{name}.weight"], groups=groups, dilation=dilation, stride=stride)
        branches.append(np.maximum(normalised(p, f"{name}_norm", u, training=training), 0.0))
    z = pooled(branches[0] + branches[1], pool, mix_parameter(p)) @ p["fc.weight"].T
    z = np.maximum(normalised(p, "norm", z, training=training), 0.0)
    scores = [np.exp(z @ p[f"fc_{name}.weight"].T) for name in ("near", "far")]
    shares = [(s / (scores[0] + scores[1]))[:, :, None, None] for s in scores]
    return shares[0], shares[0] * branches[0] + shares[1] * branches[1]
