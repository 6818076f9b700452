"""Layers inside an attention are called, in every dtype: whatever they have become acts."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from attention.cases import ALL, sampled
from attention.drawing import feature_map, randomise
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import spem
from spem.attention.precision import call

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


class Adapted(nn.Module):
    """A layer with a low-rank addition, as adapters for finetuning put it around the layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        like = base.weight
        self.down = nn.Parameter(torch.randn(2, base.in_features).to(like.dtype))
        self.up = nn.Parameter(torch.randn(base.out_features, 2).to(like.dtype))

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.down.T @ self.up.T


def se_of(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """The formula in float64."""
    hidden = torch.relu(x.double().mean((2, 3)) @ w1.double().T + b1.double())
    return x.double() * torch.sigmoid(hidden @ w2.double().T + b2.double())[..., None, None]


@pytest.mark.parametrize(("name", "dtype"), sampled(ALL, DTYPES.args[1], each=1))
def test_hooks_of_every_layer_fire(name: str, dtype: torch.dtype) -> None:
    spec = {"ge": "ge(form=theta_plus)", "gc": "gc(fusion=both)"}.get(name, name)
    module = spem.create_attention(spec, 64, size=(8, 8)).to(dtype).eval()
    plain = copy.deepcopy(module)
    layers = {n: m for n, m in module.named_modules() if isinstance(m, (*LAYERS, nn.GroupNorm))}
    seen: set[str] = set()
    for key, layer in layers.items():
        layer.register_forward_hook(lambda _m, _a, _o, key=key: seen.add(key))
    x = feature_map(2, 64, 8, 8).to(dtype)
    out = module(x, ())[0] if name == "dia" else module(x)
    assert seen == set(layers)
    assert torch.equal(out, plain(x))  # they only look


@DTYPES
def test_adapters_count(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = randomise(spem.SE(64), "adapters").to(dtype)
    module.fc1, module.fc2 = Adapted(module.fc1), Adapted(module.fc2)
    x = feature_map(2, 64, 8, 8).to(dtype)
    (w1, b1), (w2, b2) = (
        (a.weight.double() + a.up.double() @ a.down.double(), a.bias)
        for a in (module.fc1, module.fc2)
    )
    with torch.no_grad():
        error = (module(x).double() - se_of(x, w1, b1, w2, b2)).abs().max()
        without = (
            (module(x).double() - se_of(x, module.fc1.weight, b1, module.fc2.weight, b2))
            .abs()
            .max()
        )
    assert error < max(8 * torch.finfo(dtype).eps, 1e-5)  # |x| < 5, and sums of 64 products
    assert without > 10 * error


@DTYPES
def test_masks_of_pruning_count(dtype: torch.dtype) -> None:
    modules = [randomise(spem.SE(64), "pruned", key).to(dtype) for key in range(2)]
    for module in modules:
        for layer in (module.fc1, module.fc2):
            prune.l1_unstructured(layer, "weight", 0.5)
    modules[0].load_state_dict(modules[1].state_dict())
    x = feature_map(2, 64, 8, 8).to(dtype)
    with torch.no_grad():
        assert torch.equal(modules[0](x), modules[1](x))
        whole = copy.deepcopy(modules[1])
        whole.fc1.weight_mask.fill_(1)
        assert not torch.allclose(whole(x), modules[1](x))


def test_what_was_pruned_or_parametrised_before_becomes_half() -> None:
    for change in (
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        parametrizations.weight_norm,
    ):
        module = randomise(spem.SE(64), "changed")
        change(module.fc1)
        x = feature_map(2, 64, 8, 8, dtype=torch.float32)
        with torch.no_grad():
            expected = module(x)
            half = module.bfloat16()(x.bfloat16())
        torch.testing.assert_close(half.float(), expected, rtol=0.03, atol=0.03)


def test_dynamic_quantisation() -> None:
    for name in ("se", "cbam", "ese", "gc", "bam", "dia", "sk"):
        quantised_dynamically(name)


def quantised_dynamically(name: str) -> None:
    module = randomise(spem.create_attention(name, 64), name).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in torch
        quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(module), {nn.Linear})
    assert any("quantized" in type(m).__module__ for m in quantised.modules())
    x = feature_map(3, 64, 8, 8, dtype=torch.float32)
    with torch.no_grad():
        expected, found = module(x), quantised(x)
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()
    assert not torch.equal(found, expected)


def test_a_norm_without_momentum_averages_over_all_batches() -> None:
    """As `torch.optim.swa_utils.update_bn` sets it."""
    for name in ALL:
        module = spem.create_attention(name, 64, size=8)
        norms = [m for m in module.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
        if norms:
            loader = [feature_map(4, 64, 8, 8, key=key, dtype=torch.float32) for key in range(2)]
            torch.optim.swa_utils.update_bn(loader, module)
            assert all(int(norm.num_batches_tracked) == 2 for norm in norms), name


def test_half_layers_compute_as_wide_ones_and_keep_their_statistics() -> None:
    for make, x in (
        (lambda: nn.Linear(8, 4), feature_map(3, 8, 1)[..., 0]),
        (lambda: nn.Conv1d(1, 1, 3, padding=1), feature_map(3, 1, 8)),
        (lambda: nn.Conv2d(8, 4, 3), feature_map(3, 8, 5, 5)),
        (lambda: nn.BatchNorm1d(8), feature_map(3, 8, 1)[..., 0]),
        (lambda: nn.BatchNorm2d(8), feature_map(3, 8, 4, 4)),
        (lambda: nn.LayerNorm(8), feature_map(3, 8, 1)[..., 0]),
        (lambda: nn.GroupNorm(2, 8), feature_map(3, 8, 5)),
    ):
        half = randomise(make(), "half").bfloat16()
        wide = make()
        wide.load_state_dict(half.state_dict())
        x = x.float()
        assert torch.equal(call(half, x), wide(x))
        for ours, theirs in zip(half.buffers(), wide.buffers(), strict=True):
            torch.testing.assert_close(ours.float(), theirs.float(), rtol=1e-2, atol=1e-2)


def replica_of(module: nn.Module) -> nn.Module:
    """A module as `torch.nn.DataParallel` copies it: its parameters are plain tensors."""
    replica = module._replicate_for_data_parallel()
    vars(replica)["_former_parameters"] = {}
    for name, child in module.named_children():
        setattr(replica, name, replica_of(child))
    for name, parameter in module._parameters.items():
        vars(replica)[name] = copied = None if parameter is None else parameter.clone()
        if copied is not None:
            vars(replica)["_former_parameters"][name] = copied
    for name, buffer in module.named_buffers(recurse=False):
        setattr(replica, name, buffer.clone())
    return replica


@pytest.mark.parametrize(("name", "dtype"), sampled(ALL, DTYPES.args[1], each=1))
@pytest.mark.parametrize("training", [False, True])
def test_parameters_may_be_plain_tensors(name: str, dtype: torch.dtype, *, training: bool) -> None:
    """In replicas of DataParallel, and in `torch.func.functional_call`."""
    module = spem.create_attention(name, 64, size=(8, 8)).to(dtype).train(training)
    norm = nn.BatchNorm2d(64).to(dtype).train(training)
    x = feature_map(4, 64, 8, 8).to(dtype)

    class Tail(nn.Module):
        def __init__(self, module: spem.ChannelAttention, norm: nn.Module | None) -> None:
            super().__init__()
            self.module, self.norm = module, norm

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x) if module.needs.replaces else self.module.tail(x, x, self.norm)

    for norms in (None, norm):
        tail = Tail(module, norms)
        state = {key: tensor.clone() for key, tensor in tail.state_dict().items()}
        copied = replica_of(tail)(x)
        called = torch.func.functional_call(tail, state, (x,))
        expected = tail(x)
        torch.testing.assert_close(copied, expected, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(called, expected, rtol=1e-2, atol=1e-2)
