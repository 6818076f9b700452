"""An attached ResNet goes through the tools of the field, and what comes out is the network."""

from __future__ import annotations

import copy
import io
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
from insert.hosts import attentions, build, scattered, small, small_timm
from tolerance import TOLERANCE
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint
from torchvision.models.feature_extraction import create_feature_extractor

import spem

TRACES_TAILS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)


class Case(NamedTuple):
    """A network with attention at work, in evaluation mode, and how to build another one."""

    network: nn.Module
    make: Callable[[], nn.Module]
    x: Tensor


HOSTS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "timm, fused": (lambda: small_timm(channels=(16, 16, 32, 32)), True),
    "torchvision": (lambda: small(block="Bottleneck", groups=4, width_per_group=8), False),
    "timm resnet50": (lambda: build("timm:resnet50"), False),
    "timm resnet50, fused": (lambda: build("timm:resnet50"), True),
    "torchvision resnet50": (lambda: build("torchvision:resnet50"), False),
    "torchvision resnet50, fused": (lambda: build("torchvision:resnet50"), True),
}


def case_of(host: str) -> Case:
    plain, fuse = HOSTS[host]

    def make() -> nn.Module:
        network = plain()
        spem.attach(network, "spem", fuse=fuse, input_shape=(1, 3, 64, 64))
        return network

    network = scattered(make()).eval()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    return Case(network, make, x)


def doubled(case: Case) -> Case:
    return case._replace(network=case.network.double(), x=case.x.double())


def averaged(case: Case) -> Tensor:
    ema = AveragedModel(case.network, use_buffers=True)
    ema.update_parameters(case.network)
    return ema.eval()(case.x)


def averaged_norms(case: Case) -> Tensor:
    """Statistics are taken again with momentum=None; one batch gives those of the batch."""
    swa = AveragedModel(case.network)
    update_bn([case.x], swa)
    twin = copy.deepcopy(case.network)
    for module in twin.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    twin.train()(case.x)
    torch.testing.assert_close(swa.eval()(case.x), twin.eval()(case.x), rtol=1e-3, atol=1e-3)
    return case.network(case.x)


def pickled(case: Case) -> Tensor:
    file = io.BytesIO()
    torch.save(case.network, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(case.x), case.network(case.x))
    return pickle.loads(pickle.dumps(case.network))(case.x)  # noqa: S301


def called_functionally(case: Case) -> Tensor:
    with torch.device("meta"):
        shell = case.make().eval()
    state = case.network.state_dict()
    assert [name for name, _ in case.network.named_parameters() if name not in state] == []
    return torch.func.functional_call(shell, dict(state), (case.x,))


def in_an_ensemble(case: Case) -> Tensor:
    state = torch.func.stack_module_state([case.network, case.network])
    run = lambda *state: torch.func.functional_call(case.network, state, (case.x,))  # noqa: E731
    return torch.vmap(run)(*state)[1]


def synchronised(case: Case) -> Tensor:
    kinds = [type(m) for m in case.network.modules()]
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(case.network))
    assert len(attentions(converted)) == len(attentions(case.network))
    expected = [nn.SyncBatchNorm if kind is nn.BatchNorm2d else kind for kind in kinds]
    assert [type(m) for m in converted.modules()] == expected
    return converted(case.x)


def features(case: Case) -> Tensor:
    case = doubled(case)  # two ways to compute a tail round differently
    seen: list[Tensor] = []
    handle = case.network.layer3.register_forward_hook(lambda *a: seen.append(a[-1]))
    y = case.network(case.x)
    handle.remove()
    found = create_feature_extractor(case.network, ["layer3"])(case.x)["layer3"]
    torch.testing.assert_close(found, seen[0], **TOLERANCE[torch.float64])
    return y.float()


def checkpointed(case: Case) -> Tensor:
    twin = copy.deepcopy(case.network)

    def run(network: nn.Module, *, again: bool) -> list[Tensor]:
        z = network.bn1(network.conv1(case.x))
        for number in range(1, 5):
            stage = network.get_submodule(f"layer{number}")
            z = checkpoint(stage, z, use_reentrant=False) if again else stage(z)
        z.square().mean().backward()
        return [p.grad for p in network.parameters() if p.grad is not None]

    with torch.enable_grad():
        gradients = run(case.network, again=True), run(twin, again=False)
        for one, two in zip(*gradients, strict=True):
            torch.testing.assert_close(one, two, **TOLERANCE[torch.float32])
    return case.network(case.x)


