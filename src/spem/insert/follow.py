"""Finding the ends of residual branches in any network, by following one forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spem.insert.families import is_norm

_ADDITIONS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
_CONVOLUTIONS = {
    *("conv1d", "conv2d", "conv3d"),
    *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
}
_KEEPING = {
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "alpha_dropout"),
    *("contiguous", "to", "float", "half", "clone"),
}
"""What ends a branch stays its end after these."""
_SHAPING = {
    *("relu", "relu_", "relu6", "leaky_relu", "elu", "gelu", "silu", "mish", "hardswish"),
    *("sigmoid", "tanh", "prelu", "hardtanh", "mul", "mul_", "__mul__", "__rmul__", "__imul__"),
    *("div", "__truediv__"),
}
"""The same, unless a module made them: an activation or a layer scale is an end itself."""
_CHANNELS_SECOND = {*_CONVOLUTIONS, "batch_norm", "group_norm", "instance_norm"}
_CHANNELS_LAST = {"linear", "layer_norm"}
_MOVING = {
    *("permute", "transpose", "swapaxes", "movedim", "moveaxis"),
    *("reshape", "view", "flatten", "unflatten"),
}
"""Operations after which the axis of the channels is not known."""
_FOLDING = ("fuse", "reparameterize", "switch_to_deploy")
"""Methods that give a layer to put in the place of a module, and would leave attention out."""


class Call(NamedTuple):
    """A module that ran, and the module that holds it."""

    module: nn.Module
    parent: nn.Module


class End(NamedTuple):
    """What ends a residual branch, and how many convolutions the branch has."""

    call: Call
    convolutions: int
    earlier: Call | None = None
    """What ends it but for an activation."""


class Node:
    """A tensor of the forward pass.

    Attributes:
        parents: What it was computed from.
        depth: Convolutions on the longest path to it.
        is_conv: Whether it is the output of a convolution.
        ends: The modules whose output it is, from the inside out.
        shaped: Whether a function, no module, came after them.
        earlier: The modules before that function, where a module holds it.
        passed: Whether these modules only handed it on, as an identity does.
        channels_last: Whether the last axis is that of the channels, as in maps of tokens; None if
            nothing says so.
    """

    def __init__(self, number: int, parents: list[Node], *, is_conv: bool = False) -> None:
        self.number, self.parents, self.is_conv = number, parents, is_conv
        self.depth = max((p.depth for p in parents), default=0) + is_conv
        last = [parent.channels_last for parent in parents]
        self.channels_last = True if True in last else None if None in last else False
        self.ends: list[Call] = []
        self.earlier: list[Call] = []
        self.shaped = self.passed = False


class Forward(TorchFunctionMode):
    """Follows a forward pass.

    An addition joins a branch with what it came from if the branch descends from the other operand
    (or from its source, where the shortcut has at most one convolution and the branch two).

    Attributes:
        ends: What ends a residual branch, in the order of the additions.
        norms: The last norm of each resolution, after a convolution.
        maps: Modules whose output was a map, with its shape, in the order they finished.
        convolutions: How many ran.
        additions: How many added two maps.
        calls: How often a module ran, as the attribute of the one that holds it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[End] = []
        self.norms: dict[tuple[int, ...], Call] = {}
        self.maps: list[tuple[Call, tuple[int, ...]]] = []
        self.convolutions = self.additions = 0
        self.calls: Counter[tuple[int, int]] = Counter()
        self._nodes: dict[int, Node] = {}
        self._running: list[tuple[nn.Module, int]] = []
        self._alive: list[Tensor] = []  # a tensor's number is its own as long as it lives
        self._count = 0

    def enter(self, module: nn.Module, _inputs: object) -> None:
        """Pre-hook of every module."""
        self._running.append((module, self._count))

    def leave(self, module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        """Hook of every module: writes down what it has node."""
        _, began = self._running.pop()
        if not isinstance(output, Tensor) or not 3 <= output.dim() <= 5 or not self._running:
            return
        call = Call(module, self._holder(module))
        self.calls[id(module), id(call.parent)] += 1
        node = self._of(output)
        if node.shaped and node.number > began:
            node.earlier, node.ends, node.shaped = node.ends, [], False
        passed = any(value is output for value in inputs)
        if node.passed and not passed and node.number > began:
            node.ends = []  # this module made what identities in it handed on
        node.passed = passed and (node.passed or not node.ends)
        node.ends = [*node.ends, call]
        shape = tuple(output.shape)
        self.maps.append((call, shape))
        if is_norm(module) and node.depth and not node.channels_last and prod(shape[2:]) > 1:
            self.norms.pop(shape[2:], None)  # so that the order is that of the last ones
            self.norms[shape[2:]] = call

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs an operation and writes down what it was made from."""
        del types
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        tensors = [value for value in _flat((*args, *kwargs.values())) if isinstance(value, Tensor)]
        inputs = [t for t in tensors if not isinstance(t, nn.Parameter) and t.dim() >= 2]
        conv = name in _CONVOLUTIONS
        if conv:
            inputs = inputs[:1]  # a weight may be computed, too
        parents = [self._of(tensor) for tensor in inputs]
        shapes = [tensor.shape for tensor in inputs]
        if name in _ADDITIONS and len(inputs) == 2 and shapes[0] == shapes[1]:
            self._added(parents[0], parents[1], shapes[0])
        self.convolutions += conv
        output = func(*args, **kwargs)
        largest = max(range(len(shapes)), key=lambda i: prod(shapes[i]), default=None)
        for tensor in _flat([output]):
            if not isinstance(tensor, Tensor):
                continue
            node = self._new(tensor, parents, is_conv=conv)
            if name in _CHANNELS_LAST:
                node.channels_last = True
            elif name in _CHANNELS_SECOND:
                node.channels_last = False
            elif name in _MOVING:
                node.channels_last = None
            kept = name in _KEEPING or name in _SHAPING
            if kept and largest is not None and tensor.shape == shapes[largest]:
                before = parents[largest]
                node.ends, node.shaped = before.ends, before.shaped or name in _SHAPING
        return output

    def _of(self, tensor: Tensor) -> Node:
        return self._nodes.get(id(tensor)) or self._new(tensor, [])

    def _new(self, tensor: Tensor, parents: list[Node], *, is_conv: bool = False) -> Node:
        self._count += 1
        node = Node(self._count, parents, is_conv=is_conv)
        self._nodes[id(tensor)] = node
        self._alive.append(tensor)
        return node

    def _holder(self, module: nn.Module) -> nn.Module:
        """The innermost module that runs and holds this one; the innermost of all if none does."""
        for running, _ in reversed(self._running):
            if any(child is module for child in running.children()):
                return running
        return self._running[-1][0]

    def _added(self, one: Node, two: Node, shape: torch.Size) -> None:
        if not 3 <= len(shape) <= 5:
            return
        self.additions += 1
        for shortcut, branch in ((one, two), (two, one)):
            convolutions = _convolutions(shortcut, branch)
            if convolutions and branch.ends and not branch.channels_last:
                earlier = _outermost_folded(branch.earlier) if branch.earlier else None
                end = End(_outermost_folded(branch.ends), convolutions, earlier)
                if all(end.call != other.call for other in self.ends):
                    self.ends.append(end)
                return


def follow(model: nn.Module, run: Callable[[], object]) -> Forward:
    """Follows a forward pass of a network.

    Args:
        model: The network.
        run: What runs it.
    """
    forward = Forward()
    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(forward.enter))
            handles.append(module.register_forward_hook(forward.leave))
        with torch.no_grad(), forward:
            run()
    finally:
        for handle in handles:
            handle.remove()
    return forward


def ends_of_branches(forward: Forward) -> tuple[list[End], list[End]]:
    """The ends of branches with two convolutions or more, and of those with one.

    An activation that a block uses more than once is no place for attention: what is before it is.
    """
    ends = [
        end._replace(call=end.earlier)
        if end.earlier is not None and forward.calls[id(end.call.module), id(end.call.parent)] > 1
        else end
        for end in forward.ends
    ]
    return [e for e in ends if e.convolutions > 1], [e for e in ends if e.convolutions == 1]


def summary(forward: Forward) -> str:
    """What a forward pass showed, in words."""
    parts = [f"{forward.convolutions} convolutions"]
    if forward.additions:
        parts.append(f"{forward.additions} additions of maps, none joins a branch of convolutions")
    else:
        parts.append("no addition joins a branch with what it came from")
    if not forward.norms:
        parts.append("no norm of maps")
    return ", ".join(parts)


def suggestion(model: nn.Module, forward: Forward) -> str | None:
    """A ``where=`` that would work: the commonest kind of module that convolves and gives a map."""
    kinds = Counter(
        type(call.module).__name__
        for call, _ in forward.maps
        if call.module is not model
        and any(hasattr(part, "kernel_size") for part in call.module.modules())
        and any(child is call.module for child in call.parent.children())
    )
    # What has parts comes before bare convolutions: a block rather than its layers.
    composed = {type(m).__name__ for m in model.modules() if next(m.children(), None) is not None}
    chosen = sorted(kinds, key=lambda kind: (kind not in composed, -kinds[kind]))
    chosen = [kind for kind in chosen if kind != "Sequential"] or chosen
    if not chosen:
        return None
    return f"where=lambda m: m if type(m).__name__ == {chosen[0]!r} else None"


def _convolutions(shortcut: Node, branch: Node) -> int:
    """The convolutions of a branch that joins what it came from; 0 if it does not."""
    source, crossed = shortcut, 0
    sources: list[tuple[Node, int]] = [(shortcut, 1)]
    while len(source.parents) == 1:
        crossed += source.is_conv
        if crossed > 1:
            break
        source = source.parents[0]
        sources.append((source, 2))
    ancestors = set(_ancestors(branch, min(s.number for s, _ in sources)))
    for node, least in sources:
        if node in ancestors and node is not branch and branch.depth - node.depth >= least:
            return branch.depth - node.depth
    return 0


def _ancestors(node: Node, oldest: int) -> Iterator[Node]:
    found: set[Node] = set()
    waiting = [node]
    while waiting:
        one = waiting.pop()
        if one not in found and one.number >= oldest:
            found.add(one)
            waiting += one.parents
            yield one


def _outermost_folded(ends: list[Call]) -> Call:
    """The innermost end; or the outermost around it that folds what is in it into one layer."""
    folding = [call for call in ends if any(hasattr(call.module, name) for name in _FOLDING)]
    return folding[-1] if folding else ends[0]


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        elif isinstance(value, dict):
            yield from _flat(value.values())
        else:
            yield value
