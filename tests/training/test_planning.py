"""What is refused or mended before the first step, and many compiled runs in one process."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training.tiny import begun, shortened, tiny

from spem.cli import main
from spem.data import ImageSet, load_images
from spem.training import DataConfig, ModelConfig, OptimConfig, RunConfig, Silent, read_run, train
from spem.training.sets import load_sets
from spem.training.step import make_optimizer, set_rate


def test_a_device_that_is_not_there_can_be_corrected(tmp_path: Path):
    config = shortened(tiny(epochs=1, device="gpu"), 40)
    with pytest.raises(ValueError, match=r"runtime.device='gpu' cannot be used.*'cpu' or 'auto'"):
        train(config, tmp_path, progress=Silent())
    train(shortened(tiny(epochs=1), 40), tmp_path, progress=Silent())
    assert read_run(tmp_path).runtime.device == "cpu"


def test_a_last_batch_too_small_for_a_module_is_refused_before_the_first_step(tmp_path: Path):
    config = shortened(tiny("srm", epochs=1), 41)
    with pytest.raises(ValueError, match=r"41 images in batches of 40 end in one of 1, but srm"):
        train(config, tmp_path, progress=Silent())


def test_a_wrong_sum_of_the_images_is_refused_before_the_folder_is_made(tmp_path: Path):
    config = shortened(tiny("none", epochs=1), 40)
    right = load_images("digits", "test", size=8).sha256
    wrong = replace(config, data=replace(config.data, test_sha256="0" * 64))
    with pytest.raises(ValueError, match=rf"SHA-256 of the test images is {right}, expected 0000"):
        train(wrong, tmp_path / "run", progress=Silent())
    assert not (tmp_path / "run").exists()
    good = replace(config, data=replace(config.data, test_sha256=right))
    train(good, tmp_path / "run", progress=Silent())


def test_attention_that_starts_as_the_identity_changes_no_output():
    config = tiny("se")
    plain = begun(tiny("none")).model
    model, _, step = begun(replace(config, model=replace(config.model, start="identity")))
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.eval()(images), plain.eval()(images))
    alphas = {name: p for name, p in model.named_parameters() if name.endswith("alpha")}
    assert len(alphas) == 3
    model.train()
    for _ in range(2):
        step(images, torch.arange(4))
    assert all(float(p.detach().abs().max()) > 0 for p in alphas.values())


@pytest.mark.parametrize(
    ("attention", "start"), [("none", None), ("spem", None), ("se", "identity")]
)
def test_a_run_starts_from_the_weights_of_another_backbone(
    attention: str, start: str | None, tmp_path: Path
):
    config = shortened(tiny("none", epochs=1), 40)
    train(config, tmp_path / "first", progress=Silent())
    path = tmp_path / "first" / "model.safetensors"
    given = {"weights": str(path), "weights_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    still = replace(config, optim=replace(config.optim, lr=0.0))
    model = replace(config.model, attention=attention, start=start, **given)
    train(replace(still, model=model), tmp_path / "second", progress=Silent())
    first, second = (read_run(tmp_path / name).network() for name in ("first", "second"))
    weights = {name: w for name, w in first.named_parameters() if not name.startswith("fc.")}
    found = {k.replace(".norm.", "."): w for k, w in second.named_parameters()}
    assert len(weights) == 39
    assert all(torch.equal(found[name], w) for name, w in weights.items())
    assert not torch.equal(first.fc.weight, second.fc.weight)
    other = replace(model, weights_sha256="0" * 64)
    with pytest.raises(ValueError, match=r"SHA-256 of .*model.safetensors is"):
        train(replace(still, model=other), tmp_path / "third", progress=Silent())
    deeper = replace(still, model=replace(model, depth=20))
    with pytest.raises(ValueError, match=r"model.safetensors does not fit the network: it lacks"):
        train(deeper, tmp_path / "fourth", progress=Silent())


def test_weights_that_are_not_those_meant_leave_no_folder(tmp_path: Path):
    """In which the right sum would then be another run's."""
    (tmp_path / "w").write_bytes(b"other")
    weights = [f"--model.weights={tmp_path / 'w'}", "--model.weights-sha256=0"]
    assert main(["train", "smoke", *weights, "--folder", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()


def test_weights_are_known_by_their_sum():
    a, b = (ModelConfig(weights=where, weights_sha256="0" * 64) for where in ("a", "b/a"))
    assert RunConfig(model=a).id == RunConfig(model=b).id != RunConfig().id
    with pytest.raises(ValueError, match=r"model.weights and model.weights_sha256"):
        ModelConfig(weights="a")


def test_the_limited_images_can_be_drawn_again_for_every_seed():
    data = replace(tiny().data, limit=30, limit_seed=True)
    sums = [load_sets(data, seed).train.sha256 for seed in (0, 1, 1)]
    assert sums[0] != sums[1] == sums[2]
    assert sums[0] == load_sets(replace(data, limit_seed=False), 5).train.sha256


def test_splits_of_different_classes_are_told_as_such(monkeypatch: pytest.MonkeyPatch):
    def other(data: DataConfig) -> ImageSet:
        return replace(load_images(data.name, "test", size=8), classes=tuple("abcdefghij"))

    monkeypatch.setattr("spem.training.sets.load_test", other)
    with pytest.raises(ValueError, match=r"digits: the training images have other classes"):
        load_sets(tiny().data)


def test_the_cosine_starts_at_the_rate_and_falls_to_nothing():
    optim = OptimConfig(epochs=4, lr=0.2, schedule="cosine", milestones=())
    optimizer = make_optimizer(torch.nn.Linear(1, 1), optim)
    expected = [0.2, 0.1 + 0.1 * 2**-0.5, 0.1, 0.1 - 0.1 * 2**-0.5]
    assert [set_rate(optimizer, optim, epoch) for epoch in range(4)] == pytest.approx(expected)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(expected[-1])