def compiled(case: Case) -> Tensor:
    if not TRACES_TAILS:
        pytest.skip("fused tails are compiled from torch 2.11 on")
    torch.compiler.reset()
    return torch.compile(case.network, fullgraph=True, backend="aot_eager")(case.x)


def exported(case: Case) -> Tensor:
    if not TRACES_TAILS:
        pytest.skip("fused tails are exported from torch 2.11 on")
    return torch.export.export(case.network, (case.x,)).module()(case.x)


def from_meta(case: Case) -> Tensor:
    with torch.device("meta"):
        fresh = case.make()
    fresh.to_empty(device="cpu")
    for tensor in (*fresh.parameters(), *fresh.buffers()):
        if tensor.is_floating_point():
            tensor.data.fill_(float("nan"))  # what memory that nobody has written may hold
    fresh.load_state_dict(case.network.state_dict())
    return fresh.eval()(case.x)


def in_two_threads(case: Case) -> Tensor:
    inputs = [case.x, case.x.flip(0) * 1.3]
    expected = [case.network(x) for x in inputs]
    wrong: list[float] = []

    def work(number: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                y = case.network(inputs[number])
                if not torch.allclose(y, expected[number], rtol=1e-4, atol=1e-5):
                    wrong.append(float((y - expected[number]).abs().max()))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    assert not wrong
    return case.network(case.x)


def rank(number: int, port: int, host: str, gradients: dict[int, list[Tensor]]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=number, world_size=2)
    case = doubled(case_of(host))
    replica = nn.parallel.DistributedDataParallel(case.network)
    replica(case.x[number : number + 1]).square().mean().backward()
    gradients[number] = [p.grad for p in case.network.parameters()]
    torch.distributed.destroy_process_group()


def in_two_processes(case: Case, host: str) -> Tensor:
    context = torch.multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        found = manager.dict()
        port = 20000 + os.getpid() % 20000
        torch.multiprocessing.spawn(rank, (port, host, found), nprocs=2)
        first, second = found[0], found[1]
    with torch.enable_grad():
        case.network(case.x).square().mean().backward()
    for one, two, parameter in zip(first, second, case.network.parameters(), strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, parameter.grad, rtol=1e-8, atol=1e-10)
    return case.network(case.x)


TOOLS: dict[str, Callable[[Case], Tensor]] = {
    "deepcopy": lambda case: copy.deepcopy(case.network)(case.x),
    "pickle": pickled,
    "AveragedModel": averaged,
    "update_bn": averaged_norms,
    "functional_call": called_functionally,
    "vmap": in_an_ensemble,
    "convert_sync_batchnorm": synchronised,
    "fx.symbolic_trace": lambda case: torch.fx.symbolic_trace(case.network)(case.x),
    "create_feature_extractor": features,
    "checkpoint": checkpointed,
    "torch.compile": compiled,
    "torch.export": exported,
    "bfloat16": lambda case: case.network.bfloat16()(case.x.bfloat16()).float(),
    "half": lambda case: case.network.half()(case.x.half()).float(),
    "channels_last": lambda case: case.network.to(memory_format=torch.channels_last)(
        case.x.to(memory_format=torch.channels_last)
    ),
    "meta, to_empty": from_meta,
    "two threads": in_two_threads,
}
LOOSE = {"bfloat16": 0.1, "half": 0.02}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("host", ["timm, fused", "torchvision"])
def test_tool(host: str, tool: str) -> None:
    case = case_of(host)
    with torch.no_grad():
        assert all(attention.alpha != 0 for attention in attentions(case.network))
        expected = case.network(case.x)
        y = TOOLS[tool](case)
    limit = LOOSE.get(tool, 1e-4) * expected.abs().max()
    assert (y - expected).abs().max() <= limit


@pytest.mark.slow
@pytest.mark.parametrize("host", [host for host in HOSTS if "resnet50" in host])
def test_all_tools_on_a_whole_network(host: str) -> None:
    for tool in TOOLS:
        test_tool(host, tool)


@pytest.mark.slow
@pytest.mark.parametrize("host", ["timm, fused", "torchvision", "torchvision resnet50, fused"])
def test_two_processes(host: str) -> None:
    case = doubled(case_of(host))  # in float32 a ReLU that flips moves gradients by far more
    expected = case.network(case.x)
    torch.testing.assert_close(in_two_processes(case, host), expected)
