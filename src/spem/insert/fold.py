"""Gates become constants inside the norms before them; no attention is left."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from spem.attention import AttentionSpec, ChannelAttention
from spem.insert.attach import DISPLACED, detach, exchange
from spem.insert.families import attribute, is_norm, rule_of
from spem.insert.sites import attentions_of, evaluating, float_like, tensors
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
        images: How many.
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
            f"{site.name:{width}}  {site.channels:8}  {site.gate:6.3f}  {site.spread:6.1%}"
            for site in self.sites
        ]
        lines.append(
            f"{len(self.sites)} gates folded over {self.images} images; outputs differ by at most "
            f"{100 * self.difference:.2g}% of the largest."
        )
        if self.agreement is not None:
            lines.append(f"Top-1 agreement: {self.agreement:.2%}.")
        if self.accuracy_before is not None:
            after = f"{self.accuracy_after:.2%} folded"
            lines.append(f"Accuracy: {self.accuracy_before:.2%} with attention, {after}.")
        return "\n".join(lines)


class _Gate:
    """An attention, the tensors before it that take its factor, and its gates on all images."""

    def __init__(self, name: str, attention: ChannelAttention, tensors: list[Tensor]) -> None:
        self.name, self.attention, self.tensors = name, attention, tensors
        # Number of gates, their sum and the sum of their squares.
        self.sums = torch.zeros(3, attention.channels, dtype=torch.float64)

    def see(self, v: Tensor, images: int) -> None:
        """Observer of the attention's gates."""
        if any(extent > 1 for extent in v.shape[2:]):
            said = f"{self.name} ({self.attention.name}) has another gate at each position"
            raise ValueError(f"fold: {said}; only a factor per channel becomes a constant.")
        v = v.flatten(1).expand(images, self.attention.channels).double().cpu()
        self.sums += torch.stack([torch.ones_like(v), v, v.square()]).sum(1)

    @property
    def mean(self) -> Tensor:
        """The constant, [C]."""
        return self.sums[1] / self.sums[0]

    def hold(self, _module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> Tensor:
        """Hook of the attention: the output with the constant for a gate."""
        z = inputs[0]
        return z * self.mean.reshape(1, -1, *[1] * (z.dim() - 2)).to(z.device, z.dtype)

    def site(self) -> FoldedSite:
        """What the report says of it."""
        mean = self.mean
        stray = (self.sums[2] / self.sums[0] - mean.square()).clamp(min=0).mean().sqrt()
        spread = float(stray / mean.square().mean().sqrt())
        return FoldedSite(self.name, len(mean), float(mean.mean()), spread)


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
        labels: Classes of all images in the order of the batches; None takes those of the pairs, if
            they are one number an image.

    Raises:
        TypeError: A model that is no module, or batches that hold no tensors.
        ValueError: No attention, a gate that is not a factor per channel (it differs between
            positions, adds to the map, or replaces a layer), nothing before it that can
            take the factor, no images, or outputs that are not finite.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fold: needs a torch.nn.Module, got {type(model).__name__}.")
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        said = f"batches is a {type(batches).__name__}"
        raise TypeError(f"fold: {said}. Pass a data loader, or a list of batches such as [images].")
    gates = _gates(model)
    batches = list(batches) if isinstance(batches, Iterator) else batches
    with torch.no_grad(), evaluating(model):
        x = None
        with ExitStack() as stack:
            for gate in gates:
                stack.enter_context(gate.attention.observe_gates(gate.see))
            for x, _ in _inputs(model, batches, None):
                model(x)
        idle = [gate.name for gate in gates if not gate.sums[0].any()]
        if x is None or idle:
            why = "no images were given" if x is None else f"{idle[0]} did not run"
            raise ValueError(f"fold: {why}. Pass batches that the network takes whole.")
        folded, same_gates = copy.deepcopy((model, gates))
        _apply(folded, same_gates)
        _check_same(model, folded, gates, x)
        report = _compared(model, folded, gates, _inputs(model, batches, labels))
    with torch.no_grad():
        _apply(model, gates)
    return report


def _gates(model: nn.Module) -> list[_Gate]:
    """Every attention of a network, once."""
    found: list[_Gate] = []
    for name, module in attentions_of(model).items():
        if not name:
            raise ValueError("fold: the model is one attention. Pass the network that holds it.")
        inner = module.inner if isinstance(module, IdentityStart) else module
        why = f"({module.name or type(module).__name__}) "
        if inner.needs.shared:
            why += "is one module for all blocks of a stage"
        elif not inner.computes_gate_in_forward():
            why += "does more than multiply its map by a factor per channel"
        elif tensors := _factors(_before(model, name)):
            found.append(_Gate(name, module, tensors))
            continue
        else:
            why = "follows no norm, convolution or layer scale that could take its factor"
        raise ValueError(f"fold: {name} {why}.")
    if not found:
        raise ValueError(f"fold: there is no attention in {type(model).__name__}.")
    return found


def _before(model: nn.Module, name: str) -> object:
    """What an attention follows: a layer or a parameter; None if that is not known."""
    above, _, key = name.rpartition(".")
    block = model.get_submodule(above)
    if isinstance(block, AfterNorm):
        target: object = block.layer
    else:
        if isinstance(block, BeforeModule):
            above, _, key = above.rpartition(".")
            block = model.get_submodule(above)
        rule = rule_of(block)
        known = rule is not None and rule.reads and key in rule.places(block)
        target = attribute(block, rule.reads) if rule is not None and known else None
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


def _apply(model: nn.Module, gates: list[_Gate]) -> None:
    """Multiplies the constants in and takes the attention out."""
    new: dict[nn.Module, nn.Module | None] = {}
    for gate in gates:
        for tensor in gate.tensors:
            # Channels come first but in a layer scale, [C] or [1, C, 1, 1].
            first = tensor.shape[0] == gate.attention.channels
            shape = [-1, *[1] * (tensor.dim() - 1)] if first else tensor.shape
            tensor.copy_(tensor.double() * gate.mean.reshape(shape).to(tensor.device))
        parent = model.get_submodule(gate.name.rpartition(".")[0])
        if not isinstance(parent, Around):  # a free slot holds None or an identity
            optional = type(parent).__module__ in ("spem.models", "timm.models.resnet")
            if DISPLACED in vars(gate.attention):
                optional = vars(gate.attention)[DISPLACED] is None
            free = None if optional else nn.Identity().train(gate.attention.training)
            new[gate.attention] = free
    exchange(model, new)
    detach(model)  # wrappers, the subclasses of fused blocks, what is known of the attention
    for module in model.modules():
        if isinstance(getattr(module, "spec", None), AttentionSpec):
            vars(module)["spec"] = None  # of spem.resnet: it is the plain network now


def _check_same(model: nn.Module, folded: nn.Module, gates: list[_Gate], x: Tensor) -> None:
    """Raises unless the folded network is the one with its gates held constant."""
    after = _outputs(folded, x)
    with ExitStack() as stack:
        for gate in gates:
            stack.enter_context(gate.attention.register_forward_hook(gate.hold))
        held = _outputs(model, x)
    limit = _ROUNDING.get(held[0].dtype, 0.1) * (_largest(held) or 1.0)
    if not math.isfinite(limit):
        remedy = "Pass batches on which the network works, or fold it in float32."
        raise ValueError(f"fold: gates or outputs are not finite on these batches. {remedy}")
    if not _largest(held, after) <= limit:
        raise ValueError(
            "fold: the network with folded gates is not the one with its gates held constant: "
            "between a gate and the layer before it something else happens, such as the sum of "
            "several branches. Leave its attention in."
        )


def _compared(
    model: nn.Module, folded: nn.Module, gates: list[_Gate], inputs: Iterable[_Batch]
) -> FoldReport:
    """Both networks on the same images."""
    images, difference, largest = 0, 0.0, 0.0
    same: list[Tensor] = []
    right: list[Tensor] = []
    for x, y in inputs:
        before, after = _outputs(model, x), _outputs(folded, x)
        images += len(x)
        difference = max(difference, _largest(before, after))
        largest = max(largest, _largest(before))
        if before[0].dim() == 2:
            tops = torch.stack([before[0].argmax(1), after[0].argmax(1)]).cpu()
            same.append(tops[0] == tops[1])
            right += [tops == y.cpu()] if y is not None else []
    if not images:
        raise ValueError("fold: the batches came only once. Pass a list or a data loader.")
    # Agreement, then accuracy before and after on the images that have labels.
    shares = [float(torch.cat(same).double().mean())] if same else []
    shares += torch.cat(right, 1).double().mean(1).tolist() if right else []
    sites = tuple(gate.site() for gate in gates)
    return FoldReport(sites, images, difference / (largest or 1.0), *shares)


def _outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The tensors of an output."""
    found = [output for output in tensors(model(x)) if output.numel()]
    if not found:
        raise ValueError(f"fold: {type(model).__name__} gives no tensor that could be compared.")
    return found


def _largest(outputs: list[Tensor], others: list[Tensor] | None = None) -> float:
    """The largest magnitude in outputs, or in their differences from others."""
    others = others or [torch.zeros_like(output) for output in outputs]
    if [one.shape for one in outputs] != [two.shape for two in others]:
        raise ValueError(
            "fold: with folded gates the outputs have other shapes, as detections have, and "
            "cannot be compared. Fold the part that gives maps or scores, such as the backbone."
        )
    pairs = zip(outputs, others, strict=True)
    return max(float((one.double() - two.double()).abs().max()) for one, two in pairs)


def _inputs(
    model: nn.Module,
    batches: Iterable[Tensor | Sequence[Tensor]],
    labels: Tensor | Sequence[int] | None,
) -> Iterator[_Batch]:
    """Inputs on the device of the model, with labels where there are some."""
    like, wrong = float_like(model), "are not one number for each image"
    left = None if labels is None else torch.as_tensor(labels)
    for batch in batches:
        x, y, *_ = (*batch, None) if isinstance(batch, (tuple, list)) else (batch, None)
        if not isinstance(x, Tensor):
            said = f"a batch is a {type(batch).__name__} without a tensor in the first place"
            raise TypeError(f"fold: {said}. Pass tensors [N, C, ...], or pairs (inputs, labels).")
        if left is not None:
            y, left = left[: len(x)], left[len(x) :]
            if y.shape != x.shape[:1]:
                raise ValueError(f"fold: labels {list(torch.as_tensor(labels).shape)} {wrong}.")
        if len(x):
            classes = isinstance(y, Tensor) and y.shape == x.shape[:1]
            yield x.to(like.device, like.dtype), y if classes else None
    if left is not None and len(left):
        raise ValueError(f"fold: labels {list(torch.as_tensor(labels).shape)} {wrong}.")
