"""Gate arithmetic in at least float32: layers applied in the precision of the statistics.

Under autocast the map is half and the parameters are float32; in a pure half model both are half.
In both the gate is computed in float32 and only the final factor is cast down.
"""

import functools
from collections.abc import Callable
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spem.ops.library import runs_eagerly
from spem.ops.stats import compute_dtype

_P = ParamSpec("_P")
_M = TypeVar("_M", bound=nn.Module)
_X = TypeVar("_X")
_R = TypeVar("_R")


def without_autocast(
    method: Callable[Concatenate[_M, _X, _P], _R],
) -> Callable[Concatenate[_M, _X, _P], _R]:
    """Runs a module's method with autocast off for the device type of its input."""

    @functools.wraps(method)
    def wrapped(self: _M, x: _X, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        # PlaneStats is passed here too: its first statistic that is there tells the device.
        device = _device_type(x)
        if device is None or not torch.is_autocast_enabled(device):
            return method(self, x, *args, **kwargs)
        with torch.autocast(device, enabled=False):
            return method(self, x, *args, **kwargs)

    return wrapped


def _device_type(value: object) -> str | None:
    if isinstance(value, Tensor):
        return None if value.device.type == "meta" else value.device.type
    if isinstance(value, tuple):
        for part in value:
            if isinstance(part, Tensor):
                return _device_type(part)
    return None


def cast(parameter: Tensor, like: Tensor) -> Tensor:
    """A parameter in the dtype of the statistics it meets."""
    return parameter if parameter.dtype == like.dtype else parameter.to(like.dtype)


def at_hand(parameter: Tensor) -> Tensor | None:
    """The few values of a parameter as a tensor to read numbers from: on a CPU, no gradient.

    Operators with numbers are less work than those with tensors of one value. None where a gradient
    is recorded, where values come late (CUDA), or where somebody traces and would take them for
    constants.
    """
    if torch.is_grad_enabled() or parameter.device.type != "cpu" or not runs_eagerly(parameter):
        return None
    return parameter.to(compute_dtype(parameter.dtype))


def _bias(layer: nn.Module, z: Tensor) -> Tensor | None:
    bias = getattr(layer, "bias", None)
    return cast(bias, z) if isinstance(bias, Tensor) else None


def linear(layer: nn.Linear, z: Tensor) -> Tensor:
    """``layer(z)`` in the dtype of z, [N, in] -> [N, out]."""
    if layer.weight.dtype == z.dtype:
        return layer(z)
    return F.linear(z, cast(layer.weight, z), _bias(layer, z))


def conv(layer: nn.Conv1d | nn.Conv2d, z: Tensor) -> Tensor:
    """``layer(z)`` in the dtype of z, zero padding."""
    if layer.weight.dtype == z.dtype:
        return layer(z)
    apply = F.conv1d if isinstance(layer, nn.Conv1d) else F.conv2d
    return apply(
        z,
        cast(layer.weight, z),
        _bias(layer, z),
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
    )


def batch_norm(norm: nn.BatchNorm1d | nn.BatchNorm2d, z: Tensor) -> Tensor:
    """``norm(z)`` in the dtype of z; an empty batch leaves the running statistics alone."""
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None
    assert var is not None
    assert norm.momentum is not None  # no module here averages cumulatively
    if z.shape[0] > 0 and norm.weight.dtype == z.dtype:
        return norm(z)
    scale, shift = cast(norm.weight, z), cast(norm.bias, z)
    running = Running(mean, var, norm.num_batches_tracked)
    return normalise(
        z, running, scale, shift, training=norm.training, momentum=norm.momentum, eps=norm.eps
    )


class Running(NamedTuple):
    """Running statistics of a batch norm, and the number of batches in them."""

    mean: Tensor
    var: Tensor
    batches: Tensor | None


def normalise(
    z: Tensor,
    running: Running,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """Batch norm in the dtype of z over any rank; running statistics keep theirs."""
    training = training and z.shape[0] > 0
    mean, var = cast(running.mean, z), cast(running.var, z)
    out = F.batch_norm(z, mean, var, weight, bias, training, momentum, eps)
    if training:
        with torch.no_grad():
            if mean is not running.mean:
                running.mean.copy_(mean)
                running.var.copy_(var)
            if running.batches is not None:
                running.batches.add_(1)
    return out
