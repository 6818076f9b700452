"""Gates become constants inside the norms before them; no attention is left."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from spem.attention import AttentionSpec, ChannelAttention
from spem.insert.attach import forget, put
from spem.insert.families import is_norm, rule_of
from spem.insert.fused import unfuse
from spem.insert.start import IdentityStart
from spem.insert.wrap import Around, BeforeModule
from spem.ops.library import has_hooks

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Differences, relative to the largest output, between gates held constant and gates folded."""


@dataclass(frozen=True)
class FoldedSite:
    """One gate that became a constant.

    Attributes:
        name: Dotted name of the attention.
        channels: C.
        gate: Mean of the constant over channels.
        spread: How far the gate of an image strays from the constant: the root mean square over
            images and channels, relative to that of the constant. 0 is a gate that was constant.
    """

    name: str
    channels: int
    gate: float
    spread: float


@dataclass(frozen=True)
class FoldReport:
    """What folding did to the outputs on the batches it was given.

    Attributes:
        sites: One entry a gate, in the order of the network.
        images: Number of images.
        difference: Largest difference of an output, relative to the largest output.
        agreement: Share of images whose highest class stays; None if the output is no [N, K].
        accuracy_before: Top-1 accuracy of the network with attention; None without labels.
        accuracy_after: The same after folding.
    """

    sites: tuple[FoldedSite, ...]
    images: int
    difference: float
    agreement: float | None = None
    accuracy_before: float | None = None
    accuracy_after: float | None = None

    def __str__(self) -> str:
        """The report as lines of text."""
        width = max(len(site.name) for site in self.sites)
        lines = [f"{'attention':{width}}  channels    gate  spread"]
        lines += [
            f"{site.name:{width}}  {site.channels:8}  {site.gate:6.3f}  {100 * site.spread:5.1f}%"
            for site in self.sites
        ]
        lines.append(
            f"{len(self.sites)} gates folded over {self.images} images; outputs differ by at most "
            f"{100 * self.difference:.2g}% of the largest."
        )
        if self.agreement is not None:
            lines.append(f"Top-1 agreement: {100 * self.agreement:.2f}%.")
        if self.accuracy_before is not None and self.accuracy_after is not None:
            lines.append(
                f"Accuracy: {100 * self.accuracy_before:.2f}% with attention, "
                f"{100 * self.accuracy_after:.2f}% folded."
            )
        return "\n".join(lines)


class _Gate(NamedTuple):
    """An attention, where it stands, and what its constant is multiplied into."""

    name: str
    attention: ChannelAttention
    parent: nn.Module
    key: str
    into: str
    """Name of the norm, convolution or layer scale."""


def fold(
    model: nn.Module,
    batches: Iterable[Tensor | Sequence[Tensor]],
    labels: Tensor | Sequence[int] | None = None,
) -> FoldReport:
    """Replaces each gate by its mean over images and multiplies it into the norm before it.

    Formula:
        v x with x = gamma n + beta becomes (m gamma) n + m beta, m[c] the mean of v[n, c] over the
        images.

    No attention is left: the network is changed in place into the plain one, with its operations
    and its speed in every runtime. What differed between images is lost, and the report
    says how much; training the folded network further for an epoch recovers part of it. If anything
    fails, the network is as it was.

    Args:
        model: A trained network with attention, from `spem.attach` or `spem.resnet`.
        batches: Typical inputs [N, C, ...], or pairs (inputs, labels), as a data loader gives them;
            gone through twice. A few hundred images do.
        labels: Classes of all images in the order of the batches; None takes those of the pairs.

    Returns:
        What it did to gates and outputs.

    Raises:
        ValueError: No attention, a gate that is no factor per channel (it differs between
            positions, adds to the map, or stands in place of a layer), nothing before it that can
            take the factor, or no images.
    """
    gates = _gates(model)
    batches = list(batches) if isinstance(batches, Iterator) else batches
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            means, sites = _measured(model, gates, _inputs(model, batches, None))
            folded = copy.deepcopy(model)
            _apply(folded, _gates(folded), means)
            report = _compared(model, folded, gates, means, sites, _inputs(model, batches, labels))
    finally:
        for module, training in modes:
            module.training = training
    with torch.no_grad():
        _apply(model, gates, means)
    return report


def _gates(model: nn.Module) -> list[_Gate]:
    """Every attention of a network, once.

    Raises:
        ValueError: There is none, or one cannot be folded.
    """
    found: list[_Gate] = []
    inside: set[int] = set()
    taken: dict[str, str] = {}
    names = {id(module): name for name, module in model.named_modules()}
    for name, module in model.named_modules():
        if not isinstance(module, ChannelAttention) or id(module) in inside:
            continue
        inside |= {id(part) for part in module.modules()}
        above, _, key = name.rpartition(".")
        parent = model.get_submodule(above)
        if not name:
            raise ValueError("fold: the model is one attention. Pass the network that holds it.")
        why = _no_factor(module)
        into = None if why else _before(model, parent, above, key)
        if into is None:
            raise ValueError(
                f"fold: {name} {why or 'follows no norm, convolution or layer scale'}; only a "
                f"factor per channel after one of these becomes a constant."
            )
        into = names.get(id(_named(model, into)), into)
        if into in taken:
            raise ValueError(f"fold: {name} and {taken[into]} share {into}; each needs its own.")
        taken[into] = name
        found.append(_Gate(name, module, parent, key, into))
    if not found:
        raise ValueError(f"fold: there is no attention in {type(model).__name__}.")
    return found


