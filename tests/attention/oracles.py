"""The gates of the published modules in plain numpy, written from their formulas and nothing else.

Every function takes the module's parameters by name (float64 arrays) and a map ``x`` [N, C, ...]
and returns the factor that the map is multiplied by. A pool is written "avg", "max", "min", a
number (a constant lambda), or the name of a parametrisation of a learned lambda: "squares",
"anchored", "sigmoid".
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Parameters = Mapping[str, Array]
Pool = str | float

BN_EPS = 1e-5


def sigmoid(v: Array) -> Array:
    """The logistic function, without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * v))


def planes(x: Array) -> Array:
    """[N, C, ...] as [N, C, pixels]."""
    return x.reshape(x.shape[0], x.shape[1], -1)


def spread(gate: Array, x: Array) -> Array:
    """[N, C] with the spatial axes of x added."""
    return gate.reshape(gate.shape + (1,) * (x.ndim - 2))


def lam(parametrization: str, parameter: Array) -> float:
    """lambda of a learned mix from its parameter."""
    if parametrization in ("squares", "anchored"):
        p0, p1 = parameter
        return float(p0**2 / (p0**2 + p1**2))
    if parametrization == "sigmoid":
        return float(sigmoid(parameter))
    raise AssertionError(parametrization)


def penalty(parametrization: str, parameter: Array) -> float:
    """What one learned mix adds to the penalty."""
    if parametrization == "squares":
        return float(parameter[0] ** 2 + parameter[1] ** 2)
    if parametrization == "anchored":
        return float((parameter[0] ** 2 + parameter[1] ** 2 - 0.5) ** 2)
    if parametrization == "sigmoid":
        return float(parameter) ** 2
    raise AssertionError(parametrization)


def pooled(x: Array, pool: Pool, parameter: Array | None = None) -> Array:
    """[N, C]: the descriptor of every plane."""
    flat = planes(x)
    if pool == "avg":
        return flat.mean(-1)
    if pool == "max":
        return flat.max(-1)
    if pool == "min":
        return flat.min(-1)
    if isinstance(pool, str):
        assert parameter is not None
        weight = lam(pool, parameter)
    else:
        weight = pool
    return weight * flat.max(-1) + (1.0 - weight) * flat.min(-1)


def mix_parameters(parameters: Parameters) -> list[Array]:
    """The parameters of the learned mixes, in the order of the state dict."""
    return [v for k, v in parameters.items() if k.rpartition(".")[2] in ("p", "logit")]


def mix_parameter(parameters: Parameters) -> Array | None:
    """The parameter of the one learned mix, None if there is none."""
    found = mix_parameters(parameters)
    assert len(found) <= 1
    return found[0] if found else None


def reweight(variant: str, parameters: Parameters, high: Array, low: Array) -> Array:
    """R of the paper's Table 4 from the maxima and minima [N, C]."""
    if variant == "none":
        return np.ones_like(high)
    a = parameters["w_r"] * high + parameters["b_r"]
    if variant == "unshared_sum":
        return sigmoid(a + parameters["w_r2"] * low + parameters["b_r2"])
    b = parameters["w_r"] * low + parameters["b_r"]
    return {
        "shared_sum": lambda: sigmoid(a + b),
        "sum_of_sigmoids": lambda: sigmoid(a) + sigmoid(b),
        "product_of_sigmoids": lambda: sigmoid(a) * sigmoid(b),
        "sigmoid_of_product": lambda: sigmoid(a * b),
        "linear_sum": lambda: a + b,
        "linear_product": lambda: a * b,
        "double_sigmoid": lambda: sigmoid(sigmoid(a) + sigmoid(b)),
        "max_only": lambda: sigmoid(a),
        "min_only": lambda: sigmoid(b),
    }[variant]()


def spem(parameters: Parameters, x: Array, *, form: str, variant: str, pool: Pool) -> Array:
    """SPEM in the form `text`, `figure` or `code`."""
    high, low = pooled(x, "max"), pooled(x, "min")
    u = pooled(x, pool, mix_parameter(parameters))
    r = reweight(variant, parameters, high, low)
    w_e, b_e = parameters["w_e"], parameters["b_e"]
    if form == "text":
        gate = sigmoid(w_e * u + b_e) * r
    elif form == "figure":
        gate = sigmoid((w_e * u + b_e) * r)
    elif form == "code":
        gate = sigmoid(w_e * (parameters["w_r"] * u + parameters["b_r"]) + b_e) * r
    else:
        raise AssertionError(form)
    return spread(gate, x)


def mlp(parameters: Parameters, z: Array) -> Array:
    """W2 relu(W1 z + b1) + b2; biases that are not there are zero."""
    hidden = z @ parameters["fc1.weight"].T + parameters.get("fc1.bias", np.zeros(()))
    return np.maximum(hidden, 0.0) @ parameters["fc2.weight"].T + parameters.get(
        "fc2.bias", np.zeros(())
    )


