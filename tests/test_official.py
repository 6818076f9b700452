"""The published program's network: logits, penalty, gradients, and twenty steps of SGD."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tolerance import RECORDED
from torch import nn

import spem

FOLDER = Path(__file__).parent / "data" / "official"
CHECKPOINT = FOLDER / "checkpoint.pth.tar"

# the published program's names -> ours
GATE = {
    "w1": "attention.w_e",
    "b1": "attention.b_e",
    "w2": "attention.w_r",
    "b2": "attention.b_r",
    "p": "attention.pool.p",
}


def ours(key: str) -> str:
    head, _, last = key.rpartition(".")
    return f"{head}.{GATE[last]}" if last in GATE else key


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "golden.npz", allow_pickle=False) as file:
        return dict(file)


@pytest.fixture
def model() -> nn.Module:
    return spem.load_official(CHECKPOINT).double()


def batch(golden: dict[str, np.ndarray], step: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(golden["images"][step % 4]).double(), torch.from_numpy(
        golden["labels"][step % 4]
    )


def close(actual: torch.Tensor, expected: np.ndarray, what: str = "") -> None:
    np.testing.assert_allclose(
        actual.detach().numpy().reshape(expected.shape), expected, **RECORDED, err_msg=what
    )


def recorded(golden: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {ours(k.removeprefix(prefix)): v for k, v in golden.items() if k.startswith(prefix)}


def test_what_is_loaded(model: nn.Module) -> None:
    loaded = spem.load_official(str(CHECKPOINT))  # a path as text, too
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    assert (loaded.depth, loaded.classes, loaded.block) == (11, 10, "bottleneck")
    assert str(loaded.spec) == "spem(form=code)"
    state = torch.load(CHECKPOINT, weights_only=True)["state_dict"]
    mine = loaded.state_dict()
    assert len(mine) == len(state)
    for key, value in state.items():
        assert torch.equal(mine[ours(key.removeprefix("module."))].flatten(), value.flatten()), key


def test_logits_in_evaluation(model: nn.Module, golden: dict[str, np.ndarray]) -> None:
    close(model.eval()(batch(golden, 0)[0]), golden["logits_eval"])


def test_logits_in_training(model: nn.Module, golden: dict[str, np.ndarray]) -> None:
    close(model.train()(batch(golden, 0)[0]), golden["logits_train"])
    assert not np.allclose(golden["logits_train"], golden["logits_eval"])


def test_penalty(model: nn.Module, golden: dict[str, np.ndarray]) -> None:
    close(spem.penalty(model), golden["penalty"])


def test_gradients(model: nn.Module, golden: dict[str, np.ndarray]) -> None:
    images, labels = batch(golden, 0)
    (F.cross_entropy(model.train()(images), labels) + 0.1 * spem.penalty(model)).backward()
    expected = recorded(golden, "grad/")
    assert set(expected) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        close(parameter.grad, expected[name], name)


def test_twenty_steps_of_sgd(model: nn.Module, golden: dict[str, np.ndarray]) -> None:
    optimiser = torch.optim.SGD(
        model.train().parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4
    )
    losses, penalties = [], []
    for step in range(20):
        images, labels = batch(golden, step)
        loss, penalty = F.cross_entropy(model(images), labels), spem.penalty(model)
        losses.append(loss.item())
        penalties.append(penalty.item())
        optimiser.zero_grad()
        (loss + 0.1 * penalty).backward()
        optimiser.step()
    np.testing.assert_allclose(losses, golden["task_loss"], **RECORDED)
    np.testing.assert_allclose(penalties, golden["penalties"], **RECORDED)
    expected = recorded(golden, "after/")
    state = model.state_dict()
    assert set(expected) == set(state)
    for name, value in state.items():
        close(value, expected[name], name)


def content() -> dict:
    return torch.load(CHECKPOINT, weights_only=True)


def test_keys_without_the_prefix_of_a_wrapper(tmp_path: Path) -> None:
    """A network trained without the data-parallel wrapper has keys without `module.`."""
    whole = content()
    whole["state_dict"] = {k.removeprefix("module."): v for k, v in whole["state_dict"].items()}
    torch.save(whole, tmp_path / "plain.pth.tar")
    expected = spem.load_official(CHECKPOINT).state_dict()
    for name, value in spem.load_official(tmp_path / "plain.pth.tar").state_dict().items():
        assert torch.equal(value, expected[name]), name


def without(key: str) -> Callable[[dict], object]:
    return lambda whole: {
        **whole,
        "state_dict": {k: v for k, v in whole["state_dict"].items() if k != key},
    }


def changed(key: str, value: object) -> Callable[[dict], object]:
    return lambda whole: {**whole, "state_dict": {**whole["state_dict"], key: value}}


ALTERED: dict[str, tuple[Callable[[dict], object], str]] = {
    "no state": (lambda whole: {k: v for k, v in whole.items() if k != "state_dict"}, "state_dict"),
    "empty state": (lambda whole: {**whole, "state_dict": {}}, ""),
    "a list for a state": (lambda whole: {**whole, "state_dict": [1, 2]}, "state_dict"),
    "a list": (lambda whole: [whole], ""),
    "a tensor": (lambda whole: torch.zeros(3), ""),
    "no conv1": (without("module.conv1.weight"), r"conv1\.weight"),
    "no w2": (without("module.layer2.0.w2"), r"layer2\.0.*w"),
    "no p": (without("module.layer3.0.p"), r"layer3\.0.*p"),
    "no fc": (without("module.fc.weight"), r"fc\.weight"),
    "no running_var": (without("module.bn1.running_var"), r"bn1\.running_var"),
    "a fourth stage": (changed("module.layer4.0.w1", torch.zeros(1, 8, 1, 1)), "layer4"),
    "an extra key": (changed("module.extra", torch.zeros(2)), "extra"),
    "a narrow fc": (changed("module.fc.weight", torch.zeros(10, 255)), r"fc\.weight"),
    "a flat fc": (changed("module.fc.weight", torch.zeros(10)), r"fc\.weight"),
    "a scalar fc": (changed("module.fc.weight", torch.tensor(1.0)), r"fc\.weight"),
    "a text": (changed("module.fc.weight", "text"), r"fc\.weight|state_dict"),
    "a short w1": (changed("module.layer1.0.w1", torch.zeros(1, 63, 1, 1)), r"layer1\.0.*w"),
    "three p": (changed("module.layer1.0.p", torch.zeros(3)), r"layer1\.0.*p"),
    "an integer key": (changed(7, torch.zeros(3)), "7"),
    "an odd block": (changed("module.layer1.x.w1", torch.zeros(1, 64, 1, 1)), r"layer1\.x|layer1"),
    "a complex weight": (
        changed("module.fc.weight", torch.zeros(10, 256, dtype=torch.complex64)),
        r"fc\.weight",
    ),
}


@pytest.mark.parametrize(("change", "message"), ALTERED.values(), ids=ALTERED)
def test_a_file_of_another_layout(
    change: Callable[[dict], object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "other.pth.tar"
    torch.save(change(content()), path)
    with pytest.raises(ValueError, match=rf"(?s)other\.pth\.tar.*{message}") as raised:
        spem.load_official(path)
    said = str(raised.value).replace(str(path), "")
    assert len(said) < 400
    assert "\n" not in said
    assert "weights_only" not in said


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        spem.load_official(tmp_path / "nowhere.pth")


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError), match=tmp_path.name):
        spem.load_official(tmp_path)


@pytest.mark.parametrize("size", [0, 1, 100, 5000, 500_000, 1_091_000])
def test_a_truncated_file(size: int, tmp_path: Path) -> None:
    path = tmp_path / "short.pth.tar"
    path.write_bytes(CHECKPOINT.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"short\.pth\.tar"):
        spem.load_official(path)


@pytest.mark.parametrize(
    "data", [b"not a checkpoint", b"\x80\x02", b"PK\x03\x04 no archive", b"{}", b"\0" * 64]
)
def test_a_file_that_is_no_checkpoint(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "wrong.pth.tar"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"wrong\.pth\.tar"):
        spem.load_official(path)


def test_flipped_bytes_never_end_in_a_strange_error(tmp_path: Path) -> None:
    """The file has no checksum of its own: a flip is an error, or changes nothing but numbers."""
    original = CHECKPOINT.read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "flipped.pth.tar"
    messages: list[str] = []
    with zipfile.ZipFile(
        CHECKPOINT
    ) as archive:  # the part that describes the tensors is the interesting one
        start = next(i.header_offset for i in archive.infolist() if i.filename.endswith("data.pkl"))
    places = [
        *rng.integers(start, start + 12_000, 40),
        *rng.integers(0, len(original), 10),
        *range(-60, 0, 6),
    ]
    for place in places:
        data = bytearray(original)
        data[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        try:
            loaded = spem.load_official(path)
        except ValueError as error:
            messages.append(str(error))
        else:
            assert loaded.depth == 11
    assert messages
    assert all("flipped.pth.tar" in message for message in messages)


class Malicious:
    """Unpickling it writes a file."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return exec, (f"open({self.target!r}, 'w').close()",)


@pytest.mark.parametrize("how", ["archive", "legacy", "bare"])
def test_no_object_of_the_file_is_executed(how: str, tmp_path: Path) -> None:
    target = tmp_path / "executed"
    path = tmp_path / "evil.pth.tar"
    evil = {**content(), "acc": Malicious(str(target))}
    if how == "bare":
        path.write_bytes(pickle.dumps(evil["acc"]))
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=how == "archive")
    with pytest.raises(ValueError, match=r"evil\.pth\.tar"):
        spem.load_official(path)
    assert not target.exists()


def test_a_tensor_of_the_legacy_format_is_read(tmp_path: Path) -> None:
    """The published program's time wrote files without an archive around them."""
    path = tmp_path / "legacy.pth.tar"
    torch.save(content(), path, _use_new_zipfile_serialization=False)
    expected = spem.load_official(CHECKPOINT).state_dict()
    for name, value in spem.load_official(path).state_dict().items():
        assert torch.equal(value, expected[name])