def _no_factor(attention: ChannelAttention) -> str | None:
    """Why a gate is no factor per channel, as far as its class says."""
    inner = attention.inner if isinstance(attention, IdentityStart) else attention
    needs, kind = inner.needs, inner.name or type(inner).__name__
    if getattr(needs, "adds", False):
        return f"({kind}) adds to the map"
    if getattr(needs, "replaces", None) is not None:
        return f"({kind}) stands in place of a layer"
    if getattr(needs, "shared", False) or type(inner).forward is not ChannelAttention.forward:
        return f"({kind}) does more than multiply its map"
    return None


def _before(model: nn.Module, parent: nn.Module, above: str, key: str) -> str | None:
    """Name of what takes the factor of an attention; None if nothing can."""
    if isinstance(parent, Around) and not isinstance(parent, BeforeModule):
        path = f"{above}.{parent.inner}"
    else:
        block_name = above.rpartition(".")[0] if isinstance(parent, BeforeModule) else above
        block = model.get_submodule(block_name)
        rule = rule_of(block)
        slot = above.rpartition(".")[2] if isinstance(parent, BeforeModule) else key
        if rule is None or not rule.reads or slot not in rule.find(block):
            return None
        path = f"{block_name}.{rule.reads}" if block_name else rule.reads
    target = _named(model, path)
    while type(target) is nn.Sequential and len(target):
        path, target = f"{path}.{len(target) - 1}", target[-1]
    return path if _factors(target) else None


def _named(model: nn.Module, path: str) -> object:
    found: object = model
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def _factors(target: object) -> list[Tensor]:
    """The tensors of a layer that a factor per channel multiplies, along their first axis."""
    if isinstance(target, nn.Parameter):
        return [target]
    if not isinstance(target, nn.Module) or parametrize.is_parametrized(target):
        return []
    act = getattr(target, "act", None)
    shaped = isinstance(act, nn.Module) and type(act) is not nn.Identity
    known = type(target) in _CONVOLUTIONS or (is_norm(target) and not shaped)
    weight, bias = getattr(target, "weight", None), getattr(target, "bias", None)
    if not known or has_hooks(target) or not isinstance(weight, Tensor):
        return []
    return [weight, bias] if isinstance(bias, Tensor) else [weight]


