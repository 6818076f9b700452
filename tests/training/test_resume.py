"""A training that was stopped and goes on ends in the bits of one that was not."""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training.processes import start
from training.tiny import (
    Stop,
    differences,
    folder_set,
    outcome,
    shortened,
    tiny,
    trained,
    validated,
)

from spem.data import load_images
from spem.training import (
    DataConfig,
    Interrupted,
    RunConfig,
    RuntimeConfig,
    Silent,
    evaluate,
    read_metrics,
    read_result,
    read_run,
    step,
    train,
)
from spem.training.folder import load_checkpoint
from spem.training.step import execution


def train_with_stops(config: RunConfig, folder: Path, stops: list[int]) -> None:
    for after in stops:
        with pytest.raises(Interrupted):
            train(config, folder, progress=Stop(after))
        assert read_result(folder) is None
    trained(config, folder)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[RunConfig], dict[str, Any]]:
    """What an undisturbed training of a config ends in."""
    known: dict[str, dict[str, Any]] = {}

    def get(config: RunConfig) -> dict[str, Any]:
        if repr(config) not in known:
            folder = tmp_path_factory.mktemp("undisturbed")
            trained(config, folder)
            known[repr(config)] = outcome(folder)
        return known[repr(config)]

    return get


# 7 steps an epoch. The signal comes during a step's report and is honoured after the next step,
# so 13 stops in epoch 2 after its last step, 14 stops at the end of epoch 2, 3 in mid-epoch.
@pytest.mark.parametrize("stops", [[14], [13], [3, 1, 1]])
def test_four_epochs_equal_two_stopped_and_two_more(
    stops: list[int], tmp_path: Path, undisturbed: Callable[[RunConfig], dict[str, Any]]
):
    config = tiny()
    train_with_stops(config, tmp_path, stops)
    assert differences(outcome(tmp_path), undisturbed(config)) == []


MODES = {
    "srm": tiny("srm", epochs=2),
    "bf16": tiny(epochs=2, precision="bf16"),
    "contiguous": tiny("none", epochs=2, channels_last=False),
    "validation": validated(tiny(epochs=2), 40),
    "declared": replace(tiny(), optim=replace(tiny(epochs=2).optim, rules="declared", mix_lr=0.01)),
    "threads2": shortened(tiny(epochs=2, threads=2), images=80),
    "compile": shortened(tiny(epochs=2, step="compile"), images=120),
}


@pytest.mark.parametrize(
    "mode", [pytest.param(m, marks=pytest.mark.slow if m == "compile" else ()) for m in MODES]
)
def test_resume_is_exact_in_every_mode(
    mode: str, tmp_path: Path, undisturbed: Callable[[RunConfig], dict[str, Any]]
):
    train_with_stops(MODES[mode], tmp_path, [3])
    assert differences(outcome(tmp_path), undisturbed(MODES[mode])) == []


def test_comparison_sees_a_difference(undisturbed: Callable[[RunConfig], dict[str, Any]]):
    a, b = undisturbed(tiny()), undisturbed(replace(tiny(), seed=1))
    assert {d.split()[0] for d in differences(a, b)} == {"weights", "momentum", "metrics"}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("count", [2, pytest.param(25, marks=pytest.mark.slow)])
def test_kills_at_random_moments_leave_no_trace(count: int, tmp_path: Path):
    driver = start("kills", str(tmp_path), str(count))
    said, _ = driver.communicate(timeout=1700)
    assert driver.returncode == 0
    hits, with_checkpoint = map(int, said.split())
    assert hits == count
    assert with_checkpoint >= count // 4


