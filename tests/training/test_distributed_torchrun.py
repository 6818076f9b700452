"""The command under torchrun: one process killed, what is said, and going on; and parts of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import pytest
from torch import distributed

from spem.attention import AttentionSpec
from spem.models import resnet
from spem.training import (
    RuntimeConfig,
    Silent,
    process_group,
    read_metrics,
    read_result,
    read_run,
    train,
)
from spem.training.distributed import Team, share_norms
from spem.training.folder import load_checkpoint
from spem.training.loop import _resolved

OPTIONS = [
    *("train", "smoke", "--depth", "11", "--epochs", "6", "--limit", "50", "--attention", "none"),
    *("--checkpoint-minutes", "0", "--runtime.impl", "reference"),
]


def ranks(parent: int) -> dict[int, int]:
    """The process ids of torchrun's children, by rank."""
    found: dict[int, int] = {}
    listed = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    for child in map(int, listed):
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        found |= {int(v[5:]): child for v in variables if v.startswith(b"RANK=")}
    return found


def start(folder: Path, errors: IO[str]) -> subprocess.Popen[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    port = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command = [*torchrun, *port, "-m", "spem", *OPTIONS, "--folder", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=errors, stdout=errors, text=True, env=environment)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.timeout(900)
@pytest.mark.slow
def test_a_killed_process_ends_the_run_with_a_sentence_and_another_number_goes_on(
    tmp_path: Path,
) -> None:
    folder, said = tmp_path / "run", tmp_path / "said"
    with said.open("w") as errors:
        running = start(folder, errors)
        try:
            while not read_metrics(folder) and running.poll() is None:
                time.sleep(0.02)
            killed = ranks(running.pid)[1]
            os.kill(killed, signal.SIGKILL)
            assert running.wait(120) != 0
        finally:
            running.kill()
    text = said.read_text()
    assert text.count("run the same command again") == 1
    assert "another of the 2 processes of this run is gone" in text
    assert "checkpoint.pt" in text
    assert read_result(folder) is None
    assert load_checkpoint(folder / "checkpoint.pt")["epoch"] >= 1
    result = train(read_run(folder).config, folder, progress=Silent())  # one process goes on
    assert result.epochs == len(read_metrics(folder)) == 6


def test_without_torchrun_nothing_is_joined() -> None:
    with process_group() as first:
        assert first
        assert not distributed.is_initialized()


@pytest.mark.parametrize(("images", "size"), [(41, 2), (128, 5)])
def test_parts_cover_a_batch_once(images: int, size: int) -> None:
    parts = [Team(rank, size).part(images) for rank in range(size)]
    taken = [i for part in parts for i in range(images)[part]]
    assert taken == list(range(images))
    lengths = {part.stop - part.start for part in parts}
    assert max(lengths) - min(lengths) <= 1


def test_several_processes_step_eagerly_each_on_its_own_device() -> None:
    assert _resolved(RuntimeConfig(device="cpu", step="auto"), 2).step == "eager"
    with pytest.raises(ValueError, match=r"step='compile' is for one process, and 2 train"):
        _resolved(RuntimeConfig(device="cpu", step="compile"), 2)
    with pytest.raises(ValueError, match=r"device='cpu:0' cannot serve 2 processes"):
        _resolved(RuntimeConfig(device="cpu:0"), 2)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [("iebn", "takes statistics of the batch by itself"), ("se(pool=srp)", "draws at random")],
)
def test_modules_that_look_at_the_whole_batch_are_refused(spec: str, reason: str) -> None:
    model = resnet(11, attention=AttentionSpec.parse(spec))
    with pytest.raises(ValueError, match=reason):
        share_norms(model)


def test_shared_norms_keep_names_and_tensors() -> None:
    model = resnet(11, attention=AttentionSpec.parse("srm")).train()
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    norms = share_norms(model)
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert len(norms) == 16  # of stem, blocks, shortcuts and attention
    assert all(norm.training for norm in norms)