def _measured(
    model: nn.Module, gates: list[_Gate], inputs: Iterator[tuple[Tensor, Tensor | None]]
) -> tuple[list[Tensor], tuple[FoldedSite, ...]]:
    """The mean of every gate over all images, [C] in float64, and how far it strays."""
    sums = [torch.zeros((), dtype=torch.float64) for _ in gates]
    squares = [torch.zeros((), dtype=torch.float64) for _ in gates]
    counts = [0] * len(gates)

    def see(number: int, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        attention, x = cast("ChannelAttention", module), cast("Tensor", inputs[0])
        v = attention.gate(x)
        if any(extent > 1 for extent in v.shape[2:]):
            raise ValueError(
                f"fold: {gates[number].name} ({attention.name}) has another gate at each position; "
                f"only a factor per channel becomes a constant."
            )
        v = v.flatten(1).expand(x.shape[0], attention.channels).double().cpu()
        sums[number] = sums[number] + v.sum(0)
        squares[number] = squares[number] + v.square().sum(0)
        counts[number] += x.shape[0]

    def watch(number: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, inputs: see(number, module, inputs)

    handles = [
        gate.attention.register_forward_pre_hook(watch(number)) for number, gate in enumerate(gates)
    ]
    try:
        for x, _ in inputs:
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    idle = [gate.name for gate, count in zip(gates, counts, strict=True) if count == 0]
    if idle:
        why = "no images were given" if len(idle) == len(gates) else f"{idle[0]} did not run"
        raise ValueError(f"fold: {why}. Pass batches that the network takes whole.")
    means: list[Tensor] = []
    sites: list[FoldedSite] = []
    for gate, total, square, count in zip(gates, sums, squares, counts, strict=True):
        mean = total / count
        stray = (square / count - mean.square()).clamp(min=0).mean().sqrt()
        scale = mean.square().mean().sqrt()
        means.append(mean)
        channels = gate.attention.channels
        sites.append(FoldedSite(gate.name, channels, float(mean.mean()), float(stray / scale)))
    return means, tuple(sites)


def _apply(model: nn.Module, gates: list[_Gate], means: list[Tensor]) -> None:
    """Multiplies the constants in and takes the attention out."""
    for gate, mean in zip(gates, means, strict=True):
        for tensor in _factors(_named(model, gate.into)):
            factor = mean.reshape(-1, *[1] * (tensor.dim() - 1)).to(tensor.device)
            if tensor.shape[0] != mean.numel():  # a layer scale [C, 1, 1] or [1, C, 1, 1]
                factor = mean.reshape(tensor.shape).to(tensor.device)
            tensor.copy_(tensor.double() * factor)
    parents = list(model.modules())
    for gate in gates:
        out: nn.Module = gate.attention
        left: nn.Module | None
        if isinstance(gate.parent, Around):
            out, left = gate.parent, gate.parent.layer
        else:
            left = _left(gate)
        for parent in parents:
            for key, child in list(parent._modules.items()):
                if child is out:
                    put(parent, key, left)
    for module in parents:
        unfuse(module)
        if isinstance(getattr(module, "spec", None), AttentionSpec):
            vars(module)["spec"] = None  # of spem.resnet: it is the plain network now
    forget(model)


def _left(gate: _Gate) -> nn.Module | None:
    """What a free slot holds in the plain network."""
    displaced = vars(gate.attention).get("displaced")
    if displaced is not None:
        layer = displaced.layer
        return None if layer is None else nn.Identity()
    optional = type(gate.parent).__module__ in ("spem.models", "timm.models.resnet")
    return None if optional else nn.Identity()


def _compared(
    model: nn.Module,
    folded: nn.Module,
    gates: list[_Gate],
    means: list[Tensor],
    sites: tuple[FoldedSite, ...],
    inputs: Iterator[tuple[Tensor, Tensor | None]],
) -> FoldReport:
    """Both networks on the same images.

    Raises:
        ValueError: The folded network is not the one with its gates held constant.
    """
    images = agreeing = labelled = right_before = right_after = 0
    difference = largest = 0.0
    classes = True
    for number, (x, y) in enumerate(inputs):
        before, after = _outputs(model(x)), _outputs(folded(x))
        if number == 0:
            _check(_held(model, gates, means, x), after)
        images += x.shape[0]
        for one, two in zip(before, after, strict=True):
            difference = max(difference, float((one.double() - two.double()).abs().max()))
            largest = max(largest, float(one.abs().max()))
        classes = classes and before[0].dim() == 2
        if not classes:
            continue
        top, now = before[0].argmax(1), after[0].argmax(1)
        agreeing += int((top == now).sum())
        if y is not None:
            labelled += len(y)
            right_before += int((top == y.to(top.device)).sum())
            right_after += int((now == y.to(top.device)).sum())
    return FoldReport(
        sites,
        images,
        difference / largest if largest else 0.0,
        agreeing / images if classes else None,
        right_before / labelled if labelled else None,
        right_after / labelled if labelled else None,
    )


def _held(model: nn.Module, gates: list[_Gate], means: list[Tensor], x: Tensor) -> list[Tensor]:
    """Outputs with every gate held at its mean, which folding has to equal."""

    def constant(mean: Tensor) -> Callable[..., Tensor]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], _output: object) -> Tensor:
            z = cast("Tensor", inputs[0])
            return z * mean.reshape(1, -1, *[1] * (z.dim() - 2)).to(z.device, z.dtype)

        return hook

    handles = [
        gate.attention.register_forward_hook(constant(mean))
        for gate, mean in zip(gates, means, strict=True)
    ]
    try:
        return _outputs(model(x))
    finally:
        for handle in handles:
            handle.remove()


def _check(held: list[Tensor], folded: list[Tensor]) -> None:
    for one, two in zip(held, folded, strict=True):
        scale = float(one.abs().max()) or 1.0
        limit = _ROUNDING.get(one.dtype, 0.1)
        if not float((one.double() - two.double()).abs().max()) <= limit * scale:
            raise ValueError(
                "fold: the network with folded gates is not the one with its gates held constant: "
                "between a gate and the layer before it something else happens, such as the sum of "
                "several branches. Leave its attention in."
            )


def _inputs(
    model: nn.Module,
    batches: Iterable[Tensor | Sequence[Tensor]],
    labels: Tensor | Sequence[int] | None,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Inputs on the device of the model, with labels where there are some."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    given = None if labels is None else torch.as_tensor(labels)
    start = 0
    for batch in batches:
        x, y = (batch, None) if isinstance(batch, Tensor) else (batch[0], batch[1])
        if given is not None:
            y = given[start : start + x.shape[0]]
            if len(y) != x.shape[0]:
                raise ValueError(
                    f"fold: there are {len(given)} labels and more images. Give a label for each."
                )
            start += x.shape[0]
        yield x.to(like.device, like.dtype), y


def _outputs(value: Any) -> list[Tensor]:
    """The tensors of an output, however it holds them."""
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value
    return [tensor for part in values for tensor in _outputs(part)]
