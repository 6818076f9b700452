"""benchmarks/attach_table.py and export_table.py: interrupted, taken up again, errors repeated."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("timm", reason="timm is not installed")
pytest.importorskip("torchvision", reason="torchvision is not installed")

import attach_table
import export_table
from export.graphs import Network

import spem

TINY = ("timm:resnet10t", "timm:mobilenetv3_small_050")


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """The scripts set the number of threads, and what becomes of warnings."""
    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        yield
    torch.set_num_threads(threads)


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def counted(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, stop: int | None = None
) -> list[object]:
    """The attentions that a script's `measured` is asked for, until it is stopped at one."""
    asked: list[object] = []
    measured = script.measured

    def note(*given: object) -> dict[str, str]:
        if len(asked) == stop:
            raise KeyboardInterrupt
        asked.append(given[0] if isinstance(given[0], str) else given[1])
        return measured(*given)

    monkeypatch.setattr(script, "measured", note)
    return asked


@pytest.mark.slow
def test_attach_goes_on_and_repeats_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(attach_table, "ARCHITECTURES", TINY)
    args = ["--out", str(tmp_path)]
    with pytest.MonkeyPatch.context() as patch:
        counted(attach_table, patch, stop=4)  # in the second network
        with pytest.raises(KeyboardInterrupt):
            attach_table.main(args)
    done = rows(tmp_path, "attach.csv")
    wanted = [*((TINY[0], name) for name in attach_table.ATTENTIONS), (TINY[1], "spem")]
    assert [(row["architecture"], row["attention"]) for row in done] == wanted

    def no_attach(model: torch.nn.Module, attention: str, **options: object) -> None:
        raise RuntimeError(f"{attention}\nbroke")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attach_table.spem, "attach", no_attach)
        assert attach_table.main(args) == 0
    found = rows(tmp_path, "attach.csv")
    assert found[:4] == done
    errors = [(f"RuntimeError: {name} broke", "failed") for name in ("se", "eca")]
    assert [(row["sites"], row["note"]) for row in found[4:]] == errors
    assert found[4]["torch"] == torch.__version__.partition("+")[0]

    assert attach_table.main(args) == 0  # errors stay
    assert rows(tmp_path, "attach.csv") == found
    asked = counted(attach_table, monkeypatch)
    assert attach_table.main([*args, "--retry"]) == 0
    assert asked == ["se", "eca"]
    again = rows(tmp_path, "attach.csv")
    assert again[:4] == done
    # mobilenetv3_small_050 has a block of 8 channels: no hidden unit at reduction=16
    assert again[4]["sites"].startswith("attach: blocks.0.0.bn2: SE: reduction=16")
    assert (again[5]["sites"], again[5]["note"], again[5]["identity_difference"]) == ("11", "", "0")
    assert 0 < float(again[0]["onnx_difference"]) < 1e-4


def test_an_architecture_that_is_not_there_is_a_row(tmp_path: Path) -> None:
    assert attach_table.main(["--out", str(tmp_path), "--only", "timm:nosuch"]) == 0
    (one, *_) = found = rows(tmp_path, "attach.csv")
    assert len(found) == 3
    assert one["plain_parameters"].startswith("build: unknown architecture 'timm:nosuch'")
    assert one["note"] == "failed"


def one_block(spec: str) -> torch.nn.Module:
    """In place of a row's network: one convolution and the attention, exported much sooner."""
    attention = torch.nn.Identity()
    if spec != "none":
        attention = spem.create_attention(spec, 16, size=export_table.IMAGE)
    return attach_table.scattered(Network(attention), 0).eval()


@pytest.mark.slow
def test_export_goes_on_and_repeats_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_table, "specs", lambda: ["none", "eca", "fca"])
    monkeypatch.setattr(export_table, "host", one_block)
    args = ["--out", str(tmp_path)]
    with pytest.MonkeyPatch.context() as patch:
        counted(export_table, patch, stop=1)
        with pytest.raises(KeyboardInterrupt):
            export_table.main(args)
    assert [row["spec"] for row in rows(tmp_path, "export.csv")] == ["none"]

    real = export_table.to_onnx

    def no_second_size(*given: object, dynamic_size: bool = False, **options: object) -> object:
        if dynamic_size:
            raise TypeError("no second size")
        return real(*given, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_table, "to_onnx", no_second_size)
        timed = ["--latency", "--rounds", "2"]
        assert export_table.main([*args, "--only", "eca", *timed]) == 0
    none, eca = rows(tmp_path, "export.csv")
    assert (eca["dynamic_size"], eca["note"]) == ("TypeError: no second size", "failed")
    assert (eca["latency_over_plain"], none["latency_rounds"]) == ("", "2")  # no time of an error
    assert eca["operators"].split()[0] == "Conv"
    assert float(eca["fp16"]) < 0.2
    assert export_table.main([*args, "--only", "eca"]) == 0
    assert rows(tmp_path, "export.csv") == [none, eca]

    asked = counted(export_table, monkeypatch)
    assert export_table.main([*args, "--retry", *timed]) == 0
    assert asked == ["eca", "fca"]
    found = {row["spec"]: row for row in rows(tmp_path, "export.csv")}
    assert found["eca"]["dynamic_size"] == "yes"
    assert found["fca"]["dynamic_size"].startswith("fca is built for maps of one size.")
    for row in found.values():
        assert row["note"] == ""
        assert float(row["latency_over_plain"]) > 0
        assert row["latency_rounds"] == "2"


def test_the_network_of_a_row_is_the_same_every_time() -> None:
    one, other = (export_table.host("eca") for _ in range(2))
    assert len([part for part in one.modules() if isinstance(part, spem.ECA)]) == 3
    state = other.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in one.state_dict().items())
    assert not one.training
