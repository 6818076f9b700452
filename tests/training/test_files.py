"""Damaged files end in an error that names them, or in the right result; never in a wrong one."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from training.tiny import tiny

from spem.training import Silent, load_weights, read_config, read_result, save_weights, train
from spem.training.checkpoint import (
    build_model,
    load_checkpoint,
    load_json,
    save_checkpoint,
    save_json,
    write_atomic,
)


class Kind(NamedTuple):
    """One of the files of a run, and how it is read."""

    name: str
    load: Callable[[Path], Any]
    same: Callable[[Any, Any], bool]


def same_tensors(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tensors(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_tensors, a, b))
    return a == b


def loaded(kind: Kind, path: Path) -> Any:
    """What a file is read as, or the error it ends in; no other kind of error may come."""
    try:
        return kind.load(path)
    except ValueError as error:
        return error


def weights_and_config(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    model, config = load_weights(path)
    return model.state_dict(), config.to_dict()


KINDS = {
    kind.name: kind
    for kind in (
        Kind("checkpoint.pt", load_checkpoint, same_tensors),
        Kind("model.safetensors", weights_and_config, same_tensors),
        Kind("config.json", lambda path: read_config(path.parent), lambda a, b: a == b),
        Kind("result.json", lambda path: read_result(path.parent), lambda a, b: a == b),
    )
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    train(tiny(epochs=1), folder, progress=Silent())
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_50_random_damages_of_each_file(name: str, finished: Path, tmp_path: Path):
    kind, chance = KINDS[name], random.Random(name)
    whole = (finished / name).read_bytes()
    right = kind.load(finished / name)
    path = tmp_path / name
    refused = 0
    for trial in range(50):
        if trial % 2:
            damaged = whole[: chance.randrange(len(whole))]
        else:
            at, flip = chance.randrange(len(whole)), chance.randrange(1, 256)
            damaged = whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :]
        path.write_bytes(damaged)
        outcome = loaded(kind, path)
        if isinstance(outcome, ValueError):
            refused += 1
            assert str(path) in str(outcome)
        else:
            assert kind.same(outcome, right), f"trial {trial} was read as something else"
    # Only a change of white space, or of nothing that is read, may go through.
    assert refused >= 45


def test_message_names_file_and_remedy(finished: Path, tmp_path: Path):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes((finished / "checkpoint.pt").read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"checkpoint.pt is damaged: .*Delete it to train"):
        load_checkpoint(path)


def test_checkpoint_refuses_objects(tmp_path: Path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint({"model": Path("an object")}, path)  # a whole file, checksum and all
    with pytest.raises(ValueError, match="cannot be read"):
        load_checkpoint(path)


def test_edited_json_is_refused(tmp_path: Path):
    path = tmp_path / "result.json"
    save_json({"accuracy": 91.0}, path)
    path.write_text(path.read_text().replace("91.0", "95.0"))
    with pytest.raises(ValueError, match="edited by hand"):
        load_json(path, remedy="Train again.")


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"{}", b'{"sha256": 3}', b"\xff", b"[" * 9999]
)
def test_json_of_another_kind_is_refused(content: bytes, tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"config.json is damaged"):
        read_config(tmp_path)


def test_unknown_field_in_a_whole_config_is_refused(tmp_path: Path):
    values = tiny().to_dict()
    values["optim"]["nesterov"] = True
    save_json({"schema": 1, "id": "0" * 10, "config": values}, tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"config.json .*no field nesterov"):
        read_config(tmp_path)


def test_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("spem.training.checkpoint.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_weights_keep_every_bit_in_any_memory_format(tmp_path: Path):
    config = tiny("se(pool=mix())")
    model = build_model(config, classes=7).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    save_weights(model, config, tmp_path / "model.safetensors")
    loaded, read = load_weights(tmp_path / "model.safetensors")
    assert same_tensors(loaded.state_dict(), model.state_dict())
    assert read == config
    assert not loaded.training


def test_weights_do_not_tell_where_the_data_lay(tmp_path: Path):
    config = tiny()
    config = replace(config, data=replace(config.data, root="/home/somebody/images"))
    save_weights(build_model(config, classes=10), config, tmp_path / "model.safetensors")
    assert b"somebody" not in (tmp_path / "model.safetensors").read_bytes()


def test_foreign_safetensors_are_refused(tmp_path: Path):
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    save_file({"fc.weight": torch.zeros(10, 256)}, path)
    with pytest.raises(ValueError, match="no config and SHA-256"):
        load_weights(path)


def test_files_are_json_and_safetensors_for_other_programs(finished: Path):
    from safetensors.torch import load_file

    assert json.loads((finished / "result.json").read_text())["attention"] == "spem"
    assert json.loads((finished / "config.json").read_text())["config"]["seed"] == 0
    assert "conv1.weight" in load_file(finished / "model.safetensors")
