"""Finding the ends of residual branches in any network, by following one forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from math import prod
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

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
_CHANNELS_LAST = {
    **dict.fromkeys((*_CONVOLUTIONS, "batch_norm", "group_norm", "instance_norm"), False),
    **dict.fromkeys(("linear", "layer_norm"), True),
    **dict.fromkeys(("permute", "transpose", "swapaxes", "movedim", "moveaxis")),
    **dict.fromkeys(("reshape", "view", "flatten", "unflatten")),
}
"""Whether the axis of the channels is the last one after an operation; None is unknown."""
_FOLDING = ("fuse", "reparameterize", "switch_to_deploy")
"""Methods that give a layer to put in the place of a module, and would leave attention out."""
_UNNORMED = ("forward_fuse", "fuseforward")
"""Forwards that a module has for when its norm was folded away; its activation is still called."""


class Call(NamedTuple):
    """A module that ran, and the module that holds it."""

    module: nn.Module
    parent: nn.Module


class Node:
    """A tensor of the forward pass, and what it was computed from."""

    def __init__(self, number: int, parents: list[Node], *, is_conv: bool = False) -> None:
        self.number, self.parents, self.is_conv = number, parents, is_conv
        self.depth = max((p.depth for p in parents), default=0) + is_conv
        """Convolutions on the longest path to it."""
        last = [parent.channels_last for parent in parents]
        self.channels_last = True if True in last else None if None in last else False
        self.ends: list[Call] = []  # the modules whose output it is, from the inside out
        self.earlier: list[Call] = []  # those before a function that a module around it holds
        self.shaped = False  # whether a function, no module, came after the ends
        self.passed = False  # whether the ends only handed it on, as an identity does


class Forward(TorchFunctionMode):
    """Follows a forward pass.

    An addition joins a branch with what it came from if the branch descends from the other operand
    (or from its source, where the shortcut has at most one convolution and the branch two).
    """

    def __init__(self) -> None:
        super().__init__()
        self.ends: dict[Call, tuple[Call | None, int]] = {}
        """What ends a residual branch, what does but for an activation, and its convolutions."""
        self.norms: dict[tuple[int, ...], Node] = {}
        """What the last norm of each resolution made, after a convolution."""
        self.calls: Counter[Call] = Counter()
        """How often a module that gives a map ran."""
        self.convolutions = self.additions = 0
        self._nodes: dict[int, Node] = {}
        self._running: list[tuple[nn.Module, int]] = []
        self._alive: list[Tensor] = []  # a tensor's number is its own as long as it lives

    def enter(self, module: nn.Module, _inputs: object) -> None:
        """Pre-hook of every module."""
        self._running.append((module, len(self._alive)))

    def leave(self, module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        """Hook of every module: writes down what it has made."""
        _, began = self._running.pop()
        if not isinstance(output, Tensor) or not 3 <= output.dim() <= 5 or not self._running:
            return
        call = Call(module, self._holder(module))
        self.calls[call] += 1
        node = self._node(output)
        if node.shaped and node.number > began:
            node.earlier, node.ends, node.shaped = node.ends, [], False
        passed = any(value is output for value in inputs)
        if node.passed and not passed and node.number > began:
            node.ends = []  # this module made what identities in it handed on
        node.passed = passed and (node.passed or not node.ends)
        node.ends = [*node.ends, call]
        extents = tuple(output.shape[2:])
        is_map = output.shape[1] > 1 and prod(extents) > 1 and not node.channels_last
        if is_map and is_norm(module) and node.depth:
            self.norms.pop(extents, None)  # so that the order is that of the last ones
            self.norms[extents] = node

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs an operation and writes down what it was made from."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        inputs = [t for t in tensors if not isinstance(t, nn.Parameter) and t.dim() >= 2]
        conv = name in _CONVOLUTIONS
        if conv:
            inputs = inputs[:1]  # a weight may be computed, too
        parents = [self._node(tensor) for tensor in inputs]
        shapes = [tensor.shape for tensor in inputs]
        if name in _ADDITIONS and len(inputs) == 2 and shapes[0] == shapes[1]:
            self._added(*parents, rank=len(shapes[0]))
        self.convolutions += conv
        output = func(*args, **kwargs)
        # Of a map and a gate that was made as large: the map.
        size = lambda i: (prod(shapes[i]), parents[i].channels_last is False)  # noqa: E731
        largest = max(range(len(shapes)), key=size, default=None)
        for tensor in tree_leaves(output):
            if not isinstance(tensor, Tensor):
                continue
            node = self._made(tensor, parents, is_conv=conv)
            node.channels_last = _CHANNELS_LAST.get(name, node.channels_last)
            kept = name in _KEEPING or name in _SHAPING
            if kept and largest is not None and tensor.shape == shapes[largest]:
                before = parents[largest]
                node.ends, node.shaped = before.ends, before.shaped or name in _SHAPING
                node.channels_last = before.channels_last
        return output

    def _node(self, tensor: Tensor) -> Node:
        return self._nodes.get(id(tensor)) or self._made(tensor, [])

    def _made(self, tensor: Tensor, parents: list[Node], *, is_conv: bool = False) -> Node:
        self._alive.append(tensor)
        node = self._nodes[id(tensor)] = Node(len(self._alive), parents, is_conv=is_conv)
        return node

    def _holder(self, module: nn.Module) -> nn.Module:
        """The innermost module that runs and holds this one; the innermost of all if none does."""
        running = [parent for parent, _ in reversed(self._running)]
        return next((m for m in running if holds(m, module)), running[0])

    def _added(self, one: Node, two: Node, *, rank: int) -> None:
        if not 3 <= rank <= 5:
            return
        self.additions += 1
        for shortcut, branch in ((one, two), (two, one)):
            convolutions = _convolutions(shortcut, branch)
            if convolutions and branch.ends and not branch.channels_last:
                call, earlier = _lasting(branch.ends), _lasting(branch.earlier)
                assert call is not None
                self.ends.setdefault(call, (earlier, convolutions))
                return

    def ranks(self) -> list[list[tuple[Call, str]]]:
        """Places for attention with the reason for each, the best kind first.

        These are the ends of branches of two convolutions or more, those of one, and the last norm
        of each resolution. An activation that a block uses more than once is not a place: what is
        before it is.
        """
        ranks: list[list[tuple[Call, str]]] = [[], [], []]
        for call, (earlier, number) in self.ends.items():
            place = earlier if earlier is not None and self.calls[call] > 1 else call
            reason = f"ends a residual branch of {number} convolution{'s' if number > 1 else ''}"
            ranks[number == 1].append((place, reason))
        for extents, node in self.norms.items() if self.convolutions > 1 else ():
            call = _lasting(node.ends)
            assert call is not None
            if _has(call.parent, _UNNORMED):
                call = [other for other in self.calls if other.parent is call.parent][-1]
            reason = f"last norm at {' x '.join(map(str, extents))}, no residual branches"
            ranks[2].append((call, reason))
        return ranks


def follow(model: nn.Module, run: Callable[[], object]) -> Forward:
    """Follows the forward pass of a network that ``run()`` makes."""
    forward = Forward()
    with ExitStack() as stack:
        for module in model.modules():
            stack.enter_context(module.register_forward_pre_hook(forward.enter))
            stack.enter_context(module.register_forward_hook(forward.leave))
        with forward:
            run()
    return forward


def summary(forward: Forward) -> str:
    """What a forward pass showed, in words."""
    added = "no addition joins a branch with what it came from"
    if forward.additions:
        added = f"{forward.additions} additions of maps, none joins a branch of convolutions"
    norms = "" if forward.norms else ", no norm of maps"
    return f"{forward.convolutions} convolutions, {added}{norms}"


def suggestion(forward: Forward) -> str | None:
    """A ``where=`` that would work: the commonest kind of convolution that gives a map."""
    kinds = Counter(type(m).__name__ for m, _ in forward.calls if hasattr(m, "out_channels"))
    best = max(kinds, key=lambda kind: kinds[kind], default=None)
    return best and f"where=lambda m: m if type(m).__name__ == {best!r} else None"


def holds(parent: nn.Module, module: nn.Module) -> bool:
    """Whether a module is one of those that another one holds."""
    return any(child is module for child in parent.children())


def _convolutions(shortcut: Node, branch: Node) -> int:
    """The convolutions of a branch that joins what it came from; 0 if it does not."""
    source, crossed = shortcut, 0
    sources = [(shortcut, 1)]
    while len(source.parents) == 1:
        crossed += source.is_conv
        if crossed > 1:
            break
        source = source.parents[0]
        sources.append((source, 2))
    ancestors: set[Node] = set()
    waiting = [branch]
    while waiting:
        node = waiting.pop()
        if node not in ancestors and node.number >= source.number:
            ancestors.add(node)
            waiting += node.parents
    depths = ((branch.depth - node.depth, least) for node, least in sources if node in ancestors)
    return next((depth for depth, least in depths if depth >= least), 0)


def _has(module: nn.Module, methods: tuple[str, ...]) -> bool:
    return any(hasattr(module, name) for name in methods)


def _lasting(ends: list[Call]) -> Call | None:
    """The innermost end; or the outermost one that the folding of layers around it leaves there."""
    replaced = [call for call in ends if _has(call.module, _FOLDING)]
    kept = [call for call in ends if _has(call.parent, _UNNORMED)]
    return (replaced[-1:] or kept[-1:] or ends[:1] or [None])[0]
