"""Gates become constants inside the norms before them; no attention is left."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from spem.attention import AttentionSpec, ChannelAttention
from spem.insert.attach import DISPLACED, detach, exchange
from spem.insert.families import attribute, is_norm, rule_of
from spem.insert.sites import attentions_of, evaluating, float_like
from spem.insert.start import IdentityStart
from spem.insert.wrap import AfterNorm, Around, BeforeModule
from spem.ops.library import has_hooks

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_Batch = tuple[Tensor, Tensor | None]
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Differences, relative to the largest output, between gates held constant and gates folded."""


@dataclass(frozen=True)
class FoldedSite:
    """One gate that became a constant.

    Attributes:
        name: Dotted name of the attention.
        channels: C.
        gate: Mean of the constant over channels.
        spread: Root mean square over images and channels of how far the gate strays from the
            constant, relative to that of the constant; 0 is a gate that was constant.
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
            before, after = f"{100 * self.accuracy_before:.2f}", f"{100 * self.accuracy_after:.2f}"
            lines.append(f"Accuracy: {before}% with attention, {after}% folded.")
        return "\n".join(lines)


class _Gate(NamedTuple):
    """An attention, what holds it, and the tensors before it that take its factor."""

    name: str
    attention: ChannelAttention
    parent: nn.Module
    tensors: list[Tensor]


def fold(
    model: nn.Module,
    batches: Iterable[Tensor | Sequence[Tensor]],
    labels: Tensor | Sequence[int] | None = None,
) -> FoldReport:
    """Replaces each gate by its mean over images and multiplies it into the norm before it.

    Formula:
        v x with x = gamma n + beta becomes (m gamma) n + m beta, m[c] the mean of v[n, c] over the
        images.

    The network is changed in place into the plain one, with its operations and its speed in every
    runtime. What differed between images is lost, and the report says how much; training on for an
    epoch recovers part of it. If anything fails, the network is as it was.

    Args:
        model: A trained network with attention, from `spem.attach` or `spem.resnet`.
        batches: Typical inputs [N, C, ...], or pairs (inputs, labels), as a data loader gives them;
            gone through twice. A few hundred images do.
        labels: Classes of all images in the order of the batches; None takes those of the pairs.

    Raises:
        ValueError: No attention, a gate that is not a factor per channel (it differs between
            positions, adds to the map, or replaces a layer), nothing before it that can
            take the factor, or no images.
    """
    gates = _gates(model)
    batches = list(batches) if isinstance(batches, Iterator) else batches
    with evaluating(model), torch.no_grad():
        means, sites = _measured(model, gates, _inputs(model, batches, None))
        folded = copy.deepcopy(model)
        _apply(folded, _gates(folded), means)
        report = _compared(model, folded, gates, means, sites, _inputs(model, batches, labels))
        _apply(model, gates, means)
    return report


def _gates(model: nn.Module) -> list[_Gate]:
    """Every attention of a network, once.

    Raises:
        ValueError: There is none, or one cannot be folded.
    """
    found: dict[int, _Gate] = {}
    for name, module in attentions_of(model).items():
        if not name:
            raise ValueError("fold: the model is one attention. Pass the network that holds it.")
        why = _no_factor(module)
        parent = model.get_submodule(name.rpartition(".")[0])
        tensors = [] if why else _factors(_before(model, name, parent))
        if not tensors:
            raise ValueError(
                f"fold: {name} {why or 'follows no norm, convolution or layer scale'}; only a "
                f"factor per channel after one of these becomes a constant."
            )
        gate = _Gate(name, module, parent, tensors)
        other = found.setdefault(id(tensors[0]), gate)
        if other is not gate:
            raise ValueError(
                f"fold: {name} and {other.name} share the layer before them; each needs its own."
            )
    if not found:
        raise ValueError(f"fold: there is no attention in {type(model).__name__}.")
    return list(found.values())


def _no_factor(attention: ChannelAttention) -> str | None:
    """Why a gate is not a factor per channel, as far as its class says."""
    inner = attention.inner if isinstance(attention, IdentityStart) else attention
    own_forward = type(inner).forward is not ChannelAttention.forward
    reasons = {
        "adds to the map": inner.needs.adds,
        "takes the place of a layer": inner.needs.replaces is not None,
        "does more than multiply its map": inner.needs.shared or own_forward,
    }
    kind = inner.name or type(inner).__name__
    return next((f"({kind}) {reason}" for reason, holds in reasons.items() if holds), None)


def _before(model: nn.Module, name: str, parent: nn.Module) -> object:
    """What an attention follows: a layer or a parameter; None if that is not known."""
    above, _, key = name.rpartition(".")
    if isinstance(parent, AfterNorm):
        target: object = parent.layer
    else:
        if isinstance(parent, BeforeModule):
            above, _, key = above.rpartition(".")
        block = model.get_submodule(above)
        rule = rule_of(block)
        if rule is None or not rule.reads or key not in rule.find(block):
            return None
        target = attribute(block, rule.reads)
    while type(target) is nn.Sequential and len(target):
        target = target[-1]
    return target


def _factors(target: object) -> list[Tensor]:
    """The tensors of a layer that a factor per channel multiplies, along their first axis."""
    if isinstance(target, nn.Parameter):
        return [target]
    if not isinstance(target, nn.Module) or parametrize.is_parametrized(target):
        return []
    act = getattr(target, "act", None)
    shaped = isinstance(act, nn.Module) and type(act) is not nn.Identity
    known = type(target) in _CONVOLUTIONS or (is_norm(target) and not shaped)
    tensors = [getattr(target, "weight", None), getattr(target, "bias", None)]
    if not known or has_hooks(target) or tensors[0] is None:
        return []
    return [tensor for tensor in tensors if isinstance(tensor, Tensor)]


def _measured(
    model: nn.Module, gates: list[_Gate], inputs: Iterable[_Batch]
) -> tuple[list[Tensor], tuple[FoldedSite, ...]]:
    """The mean of every gate over all images, [C] in float64, and how far it strays."""
    sums = [torch.zeros(2, gate.attention.channels, dtype=torch.float64) for gate in gates]
    counts = [0] * len(gates)

    def see(number: int, v: Tensor, images: int) -> None:
        attention = gates[number].attention
        if any(extent > 1 for extent in v.shape[2:]):
            raise ValueError(
                f"fold: {gates[number].name} ({attention.name}) has another gate at each position; "
                f"only a factor per channel becomes a constant."
            )
        v = v.flatten(1).expand(images, attention.channels).double().cpu()
        sums[number] += torch.stack([v.sum(0), v.square().sum(0)])
        counts[number] += images

    with ExitStack() as stack:
        for number, gate in enumerate(gates):
            stack.enter_context(gate.attention.observe_gates(partial(see, number)))
        for x, _ in inputs:
            model(x)
    idle = [gate.name for gate, count in zip(gates, counts, strict=True) if count == 0]
    if idle:
        why = "no images were given" if len(idle) == len(gates) else f"{idle[0]} did not run"
        raise ValueError(f"fold: {why}. Pass batches that the network takes whole.")
    means: list[Tensor] = []
    sites: list[FoldedSite] = []
    for gate, total, count in zip(gates, sums, counts, strict=True):
        mean, square = total / count
        stray = (square - mean.square()).clamp(min=0).mean().sqrt()
        spread = float(stray / mean.square().mean().sqrt())
        means.append(mean)
        sites.append(FoldedSite(gate.name, len(mean), float(mean.mean()), spread))
    return means, tuple(sites)


def _apply(model: nn.Module, gates: list[_Gate], means: list[Tensor]) -> None:
    """Multiplies the constants in and takes the attention out."""
    new: dict[nn.Module, nn.Module | None] = {}
    for gate, mean in zip(gates, means, strict=True):
        for tensor in gate.tensors:
            shape = [-1, *[1] * (tensor.dim() - 1)]
            if tensor.shape[0] != mean.numel():  # a layer scale [1, C, 1, 1]
                shape = tensor.shape
            tensor.copy_(tensor.double() * mean.reshape(shape).to(tensor.device))
        if isinstance(gate.parent, Around):
            new[gate.parent] = gate.parent.layer
        else:
            new[gate.attention] = _left(gate)
    exchange(model, new)
    detach(model)  # the subclasses of fused blocks, and what is known of the attention
    for module in model.modules():
        if isinstance(getattr(module, "spec", None), AttentionSpec):
            vars(module)["spec"] = None  # of spem.resnet: it is the plain network now


def _left(gate: _Gate) -> nn.Module | None:
    """What a free slot holds in the plain network."""
    optional = type(gate.parent).__module__ in ("spem.models", "timm.models.resnet")
    if DISPLACED in vars(gate.attention):
        optional = vars(gate.attention)[DISPLACED] is None
    return None if optional else nn.Identity()


def _compared(
    model: nn.Module,
    folded: nn.Module,
    gates: list[_Gate],
    means: list[Tensor],
    sites: tuple[FoldedSite, ...],
    inputs: Iterable[_Batch],
) -> FoldReport:
    """Both networks on the same images.

    Raises:
        ValueError: The folded network is not the one with its gates held constant.
    """
    images, difference, largest = 0, 0.0, 0.0
    tops: list[Tensor] = []
    labelled: list[Tensor] = []
    for x, y in inputs:
        before, after = _outputs(model(x)), _outputs(folded(x))
        if not images:
            _check(_held(model, gates, means, x), after)
        images += len(x)
        difference = max(difference, _difference(before, after))
        largest = max(largest, *(float(one.abs().max()) for one in before))
        if before[0].dim() == 2:
            top, now = before[0].argmax(1).cpu(), after[0].argmax(1).cpu()
            tops.append(top == now)
            if y is not None:
                labelled.append(torch.stack([top == y.cpu(), now == y.cpu()]))
    # Agreement, then accuracy before and after on the images that have labels.
    shares = [float(torch.cat(tops).double().mean())] if tops else []
    shares += torch.cat(labelled, 1).double().mean(1).tolist() if labelled else []
    return FoldReport(sites, images, difference / (largest or 1.0), *shares)


def _held(model: nn.Module, gates: list[_Gate], means: list[Tensor], x: Tensor) -> list[Tensor]:
    """Outputs with every gate held at its mean, which folding has to equal."""

    def hold(mean: Tensor, _module: nn.Module, inputs: tuple[Tensor, ...], _: object) -> Tensor:
        z = inputs[0]
        return z * mean.reshape(1, -1, *[1] * (z.dim() - 2)).to(z.device, z.dtype)

    with ExitStack() as stack:
        for gate, mean in zip(gates, means, strict=True):
            stack.enter_context(gate.attention.register_forward_hook(partial(hold, mean)))
        return _outputs(model(x))


def _check(held: list[Tensor], folded: list[Tensor]) -> None:
    for one, two in zip(held, folded, strict=True):
        limit = _ROUNDING.get(one.dtype, 0.1) * (float(one.abs().max()) or 1.0)
        if not _difference([one], [two]) <= limit:
            raise ValueError(
                "fold: the network with folded gates is not the one with its gates held constant: "
                "between a gate and the layer before it something else happens, such as the sum of "
                "several branches. Leave its attention in."
            )


def _difference(ones: list[Tensor], twos: list[Tensor]) -> float:
    pairs = zip(ones, twos, strict=True)
    return max(float((one.double() - two.double()).abs().max()) for one, two in pairs)


def _inputs(
    model: nn.Module, batches: Iterable[Tensor | Sequence[Tensor]], labels: object
) -> Iterator[_Batch]:
    """Inputs on the device of the model, with labels where there are some."""
    like = float_like(model)
    given = None if labels is None else torch.as_tensor(labels)
    start = 0
    for batch in batches:
        x, y = (batch, None) if isinstance(batch, Tensor) else (batch[0], batch[1])
        if given is not None:
            y = given[start : start + len(x)]
            if len(y) != len(x):
                raise ValueError(
                    f"fold: there are {len(given)} labels and more images. Give a label for each."
                )
            start += len(x)
        yield x.to(like.device, like.dtype), y


def _outputs(value: Any) -> list[Tensor]:
    """The tensors of an output, however it holds them."""
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value
    return [tensor for part in values for tensor in _outputs(part)]
