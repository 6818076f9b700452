"""The command line, called in this process; test_cli_processes.py starts real ones."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from reproduce import runs

import spem
from spem import cli
from spem.reproduce import Run
from spem.training import load_weights, save_weights, smoke

# digits at their own size, few of them: a run takes about a second
TINY = ["--data", "digits", "--data.size", "8", "--data.pad", "1", "--limit", "96"]
TINY_RUN = ["smoke", "--attention", "spem", *TINY[2:]]


def call(args: Sequence[str]) -> int:
    """The exit code of a command run in this process."""
    try:
        return cli.main(args)
    except SystemExit as stop:  # how the parser ends
        return stop.code if isinstance(stop.code, int) else -1


def answer(capsys: pytest.CaptureFixture[str], args: Sequence[str]) -> Any:
    """The JSON a command prints."""
    assert call([*args, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# ---- help, version, errors


def test_help_has_a_line_for_each_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert call([]) == 0
    alone = capsys.readouterr().out
    assert call(["--help"]) == 0
    assert capsys.readouterr().out == alone
    for name, (_, line) in cli.COMMANDS.items():
        assert any(text.split()[:1] == [name] and line in text for text in alone.splitlines())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["--version"]) == 0
    assert capsys.readouterr().out == f"spem {spem.__version__}\n"


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call([name, "--help"]) == 0
    assert f"usage: spem {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["list", "zpem"], "unknown attention module 'zpem'. Nearest: spem"),
        (["cost", "vgg16"], "unknown model 'vgg16'. Use resnet<depth>"),
        (["cost", "resnet12"], "Nearest: 11 or 20"),
        (
            ["cost", "resnet11", "--attention", "spme"],
            "unknown attention 'spme'. Did you mean spem",
        ),
        (["cost", "resnet11", "--attention", "se(reductoin=8)"], "no option 'reductoin'"),
        (["cost", "resnet11", "--size", "0"], "input_shape"),
        (["cost", "gone.safetensors"], "spem: gone.safetensors: No such file"),
        (["train"], "no recipe given. Use one of paper, fast, short, smoke"),
        (["train", "shrot"], "unknown recipe 'shrot'. Nearest: short"),
        (["train", "smoke", "--data", "cifar11"], "Did you mean cifar10"),
        (["train", "smoke", "--model.attention", "spme"], "Did you mean spem"),
        (["train", "smoke", "--optim.lrr", "1"], "--optim.lr"),
        (["eval", "gone.safetensors"], "spem: gone.safetensors: No such file"),
        (["compare"], "no attention given"),
        (["compare", "none", "--seeds", "few"], "--seeds 'few' is no number of seeds"),
        (["compare", "none", "--recipe", "shrot"], "unknown recipe 'shrot'. Nearest: short"),
        (["compare", "none", "--data", "digtis"], "Did you mean digits"),
    ],
)
def test_mistakes(args: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(args) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert says in " ".join(told.err.replace("│", " ").split())
    assert "Traceback" not in told.err


def test_damaged_weights_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = weights(tmp_path)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    for command in ("eval", "cost"):
        assert call([command, str(path)]) == 2
        assert f"{path} is damaged" in capsys.readouterr().err


def test_debug_anywhere_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    for args in (["--debug", "list", "zz"], ["list", "--debug", "zz"], ["list", "zz", "--debug"]):
        assert call(args) == 2
        assert "Traceback" in capsys.readouterr().err


def test_faults_inside(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("lost")

    monkeypatch.setattr("spem.cli.listing._list", broken)
    assert call(["list"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("spem: internal error: KeyError: 'lost'\n")
    assert told.endswith("run again with --debug\n")
    assert "Traceback" not in told
    assert call(["list", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_missing_extra_ends_in_the_line_that_installs_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert call(["list"]) == 2
    assert capsys.readouterr().err.endswith('pip install ".[train]"\n')
    assert call([]) == 0  # help needs nothing


# ---- list, cost


def test_list_tells_what_the_registry_knows(capsys: pytest.CaptureFixture[str]) -> None:
    modules = {m["name"]: m for m in answer(capsys, ["list"])}
    assert list(modules) == spem.list_attention()
    assert modules["spem"]["parameters"] == {"64": 258, "128": 514, "256": 1026}
    assert modules["spem"]["start_gate"] == pytest.approx(0.0320586, abs=1e-7)
    assert sorted(modules["spem"]["statistics"]) == ["max", "min"]
    assert modules["se"]["start_gate"] is None
    assert not modules["cbam"]["fusable"]
    assert modules["srm"]["no_decay"]
    assert modules["srm"]["needs"]
    assert "2208.10322" in modules["spem"]["paper"]


def test_list_with_a_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    assert [m["name"] for m in answer(capsys, ["list", "s?e*"])] == ["sge", "spem"]


@pytest.mark.parametrize(
    ("args", "parameters"),
    [
        (["resnet164"], 1_704_154),
        (["resnet164", "--attention", "spem"], 1_736_518),
        (["resnet29", "--attention", "spem", "--classes", "100"], 341_638),
        (["resnet-basic20"], 272_474),
    ],
)
def test_cost(args: list[str], parameters: int, capsys: pytest.CaptureFixture[str]) -> None:
    cost = answer(capsys, ["cost", *args])
    assert cost["parameters"] == parameters
    assert sum(layer["flops"] for layer in cost["layers"]) == cost["flops"]


def test_cost_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["cost", "resnet11", "--attention", "se(reduction=8)", "--batch", "2"]) == 0
    told = capsys.readouterr().out
    assert "attention se(reduction=8), 10 classes, input 2 x 3 x 32 x 32" in told
    assert "convolutions and matrix products only" in told
    assert told.splitlines()[1].split() == ["layer", "kind", "output", "parameters", "FLOPs"]


def test_cost_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = weights(tmp_path)
    assert answer(capsys, ["cost", str(path)])["attention_parameters"] == 1798
    assert call(["cost", str(path), "--attention", "se"]) == 2
    assert "Leave --attention and --classes out" in capsys.readouterr().err


# ---- train, eval


def weights(folder: Path) -> Path:
    config = smoke()
    path = folder / "model.safetensors"
    save_weights(spem.resnet(11, attention=config.model.attention), config, path)
    return path


def test_train_then_eval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["train", *TINY_RUN, "--epochs", "2", "--seed", "3"]
    result = answer(capsys, args)
    assert (result["attention"], result["seed"], result["epochs"]) == ("spem", 3, 2)
    folder = Path(result["folder"])
    assert folder.parts[0] == "runs"
    assert folder.name == "seed3"

    # a finished run shows its result at once
    before = (folder / "result.json").stat().st_mtime_ns
    assert call(args) == 0
    assert f"{result['accuracy']:.2f} % after the last epoch" in capsys.readouterr().out
    assert (folder / "result.json").stat().st_mtime_ns == before

    path = folder / "model.safetensors"
    evaluation = answer(capsys, ["eval", str(path), "--predictions", "told.csv"])
    assert evaluation["accuracy"] == pytest.approx(result["accuracy"])
    assert evaluation["loss"] == pytest.approx(result["loss"])
    assert evaluation["data_sha256"] == result["test_sha256"]
    with Path("told.csv").open(newline="") as file:
        told = list(csv.DictReader(file))
    assert len(told) == evaluation["count"]
    assert sum(row["label"] == row["prediction"] for row in told) == evaluation["correct"]
    assert [int(row["index"]) for row in told] == list(range(len(told)))

    assert call(["eval", str(path)]) == 0
    assert f"({evaluation['correct']}/{evaluation['count']}" in capsys.readouterr().out


def test_every_field_can_be_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nested names, short forms, the data set's own settings, and milestones that move along."""
    args = ["train", "short", "--data", "digits", "--data.size", "8", "--val=40", "--limit", "64"]
    args += ["--depth", "20", "--model.block", "basic", "--model.attention", "se(reduction=4)"]
    args += ["--epochs", "1", "--runtime.step", "eager", "--precision", "fp32"]
    args += ["--runtime.threads", "1", "--folder", "here"]
    result = answer(capsys, args)
    assert (result["folder"], result["depth"]) == ("here", 20)
    assert result["attention"] == "se(reduction=4)"
    assert result["best_selected_on"] == "validation"
    _, config = load_weights(tmp_path / "here" / "model.safetensors")
    assert config.model.block == "basic"
    assert (config.data.name, config.data.val, config.data.limit) == ("digits", 40, 64)
    assert not config.data.flip
    assert config.data.normalisation == "digits"
    assert config.optim.milestones == ()


