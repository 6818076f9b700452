"""examples/finetune.py and the study made with it, on a few of scikit-learn's digits."""

from __future__ import annotations

import csv
import fcntl
import importlib
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("timm")
pytest.importorskip("sklearn")

from safetensors.torch import load_file

import spem
from spem.cli import main
from spem.data import load_images

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 training and 30 test digits, one folder a class."""
    with pytest.MonkeyPatch.context() as patch:
        study = example("finetune_study", patch)
    made = tmp_path_factory.mktemp("images") / "digits"
    for split, count in (("train", 60), ("test", 30)):
        images = load_images("digits", split, size=32)
        study.write_folder(images.take(torch.arange(count)), made / split)
    return made


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return example("finetune", monkeypatch)


@pytest.fixture
def tiny(tune: ModuleType, folder: Path):
    return tune.Settings(
        model="timm:resnet10t", images=str(folder), size=32, epochs=1, batch=10, subset=20
    )


def test_a_row_holds_the_run_and_is_not_made_twice(tune: ModuleType, tiny, tmp_path: Path) -> None:
    table, weights = tmp_path / "runs.csv", tmp_path / "plain.safetensors"
    row = tune.run(tiny, table, weights)
    assert (row["attention"], row["start"], row["classes"], row["tested"]) == (
        *("none", "-", "10"),
        "30",
    )
    assert float(row["accuracy"]) == pytest.approx(100 * int(row["correct"]) / 30, abs=1e-3)
    before = table.read_bytes()
    assert tune.run(tiny, table, weights) == row
    assert table.read_bytes() == before
    weights.unlink()  # asked for and gone: made again, in the same row
    again = tune.run(tiny, table, weights)
    assert (again["train_loss"], again["correct"]) == (row["train_loss"], row["correct"])
    assert weights.exists()
    assert len(tune.read(table)) == 1


def test_another_command_has_written_meanwhile(
    tune: ModuleType, tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its row stays, and writers wait for each other."""
    table = tmp_path / "runs.csv"

    def trained(settings, save=None):
        if settings.seed < 2:
            tune.run(replace(settings, seed=settings.seed + 1), table)
        cells = dict.fromkeys(tune.COLUMNS, "1")
        return {**cells, **tune.columns(settings), **tune.contents(settings), "weights_sha256": ""}

    monkeypatch.setattr(tune, "finetune", trained)
    tune.run(tiny, table)
    assert sorted(row["seed"] for row in tune.read(table)) == ["0", "1", "2"]
    assert [path.name for path in tmp_path.iterdir()] == ["runs.csv"]
    folder = os.open(tmp_path, os.O_RDONLY)
    with tune.locked(table), pytest.raises(BlockingIOError):
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(folder)


