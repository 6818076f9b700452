"""The Triton kernels prove themselves: right ones, a planted fault, a device that fails."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are imported
pytest.importorskip("triton", minversion="3.6", reason="no triton of 3.6 or later")

from spem.ops import choose, cuda, dispatch
from spem.ops.cuda import proof

if not (cuda.INTERPRETED or torch.cuda.is_available()):
    pytest.skip("no GPU, and Triton came without TRITON_INTERPRET=1", allow_module_level=True)

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder of its own, and a process that knows no verdict."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(proof, "_known", {})
    return tmp_path


def stored(folder: Path) -> list[str]:
    return sorted(file.read_text() for file in folder.glob("*/spem.txt"))


def test_right_kernels_prove_themselves_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    with caplog.at_level(logging.INFO, logger="spem.ops"), torch.inference_mode():
        assert proof.objection(DEVICE) is None
    assert torch.equal(torch.random.get_rng_state(), before)
    assert "compute what they should" in caplog.text
    assert stored(folder) == [""]
    # Neither this process nor the next one tries again; with another torch one does.
    tried: list[torch.device] = []
    monkeypatch.setattr(proof, "difference", lambda device: tried.append(device) or "wrong")
    assert proof.objection(DEVICE) is None
    proof._known.clear()
    assert proof.objection(DEVICE) is None
    assert tried == []
    monkeypatch.setattr(torch, "__version__", "2.99")
    assert proof.objection(DEVICE) == "wrong"
    assert stored(folder) == ["", "wrong"]


@pytest.mark.parametrize("default", ["meta", torch.float64], ids=str)
def test_defaults_of_torch_are_no_reason_against_kernels(default: str | torch.dtype) -> None:
    dtype = torch.get_default_dtype()
    try:
        if isinstance(default, str):
            torch.set_default_device(default)
        else:
            torch.set_default_dtype(default)
        assert proof.objection(DEVICE) is None
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(dtype)


FAULTS = ("plane_stats", "affine_tail", "affine_tail_backward", "stats_backward")


def spoiled(name: str, right: Any) -> Any:
    """A pass that is wrong in one plane by a little, or takes the last of several extrema."""

    def wrong(*arguments: Any) -> Any:
        found = right(*arguments)
        if name == "plane_stats":
            return found._replace(at_low=(found.at_low + 1) % arguments[0][0, 0].numel())
        first = found[0] if isinstance(found, tuple) else found
        first[0, 0] *= 1.05
        return found

    return wrong


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_and_remembered(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(cuda, name, spoiled(name, getattr(cuda, name)))
        reason = proof.objection(DEVICE)
    assert reason is not None
    assert reason.startswith("kernels differ from the reference: ")
    assert stored(folder) == [reason]
    assert f"Triton {reason}; tails are composed" in caplog.text
    # Other sources are tried again.
    monkeypatch.setattr(proof, "_SOURCES", "others")
    assert proof.objection(DEVICE) is None
    assert stored(folder) == ["", reason]


def test_a_device_that_fails_is_no_verdict_for_the_next_process(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no kernel image is available\nfor execution")

    with monkeypatch.context() as patch:
        patch.setattr(cuda, "plane_stats", fails)
        reason = proof.objection(DEVICE)
        assert reason is not None
        assert reason.endswith("RuntimeError: no kernel image is available")
    assert proof.objection(DEVICE) == reason
    assert caplog.text.count("tails are composed") == 1
    assert stored(folder) == []
    proof._known.clear()
    assert proof.objection(DEVICE) is None


def test_nowhere_to_keep_a_verdict(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "file").write_text("a file where the folder would be")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder / "file"))
    assert proof.objection(DEVICE) is None


def test_a_graph_takes_proven_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_TORCH", (2, 11))
    monkeypatch.setitem(dispatch._INSTALLED, "triton", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    seen: list[torch.device] = []
    verdicts = [None, "kernels differ"]

    def objection(device: torch.device) -> str | None:
        seen.append(device)
        return verdicts[len(seen) - 1]

    monkeypatch.setattr(proof, "objection", objection)
    assert choose("t", "cuda", torch.bfloat16, graph=True).impl == "triton"
    assert choose("t", torch.device("cuda", 1), torch.bfloat16, graph=True) == (
        "reference",
        "triton kernels differ",
    )
    assert choose("t", "cuda", torch.float64, graph=True).impl == "reference"
    assert choose("t", "cuda", torch.bfloat16).impl == "reference"
    assert seen == [torch.device("cuda", 3), torch.device("cuda", 1)]
