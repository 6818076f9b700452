"""Learning curves are read from the very file a result was made from."""

from __future__ import annotations

from pathlib import Path

import pytest
from training.tiny import shortened, tiny

from spem.reproduce import collect
from spem.training import Silent, train


def test_changed_or_missing_metrics_are_refused(tmp_path: Path):
    config = shortened(tiny("none", epochs=2), 40)
    folder = config.folder(tmp_path)
    train(config, folder, progress=Silent())
    (run,) = collect([config], tmp_path)
    assert [line["epoch"] for line in run.epochs] == [0, 1]
    metrics = folder / "metrics.jsonl"
    whole = metrics.read_bytes()
    for damaged in (whole.replace(b"test_accuracy", b"test_accuracz", 1), whole[:-9], b""):
        metrics.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged or missing.*Delete"):
            collect([config], tmp_path)
    metrics.unlink()
    with pytest.raises(ValueError, match="missing"):
        collect([config], tmp_path)
    metrics.write_bytes(whole)
    assert collect([config], tmp_path)[0].epochs == run.epochs