def test_weights_of_other_classes_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "hundred.safetensors"
    save_weights(spem.resnet(11, 100), smoke(attention="none"), path)
    assert call(["eval", str(path)]) == 2
    assert "100 classes apart, digits has 10" in capsys.readouterr().err


# ---- compare, demo


@pytest.mark.parametrize(
    ("text", "seeds"), [("3", [0, 1, 2]), ("1", [0]), ("5,", [5]), ("4,0,9", [4, 0, 9])]
)
def test_seeds(text: str, seeds: list[int]) -> None:
    from spem.cli.compare import parse_seeds

    assert parse_seeds(text) == seeds


def test_seeds_that_are_none_are_refused_whoever_asks() -> None:
    from spem.cli.compare import parse_seeds

    with pytest.raises(ValueError, match=r"^--seeds 'x' is no number of seeds \(3\)"):
        parse_seeds("x")


@pytest.mark.parametrize("seeds", [3, 6])
def test_compare_and_stats_say_the_same(
    seeds: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of six seeds a difference that is shown, one that is not, and Holm's correction of both."""
    right = {
        "none": (331, 325, 329, 320, 327, 330),
        "se": (335, 334, 331, 329, 330, 342),
        "spem": (330, 327, 329, 321, 325, 333),
    }

    def made_up(config: Any, *_: Any, **__: Any) -> Any:
        accuracy = 100 * right[config.model.attention][config.seed] / 360
        made = Run(config, runs.result(config, accuracy), tuple(runs.epochs(accuracy)))
        runs.write(made, Path("runs"))
        return made.result

    monkeypatch.setattr("spem.reproduce.compare.train", made_up)
    args = ["compare", "none", "se", "spem", "--data", "digits", "--seeds", str(seeds)]
    told = answer(capsys, args)
    (table,) = answer(capsys, ["stats", "comparison/runs.csv"])["tables"]
    assert told["reading"] == table["reading"]
    for line, group in zip(told["lines"], table["groups"], strict=True):
        assert line["attention"] == group["name"]
        assert line["difference"] == group["difference"]
        assert line["adjusted_p"] == group["adjusted_p"]
        assert line["last"] == {key: group[key] for key in ("n", "mean", "sd")}
    with Path("comparison/summary.csv").open(newline="") as file:
        summary = list(csv.DictReader(file))
    for row, group in zip(summary[1:], table["groups"][1:], strict=True):
        d = group["difference"]
        assert row["difference_interval"] == d["interval"] == ("t" if seeds < 6 else "BCa")
        expected = [d["low"], d["high"], d["p"], group["adjusted_p"]]
        cells = ("difference_low95", "difference_high95", "difference_p", "difference_holm_p")
        assert [float(row[cell]) for cell in cells] == pytest.approx(expected, rel=1e-6)
    assert call(args) == 0
    printed = capsys.readouterr().out
    assert all(sentence in printed for sentence in table["reading"])
    assert ("Holm" in table["reading"][0]) == (seeds == 6)


def test_compare_one_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = answer(capsys, ["compare", "none", "se", *TINY, "--seeds", "7,", "--epochs", "1"])
    assert [line["attention"] for line in told["lines"]] == ["none", "se"]
    assert told["reference"] == "none"
    assert told["lines"][1]["difference"]["low"] is None
    assert "n too small" in told["reading"][0]
    assert all(Path(path).exists() for path in told["files"])


def test_compare_shows_what_is_left_when_a_run_diverges(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from spem.reproduce import compare

    train = compare.train

    def sometimes(config: Any, *args: Any, **options: Any) -> Any:
        if config.model.attention == "se":
            raise FloatingPointError("train: the training loss became nan")
        return train(config, *args, **options)

    monkeypatch.setattr(compare, "train", sometimes)
    assert call(["compare", "none", "se", *TINY, "--seeds", "1", "--epochs", "1"]) == 1
    told = capsys.readouterr()
    assert "\nnone " in told.out
    assert "1 of 2 runs diverged" in told.err
    assert "se, seed 0: train: the training loss became nan" in told.err


def test_demo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo's own path, with a shorter run."""
    from dataclasses import replace

    from spem.cli import demo

    config = demo.demo_config()
    short = replace(
        config,
        data=replace(config.data, limit=64),
        optim=replace(config.optim, epochs=1, milestones=()),
    )
    monkeypatch.setattr(demo, "demo_config", lambda: short)
    threads = torch.get_num_threads()
    assert call(["demo", "--out", "shown"]) == 0
    assert torch.get_num_threads() == threads
    told = capsys.readouterr().out
    for name in ("none", "se", "spem"):
        assert f"\n{name} " in told
    assert "What to try next" in told
    for file in ("comparison.png", "summary.csv", "runs.csv"):
        assert f"shown/{file}" in told
        assert (tmp_path / "shown" / file).exists()
