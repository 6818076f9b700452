"""Finding the ends of residual branches in a network that the table of families does not know."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_ADDITIONS = {
    torch.add,
    Tensor.add,
    Tensor.add_,
    Tensor.__add__,
    Tensor.__radd__,
    Tensor.__iadd__,
}
_CONVOLUTIONS = {torch.conv1d, torch.conv2d, torch.conv3d}
_KEEPING = {"dropout", "dropout2d", "feature_dropout", "contiguous", "to", "float"}
"""Operations that may give their input as it is."""
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm)  # pyright: ignore[reportPrivateUsage]  # the base of batch and instance norms


class Additions(TorchFunctionMode):
    """Follows a forward pass and finds the norms whose outputs are added to what they came from.

    Every tensor has a depth: the convolutions on its longest path. A block is a module that adds
    two maps; counted from its input, its branch has two convolutions at least and its shortcut one
    at most. So parallel branches of equal standing are left out, and so is a shortcut's norm.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[nn.Module] = []
        self._depth: dict[int, int] = {}
        self._norm: dict[int, nn.Module] = {}
        self._inside: list[int] = []  # the depths of the inputs of the modules that run
        self._alive: list[Tensor] = []  # a tensor's number is its own as long as it lives

    def enter(self, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Pre-hook of every module."""
        depths = [self._of(value) for value in _flat(inputs) if isinstance(value, Tensor)]
        self._inside.append(min(depths, default=0))

    def leave(self, module: nn.Module, _inputs: object, output: object) -> None:
        """Hook of every module: writes down what a norm has made."""
        self._inside.pop()
        known = isinstance(module, _NORMS) or type(module).__name__.startswith("FrozenBatchNorm")
        if known and isinstance(output, Tensor) and output.dim() == 4:
            self._norm[id(output)] = module
            self._alive.append(output)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs an operation and writes down the depth of what it gives."""
        del types
        inputs = [value for value in _flat(args) if isinstance(value, Tensor)]
        if func in _ADDITIONS and len(inputs) == 2 and inputs[0].shape == inputs[1].shape:
            self._added(*inputs)
        depth = max((self._of(tensor) for tensor in inputs), default=0)
        depth += func in _CONVOLUTIONS
        output = func(*args, **(kwargs or {}))
        kept = getattr(func, "__name__", "") in _KEEPING
        given = {id(tensor) for tensor in inputs}
        for tensor in _flat([output]):
            if isinstance(tensor, Tensor):
                self._depth[id(tensor)] = depth
                self._alive.append(tensor)
                # What works in place, such as an activation, gives its input: no norm's output now.
                if id(tensor) in given and not kept:
                    self._norm.pop(id(tensor), None)
        return output

    def _of(self, tensor: Tensor) -> int:
        return self._depth.get(id(tensor), 0)

    def _added(self, first: Tensor, second: Tensor) -> None:
        shortcut, branch = sorted((first, second), key=self._of)
        start = self._inside[-1] if self._inside else 0
        norm = self._norm.get(id(branch))
        residual = self._of(branch) - start >= 2 and self._of(shortcut) - start <= 1
        if norm is not None and residual and all(norm is not end for end in self.ends):
            self.ends.append(norm)


def ends_of_branches(model: nn.Module, run: Callable[[], object]) -> list[nn.Module]:
    """The norms that end a residual branch, in the order of the forward pass.

    Args:
        model: The network.
        run: A forward pass of it.
    """
    additions = Additions()
    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(additions.enter))
            handles.append(module.register_forward_hook(additions.leave))
        with torch.no_grad(), additions:
            run()
    finally:
        for handle in handles:
            handle.remove()
    return additions.ends


def _flat(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value
