"""The gates of the published modules in plain numpy, written from their formulas and nothing else.

Every function takes the module's parameters by name (float64 arrays) and a map ``x`` [N, C, ...]
and returns the factor that the map is multiplied by. A pool is written "avg", "max", "min", a
number (a constant lambda), or the name of a parametrisation of a learned lambda: "squares",
"anchored", "sigmoid".
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Parameters = Mapping[str, Array]
Pool = str | float

FREQUENCIES = (
    "00", "01", "60", "05", "02", "10", "12", "40", "50", "16", "30", "04", "06", "03", "35", "22"
)  # fmt: skip
"""FcaNet's pairs, vertical and horizontal, on a 7 x 7 grid."""


def sigmoid(v: Array) -> Array:
    """The logistic function, without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * v))


def hard_sigmoid(v: Array) -> Array:
    return np.clip(v + 3.0, 0.0, 6.0) / 6.0


def spread(gate: Array, x: Array) -> Array:
    """[N, C] with the spatial axes of x added."""
    return gate.reshape(gate.shape + (1,) * (x.ndim - 2))


def lam(parametrization: str, parameter: Array) -> float:
    """lambda of a learned mix from its parameter."""
    if parametrization == "sigmoid":
        return float(sigmoid(parameter))
    p0, p1 = parameter
    return float(p0**2 / (p0**2 + p1**2))


def penalty(parametrization: str, parameter: Array) -> float:
    """What one learned mix adds to the penalty."""
    squares = float((parameter**2).sum())
    return (squares - 0.5) ** 2 if parametrization == "anchored" else squares


def mix_parameters(parameters: Parameters) -> list[Array]:
    """The parameters of the learned mixes, in the order of the state dict."""
    return [v for k, v in parameters.items() if k.rpartition(".")[2] in ("p", "logit")]


def pooled(x: Array, pool: Pool, parameters: Parameters | None = None) -> Array:
    """[N, C]: the descriptor of every plane."""
    flat = x.reshape(*x.shape[:2], -1)
    if pool in ("avg", "max", "min"):
        return {"avg": flat.mean, "max": flat.max, "min": flat.min}[pool](-1)
    if isinstance(pool, str):
        assert parameters is not None
        [parameter] = mix_parameters(parameters)
        pool = lam(pool, parameter)
    return pool * flat.max(-1) + (1.0 - pool) * flat.min(-1)


def convolved(
    x: Array, weight: Array, *, groups: int = 1, dilation: int = 1, stride: int = 1
) -> Array:
    """A grouped, dilated convolution of odd sides; its zero padding keeps the map's size."""
    outputs, together, *sides = weight.shape
    d, s, (height, width) = dilation, stride, x.shape[2:]
    padded = np.pad(x, ((0, 0), (0, 0), *((side // 2 * d,) * 2 for side in sides)))
    out = np.zeros((x.shape[0], outputs, -(-height // s), -(-width // s)))
    for o in range(outputs):
        first = o // (outputs // groups) * together
        for a, b in np.ndindex(*sides):
            moved = padded[:, first : first + together, a * d : a * d + height : s]
            moved = moved[..., b * d : b * d + width : s]
            out[:, o] += (moved * weight[o, :, a, b].reshape(1, -1, 1, 1)).sum(1)
    return out


def layer(p: Parameters, name: str, v: Array) -> Array:
    """A linear layer of [N, C], or a 1 x 1 convolution of [N, C, H, W]; with a bias if it has."""
    weight, bias = p[f"{name}.weight"], p.get(f"{name}.bias", np.zeros(()))
    if weight.ndim == 2:
        return v @ weight.T + bias
    return np.einsum("oi,nihw->nohw", weight[:, :, 0, 0], v) + bias.reshape(-1, 1, 1)


def mlp(p: Parameters, z: Array, first: str = "fc1", last: str = "fc2") -> Array:
    """W2 relu(W1 z + b1) + b2; biases that are not there are zero."""
    return layer(p, last, np.maximum(layer(p, first, z), 0.0))


def batch_norm(p: Parameters, v: Array, *, training: bool, name: str = "norm") -> Array:
    """Batch norm of [N, C, ...]; in training of the batch, with the biased variance."""
    shape = (1, -1) + (1,) * (v.ndim - 2)
    axes = (0, *range(2, v.ndim))
    running = p[f"{name}.running_mean"], p[f"{name}.running_var"]
    mean, var = (v.mean(axes), v.var(axes)) if training else running
    normed = (v - mean.reshape(shape)) / np.sqrt(var.reshape(shape) + 1e-5)
    return normed * p[f"{name}.weight"].reshape(shape) + p[f"{name}.bias"].reshape(shape)


def reweight(variant: str, p: Parameters, high: Array, low: Array) -> Array:
    """R of the paper's Table 4 from the maxima and minima [N, C]."""
    if variant == "none":
        return np.ones_like(high)
    a, s = p["w_r"] * high + p["b_r"], sigmoid
    if variant == "unshared_sum":
        return s(a + p["w_r2"] * low + p["b_r2"])
    b = p["w_r"] * low + p["b_r"]
    return {
        "shared_sum": lambda: s(a + b),
        "sum_of_sigmoids": lambda: s(a) + s(b),
        "product_of_sigmoids": lambda: s(a) * s(b),
        "sigmoid_of_product": lambda: s(a * b),
        "linear_sum": lambda: a + b,
        "linear_product": lambda: a * b,
        "double_sigmoid": lambda: s(s(a) + s(b)),
        "max_only": lambda: s(a),
        "min_only": lambda: s(b),
    }[variant]()


def spem(p: Parameters, x: Array, *, form: str, variant: str, pool: Pool) -> Array:
    """SPEM in the form `text`, `figure` or `code`."""
    u = pooled(x, pool, p)
    r = reweight(variant, p, pooled(x, "max"), pooled(x, "min"))
    w_e, b_e = p["w_e"], p["b_e"]
    gates = {
        "text": lambda: sigmoid(w_e * u + b_e) * r,
        "figure": lambda: sigmoid((w_e * u + b_e) * r),
        "code": lambda: sigmoid(w_e * (p["w_r"] * u + p["b_r"]) + b_e) * r,
    }
    return spread(gates[form](), x)


def se(p: Parameters, x: Array, *, pool: Pool) -> Array:
    """SE: s(W2 relu(W1 z + b1) + b2)."""
    return spread(sigmoid(mlp(p, pooled(x, pool, p))), x)


def cbam_spatial(p: Parameters, x: Array, pools: tuple[Pool, Pool]) -> tuple[Array, Array]:
    """CBAM's channel gate [N, C, 1, 1] and what its spatial norm sees, [N, 1, H, W]."""
    learned = iter(mix_parameters(p))
    total = np.zeros(x.shape[:2])
    for pool in pools:
        own = {"p": next(learned)} if pool in ("squares", "anchored", "sigmoid") else None
        total = total + mlp(p, pooled(x, pool, own))
    channel = spread(sigmoid(total), x)
    scaled = x * channel
    maps = np.stack([scaled.max(1), scaled.mean(1)], axis=1)
    return channel, convolved(maps, p["spatial.weight"])


def cbam(p: Parameters, x: Array, *, pools: tuple[Pool, Pool], training: bool) -> Array:
    """CBAM: the channel gate, then on the scaled map s(BN(conv([max_C; mean_C])))."""
    channel, conv = cbam_spatial(p, x, pools)
    return channel * sigmoid(batch_norm(p, conv, training=training))


def eca(p: Parameters, x: Array, *, pool: Pool) -> Array:
    """ECA: a convolution along the channel axis of the descriptor, zero padding, no bias."""
    z = pooled(x, pool, p)
    return spread(
        sigmoid(convolved(z[:, None, :, None], p["conv.weight"][..., None])[:, 0, :, 0]), x
    )


def srm_style(p: Parameters, x: Array, pool: Pool) -> Array:
    """SRM's z [N, C]: a times the descriptor plus d times the deviation (unbiased variance)."""
    deviation = np.sqrt(x.reshape(*x.shape[:2], -1).var(-1, ddof=1) + 1e-5)
    return p["a"] * pooled(x, pool, p) + p["d"] * deviation


def srm(p: Parameters, x: Array, *, pool: Pool, training: bool) -> Array:
    """SRM: s(BN(z))."""
    return spread(sigmoid(batch_norm(p, srm_style(p, x, pool), training=training)), x)


def sge(p: Parameters, x: Array, *, groups: int, pool: Pool) -> Array:
    """SGE: per group the map of similarities to the descriptor, normalised over the pixels."""
    n, c = x.shape[:2]
    q = (x * spread(pooled(x, pool, p), x)).reshape(n, groups, c // groups, -1).sum(2)
    t = (q - q.mean(-1, keepdims=True)) / (q.std(-1, ddof=1, keepdims=True) + 1e-5)
    gate = sigmoid(t * p["w"].reshape(-1, 1) + p["b"].reshape(-1, 1))
    return np.repeat(gate, c // groups, axis=1).reshape(x.shape)


def scale(p: Parameters, x: Array) -> Array:
    """The control: a learned factor per channel, no input."""
    return np.broadcast_to(spread(p["factor"][None], x), x.shape[:2] + (1,) * (x.ndim - 2))


def gct(p: Parameters, x: Array, *, mode: str) -> Array:
    """GCT: 1 + tanh(gamma times the embedding over its size, plus beta)."""
    axes = tuple(range(2, x.ndim))
    if mode == "l2":
        # a plane with an infinite value has no variance
        finite = np.isfinite(x).all(axes)
        e = np.sqrt(np.where(finite, (x**2).sum(axes), np.nan) + 1e-5) * p["alpha"]
        size = np.sqrt((e**2).mean(1, keepdims=True) + 1e-5)
    else:
        e = np.abs(x).sum(axes) * p["alpha"]
        size = np.abs(e).mean(1, keepdims=True) + 1e-5
    return spread(1.0 + np.tanh(p["gamma"] * e / size + p["beta"]), x)


def ese(p: Parameters, x: Array, *, pool: Pool) -> Array:
    """eSE: one linear layer and the hard sigmoid."""
    return spread(hard_sigmoid(layer(p, "fc", pooled(x, pool, p))), x)


def ge_minus(p: Parameters, x: Array, *, pool: Pool) -> Array:
    """GE theta-: the descriptor itself."""
    return spread(sigmoid(pooled(x, pool, p)), x)


def ge_windows(p: Parameters, x: Array, *, extent: int) -> Array:
    """GE theta- of an extent: windows of 2e - 1 every e positions, repeated over the map."""
    e, (height, width) = extent, x.shape[2:]
    down, right = -(-height // e), -(-width // e)
    gate = np.zeros_like(x)
    for a, b in np.ndindex(height, width):
        i, j = (a * down) // height * e, (b * right) // width * e
        window = x[:, :, max(0, i - e + 1) : i + e, max(0, j - e + 1) : j + e]
        gate[:, :, a, b] = sigmoid(window.mean((2, 3)))
    return gate


def ge_theta(p: Parameters, x: Array, *, form: str, training: bool) -> Array:
    """GE theta and theta+: a kernel as large as the map, a norm, and in theta+ a network."""
    gathered = (x * p["gather.weight"][:, 0]).sum((2, 3)) + p.get("gather.bias", 0.0)
    z = batch_norm(p, gathered, training=training)
    return spread(sigmoid(mlp(p, np.maximum(z, 0.0)) if form == "theta_plus" else z), x)


def simam(p: Parameters, x: Array, *, lam: float) -> Array:
    """simAM: a position's squared deviation over four times the (unbiased) variance."""
    variance = x.var((2, 3), ddof=1, keepdims=True)
    deviation = (x - x.mean((2, 3), keepdims=True)) ** 2
    return sigmoid(deviation / (4.0 * (variance + lam)) + 0.5)


def nam(p: Parameters, x: Array, *, training: bool) -> Array:
    """NAM: the batch-normed map, every channel times its share of the scales."""
    share = np.abs(p["norm.weight"]) / np.abs(p["norm.weight"]).sum()
    return sigmoid(share.reshape(1, -1, 1, 1) * batch_norm(p, x, training=training))


def averaged(x: Array, height: int, width: int) -> Array:
    """Adaptive average pooling to [N, C, height, width]."""

    def regions(extent: int, count: int) -> list[slice]:
        ends = [(i * extent // count, -(-(i + 1) * extent // count)) for i in range(count)]
        return [slice(*end) for end in ends]

    rows, columns = regions(x.shape[2], height), regions(x.shape[3], width)
    means = [[x[:, :, row, column].mean((2, 3)) for column in columns] for row in rows]
    return np.moveaxis(np.array(means), (0, 1), (2, 3))


def fca(p: Parameters, x: Array, *, size: tuple[int, int], frequencies: int) -> Array:
    """FcaNet: every group of channels summed against its own two-dimensional cosine."""

    def cosine(u: int, t: int, total: int) -> float:
        value = math.cos(math.pi * u * (t + 0.5) / total) / math.sqrt(total)
        return value * math.sqrt(2.0) if u > 0 else value

    height, width = size
    # Averaging to the size is linear: what every position of the map alone becomes, [K, h, w].
    alone = np.eye(x[0, 0].size).reshape(-1, 1, *x.shape[2:])
    alone = (alone if x.shape[2:] == size else averaged(alone, height, width))[:, 0]
    z = np.zeros(x.shape[:2])
    for c in range(x.shape[1]):
        vertical, horizontal = map(int, FREQUENCIES[c // (x.shape[1] // frequencies)])
        down = [cosine(vertical * (height // 7), a, height) for a in range(height)]
        right = [cosine(horizontal * (width // 7), b, width) for b in range(width)]
        weight = (alone * np.outer(down, right)).sum((1, 2))
        z[:, c] = (x[:, c].reshape(len(x), -1) * weight).sum(1)
    return spread(sigmoid(mlp(p, z)), x)


def coord(p: Parameters, x: Array, *, training: bool) -> Array:
    """Coordinate attention: both axes through one layer, then a gate for each."""
    height = x.shape[2]
    joined = np.concatenate([x.mean(3), x.mean(2)], axis=2)[..., None]
    v = batch_norm(p, layer(p, "conv", joined), training=training)
    v = v * hard_sigmoid(v)
    down = sigmoid(layer(p, "conv_h", v[:, :, :height]))
    return down * sigmoid(layer(p, "conv_w", v[:, :, height:])).swapaxes(2, 3)


def gc_delta(p: Parameters, x: Array, name: str) -> Array:
    """GC: the context of a softmax over positions through W2 relu(LN(W1 c + b1)) + b2."""
    scores = layer(p, "mask", x).reshape(len(x), 1, -1)
    weight = np.exp(scores - scores.max(-1, keepdims=True))
    weight = weight / weight.sum(-1, keepdims=True)
    context = (x.reshape(*x.shape[:2], -1) * weight).sum(-1)
    p = {k.removeprefix(f"{name}."): v for k, v in p.items() if k.startswith(f"{name}.")}
    hidden = layer(p, "fc1", context)
    centred = hidden - hidden.mean(1, keepdims=True)
    hidden = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
    hidden = np.maximum(hidden * p["norm.weight"] + p["norm.bias"], 0.0)
    return spread(layer(p, "fc2", hidden), x)


def gc(p: Parameters, x: Array, *, fusion: str) -> Array:
    """What GC multiplies by."""
    return np.ones((*x.shape[:2], 1, 1)) if fusion == "add" else sigmoid(gc_delta(p, x, "mul"))


def gc_shift(p: Parameters, x: Array, *, fusion: str) -> Array:
    """What GC adds."""
    return np.zeros((1, 1, 1, 1)) if fusion == "mul" else gc_delta(p, x, "add")


def triplet(p: Parameters, x: Array, *, training: bool) -> Array:
    """Triplet: per plane of two axes the max and mean over the third, convolved."""

    def gate(name: str, over: int) -> Array:
        seen = np.stack([x.max(over), x.mean(over)], axis=1)
        if over == 3:
            seen = seen.swapaxes(2, 3)  # the plane (H, C), not (C, H)
        v = convolved(seen, p[f"{name}.conv.weight"])
        out = sigmoid(batch_norm(p, v, training=training, name=f"{name}.norm"))[:, 0]
        return np.expand_dims(out.swapaxes(1, 2) if over == 3 else out, over)

    return (gate("cw", 2) + gate("hc", 3) + gate("hw", 1)) / 3.0


def ela(p: Parameters, x: Array, *, norm_groups: int) -> Array:
    """ELA: both axes through the same grouped convolution and group norm."""
    weight = p["conv.weight"]

    def along(v: Array) -> Array:
        groups = len(weight) // weight.shape[1]
        out = convolved(v[..., None], weight[..., None], groups=groups)[..., 0]
        grouped = out.reshape(len(v), norm_groups, -1)
        mean, var = grouped.mean(2, keepdims=True), grouped.var(2, keepdims=True)
        normed = ((grouped - mean) / np.sqrt(var + 1e-5)).reshape(v.shape)
        return sigmoid(normed * p["norm.weight"][:, None] + p["norm.bias"][:, None])

    return along(x.mean(3))[:, :, :, None] * along(x.mean(2))[:, :, None, :]


def spa(p: Parameters, x: Array) -> Array:
    """SPA: averages over 1, 4 and 16 regions side by side, through a network without biases."""
    # a channel with an infinite value has no averages
    x = np.where(np.isinf(x).any((2, 3), keepdims=True), np.nan, x)
    z = np.concatenate([averaged(x, n, n).reshape(len(x), -1) for n in (1, 2, 4)], axis=1)
    return spread(sigmoid(mlp(p, z)), x)


def gsop(p: Parameters, x: Array, *, stride: int, training: bool) -> Array:
    """GSoP: covariances of a reduced map, each row through its own linear maps."""
    reduced = layer(p, "reduce", np.maximum(x, 0.0)[:, :, ::stride, ::stride])
    t = np.maximum(batch_norm(p, reduced, training=training), 0.0)
    t = t.reshape(*t.shape[:2], -1)
    dims = t.shape[1]
    covariance = np.stack([np.cov(image, bias=True).reshape(dims, dims) for image in t])
    covariance = batch_norm(p, covariance, training=training, name="row_norm")
    weight = p["rows.weight"].reshape(dims, 4, dims)  # row, its maps, columns
    rows = np.einsum("nrc,rmc->nrm", covariance, weight).reshape(len(x), -1) + p["rows.bias"]
    return sigmoid(layer(p, "excite", rows[..., None, None]))


def dia(
    p: Parameters, x: Array, state: tuple[Array, Array] | None = None, *, pool: Pool
) -> tuple[Array, tuple[Array, Array]]:
    """DIANet: one step of its unit; the gate [N, C, 1, ...], and the state after it."""
    z = pooled(x, pool, p)
    hidden, cell = state or (np.zeros_like(z), np.zeros_like(z))
    both = mlp(p, z, "input1", "input2") + mlp(p, hidden, "state1", "state2")
    i, f, g, o = np.split(both, 4, axis=1)
    cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
    hidden = sigmoid(o) * sigmoid(cell)
    return spread(hidden, x), (hidden, cell)


def dia_first(p: Parameters, x: Array, *, pool: Pool) -> Array:
    return dia(p, x, pool=pool)[0]


def iebn(p: Parameters, x: Array, *, pool: Pool) -> Array:
    """IEBN: what the weight of the norm is multiplied by, from the norm's input."""
    return spread(sigmoid(p["w"] * pooled(x, pool, p) + p["b"]), x)


def iebn_whole(p: Parameters, x: Array, *, pool: Pool, training: bool) -> Array:
    """IEBN: a batch norm with its weight gated per image."""
    plain = {f"norm.{k}": v for k, v in p.items()}
    plain |= {"norm.weight": np.ones(x.shape[1]), "norm.bias": np.zeros(x.shape[1])}
    gamma, beta = (spread(p[k][None], x) for k in ("weight", "bias"))
    return batch_norm(plain, x, training=training) * (gamma * iebn(p, x, pool=pool)) + beta


def bam(
    p: Parameters, x: Array, *, fusion: str, dilation: int, pool: Pool, training: bool
) -> Array:
    """BAM: one plus the sigmoid of a channel network times (or plus) a spatial one."""

    def normed(v: Array, name: str) -> Array:
        return np.maximum(batch_norm(p, v, training=training, name=name), 0.0)

    channel = layer(p, "fc2", normed(layer(p, "fc1", pooled(x, pool, p)), "norm"))[:, :, None, None]
    v = normed(layer(p, "reduce", x), "reduce_norm")
    for name in ("context1", "context2"):
        v = convolved(v, p[f"{name}.weight"], dilation=dilation)
        v = normed(v + p[f"{name}.bias"].reshape(1, -1, 1, 1), f"{name}_norm")
    spatial = layer(p, "spatial", v)
    return 1.0 + sigmoid(channel * spatial if fusion == "mul" else channel + spatial)


def sk_both(
    p: Parameters, x: Array, *, groups: int, pool: Pool, training: bool, stride: int = 1
) -> tuple[Array, Array]:
    """SK: the share of the first branch, and the branches mixed by their shares."""
    branches: list[Array] = []
    for dilation, name in ((1, "near"), (2, "far")):
        u = convolved(x, p[f"{name}.weight"], groups=groups, dilation=dilation, stride=stride)
        branches.append(np.maximum(batch_norm(p, u, training=training, name=f"{name}_norm"), 0.0))
    z = layer(p, "fc", pooled(branches[0] + branches[1], pool, p))
    z = np.maximum(batch_norm(p, z, training=training), 0.0)
    scores = [np.exp(layer(p, f"fc_{name}", z)) for name in ("near", "far")]
    shares = [(s / (scores[0] + scores[1]))[:, :, None, None] for s in scores]
    return shares[0], shares[0] * branches[0] + shares[1] * branches[1]


def sk(p: Parameters, x: Array, *, groups: int, pool: Pool, training: bool) -> Array:
    return sk_both(p, x, groups=groups, pool=pool, training=training)[0]


def sk_whole(p: Parameters, x: Array, *, groups: int, pool: Pool, training: bool) -> Array:
    return sk_both(p, x, groups=groups, pool=pool, training=training)[1]
