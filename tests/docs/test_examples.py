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

pytest.importorskip("sklearn")
pytest.importorskip("timm")

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
LOOPS = ("plain_loop", "timm_loop", "lightning_loop")
SHORT = (
    *("start", "module", "weights", "own_network", "tail", "tail_by_hand", "fold"),
    *("look_inside", "share", "to_onnx"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("detector", "int8")),
)
NEEDS = {"share": "huggingface_hub", "to_onnx": "onnxruntime", "int8": "onnxruntime"}


@pytest.fixture(autouse=True)
def _as_it_was(clean_registry: None) -> Iterator[None]:
    """Examples seed the global generators and may register modules."""
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


def test_every_example_is_run_by_a_test() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    short = {str(name if isinstance(name, str) else name.values[0]) for name in SHORT}
    assert names == short | set(LOOPS) | {"finetune", "my_attention"}  # test_adding.py


@pytest.mark.parametrize("name", SHORT)
def test_short_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """They assert what they show themselves."""
    pytest.importorskip(NEEDS.get(name, "torchvision"))
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out


# Lightning uses what torch has deprecated, and names loaders without worker processes.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*logging interval")
@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_lowers_its_loss(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "lightning_loop":
        pytest.importorskip("lightning")
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    losses = [float(value) for value in re.findall(r"loss ([0-9.]+)", capsys.readouterr().out)]
    assert len(losses) == 3
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.slow
def test_fine_tuning_a_folder_of_photos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    for split, count in (("train", 6), ("test", 2)):
        for tint, name in enumerate(("dark", "light")):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                colour = (200 * tint + number, 20, 40)
                Image.new("RGB", (60, 40 + number), colour).save(folder / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    words = ["--images", "photos", "--model", "test_resnet", "--epochs", "1", "--batch", "4"]
    for attention in ("none", "eca"):
        arguments = [*words, "--attention", attention, "--save", "tuned.safetensors"]
        monkeypatch.setattr(sys, "argv", ["finetune.py", *arguments])
        runpy.run_path(str(EXAMPLES / "finetune.py"), run_name="__main__")
    assert "of 4 test images" in capsys.readouterr().out
    with (tmp_path / "finetune.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["attention"], row["seed"]) for row in rows] == [("none", "0"), ("eca", "0")]
    assert (tmp_path / "tuned.safetensors").stat().st_size > 10_000


@pytest.mark.slow
def test_the_record_of_lambda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "moves.csv"
    arguments = ["lambda_moves.py", "--steps", "2", "--every", "1", "--seeds", "1"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--out", str(out)])
    threads = torch.get_num_threads()
    runpy.run_path(str(ROOT / "benchmarks" / "lambda_moves.py"), run_name="__main__")
    torch.set_num_threads(threads)
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    # steps 0 to 2: of the three blocks of the network, and of the two pulls
    assert len(rows) == len(arms) * 3 * (3 + 2)
    clear = [r for r in rows if r["record"] == "pull" and r["strength"] == "1.0"]
    assert all(float(row["lambda"]) > 0.5 for row in clear if row["step"] == "2")
    # The committed record has the same columns, and all of its steps.
    with (ROOT / "benchmarks" / "results" / "lambda_moves.csv").open(newline="") as file:
        kept = list(csv.DictReader(file))
    assert list(kept[0]) == list(rows[0])
    assert {row["arm"] for row in kept} == set(arms)
    assert max(int(row["step"]) for row in kept) == 300
    assert "wrote" in capsys.readouterr().out