@pytest.mark.parametrize(
    ("number", "code", "name"), [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C")]
)
def test_signal_writes_a_checkpoint_in_mid_epoch_and_says_how_to_go_on(
    number: signal.Signals, code: int, name: str, tmp_path: Path
):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(KeyboardInterrupt) as stopped:
        train(tiny(), tmp_path, progress=Stop(9, number))
    assert isinstance(stopped.value, Interrupted)
    assert stopped.value.code == code
    text = str(stopped.value)
    assert f"stopped by {name} in epoch 2 after step 3 of 7" in text
    assert "run the same command again" in text
    content = load_checkpoint(tmp_path / "checkpoint.pt")
    assert (content["epoch"], content["step"], len(content["history"])) == (1, 3, 1)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_other_threads_train_without_touching_signals(tmp_path: Path):
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    class Look(Silent):
        def step(self, done: int, total: int, text: str) -> None:
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(
        target=train, args=(tiny(epochs=1), tmp_path), kwargs={"progress": Look()}
    )
    thread.start()
    thread.join()
    assert set(seen) == {before}
    assert read_result(tmp_path) is not None


def test_torn_metrics_and_a_lost_config_are_written_anew(
    tmp_path: Path, undisturbed: Callable[[RunConfig], dict[str, Any]]
):
    with pytest.raises(Interrupted):
        train(tiny(), tmp_path, progress=Stop(16))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match=r"metrics.jsonl is damaged: a line .*Resume the run"):
        read_metrics(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is damaged: .*Delete it: the run resumes"):
        train(tiny(), tmp_path, progress=Silent())
    (tmp_path / "config.json").unlink()
    trained(tiny(), tmp_path)
    assert differences(outcome(tmp_path), undisturbed(tiny())) == []


def test_device_and_threads_are_kept_on_resume(tmp_path: Path):
    with pytest.raises(Interrupted):
        train(tiny(epochs=2, threads=1), tmp_path, progress=Stop(3))
    progress = Stop(-1)
    train(tiny(epochs=2, threads=2), tmp_path, progress=progress)
    told = "resuming as planned, so that the result stays exact: threads 1 (asked: 2)"
    assert told in progress.messages
    run = read_run(tmp_path)
    assert (run.runtime.threads, len(run.starts)) == (1, 2)


def test_other_config_and_other_seed_are_refused(tmp_path: Path):
    config = tiny()
    with pytest.raises(Interrupted):
        train(config, tmp_path, progress=Stop(3))
    other = replace(config, optim=replace(config.optim, lr=0.05))
    message = r"belongs to another run \(optim.lr 0.1 -> 0.05\). Use another folder"
    with pytest.raises(ValueError, match=message):
        train(other, tmp_path, progress=Silent())
    whole = (tmp_path / "config.json").read_bytes()
    (tmp_path / "config.json").unlink()  # the checkpoint knows as well
    with pytest.raises(ValueError, match=message):
        train(other, tmp_path, progress=Silent())
    (tmp_path / "config.json").write_bytes(whole)
    with pytest.raises(ValueError, match=r"belongs to another run \(seed 0 -> 1\)"):
        train(replace(config, seed=1), tmp_path, progress=Silent())
    train(config, tmp_path, progress=Silent())
    with pytest.raises(ValueError, match=r"optim.lr 0.1 -> 0.05"):
        train(other, tmp_path, progress=Silent())


def test_other_images_are_refused(tmp_path: Path):
    """Of the same name and number, in the folder where they lay: the checksum tells."""
    data = folder_set(tmp_path / "images", "ab")
    config = replace(tiny(epochs=2), data=DataConfig(name=str(data), pad=1, normalisation="digits"))
    config = replace(config, optim=replace(config.optim, batch=4))
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run", progress=Stop(2))
    shutil.copy(data / "train" / "b" / "3.png", data / "train" / "a" / "3.png")
    with pytest.raises(ValueError, match=r"the images, .* differ.*Use another folder"):
        train(config, tmp_path / "run", progress=Silent())


def test_settings_of_torch_are_given_back_as_they_were():
    """Also that determinism only warned, and where a setting is refused on the way in."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    threads, tf32 = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    asked = RuntimeConfig(device="cpu", threads=threads + 1, deterministic=True, impl="reference")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(step, "use_impl", lambda impl: 1 / 0)
            with pytest.raises(ZeroDivisionError), execution(asked):
                pass
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.backends.cudnn.allow_tf32 == tf32
        assert torch.get_num_threads() == threads
    finally:
        torch.use_deterministic_algorithms(False)


ROUNDING: dict[str, Callable[[], None]] = {
    "older setting": lambda: torch.set_float32_matmul_precision("medium"),
    "newer setting": lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee"),
    "of everything": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
}


@pytest.mark.parametrize("setting", ROUNDING)
def test_training_and_evaluation_are_in_float32_whatever_torch_is_set_to(setting: str):
    """By default a GPU's convolutions are not: `spem eval` then missed the run's own accuracy."""
    backends = torch.backends
    parts: Any = backends.cudnn.conv, backends.cuda.matmul, backends.mkldnn.matmul

    def precisions() -> list[str]:
        return [part.fp32_precision for part in parts]

    at_first, found = (precisions(), backends.fp32_precision), list[list[str]]()
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))
    network.register_forward_hook(lambda *_: found.append(precisions()))
    few = load_images("digits", "test", size=8).take(torch.arange(4))
    try:
        ROUNDING[setting]()
        as_set = precisions()
        evaluate(network, few)
        with execution(RuntimeConfig(device="cpu", threads=1)):
            found.append(precisions())
            assert torch.get_float32_matmul_precision() == "highest"
            assert not backends.cudnn.allow_tf32
        assert precisions() == as_set
    finally:
        torch.set_float32_matmul_precision("highest")
        backends.fp32_precision = at_first[1]
        for part, precision in zip(parts, at_first[0], strict=True):
            part.fp32_precision = precision
    assert found == [["ieee"] * 3] * 2


def test_a_finished_run_is_not_trained_again_and_says_so(tmp_path: Path):
    first = train(tiny(epochs=1), tmp_path, progress=Silent())
    assert not (tmp_path / "checkpoint.pt").exists()
    stamps = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    progress = Stop(-1)
    assert train(tiny(epochs=1), tmp_path, progress=progress) == first
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == stamps
    assert progress.messages == [
        f"finished on {first.date}, so there is nothing to train: {tmp_path}"
    ]
