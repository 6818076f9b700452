"""What a run writes down about its network: answers, gates, gradients; and the two later fields."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from spem.attention import ChannelAttention
from spem.data import load_images
from spem.models import resnet
from spem.seeding import initialise
from spem.training import DataConfig, ModelConfig, RunConfig, Silent, evaluate, recipes, train
from spem.training.checkpoint import load_answers, load_weights
from spem.training.diverged import read_diverged
from spem.training.inside import describe_gates, gradient_norms
from spem.training.log import read_metrics
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


def test_answers_are_those_that_were_counted(run: tuple[RunConfig, Path]):
    config, folder = run
    answers = load_answers(folder / "answers.npy")
    test = load_sets(config.data, torch.device("cpu")).test
    result = json.loads((folder / "result.json").read_text())
    assert answers.dtype == np.uint8
    assert len(answers) == len(test) == 50
    assert 100 * float((answers == test.labels.numpy()).mean()) == result["accuracy"]


def test_damaged_answers_are_refused(run: tuple[RunConfig, Path], tmp_path: Path):
    path = tmp_path / "answers.npy"
    for content in (b"", b"no array", (run[1] / "answers.npy").read_bytes()[:-3]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="damaged"):
            load_answers(path)
    np.save(path, np.zeros((2, 2)))
    with pytest.raises(ValueError, match="no list of classes"):
        load_answers(path)


def test_gates_are_described_as_numpy_does(run: tuple[RunConfig, Path]):
    config, folder = run
    gates = json.loads((folder / "gates.json").read_text())["gates"]
    assert [g["block"] for g in gates] == [f"layer{k}.0.attention" for k in (1, 2, 3)]
    model, _ = load_weights(folder / "model.safetensors")
    seen: list[np.ndarray] = []  # pyright: ignore[reportMissingTypeArgument]
    last = [m for m in model.modules() if isinstance(m, ChannelAttention)][-1]
    last.register_forward_pre_hook(lambda m, x: seen.append(m.gate(x[0]).detach().numpy()))
    chosen = load_sets(config.data, torch.device("cpu")).test
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


def test_a_gate_without_input_has_no_spread_over_images():
    model = resnet(11, attention="scale")
    gates = describe_gates(model, load_images("digits", "test", size=8), normalisation="digits")
    assert [g["sd_images"] for g in gates] == pytest.approx([0, 0, 0], abs=1e-9)
    assert [g["mean"] for g in gates] == pytest.approx([0.0320586] * 3, rel=1e-6)


def test_modules_without_a_gate_are_left_out_and_spatial_ones_averaged():
    few = load_images("digits", "test", size=8).take(torch.arange(4))
    assert describe_gates(resnet(11, attention="gc"), few, normalisation="digits") == []
    assert len(describe_gates(resnet(11, attention="sge"), few, normalisation="digits")) == 3
    assert describe_gates(resnet(11), few, normalisation="digits") == []


def test_gradient_norms_are_those_of_the_convolutions():
    model = resnet(11, attention="cbam")  # which has convolutions of its own
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


def test_every_epoch_writes_gradients_and_a_resumed_one_the_same(run: tuple[RunConfig, Path]):
    (line,) = read_metrics(run[1])
    assert list(line["gradients"]) == ["layer1.0", "layer2.0", "layer3.0"]
    assert all(0 < norm < 100 for norm in line["gradients"].values())


def test_branches_start_where_they_are_told(tmp_path: Path):
    from spem.models import blocks, start_branches

    model = resnet(11)
    initialise(model, 3)
    start_branches(model, 0.25)
    assert {float(v) for _, b in blocks(model) for v in b.last_norm.weight.detach()} == {0.25}
    others = [b.bn1.weight.detach() for _, b in blocks(model)]
    assert all(float(w.min()) == 1 for w in others)
    # a run begins there: one step at rate 0 leaves it
    config = small("none", branch_start=0.25)
    config = replace(config, optim=replace(config.optim, lr=0.0))
    train(config, tmp_path, progress=Silent())
    trained, _ = load_weights(tmp_path / "model.safetensors")
    assert {float(v) for _, b in blocks(trained) for v in b.last_norm.weight.detach()} == {0.25}


def test_later_fields_change_the_id_only_where_they_are_used():
    base = recipes.paper()
    values = base.to_dict()
    del values["model"]["branch_start"], values["data"]["test_limit"]
    assert RunConfig.from_dict(values).id == base.id
    assert replace(base, model=ModelConfig(branch_start=1)).id != base.id
    assert replace(base, data=DataConfig(test_limit=100)).id != base.id
    for wrong in ({"branch_start": -1.0}, {"branch_start": float("nan")}):
        with pytest.raises(ValueError, match="branch_start"):
            ModelConfig(**wrong)
    with pytest.raises(ValueError, match="test_limit"):
        DataConfig(test_limit=0)


def test_a_stop_during_evaluation_ends_it_there():
    class StopError(Exception):
        pass

    def stop() -> None:
        raise StopError

    model = resnet(11).train()
    few = load_images("digits", "test", size=8).take(torch.arange(4))
    with pytest.raises(StopError):
        evaluate(model, few, normalisation="digits", batch=1, between=stop)
    assert model.training
    calls: list[int] = []
    evaluate(model, few, normalisation="digits", batch=2, between=lambda: calls.append(1))
    assert len(calls) == 2


def test_a_run_that_diverges_says_so_in_its_folder_until_it_is_tried_again(tmp_path: Path):
    config = small("none")
    wild = replace(config, optim=replace(config.optim, lr=1e30))
    with pytest.raises(FloatingPointError):
        train(wild, tmp_path, progress=Silent())
    found = read_diverged(wild, tmp_path)
    assert found is not None
    assert found.epoch == 0
    assert "became" in found.message
    assert read_diverged(replace(wild, seed=1), tmp_path) is None
    (tmp_path / "diverged.json").write_text("{}")
    with pytest.raises(ValueError, match="Delete it to try the run again"):
        read_diverged(wild, tmp_path)
    other = tmp_path / "other"
    train(config, other, progress=Silent())
    assert not (other / "diverged.json").exists()
