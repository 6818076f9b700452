"""Every program under examples/ runs, and does what the page that shows it says."""

from __future__ import annotations

import csv
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from spem.attention.spec import _REGISTRY

pytest.importorskip("sklearn")
pytest.importorskip("timm")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LOOPS = ("plain_loop", "timm_loop", "lightning_loop")
# run with arguments by tests of their own, or by test_adding.py
OTHERS = {"finetune", "finetune_study", "lambda_moves", "my_attention"}


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """Examples seed the global generators and may register modules."""
    state, registry = torch.get_rng_state(), dict(_REGISTRY)
    yield
    torch.set_rng_state(state)
    _REGISTRY.clear()
    _REGISTRY.update(registry)


def losses(text: str) -> list[float]:
    return [float(value) for value in re.findall(r"loss ([0-9.]+)", text)]


def test_every_example_is_run_by_a_test() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    short = set(SHORT) | set(LOOPS)
    assert names == short | OTHERS
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    for name in OTHERS:  # where a test runs it, not where it stands in OTHERS
        assert re.search(rf'(example\(|examples" / |EXAMPLES / )"{name}(\.py)?"', tests), name


SHORT = (
    *("start", "module", "weights", "detector", "tail_by_hand"),
    *("look_inside", "share", "to_onnx"),
)
NEEDS = {"share": "huggingface_hub", "to_onnx": "onnxruntime"}


@pytest.mark.parametrize("name", SHORT)
def test_short_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """They assert what they show themselves."""
    pytest.importorskip(NEEDS.get(name, "torchvision"))
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out


# Lightning uses what torch has deprecated, and names loaders without worker processes.
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*logging interval")
@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_lowers_its_loss(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "lightning_loop":
        pytest.importorskip("lightning")
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    told = losses(capsys.readouterr().out)
    assert len(told) == 3
    assert told[-1] < 0.6 * told[0]


def test_the_record_of_lambda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "moves.csv"
    arguments = ["lambda_moves.py", "--steps", "2", "--every", "1", "--seeds", "1"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--out", str(out)])
    threads = torch.get_num_threads()
    runpy.run_path(str(EXAMPLES / "lambda_moves.py"), run_name="__main__")
    torch.set_num_threads(threads)
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    assert arms[0] == "squares, published settings"
    # steps 0 to 2: of the three blocks of the network, and of the two pulls
    assert len(rows) == len(arms) * 3 * (3 + 2)
    assert all(row["lambda"] == "0.5" and row["travelled"] == "0.0" for row in rows[:3])
    clear = [r for r in rows if r["record"] == "pull" and r["strength"] == "1.0"]
    assert all(float(row["lambda"]) > 0.5 for row in clear if row["step"] == "2")
    # The committed record has the same columns, and all of its steps.
    committed = EXAMPLES.parent / "docs" / "data" / "lambda_moves.csv"
    with committed.open(newline="") as file:
        kept = list(csv.DictReader(file))
    assert list(kept[0]) == list(rows[0])
    assert {row["arm"] for row in kept} == set(arms)
    assert max(int(row["step"]) for row in kept) == 300
    assert "wrote" in capsys.readouterr().out
