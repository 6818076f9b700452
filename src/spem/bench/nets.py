"""Networks as providers: the same backbone with every attention, computed in every way."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from spem.attention import ChannelAttention, learned_mixes, penalty
from spem.bench.checks import IN_ONE, NETWORKS, BenchError, require_close
from spem.bench.official import OfficialWay, official_penalty, our_name, use_official
from spem.bench.settings import (
    COMPILED,
    FOLDED,
    FORMULA,
    GRAPH,
    OFFICIAL,
    Subject,
    impl_of,
)
from spem.bench.tails import LAYOUTS, compiled
from spem.bench.timing import Sample, captured, timed
from spem.models import Bottleneck, ResNet, resnet
from spem.ops import use_impl
from spem.seeding import keyed_generator

PENALTY = 0.1
IMAGE = 32
CLASSES = 10
DRAWS = 3
"""Batches of images of which one must agree with the reference."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def network(subject: Subject, depth: int) -> ResNet:
    """A network of seed 0 on the CPU, with its attention in every block."""
    model = resnet(depth, CLASSES, attention=subject.attention)
    if subject.way == OFFICIAL:
        use_official(model)
    return model


def blocks_of(model: nn.Module) -> list[Bottleneck]:
    """The residual blocks."""
    return [module for module in model.modules() if isinstance(module, Bottleneck)]


