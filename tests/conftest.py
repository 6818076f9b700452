"""Fixtures that the whole suite shares."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from spem.attention.base import _REGISTRY

if not torch.cuda.is_available():
    # The kernels for CUDA run in Triton's interpreter; it must be asked for before they are loaded.
    os.environ.setdefault("TRITON_INTERPRET", "1")

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """One thread per worker: several workers with many threads each only slow one another down."""
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of cifar10/ and cifar100/; without it the test is skipped, or fails if CI=true."""
    root = Path(os.environ.get("SPEM_DATA") or REPOSITORY.parent / "shared" / "data")
    missing = [name for name in ("cifar10", "cifar100") if not (root / name).is_dir()]
    if missing:
        reason = (
            f"no {' and '.join(missing)} in {root}; set SPEM_DATA to the folder that holds them"
        )
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return root


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test in a folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def clean_registry() -> Iterator[None]:
    """What a test registers is forgotten after it."""
    before = dict(_REGISTRY)
    yield
    _REGISTRY.clear()
    _REGISTRY.update(before)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Deterministic algorithms; torch.empty then gives NaN, so that what nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def unreachable_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A hub that refuses every connection, with an empty cache; the waits that somebody asks for.

    Its client would wait for half a minute, and log each of its tries.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return waits
