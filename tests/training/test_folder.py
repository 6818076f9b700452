"""The run folder: one process at a time trains in it, and nothing of anybody else is touched."""

from __future__ import annotations

import errno
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training.processes import start
from training.tiny import Stop, differences, folder_set, outcome, shortened, tiny, trained

from spem.data import ImageSet, load_images
from spem.training import (
    DataIdentity,
    HeldError,
    Interrupted,
    Silent,
    load_test_images,
    read_result,
    read_run,
    train,
)
from spem.training.folder import held

SMALL = shortened(tiny(epochs=1), 40)


def contents(folder: Path) -> dict[Path, bytes]:
    """Everything below a folder."""
    return {path: path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


# ---- one process at a time


def test_the_second_process_is_told_who_holds_the_folder(tmp_path: Path):
    holder = start("hold", str(tmp_path))
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    try:
        message = rf"in use by process {holder.pid} on {socket.gethostname()} since 20.*Wait for it"
        with pytest.raises(HeldError, match=message):
            train(SMALL, tmp_path, progress=Silent())
        # Suspended, it might wake and write: it keeps the folder for as long as it lives.
        os.kill(holder.pid, signal.SIGSTOP)
        for _ in range(3):
            with pytest.raises(HeldError, match=message):
                train(SMALL, tmp_path, progress=Silent())
    finally:
        holder.kill()
        holder.communicate()
    # A killed one keeps nothing.
    train(SMALL, tmp_path, progress=Silent())


@pytest.mark.filterwarnings("ignore:flock not supported")
def test_where_flock_is_missing_a_killed_process_holds_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """filelock then looks at the process that its file names, so nothing else may stand there."""

    def missing(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", missing)
    who = f"in use by {os.getpid()} on {socket.gethostname()}. Wait"
    with held(tmp_path):
        assert (tmp_path / ".lock").read_text().split()[0] == str(os.getpid())
        with pytest.raises(HeldError, match=who), held(tmp_path):
            pass


def test_where_a_locked_file_takes_no_note_the_run_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As on Windows."""

    def refused(path: Path, *_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "write_text", refused)
    train(SMALL, tmp_path, progress=Silent())
    assert read_run(tmp_path).finished


def test_of_many_processes_one_gets_the_folder(tmp_path: Path):
    racers = start("race", str(tmp_path / "run"), "12")
    said, _ = racers.communicate(timeout=120)
    assert racers.returncode == 0
    assert said == "1\n"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_training_that_was_suspended_wakes_and_ends_in_the_same_bits(tmp_path: Path):
    undisturbed = tmp_path / "whole"
    with start("train", str(undisturbed)) as runner:
        assert runner.wait(300) == 0
    folder = tmp_path / "suspended"
    with start("train", str(folder)) as runner:
        while not (folder / "checkpoint.pt").exists():
            assert runner.poll() is None
            time.sleep(0.005)
        os.kill(runner.pid, signal.SIGSTOP)
        before = contents(folder)
        with pytest.raises(HeldError, match=f"process {runner.pid}"):
            train(tiny(), folder, progress=Silent())
        assert contents(folder) == before
        os.kill(runner.pid, signal.SIGCONT)
        assert runner.wait(300) == 0
    assert differences(outcome(folder), outcome(undisturbed)) == []


# ---- other people's files


@pytest.mark.parametrize(
    "name", ["model.safetensors", "a/b.txt", "config.json", "checkpoint.pt", ".checkpoint.pt.tmp"]
)
def test_a_folder_with_files_of_another_origin_is_refused(name: str, tmp_path: Path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"model_type": "resnet"}')
    if name == "checkpoint.pt":  # as many programs call what torch saves
        torch.save({"model": {}}, tmp_path / name)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=rf"{name[0]}.*left as they are; name a new folder"):
        train(SMALL, tmp_path, progress=Silent())
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["model.safetensors", "metrics.jsonl", ".lock", "checkpoint.pt"])
def test_nothing_is_put_in_the_place_of_a_link_or_a_device(name: str, tmp_path: Path):
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    with pytest.raises(Interrupted):
        train(SMALL, folder, progress=Stop(1))
    elsewhere.write_text("somebody's")
    path = folder / name
    path.unlink(missing_ok=True)
    make: dict[str, Callable[[], None]] = {
        "model.safetensors": lambda: path.symlink_to(elsewhere),
        "metrics.jsonl": lambda: path.symlink_to(tmp_path / "nowhere"),
        ".lock": path.mkdir,
        "checkpoint.pt": lambda: os.mkfifo(path),
    }
    make[name]()
    with pytest.raises(ValueError, match=rf"{name} is a (link|folder|pipe), not a file"):
        train(SMALL, folder, progress=Silent())
    assert elsewhere.read_text() == "somebody's"
    assert not (tmp_path / "nowhere").exists()


def test_files_beside_those_of_a_run_are_left_alone(tmp_path: Path):
    with pytest.raises(Interrupted):
        train(SMALL, tmp_path, progress=Stop(1))
    names = ("notes.txt", "a.tmp", ".hidden.tmp", ".checkpoint.pt.old.tmp", "gates.json")
    for name in names:
        (tmp_path / name).write_text("mine")
    (tmp_path / ".checkpoint.pt.0123abcd.tmp").write_text("of a killed process")
    (tmp_path / ".lock").write_text("{")
    train(SMALL, tmp_path, progress=Silent())
    assert all((tmp_path / name).read_text() == "mine" for name in names)
    assert not (tmp_path / ".checkpoint.pt.0123abcd.tmp").exists()


def test_where_the_images_lack_no_folder_is_made(tmp_path: Path):
    lacking = replace(SMALL, data=replace(SMALL.data, name=str(tmp_path / "images")))
    with pytest.raises(FileNotFoundError, match="nor a folder"):
        train(lacking, tmp_path / "runs" / "one", progress=Silent())
    assert not (tmp_path / "runs").exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"is a file\. Name a folder"):
        train(SMALL, tmp_path / "file", progress=Silent())


# ---- what a network was trained on


def test_a_name_is_no_identity(tmp_path: Path):
    """A network trained on a folder called digits is not tested on the digits."""
    images = folder_set(tmp_path / "digits", "abcdefghij")
    config = replace(SMALL, data=replace(SMALL.data, name=str(images), limit=None))
    train(config, tmp_path / "run", progress=Silent())
    run = read_run(tmp_path / "run")
    own = load_test_images(run.config, run.data)
    assert own.sha256 == load_images(str(images), "test").sha256 == run.data.test_sha256
    weights = run.weights()
    assert weights.config.data.name == "digits"
    with pytest.raises(ValueError, match=r"images named 'digits' that are not those.*--data PATH"):
        load_test_images(weights.config, weights.data)
    assert len(load_test_images(weights.config, weights.data, name=str(images))) == 40
    other = folder_set(tmp_path / "others", "jihgfedcbx")
    with pytest.raises(ValueError, match=r"class 0 is 'a' there and 'b' here"):
        load_test_images(weights.config, weights.data, name=str(other))
    with pytest.raises(ValueError, match=r"class 0 is 'a' there and '0' here"):
        load_test_images(weights.config, weights.data, name="digits")
    images.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"digits' *, which is not here. Name the images"):
        load_test_images(run.config, run.data)


def test_another_number_of_classes_is_told():
    digits = load_images("digits", "test", size=8)
    identity = DataIdentity("digits", digits.classes, digits.sha256, digits.sha256)
    digits.require_classes(identity.classes)
    fewer = ImageSet(digits.images[:1], digits.labels[:1] * 0, ("0",), "one")
    with pytest.raises(ValueError, match="10 there, 1 here"):
        fewer.require_classes(identity.classes)


def test_a_run_that_goes_on_is_read_as_unfinished(tmp_path: Path):
    with pytest.raises(Interrupted):
        trained(tiny(), tmp_path / "run", Stop(9))
    run = read_run(tmp_path / "run")
    assert (run.result, run.error, run.finished, len(run.epochs)) == (None, None, False, 1)
    assert run.config == tiny()
    assert read_result(tmp_path / "run") is None
    with pytest.raises(ValueError, match="has not finished: run the same training again"):
        run.network()