def parameters(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def perturb(model: nn.Module) -> None:
    """Moves a network off its start, where many gates are constants, by keyed draws."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = keyed_generator(1, "bench", our_name(name))
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * noise.to(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0, generator=keyed_generator(1, "bench", name))


def images(size: int, layout: str, side: int = IMAGE, draw: int = 0) -> tuple[Tensor, Tensor]:
    """Random images and labels."""
    generator = keyed_generator(draw, "bench", "images")
    found = torch.randn(size, 3, side, side, generator=generator)
    labels = torch.randint(CLASSES, (size,), generator=generator)
    return found.contiguous(memory_format=LAYOUTS[layout]), labels


def loss_of(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy, with the penalty where a lambda is learned."""
    loss = functional.cross_entropy(model(inputs).float(), labels)
    if any(isinstance(module, OfficialWay) for module in model.modules()):
        return loss + PENALTY * official_penalty(model)
    return loss + PENALTY * penalty(model) if learned_mixes(model) else loss


def fold(model: ResNet, *, keep_gates_bare: bool) -> ResNet:
    """A copy in evaluation whose norms are folded into the convolutions before them.

    Args:
        model: The network.
        keep_gates_bare: Let the last norm of a block with attention vanish altogether, so that its
            tail is one operation without a norm; otherwise an identity takes its place, and the
            tail is composed.
    """
    model = copy.deepcopy(model).eval()
    nothing: Any = None

    def fused(parent: nn.Module, convolution: str, norm: str) -> None:
        a, b = parent.get_submodule(convolution), parent.get_submodule(norm)
        assert isinstance(a, nn.Conv2d)
        assert isinstance(b, nn.BatchNorm2d)
        setattr(parent, convolution, fuse_conv_bn_eval(a, b))
        setattr(parent, norm, nn.Identity())

    fused(model, "conv1", "bn1")
    for block in blocks_of(model):
        for k in (1, 2, 3):
            fused(block, f"conv{k}", f"bn{k}")
        if block.downsample is not None:
            fused(block.downsample, "0", "1")
        if keep_gates_bare and block.attention is not None:
            block.bn3 = nothing
    return model


class NetProvider:
    """A network computed in one way, in training or in evaluation.

    Args:
        subject: Attention and way.
        model: The network, already of that way.
        impl: Implementation of its tails.
        batch: Images and labels on the device.
        training: Whether whole training steps are made, or forward passes.
        dtype: Dtype of the maps; bfloat16 means autocast.
    """

    def __init__(
        self,
        subject: Subject,
        model: nn.Module,
        impl: str,
        batch: tuple[Tensor, Tensor],
        *,
        training: bool,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.subject, self.impl, self.model, self.training = subject, impl, model, training
        self._images, self._labels = batch
        self._device, self._dtype = batch[0].device, dtype
        model.train(training)
        self._optimizer = torch.optim.SGD(
            model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4
        )
        self._work: Callable[[], object] = self._step if training else self._infer
        target = self._loss if training else model
        self._target: Callable[..., Tensor] = target
        if subject.way.removesuffix(GRAPH) in (COMPILED, FORMULA):
            self._target = compiled(target)
        self.first_call_s = float("nan")
        self.last: Tensor | None = None

    def prepare(self) -> None:
        """The first call, timed by itself; captures the graph of a way that has one.

        Raises:
            BenchError: The loss or a logit is not finite.
        """
        if self.subject.way.endswith(GRAPH):
            self.first_call_s, self._work = captured(self._device, self._call, self._free)
            self._call()
        else:
            (first,) = timed(self._device, self._call)
            self.first_call_s = first / 1e3
        assert self.last is not None
        if not bool(torch.isfinite(self.last).all()):
            raise BenchError(f"bench: {self.subject}: the results are not finite: no times.")

    def sample(self) -> Sample:
        """One step or forward pass and its milliseconds."""
        (elapsed,) = timed(self._device, self._call)
        return {"step": elapsed}

    def _call(self) -> None:
        with use_impl(self.impl):
            self._work()

    def _loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        half = self._dtype != torch.float32
        with torch.autocast(self._device.type, dtype=self._dtype, enabled=half):
            return loss_of(self.model, inputs, labels)

    def _step(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._target(self._images, self._labels)
        loss.backward()
        self._optimizer.step()
        self.last = loss.detach()  # alive, its graph would tie the parameters to this stream

    def _infer(self) -> None:
        half = self._dtype != torch.float32
        with torch.no_grad(), torch.autocast(self._device.type, dtype=self._dtype, enabled=half):
            self.last = self._target(self._images)

    def _free(self) -> None:
        self.last = None
        self._optimizer.zero_grad(set_to_none=True)


def check_way(
    subject: Subject,
    impl: str,
    device: torch.device,
    *,
    dtype: str = "float32",
    layout: str = "contiguous",
) -> None:
    """Compares a small network, computed in this way, with the reference in float64.

    Training: loss and the gradient of every parameter, at batch 4 and 16x16 pixels. Inference:
    the logits. First in float64 where the implementation takes it, else in float32; then in the
    dtype and the layout that are timed. Other images are drawn once or twice where they differ: a
    value that rounding moves over the edge of a ReLU changes the gradients of a network this small
    by percents, and does so for single draws only.

    Raises:
        BenchError: They differ, or the network lacks attention in a block.
    """
    way = subject.way.removesuffix(GRAPH)
    small = Subject(subject.attention, way)
    wide = torch.float64 if device.type == "cpu" and impl != "triton" else torch.float32
    model = network(small, 11)
    count = sum(isinstance(m, (ChannelAttention, OfficialWay)) for m in model.modules())
    if (count == 0) != (subject.attention == "none"):
        raise BenchError(f"bench: {subject} has {count} attention modules: no times.")
    twin = network(Subject(subject.attention, "composed"), 11)
    for one in (model, twin):
        perturb(one)
    twin = twin.to(device, torch.float64)
    folded = way.endswith(FOLDED)
    for kind in ((wide, "contiguous"), (DTYPES[dtype], layout)):
        # bfloat16 is autocast: the weights stay float32.
        one = copy.deepcopy(model).to(device, wide if kind[0] == wide else torch.float32)
        if folded:
            one = fold(one, keep_gates_bare=way.startswith("fused"))
        for draw in range(DRAWS):
            try:
                _compare(small, impl, one, twin, kind, draw, training=not folded)
                break
            except BenchError:
                if draw == DRAWS - 1:
                    raise


def _compare(
    subject: Subject,
    impl: str,
    model: nn.Module,
    twin: nn.Module,
    kind: tuple[torch.dtype, str],
    draw: int,
    *,
    training: bool,
) -> None:
    """Compares loss, gradients and logits of a network with those of its twin in float64."""
    dtype, layout = kind
    model = model.to(memory_format=LAYOUTS[layout])  # pyright: ignore[reportCallIssue]
    device = next(model.parameters()).device
    side = IMAGE if _sized(model) else 16
    inputs, labels = (t.to(device) for t in images(4, layout, side, draw))
    mine = inputs.to(next(model.parameters()).dtype)
    half = torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
    # Copies: a forward pass in training moves the running statistics.
    one, two = copy.deepcopy(model).train(training), copy.deepcopy(twin).train(training)
    expected = _results(two, "reference", inputs.double(), labels, training=training)
    with half:
        found = _results(one, impl, mine, labels, training=training)
    if training and dtype == torch.bfloat16:
        found, expected = _in_one(found), _in_one(expected)
    bounds = dict.fromkeys(expected, NETWORKS[dtype]) | {"gradients": IN_ONE}
    name = f"{subject} ({str(dtype).removeprefix('torch.')}, {layout})"
    require_close(name, found, expected, bounds, norm=True)
    with torch.no_grad():
        with use_impl("reference"):
            logits = two.eval()(inputs.double())
        with use_impl(impl), half:
            found = {"logits": one.eval()(mine)}
    require_close(name, found, {"logits": logits}, {"logits": NETWORKS[dtype]}, norm=True)


def _sized(model: nn.Module) -> bool:
    """Whether a module in it was built for one size of maps."""
    return any(m.needs.fixed_size for m in model.modules() if isinstance(m, ChannelAttention))


def _in_one(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """All gradients as one vector: of some, half precision leaves nothing but rounding errors."""
    parts = [value.flatten() for name, value in results.items() if name != "loss"]
    return {"loss": results["loss"], "gradients": torch.cat(parts)}


def _results(
    model: nn.Module, impl: str, inputs: Tensor, labels: Tensor, *, training: bool
) -> dict[str, Tensor]:
    """Loss and gradients under the parameters' own names; of a folded network the loss alone."""
    with use_impl(impl):
        logits = model(inputs)
        # The loss in the network's own dtype (`loss_of` makes the logits float32) but not in half.
        loss = functional.cross_entropy(logits.to(inputs.dtype), labels)
        if not training:
            return {"loss": loss.detach()}
        names = [our_name(name) for name, _ in model.named_parameters()]
        found = torch.autograd.grad(loss, list(model.parameters()))
    return {"loss": loss.detach(), **dict(zip(names, found, strict=True))}


def checked(
    subject: Subject, fused: str | None, device: torch.device, dtype: str, layout: str
) -> str:
    """The implementation of a subject, after its check."""
    impl = impl_of(subject.way, fused)
    check_way(subject, impl, device, dtype=dtype, layout=layout)
    return impl


def fusable(attention: str) -> bool:
    """Whether the tails of an attention run as one operation."""
    if attention == "none":
        return True
    model = network(Subject(attention, "composed"), 11)
    gates = [module for module in model.modules() if isinstance(module, ChannelAttention)]
    return all(gate.needs.place == "tail" and gate.why_composed() is None for gate in gates)
