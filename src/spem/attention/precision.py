"""Gate arithmetic in at least float32, and layers called in the precision of what they get.

Under autocast the map is half and the parameters are float32; in a pure half model both are half.
In both the gate is computed in float32 and only the final factor is cast down.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode

_P = ParamSpec("_P")
_M = TypeVar("_M", bound=nn.Module)
_X = TypeVar("_X")
_R = TypeVar("_R")

_OWN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)
_FUNCTIONS = (F.linear, F.conv1d, F.conv2d, F.layer_norm, F.group_norm)


def without_autocast(
    method: Callable[Concatenate[_M, _X, _P], _R],
) -> Callable[Concatenate[_M, _X, _P], _R]:
    """Runs a module's method with autocast off for the device type of its input."""

    @functools.wraps(method)
    def wrapped(self: _M, x: _X, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        # Of PlaneStats the first statistic that is there has the device.
        parts = x if isinstance(x, tuple) else (x,)
        devices = [part.device.type for part in parts if isinstance(part, Tensor)]
        device = devices[0] if devices else "meta"
        if device == "meta" or not torch.is_autocast_enabled(device):
            return method(self, x, *args, **kwargs)
        with torch.autocast(device, enabled=False):
            return method(self, x, *args, **kwargs)

    return wrapped


def cast(parameter: Tensor, like: Tensor) -> Tensor:
    """A parameter in the dtype of the statistics it meets."""
    return parameter if parameter.dtype == like.dtype else parameter.to(like.dtype)


def call(layer: nn.Module, z: Tensor) -> Tensor:
    """``layer(z)`` in the dtype of z, [N, ...].

    The layer is called, whatever it has become: hooks, LoRA, pruning, parametrisations and
    quantisation have their effect. Parameters of torch's own layers are cast where they meet z;
    a layer of another kind computes in its own dtype. An empty batch moves no running statistic.
    """
    if z.shape[0] == 0 and isinstance(layer, nn.modules.batchnorm._BatchNorm):  # pyright: ignore[reportPrivateUsage]
        mean, var, weight, bias = layer.running_mean, layer.running_var, layer.weight, layer.bias
        return batch_norm(z, mean, var, weight, bias, training=False, momentum=0.0, eps=layer.eps)
    dtypes = [p.dtype for p in _parameters(layer) if p.is_floating_point()]
    dtype = dtypes[0] if dtypes else z.dtype
    if dtype == z.dtype:
        return layer(z)
    if type(layer) not in _OWN and not is_parametrized(layer):
        return layer(z.to(dtype)).to(z.dtype)
    with _InDtypeOfInput():
        return layer(z)


def _parameters(layer: nn.Module) -> Iterator[Tensor]:
    """The parameters of a layer; in a replica of `torch.nn.DataParallel` they are plain tensors."""
    yield from layer.parameters()
    for part in layer.modules():
        yield from getattr(part, "_former_parameters", {}).values()


class _InDtypeOfInput(TorchFunctionMode):
    """Casts what a layer's function is given to the dtype of the map; of this thread alone."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return batch_norm(*args, **kwargs)
        if func in _FUNCTIONS:
            kwargs = {name: _cast(value, args[0]) for name, value in kwargs.items()}
            args = (args[0], *(_cast(value, args[0]) for value in args[1:]))
        return func(*args, **kwargs)


def _cast(value: Any, like: Tensor) -> Any:
    return cast(value, like) if isinstance(value, Tensor) else value


def batch_norm(
    z: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm` in the dtype of z; running statistics keep theirs."""
    mean, var, weight, bias = (_cast(t, z) for t in (running_mean, running_var, weight, bias))
    out = F.batch_norm(z, mean, var, weight, bias, training, momentum, eps)
    if training and running_mean is not None and running_var is not None:
        with torch.no_grad():
            for kept, moved in ((running_mean, mean), (running_var, var)):
                if moved is not kept:
                    kept.copy_(moved)
    return out
