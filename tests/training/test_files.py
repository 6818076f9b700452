"""Damaged files end in an error that names them, or in the right result; never in a wrong one."""

from __future__ import annotations

import errno
import json
import os
import random
import stat
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save, save_file
from training.tiny import kept_checkpoint, tiny, trained

from spem.files import canonical_json, load_json, read_regular, save_json, write_atomic
from spem.training import DataIdentity, read_run, read_weights, save_weights
from spem.training.folder import _weights_sum, build_network, load_checkpoint, save_checkpoint


def same_tensors(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tensors(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_tensors, a, b))
    return a == b


def whole_run(path: Path) -> Any:
    """A run folder as a user reads it, weights and all."""
    run = read_run(path.parent)
    network = run.network()
    said = asdict(run.result) if run.result else None
    return network.state_dict(), run.config.to_dict(), said, run.epochs, asdict(run.data)


KINDS = dict.fromkeys(
    ("model.safetensors", "config.json", "result.json", "metrics.jsonl"), whole_run
) | {"checkpoint.pt": load_checkpoint}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    trained(tiny(epochs=1), folder)
    return folder


def copied(finished: Path, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for path in finished.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def damage(content: bytes, trial: int, chance: random.Random) -> bytes:
    """A file cut off, with one byte flipped, or with some zeros in it."""
    at = chance.randrange(len(content))
    if trial % 3 == 0:
        return content[:at]
    if trial % 3 == 1:
        return content[:at] + bytes([content[at] ^ chance.randrange(1, 256)]) + content[at + 1 :]
    until = min(len(content), at + chance.randrange(1, 100))
    return content[:at] + bytes(until - at) + content[until:]


@pytest.mark.parametrize(
    "count", [10, pytest.param(150, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
@pytest.mark.parametrize("name", KINDS)
def test_random_damages_end_in_a_sentence_or_change_nothing(
    name: str, count: int, finished: Path, tmp_path: Path
):
    read, chance = KINDS[name], random.Random(name)
    path = copied(finished, tmp_path) / name
    if name == "checkpoint.pt":
        path.write_bytes(kept_checkpoint(finished).read_bytes())
    whole, right = path.read_bytes(), read(path)
    refused = 0
    for trial in range(count):
        path.write_bytes(damage(whole, trial, chance))
        found, message = None, ""
        try:
            found = read(path)
        except (ValueError, FileNotFoundError) as error:  # no other kind may come
            message = str(error)
        if message:
            refused += 1
            assert str(path) in message
            assert "\n" not in message
        else:
            assert same_tensors(found, right), f"trial {trial} was read as something else"
    # Only a change of white space, or of nothing that is read, may go through.
    assert refused >= 0.9 * count


def test_a_damaged_file_of_a_finished_run_is_never_trained_over(finished: Path, tmp_path: Path):
    for name in ("config.json", "metrics.jsonl", "result.json"):
        folder = copied(finished, tmp_path / name)
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:50] + bytes(20) + content[70:])
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(ValueError, match=name):
            trained(tiny(epochs=1), folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_files_that_look_whole_are_told_by_the_sums_of_the_result(finished: Path, tmp_path: Path):
    folder = copied(finished, tmp_path)
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text.replace('"epoch": 0', '"epoch": 1'))
    with pytest.raises(ValueError, match=r"metrics.jsonl is damaged: it is not the file that"):
        read_run(folder)
    (folder / "metrics.jsonl").write_text(text)
    save_weights(read_run(folder).network(), tiny(), folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors is damaged: it is not the file that"):
        read_run(folder).network()
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"metrics.jsonl is missing. Delete the folder"):
        read_run(folder)


def test_a_pipe_in_a_run_folder_does_not_hang(finished: Path, tmp_path: Path):
    for name in ("config.json", "metrics.jsonl", "result.json", "model.safetensors"):
        folder = copied(finished, tmp_path / name)
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(ValueError, match=rf"{name} is a pipe, not a file"):
            whole_run(folder / "x")
        if name != "model.safetensors":  # a finished run shows its result without them
            with pytest.raises(ValueError, match=rf"{name} is a pipe, not a file"):
                trained(tiny(epochs=1), folder)


def test_checkpoint_refuses_objects(tmp_path: Path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint({"model": Path("an object")}, path)  # a whole file, checksum and all
    with pytest.raises(ValueError, match="cannot be read"):
        load_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"null", b"{}", b'{"sha256": 3}', b"\xff", b"[" * 99_999])
def test_json_of_another_kind_is_refused(content: bytes, tmp_path: Path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config.json is damaged.*Fetch the folder again"):
        read_run(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match=r"config.json is damaged.*Delete the folder to train"):
        read_run(tmp_path)
    save_json({"accuracy": 91.0}, tmp_path / "result.json")
    edited = (tmp_path / "result.json").read_text().replace("91.0", "95.0")
    (tmp_path / "result.json").write_text(edited)
    with pytest.raises(ValueError, match="edited by hand"):
        load_json(tmp_path / "result.json", remedy="Train again.")


def test_whole_configs_of_other_content_are_refused(finished: Path, tmp_path: Path):
    good = load_json(finished / "config.json", remedy="")
    for section in ("config", "runtime", "data", "starts"):
        for value in (None, [], {"a": 1}, 3):
            save_json({**good, section: value}, tmp_path / "config.json")
            if (section, value) in (("starts", []), ("runtime", {"a": 1})):
                continue  # no start, and what another version says of them
            with pytest.raises(ValueError, match=r"config.json does not fit"):
                read_run(tmp_path)
    good["config"]["optim"]["nesterov"] = True
    save_json(good, tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"config.json .*nesterov"):
        read_run(tmp_path)
    (tmp_path / "config.json").write_bytes((finished / "config.json").read_bytes())
    for values in ({"error": 3}, {"accuracy": "high"}):
        save_json(values, tmp_path / "result.json")
        with pytest.raises(ValueError, match=r"result.json does not fit"):
            read_run(tmp_path)


def test_folders_without_a_run_are_told(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="this folder holds no run"):
        read_run(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        read_run(tmp_path / "missing")


def test_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("spem.files.os.fsync", full)
    with pytest.raises(OSError, match=rf"No space left.*{path}"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match=r"No space left on device: '.*config\.json'"):
        trained(tiny(epochs=1), tmp_path / "run")


@pytest.mark.parametrize("refuses", [False, True])
def test_the_name_is_synced_last_where_the_file_system_can(
    refuses: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path, sync, synced = tmp_path / "file", os.fsync, list[bool]()

    def watched(descriptor: int) -> None:
        synced.append(stat.S_ISDIR(os.fstat(descriptor).st_mode))
        assert path.exists() == synced[-1]
        if refuses and synced[-1]:
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr("spem.files.os.fsync", watched)
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert synced == [False, True]


def test_the_mode_of_a_new_file_is_the_users(tmp_path: Path):
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "file", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_only_regular_files_are_replaced_and_read(tmp_path: Path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"somebody's")
    link.symlink_to(target)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for path in (link, tmp_path / "folder", tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(ValueError, match="not a file"):
            write_atomic(path, b"new")
    assert target.read_bytes() == b"somebody's"
    assert Path("/dev/null").is_char_device()
    assert read_regular(link) == b"somebody's"
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(ValueError, match="not a file"):
            read_regular(path)


# ---- weights

DATA = DataIdentity("digits", tuple("0123456"), "a" * 64, "b" * 64)


def test_weights_keep_every_bit_and_do_not_tell_where_the_data_lay(tmp_path: Path):
    config = tiny("se(pool=mix())")
    there = replace(config.data, root="/home/somebody/images", name="/home/somebody/pets")
    config = replace(config, data=there)
    model = build_network(config, classes=7).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    path, data = tmp_path / "model.safetensors", replace(DATA, name="/home/somebody/pets")
    save_weights(model, config, path, data=data, impl="numba")
    found = read_weights(path)
    assert same_tensors(found.network.state_dict(), model.state_dict())
    assert found.config == replace(config, data=replace(there, root=None, name="pets"))
    assert (found.data, found.impl) == (replace(DATA, name="pets"), "numba")
    assert not found.network.training
    assert b"somebody" not in path.read_bytes()
    save_weights(model, config, path)  # without what is known of the data
    assert read_weights(path).data is None
    save_weights(model.half(), config, path)
    assert read_weights(path).network.fc.weight.dtype == torch.float32


def test_equal_weights_give_equal_files(tmp_path: Path):
    config = tiny()
    model = build_network(config, classes=7)
    for i in range(20):
        save_weights(model, config, tmp_path / f"{i}.safetensors", data=DATA)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    assert "conv1.weight" in load_file(tmp_path / "0.safetensors")


def test_foreign_safetensors_are_refused(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    save_file({"fc.weight": torch.zeros(10, 256)}, path)
    with pytest.raises(ValueError, match="no config and SHA-256"):
        read_weights(path)


Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], object]


def crafted(path: Path, change: Change) -> None:
    """Weights with a right sum and another content: `change` gets the metadata and the tensors."""
    config = tiny()
    save_weights(build_network(config, classes=7), config, path, data=DATA)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length])["__metadata__"]
    texts = {name: json.loads(metadata[name]) for name in ("config", "about")}
    tensors = load(content)
    change(texts, tensors)
    encoded = {k: v if isinstance(v, str) else canonical_json(v).decode() for k, v in texts.items()}
    metadata = {"format": "pt", **encoded, "sha256": _weights_sum(tensors, encoded)}
    path.write_bytes(save(tensors, metadata))


def put(section: str, name: str, value: object) -> Change:
    return lambda texts, _: texts["config"][section].update({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("model", "depth", 900_002), "depth=900002 is too large"),
        (put("model", "depth", 4997), "tensors for a depth of 4997"),
        (put("model", "depth", 20), "Missing key|does not fit"),
        (put("model", "attention", "sk(branches=100000)"), "does not fit"),
        (put("model", "attention", "eca(kernel=999999999)"), "does not fit"),
        (put("model", "attention", "se(reduction=1e16)"), "reduction=1e[+]16 is not"),
        (put("model", "attention", "fca(size=[7,5000])"), "does not fit"),
        (put("data", "size", 60_000), "size=60000 is too large"),
        (lambda texts, _: texts.update(config="[" * 100_000), "does not fit"),
        (lambda texts, _: texts.update(about=[1]), "does not fit"),
        (lambda texts, _: texts["about"].update(data={"name": 1}), "does not fit"),
        (lambda texts, _: texts["about"]["data"].update(classes=["a"]), "1 class names for 7"),
        (lambda _, tensors: tensors.pop("fc.weight"), "no classifier"),
        (lambda _, tensors: tensors.update({"fc.weight": torch.zeros(10**9, 0)}), "no classifier"),
        (lambda _, tensors: tensors.update({"fc.weight": torch.zeros(7, 3)}), "does not fit"),
        (lambda _, tensors: tensors["bn1.running_var"].fill_(float("nan")), "infinite or NaN"),
    ],
)
def test_crafted_weights_are_refused_before_anything_large_is_built(
    change: Change, message: str, tmp_path: Path
):
    path = tmp_path / "model.safetensors"
    crafted(path, change)
    with pytest.raises(ValueError, match=message) as raised:
        read_weights(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