def se(parameters: Parameters, x: Array, *, pool: Pool) -> Array:
    """SE: s(W2 relu(W1 z + b1) + b2)."""
    return spread(sigmoid(mlp(parameters, pooled(x, pool, mix_parameter(parameters)))), x)


def batch_norm(parameters: Parameters, v: Array, *, training: bool) -> Array:
    """Batch norm of [N, C, ...] with the parameters `norm.*`; in training of the batch (biased)."""
    shape = (1, -1) + (1,) * (v.ndim - 2)
    if training:
        axes = (0, *range(2, v.ndim))
        mean, var = v.mean(axes), v.var(axes)
    else:
        mean, var = parameters["norm.running_mean"], parameters["norm.running_var"]
    normed = (v - mean.reshape(shape)) / np.sqrt(var.reshape(shape) + BN_EPS)
    return normed * parameters["norm.weight"].reshape(shape) + parameters["norm.bias"].reshape(
        shape
    )


def running(before: Array, batch: Array, momentum: float) -> Array:
    """A running statistic after one training batch."""
    return (1.0 - momentum) * before + momentum * batch


def cbam_spatial_input(
    parameters: Parameters, x: Array, pools: tuple[Pool, Pool]
) -> tuple[Array, Array]:
    """CBAM's channel gate [N, C, 1, 1] and what its spatial norm sees, [N, 1, H, W]."""
    learned = iter(mix_parameters(parameters))
    total = np.zeros(x.shape[:2])
    for pool in pools:
        parameter = next(learned) if pool in ("squares", "anchored", "sigmoid") else None
        total = total + mlp(parameters, pooled(x, pool, parameter))
    channel = spread(sigmoid(total), x)
    scaled = x * channel
    maps = np.stack([scaled.max(1), scaled.mean(1)], axis=1)
    weight = parameters["spatial.weight"]
    kernel = weight.shape[-1]
    pad = (kernel - 1) // 2
    padded = np.pad(maps, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    height, width = x.shape[2:]
    out = np.zeros((x.shape[0], 1, height, width))
    for i in range(kernel):
        for j in range(kernel):
            window = padded[:, :, i : i + height, j : j + width]
            out[:, 0] += (window * weight[0, :, i, j].reshape(1, 2, 1, 1)).sum(1)
    return channel, out


def cbam(parameters: Parameters, x: Array, *, pools: tuple[Pool, Pool], training: bool) -> Array:
    """CBAM: the channel gate, then on the scaled map s(BN(conv([max_C; mean_C])))."""
    channel, conv = cbam_spatial_input(parameters, x, pools)
    return channel * sigmoid(batch_norm(parameters, conv, training=training))


def eca(parameters: Parameters, x: Array, *, pool: Pool) -> Array:
    """ECA: a convolution along the channel axis of the descriptor, zero padding, no bias."""
    z = pooled(x, pool, mix_parameter(parameters))
    weight = parameters["conv.weight"].reshape(-1)
    pad = (len(weight) - 1) // 2
    padded = np.pad(z, ((0, 0), (pad, pad)))
    out = np.zeros_like(z)
    for i, w in enumerate(weight):
        out += w * padded[:, i : i + z.shape[1]]
    return spread(sigmoid(out), x)


def srm_style(parameters: Parameters, x: Array, pool: Pool) -> Array:
    """SRM's z [N, C]: a times the descriptor plus d times the deviation (unbiased variance)."""
    deviation = np.sqrt(planes(x).var(-1, ddof=1) + 1e-5)
    return (
        parameters["a"] * pooled(x, pool, mix_parameter(parameters)) + parameters["d"] * deviation
    )


def srm(parameters: Parameters, x: Array, *, pool: Pool, training: bool) -> Array:
    """SRM: s(BN(z))."""
    z = srm_style(parameters, x, pool)
    return spread(sigmoid(batch_norm(parameters, z, training=training)), x)


def sge(parameters: Parameters, x: Array, *, groups: int, pool: Pool) -> Array:
    """SGE: per group the map of similarities to the descriptor, normalised over the pixels."""
    n, c = x.shape[:2]
    weighted = x * spread(pooled(x, pool, mix_parameter(parameters)), x)
    q = weighted.reshape(n, groups, c // groups, -1).sum(2)  # [N, G, pixels]
    t = (q - q.mean(-1, keepdims=True)) / (q.std(-1, ddof=1, keepdims=True) + 1e-5)
    gate = sigmoid(t * parameters["w"].reshape(-1, 1) + parameters["b"].reshape(-1, 1))
    return np.repeat(gate, c // groups, axis=1).reshape(x.shape)


def scale(parameters: Parameters, x: Array) -> Array:
    """The control: a learned factor per channel, no input."""
    return np.broadcast_to(spread(parameters["factor"][None], x), x.shape[:2] + (1,) * (x.ndim - 2))
