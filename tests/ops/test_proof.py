"""The Triton kernels prove themselves: right ones, a planted fault, a device that fails."""

from __future__ import annotations

import json
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
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(proof, "_known", {})
    return tmp_path


def stored(folder: Path) -> dict[str, str]:
    return json.loads((folder / "spem" / "kernels.json").read_text())


def test_right_kernels_prove_themselves_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    with caplog.at_level(logging.INFO, logger="spem.ops"), torch.inference_mode():
        assert proof.objection(DEVICE) is None
    assert torch.equal(torch.random.get_rng_state(), before)
    assert "compute what they should" in caplog.text
    [(key, verdict)] = stored(folder).items()
    assert verdict == ""
    assert torch.__version__ in key
    # Neither this process nor the next one tries again.
    monkeypatch.setattr(proof, "difference", None)
    assert proof.objection(DEVICE) is None
    proof._known.clear()
    assert proof.objection(DEVICE) is None


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
    assert list(stored(folder).values()) == [reason]
    assert f"Triton {reason}; tails are composed" in caplog.text
    # Other sources are tried again.
    monkeypatch.setattr(proof, "_SOURCES", "others")
    assert proof.objection(DEVICE) is None
    assert sorted(stored(folder).values()) == ["", reason]


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
    assert not (folder / "spem").exists()
    proof._known.clear()
    assert proof.objection(DEVICE) is None


def test_nowhere_to_keep_a_verdict(folder: Path) -> None:
    (folder / "spem").write_text("a file where the folder would be")
    assert proof.objection(DEVICE) is None


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 1}', "\x00"])
def test_a_spoiled_file_is_rewritten(text: str, folder: Path) -> None:
    (folder / "spem").mkdir()
    (folder / "spem" / "kernels.json").write_text(text)
    proof._keep("one", "")
    assert stored(folder) == {"one": ""}


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
