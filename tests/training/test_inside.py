"""What a run writes down about its network: answers, gates, gradients; and the two later fields."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from spem.attention import ChannelAttention
from spem.data import load_images
from spem.models import blocks, resnet
from spem.training import ModelConfig, RunConfig, Silent, evaluate, recipes, train
from spem.training.evaluation import describe_gates, gradient_norms, norm_report
from spem.training.folder import read_result, read_weights
from spem.training.sets import load_sets


def small(attention: str = "spem", **model: float) -> RunConfig:
    base = recipes.smoke(attention, epochs=1)
    return replace(
        base,
        model=ModelConfig(depth=11, attention=attention, **model),  # pyright: ignore[reportArgumentType]
        data=replace(base.data, limit=64, test_limit=50),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    config, folder = small(), tmp_path_factory.mktemp("run")
    train(config, folder, progress=Silent())
    return config, folder


def test_gates_are_described_as_numpy_does(run: tuple[RunConfig, Path]):
    config, folder = run
    gates = (read_result(folder) or pytest.fail("no result")).gates
    assert [g["block"] for g in gates] == [f"layer{k}.0.attention" for k in (1, 2, 3)]
    model = read_weights(folder / "model.safetensors").network
    seen: list[np.ndarray] = []  # pyright: ignore[reportMissingTypeArgument]
    last = [m for m in model.modules() if isinstance(m, ChannelAttention)][-1]
    last.register_forward_pre_hook(lambda m, x: seen.append(m.gate(x[0]).detach().numpy()))
    chosen = load_sets(config.data).test
    again = describe_gates(model, chosen, normalisation="digits")
    values = seen[-1].reshape(50, 256).astype(np.float64)
    expected = {
        "mean": values.mean(),
        "sd": values.std(),
        "q05": np.quantile(values, 0.05),
        "q50": np.quantile(values, 0.5),
        "q95": np.quantile(values, 0.95),
        "sd_channels": values.mean(0).std(),
        "sd_images": values.std(0).mean(),
    }
    for key, number in expected.items():
        assert again[-1][key] == pytest.approx(number, rel=1e-4, abs=1e-7)
        assert gates[-1][key] == pytest.approx(again[-1][key], rel=1e-4, abs=1e-7)


def test_modules_without_a_gate_are_left_out_and_spatial_ones_averaged():
    digits = load_images("digits", "test", size=8)
    gates = describe_gates(resnet(11, attention="scale"), digits, normalisation="digits")
    assert [g["sd_images"] for g in gates] == pytest.approx([0, 0, 0], abs=1e-9)  # no input
    assert [g["mean"] for g in gates] == pytest.approx([0.0320586] * 3, rel=1e-6)
    few = digits.take(torch.arange(4))
    found = [describe_gates(resnet(11, attention=name), few) for name in (None, "gc", "sge")]
    assert [len(gates) for gates in found] == [0, 0, 3]


def test_gradient_norms_are_those_of_the_convolutions():
    model = resnet(11, attention="coord")  # which has convolutions of its own
    model(torch.randn(4, 3, 8, 8)).square().mean().backward()
    by_hand = [
        np.sqrt(
            sum(
                float((p.grad.double() ** 2).sum())  # pyright: ignore[reportOptionalMemberAccess]
                for name, p in model.named_parameters()
                if name.startswith((f"layer{k}.0.conv", f"layer{k}.0.downsample.0"))
            )
        )
        for k in (1, 2, 3)
    ]
    assert gradient_norms(model).tolist() == pytest.approx(by_hand, rel=1e-5)


def test_the_worst_norms_are_named_also_those_without_weights():
    model = torch.nn.Sequential(*(torch.nn.BatchNorm2d(4, affine=False) for _ in range(6)))
    for i, variance in enumerate((1.0, 2.0, float("nan"), 3.0, 5.0, float("inf"))):
        norm = model.get_submodule(str(i))
        norm.running_var[0] = variance  # pyright: ignore[reportIndexIssue]
    named = [text.partition(" ")[0] for text in norm_report(model).split(", ")]
    assert (sorted(named[:2]), named[2:]) == (["2", "5"], ["4", "3"])


def test_branches_start_where_they_are_told(tmp_path: Path):
    # at rate 0 a run leaves them there
    config = small("none", branch_start=0.25)
    config = replace(config, optim=replace(config.optim, lr=0.0))
    train(config, tmp_path, progress=Silent())
    trained = read_weights(tmp_path / "model.safetensors").network
    assert {float(v) for _, b in blocks(trained) for v in b.last_norm.weight.detach()} == {0.25}
    assert all(float(b.bn1.weight.detach().min()) == 1 for _, b in blocks(trained))


def test_a_stop_during_evaluation_ends_it_there():
    class StopError(Exception):
        pass

    def stop() -> None:
        raise StopError

    model = resnet(11).train()
    few = load_images("digits", "test", size=8).take(torch.arange(4))
    with pytest.raises(StopError):
        evaluate(model, few, batch=1, between=stop)
    assert model.training
    calls: list[int] = []
    evaluate(model, few, batch=2, between=lambda: calls.append(1))
    assert len(calls) == 2
