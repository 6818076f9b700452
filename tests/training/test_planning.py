"""What is refused or mended before the first step, and many compiled runs in one process."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training.tiny import shortened, tiny

from spem.training import Silent, claim, load_weights, read_config, train
from spem.training.claim import Claim
from spem.training.config import DataConfig, RunConfig
from spem.training.signals import StopSignals
from spem.training.step import make_optimizer, make_step


def test_a_vanished_probe_does_not_free_a_held_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    holder = Claim(tmp_path)
    holder.acquire()
    try:

        def vanished(folder: Path) -> float:
            raise FileNotFoundError(folder)

        monkeypatch.setattr(claim, "_folder_time", vanished)
        with pytest.raises((FileNotFoundError, RuntimeError)):
            Claim(tmp_path).acquire()
        monkeypatch.undo()
        holder.check()
    finally:
        holder.release()


def test_a_leftover_probe_is_swept(tmp_path: Path):
    (tmp_path / ".claim.1.2.probe").touch()
    with claim.claimed(tmp_path):
        assert not list(tmp_path.glob("*.probe"))


def test_a_device_that_is_not_there_can_be_corrected(tmp_path: Path):
    with pytest.raises(ValueError, match=r"runtime.device='gpu' cannot be used.*'cpu' or 'auto'"):
        train(tiny(epochs=1, device="gpu"), tmp_path, progress=Silent())
    config = shortened(tiny(epochs=1, step="compile"), 40)
    (tmp_path / "planned").mkdir()
    from spem.training.runs import plan_run

    plan_run(config, tmp_path / "planned", print)
    eager = replace(config, runtime=replace(config.runtime, step="eager"))
    train(eager, tmp_path / "planned", progress=Silent())
    stored = read_config(tmp_path / "planned")
    assert stored is not None
    assert stored.runtime.step == "eager"


def test_what_was_left_open_stays_as_planned(tmp_path: Path):
    from spem.training.runs import plan_run

    first = plan_run(tiny(threads=3), tmp_path, print)
    again = plan_run(tiny(threads=0), tmp_path, print)
    assert first.runtime.threads == again.runtime.threads == 3


def test_unknown_normalisation_names_the_nearest():
    with pytest.raises(ValueError, match=r"'cifar1'.*paper.*Did you mean 'cifar10'"):
        DataConfig(normalisation="cifar1")


def test_a_hub_id_is_the_same_run_as_its_short_name():
    long = RunConfig(data=DataConfig(name="uoft-cs/cifar10"))
    assert long.id == RunConfig(data=DataConfig(name="cifar10")).id


def test_a_last_batch_too_small_for_a_module_is_refused_before_the_first_step(tmp_path: Path):
    config = shortened(tiny("srm", epochs=1), 41)
    with pytest.raises(ValueError, match=r"41 images in batches of 40 end in one of 1, but srm"):
        train(config, tmp_path, progress=Silent())


def test_a_wrong_sum_of_the_test_files_is_refused(tmp_path: Path):
    import numpy as np
    from PIL import Image

    for split in ("train", "test"):
        for name in ("a", "b"):
            folder = tmp_path / "set" / split / name
            folder.mkdir(parents=True)
            pixels = np.full((8, 8, 3), 9 * len(name) + (split == "test"), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "0.png")
    files = sorted((tmp_path / "set" / "test").rglob("*.png"))
    right = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    base = replace(tiny("none", epochs=1), data=DataConfig(name=str(tmp_path / "set"), pad=1))
    wrong = replace(base, data=replace(base.data, test_sha256="0" * 64))
    with pytest.raises(ValueError, match=r"SHA-256|sum"):
        train(wrong, tmp_path / "wrong", progress=Silent())
    good = replace(base, data=replace(base.data, test_sha256=right))
    train(good, tmp_path / "good", progress=Silent())
    # What is passed on names the set, not where it lay.
    assert load_weights(tmp_path / "good" / "model.safetensors")[1].data.name == "set"


def test_many_compiled_networks_in_one_process(monkeypatch: pytest.MonkeyPatch):
    from spem.training.checkpoint import build_model

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    for attention in ("none", "se", "eca", "srm", "spem"):
        config = tiny(attention, step="compile")
        model = build_model(config, 10).train()
        step = make_step(model, make_optimizer(model, config.optim), config.optim, config.runtime)
        for batch in (4, 3):
            output = step(torch.randn(batch, 3, 8, 8), torch.zeros(batch, dtype=torch.int64))
            assert output.loss.isfinite()
    torch.compiler.reset()


def test_a_signal_after_the_last_epoch_speaks_of_no_checkpoint():
    import signal

    stop = StopSignals()
    stop.receive(signal.SIGTERM, None)
    text = str(stop.interruption("after its last epoch", "The result is written."))
    assert text == "Training stopped by SIGTERM after its last epoch. The result is written."
