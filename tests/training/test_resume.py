"""A training that was stopped and goes on ends in the bits of one that was not."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training.processes import start
from training.tiny import Stop, differences, outcome, shortened, tiny, validated

from spem.training import Interrupted, RunConfig, Silent, read_metrics, read_result, train
from spem.training.checkpoint import load_checkpoint, save_checkpoint


def train_with_stops(config: RunConfig, folder: Path, stops: list[int]) -> None:
    for after in stops:
        with pytest.raises(Interrupted):
            train(config, folder, progress=Stop(after))
        assert read_result(folder) is None
    train(config, folder, progress=Silent())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[RunConfig], dict[str, Any]]:
    """What an undisturbed training of a config ends in."""
    known: dict[str, dict[str, Any]] = {}

    def get(config: RunConfig) -> dict[str, Any]:
        key = repr(config)
        if key not in known:
            folder = tmp_path_factory.mktemp("undisturbed")
            train(config, folder, progress=Silent())
            known[key] = outcome(folder)
        return known[key]

    return get


# 7 steps an epoch. The signal comes during a step's report and is honoured after the next step,
# so 13 stops in epoch 2 after its last step, 14 stops at the end of epoch 2, 3 in mid-epoch.
@pytest.mark.parametrize("stops", [[14], [3], [6], [13], [1, 1, 1], [20]])
def test_four_epochs_equal_two_stopped_and_two_more(
    stops: list[int], tmp_path: Path, undisturbed: Callable[[RunConfig], dict[str, Any]]
):
    config = tiny()
    train_with_stops(config, tmp_path, stops)
    assert differences(outcome(tmp_path), undisturbed(config)) == []


@pytest.mark.parametrize(
    "config",
    [
        tiny("none"),
        tiny("srm"),
        tiny("cbam"),
        tiny("spem", precision="bf16"),
        tiny("spem", channels_last=False),
        validated(tiny(), 40),
        replace(tiny(), optim=replace(tiny().optim, rules="declared", mix_lr=0.01)),
        shortened(tiny(threads=2), images=80),
        shortened(tiny(step="compile"), images=120),
    ],
    ids=[
        *("none", "srm", "cbam", "bf16", "contiguous", "validation", "declared", "threads2"),
        "compile",
    ],
)
def test_resume_is_exact_in_every_mode(
    config: RunConfig, tmp_path: Path, undisturbed: Callable[[RunConfig], dict[str, Any]]
):
    config = replace(config, optim=replace(config.optim, epochs=2, milestones=(1,)))
    train_with_stops(config, tmp_path, [3])
    assert differences(outcome(tmp_path), undisturbed(config)) == []


def test_comparison_sees_a_difference(undisturbed: Callable[[RunConfig], dict[str, Any]]):
    a, b = undisturbed(tiny()), undisturbed(replace(tiny(), seed=1))
    assert {d.split()[0] for d in differences(a, b)} == {"weights", "momentum", "metrics"}


@pytest.mark.timeout(600)  # some 50 trainings, half a second each on an idle core
def test_20_kills_at_random_moments(tmp_path: Path):
    driver = start("kills", str(tmp_path), "20")
    said, _ = driver.communicate(timeout=550)
    assert driver.returncode == 0
    killed, terminated, with_checkpoint = map(int, said.split())
    assert killed + terminated == 20
    assert min(killed, terminated) >= 5
    assert with_checkpoint >= 5


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
        def due(self) -> bool:
            seen.append(signal.getsignal(signal.SIGTERM))
            return False

    thread = threading.Thread(
        target=train, args=(tiny(epochs=1), tmp_path), kwargs={"progress": Look()}
    )
    thread.start()
    thread.join()
    assert set(seen) == {before}
    assert read_result(tmp_path) is not None


def test_torn_metrics_are_written_anew(
    tmp_path: Path, undisturbed: Callable[[RunConfig], dict[str, Any]]
):
    with pytest.raises(Interrupted):
        train(tiny(), tmp_path, progress=Stop(16))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])
    assert len(read_metrics(tmp_path)) == 1
    train(tiny(), tmp_path, progress=Silent())
    assert outcome(tmp_path)["metrics"] == undisturbed(tiny())["metrics"]


def test_planned_execution_is_kept_on_resume(tmp_path: Path):
    with pytest.raises(Interrupted):
        train(tiny(epochs=2, threads=1), tmp_path, progress=Stop(3))
    progress = Stop(-1)
    train(tiny(epochs=2, threads=2, channels_last=False), tmp_path, progress=progress)
    told = [m for m in progress.messages if "as planned" in m]
    assert told == [
        "resuming as planned, so that the result stays exact: "
        "threads 1 (asked: 2), channels_last True (asked: False)"
    ]
    assert "1 thread" in (read_result(tmp_path) or pytest.fail("no result")).hardware
    assert "as planned" in (tmp_path / "log.txt").read_text()


def test_lost_config_is_taken_from_the_checkpoint(
    tmp_path: Path, undisturbed: Callable[[RunConfig], dict[str, Any]]
):
    with pytest.raises(Interrupted):
        train(tiny(), tmp_path, progress=Stop(3))
    (tmp_path / "config.json").unlink()
    train(tiny(), tmp_path, progress=Silent())
    assert differences(outcome(tmp_path), undisturbed(tiny())) == []


def test_other_config_and_other_seed_are_refused(tmp_path: Path):
    config = tiny()
    with pytest.raises(Interrupted):
        train(config, tmp_path, progress=Stop(3))
    other = replace(config, optim=replace(config.optim, lr=0.05))
    message = rf"belongs to run {config.id}, this config is {other.id} \(optim.lr 0.1 -> 0.05\)"
    with pytest.raises(ValueError, match=message):
        train(other, tmp_path, progress=Silent())
    (tmp_path / "config.json").unlink()  # the checkpoint knows as well
    with pytest.raises(ValueError, match=message):
        train(other, tmp_path, progress=Silent())
    with pytest.raises(ValueError, match="belongs to seed 0, this config has seed 1"):
        train(replace(config, seed=1), tmp_path, progress=Silent())
    train(config, tmp_path, progress=Silent())
    with pytest.raises(ValueError, match=r"optim.lr 0.1 -> 0.05"):
        train(other, tmp_path, progress=Silent())


def test_other_images_are_refused(tmp_path: Path):
    with pytest.raises(Interrupted):
        train(tiny(), tmp_path, progress=Stop(3))
    path = tmp_path / "checkpoint.pt"
    content = load_checkpoint(path)
    content["data_sha256"]["train"] = "0" * 64
    save_checkpoint(content, path)
    with pytest.raises(ValueError, match="the images differ"):
        train(tiny(), tmp_path, progress=Silent())


def test_threads_are_given_back(tmp_path: Path):
    before = torch.get_num_threads()
    config = shortened(tiny(epochs=1, threads=before + 1), images=40)
    train(config, tmp_path, progress=Silent())
    assert torch.get_num_threads() == before


def test_finished_run_is_not_trained_again(tmp_path: Path):
    first = train(tiny(epochs=1, keep_checkpoint=False), tmp_path, progress=Silent())
    assert not (tmp_path / "checkpoint.pt").exists()
    stamps = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert train(tiny(epochs=1, keep_checkpoint=False), tmp_path, progress=Silent()) == first
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == stamps