def test_images_and_columns_decide_before_a_training(
    tune: ModuleType, tiny, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of the same name with other classes is another run; an old table is taken up."""
    table = tmp_path / "runs.csv"
    first = tune.run(tiny, table)
    assert (first["train_images"], first["test_images"]) == ("60", "30")
    assert list(first) == list(tune.COLUMNS)
    other = tmp_path / "other" / folder.name
    shutil.copytree(folder, other)
    for split in ("train", "test"):
        (other / split / "9").rename(other / split / "nine")

    class TrainedError(Exception): ...

    def stop(settings, save=None):
        raise TrainedError

    monkeypatch.setattr(tune, "finetune", stop)
    assert tune.run(tiny, table) == first
    with pytest.raises(TrainedError):
        tune.run(replace(tiny, images=str(other)), table)

    old = {key: cell for key, cell in first.items() if key not in tune.ADDED}
    write(table, [old])
    assert tune.run(tiny, table) == {**first, **dict.fromkeys(tune.ADDED, "")}
    with pytest.raises(TrainedError):
        tune.run(replace(tiny, seed=1), table)
    for odd in ({**old, "more": "1"}, {key: old[key] for key in old if key != "lr"}):
        write(table, [odd])
        with pytest.raises(ValueError, match=r"runs\.csv is no table of this program: (more|lr) "):
            tune.run(replace(tiny, seed=1), table)


def write(table: Path, rows: list[dict[str, str]]) -> None:
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_a_tuned_network_is_exported(
    tune: ModuleType,
    tiny,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The two commands of docs/export.md, on three classes: the graph holds the tuned network."""
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    few, weights, path = tmp_path / "few", tmp_path / "tuned.safetensors", tmp_path / "tuned.onnx"
    for split in ("train", "test"):
        for name in "012":
            shutil.copytree(folder / split / name, few / split / name)
    words = "finetune.py --model timm:resnet10t --size 32 --epochs 1 --batch 8 --attention spem"
    arguments = [*words.split(), "--images", str(few), "--save", str(weights)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--csv", str(tmp_path / "runs.csv")])
    tune.main()
    capsys.readouterr()
    options = ["--classes", "3", "--attention", "spem", "--size", "32"]
    files = ["--weights", str(weights), "--out", str(path)]
    assert main(["export", "timm:resnet10t", *options, *files]) == 0
    out, err = capsys.readouterr()
    assert "onnxruntime and PyTorch on" in out
    assert err == ""
    model, _, _ = tune.build(replace(tiny, images=str(few)), 3)
    spem.attach(model, "spem")
    model.load_state_dict(load_file(weights))
    starts = [value for key, value in model.state_dict().items() if key.endswith("alpha")]
    assert any(starts)  # attention has learned, so it is in the graph
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = model.eval()(x)
    (found,) = runtime.InferenceSession(str(path)).run(None, {"input": x.numpy()})
    assert found.shape == (2, 3)
    torch.testing.assert_close(torch.from_numpy(found), y, rtol=1e-4, atol=1e-5)


def test_pairs_share_everything_but_the_attention(
    tune: ModuleType, tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An identity start with rate 0 is the plain network, batch by batch.

    timm starts the last norm of a branch at zero, so a module's own start changes little here.
    """
    weights = tmp_path / "w.safetensors"
    tune.run(replace(tiny, subset=0), tmp_path / "first.csv", weights)
    frozen = replace(tiny, weights=str(weights), lr=0.0, penalty=0.0)
    plain = tune.finetune(frozen)
    same = tune.finetune(replace(frozen, attention="se"))
    other = tune.finetune(replace(frozen, attention="se", start="module"))
    seed = tune.finetune(replace(frozen, seed=1))
    assert same["train_loss"] == pytest.approx(plain["train_loss"], abs=2e-6)
    assert abs(other["train_loss"] - plain["train_loss"]) > 1e-5
    assert abs(seed["train_loss"] - plain["train_loss"]) > 1e-3
    assert same["parameters"] > plain["parameters"]


def test_torchvision_and_its_transforms(tune: ModuleType, tiny, tmp_path: Path) -> None:
    model, training, testing = tune.build(replace(tiny, model="torchvision:resnet18", size=0), 7)
    assert model.fc.out_features == 7
    assert (testing.crop_size, testing.resize_size) == ([224], [256])
    row = tune.finetune(
        replace(tiny, model="torchvision:resnet18", attention="spem"), tmp_path / "t.safetensors"
    )
    assert row["tested"] == 30
    _, training, testing = tune.build(tiny, 10)
    from PIL import Image

    for transform in (training, testing):
        assert transform(Image.new("RGB", (40, 50))).shape == (3, 32, 32)


def test_weights_of_another_head_and_what_cannot_be_loaded(
    tune: ModuleType, tmp_path: Path
) -> None:
    settings = tune.Settings(model="timm:resnet10t")
    source, _, _ = tune.build(settings, 3)
    path = tmp_path / "three.pt"
    torch.save({"state_dict": source.state_dict()}, path)
    target, _, _ = tune.build(settings, 5)
    head = target.fc.weight.detach().clone()
    tune.load(target, path, set())
    assert torch.equal(target.fc.weight, head)
    first = next(iter(source.state_dict()))
    assert torch.equal(target.state_dict()[first], source.state_dict()[first])

    wider, _, _ = tune.build(replace(settings, model="timm:resnet14t"), 5)
    with pytest.raises(ValueError, match=r"three\.pt.*--model"):
        tune.load(wider, path, set())
    torch.save({"unknown": torch.zeros(1), **source.state_dict()}, path)
    with pytest.raises(ValueError, match="unknown"):
        tune.load(target, path, set())


def test_subsets_are_balanced_and_drawn_by_the_seed(tune: ModuleType) -> None:
    labels = [index % 4 for index in range(40)]
    first, again, other = (tune.chosen(labels, 12, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert torch.tensor(labels)[first].bincount().tolist() == [3] * 4
    assert sorted(tune.chosen(labels, 0, 0)) == list(range(40))
    with pytest.raises(ValueError, match="no multiple of 4"):
        tune.chosen(labels, 13, 0)
    with pytest.raises(ValueError, match="smaller subset"):
        tune.chosen(labels, 44, 0)


def test_the_study_goes_on_where_it_stopped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = example("finetune_study", monkeypatch)
    arguments = ["finetune_study.py", "--first", str(folder), "--second", str(folder)]
    arguments += ["--first-epochs", "1", "--epochs", "1", "--batch", "10", "--subsets", "20"]
    arguments += ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    threads = torch.get_num_threads()
    for seeds in ("1", "2"):
        monkeypatch.setattr(sys, "argv", [*arguments, "--seeds", seeds])
        study.main()
    torch.set_num_threads(threads)
    with (tmp_path / "out" / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["seed"], row["attention"], row["start"]) for row in rows] == [
        (seed, *arm)
        for seed in ("0", "1")
        for arm in [
            ("none", "-"),
            ("spem", "identity"),
            ("spem", "module"),
            ("se", "identity"),
            ("se", "module"),
        ]
    ]
    assert len({row["weights_sha256"] for row in rows}) == 1
    report = (tmp_path / "out" / "summary.md").read_text()
    mean = sum(float(row["accuracy"]) for row in rows if row["attention"] == "none") / 2
    assert f"| `plain` | 2 | {mean:.2f} |" in report
    assert "| `spem, identity` | 2 |" in report
    assert "## 20 training images" in report
