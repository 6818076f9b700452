"""`spem list`, `cost`, `attach`, `train`, `eval`, called in this process."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from PIL import Image
from safetensors.torch import save_file

import spem
from spem import cli
from spem.cli.network import load_network
from spem.training import read_weights, save_weights, smoke

# digits at their own size, few of them: a run takes about a second
TINY_RUN = ["smoke", "--attention", "spem", "--size", "8", "--data.pad", "1", "--limit", "96"]


def answer(capsys: pytest.CaptureFixture[str], args: list[str]) -> Any:
    """The JSON a command prints."""
    assert cli.main([*args, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def refused(
    capsys: pytest.CaptureFixture[str], args: list[str], says: str, *, status: int = 2
) -> None:
    """The command ends with a sentence that says this, and nothing else."""
    assert cli.main(args) == status
    told = capsys.readouterr()
    assert told.out == ""
    assert f"spem {args[0]}: " in told.err.splitlines()[-1]
    assert says in told.err


pytestmark = pytest.mark.usefixtures("own_folder")


def weights(folder: Path, *, attention: str = "spem", classes: int = 10) -> Path:
    path = folder / "model.safetensors"
    save_weights(spem.resnet(11, classes, attention=attention), smoke(attention=attention), path)
    return path


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["list", "--json", "--bibtex"], "exclude each other. Give one of them."),
        (["list", "zpem"], "spem list: unknown attention module 'zpem'. Did you mean spem?"),
        (["cost", "vgg166"], "spem cost: unknown architecture 'vgg166'. Did you mean vgg16"),
        (["cost", "resnet164"], "Ours of CIFAR are written cifar:164."),
        (["cost", "cifar:12"], "Nearest: 11 or 20"),
        (["cost", "cifar:11", "--attention", "se(reductoin=8)"], "no option 'reductoin'"),
        (["cost", "cifar:11", "--classes", "0"], "--classes: '0' is not a whole number from 1 on."),
        (
            ["cost", "cifar:11", "--classes", "-1"],
            "--classes: '-1' is not a whole number from 1 on.",
        ),
        (["cost", "gone.safetensors"], "spem cost: there is no file gone.safetensors."),
        (["cost", "gone/way"], "'gone/way' is not a file, folder or name."),
        (["train"], "spem train: no recipe given. Use one of paper, fast, short, smoke"),
        (["train", "shrot"], "spem train: unknown recipe 'shrot'. Did you mean short?"),
        (["train", "smoke", "--data", "cifar11"], "Did you mean cifar10"),
        (["train", "smoke", "--attention", "spme"], "Did you mean spem"),
        (["train", "smoke", "--optim.lrr", "1"], "Did you mean --optim.lr"),
        (["train", "smoke", "--lr", "-1"], "--lr -1.0 must be a number from 0 on."),
        (["eval", "cifar:11"], "does not say which images it was trained on. Give --data."),
        (["train", "smoke", "--optim.mix-lr", "-1"], "--optim.mix-lr -1.0 must be a number from 0"),
        (["explain", "cifar:11", "gone.png", "--attention", "se"], "there is no image gone.png."),
        (["eval", "cifar:11", "--data", "digits", "--device", "gpu"], "Known: auto, cpu, cuda."),
        (["export", "cifar:11"], "nowhere to write. Give --out FILE"),
        (["share", "runs"], "nowhere to write. Give --folder DIR"),
        (["share", "/dev/null", "--folder", "out"], "there is no run /dev/null. Name the folder"),
        (["cost", "cifar:11", "--start", "module"], "--start is for attention that --attention"),
        (["train", "smoke", "--data", "~nobody/x"], "~nobody/x: neither a known set"),
        (["train", "smoke", "--device", "meta"], "--device 'meta' cannot be used"),
        (["train", "smoke", "--val", "99999"], "--val 99999 of 1437 images. Use 1 to 1436."),
        (["train", "smoke", "--attention", "gsop(dims=9000000)"], "not enough memory."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(args: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, args, says)
    assert not list(Path().iterdir())


def test_a_training_that_diverges_names_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *TINY_RUN, "--lr", "1e30", "--folder", "run"]) == 1
    assert "Use a lower --lr." in capsys.readouterr().err


@pytest.mark.parametrize("how", ["eval {} --data digits", "cost {}", "bench {}", "attach {}"])
def test_what_does_not_run_on_images_is_said(how: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("own.py").write_text(
        "import torch\n"
        "def words(): return torch.nn.Embedding(9, 4)\n"
        "def grey(): return torch.nn.Conv2d(1, 10, 3)\n"
        "def several():\n"
        "    class Several(torch.nn.Conv2d):\n"
        "        def forward(self, x): return {'one': super().forward(x)}\n"
        "    return Several(3, 10, 3)\n"
    )
    run = "does not run on an input [1, 3, 224, 224]"
    refused(capsys, how.format("own.py:words").split(), f"own.py:words {run}")
    if how.startswith("eval"):
        refused(capsys, how.format("own.py:grey").split(), "own.py:grey takes images of 1 channel")
    if how.startswith("bench"):
        refused(capsys, how.format("own.py:several").split(), "own.py:several answers dict. Name")


def test_attention_of_a_network_of_ours_starts_as_it_is_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As the module does, unless it is to start as the identity, which adds one number a block."""
    plain = answer(capsys, ["cost", "cifar:11", "--attention", "se"])["parameters"]
    same = answer(capsys, ["cost", "cifar:11", "--attention", "se", "--start", "module"])
    other = answer(capsys, ["cost", "cifar:11", "--attention", "se", "--start", "identity"])
    assert (same["parameters"], other["parameters"]) == (plain, plain + 3)
    args = ["export", "cifar:11", "--attention", "se", "--out", "x.onnx", "--start", "identity"]
    refused(capsys, args, "the file would hold no attention")
    model = spem.resnet(11)
    spem.attach(model, "se")
    save_file(model.state_dict(), "own.safetensors")  # as they were trained, without --start
    args = ["cost", "cifar:11", "--attention", "se", "--weights", "own.safetensors"]
    trained = answer(capsys, args)
    assert trained["parameters"] == plain + 3


def test_a_device_that_is_not_there_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """`eval` computes where it is told to, and nowhere else."""
    given = ["eval", "cifar:11", "--data", "digits", "--size", "32", "--device"]
    assert answer(capsys, [*given, "cpu"])["count"] == 360
    if not torch.cuda.is_available():
        refused(capsys, [*given, "cuda"], "--device 'cuda' cannot be used")


def test_a_network_is_called_by_its_name_once(capsys: pytest.CaptureFixture[str]) -> None:
    Path("own.py").write_text("import spem\ndef net(): return spem.resnet(11, attention='se')\n")
    Image.new("RGB", (32, 32)).save("image.png")
    assert cli.main(["explain", "own.py:net", "image.png", "--size", "32"]) == 0
    assert capsys.readouterr().out.startswith("own.py:net, random weights, image.png\n")


def test_a_picture_has_the_name_that_was_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (32, 32)).save("image.png")
    Path("folder.png").mkdir()
    before = sorted(tmp_path.iterdir())
    for out, says in (
        ("folder.png", "folder.png"),
        (".", ". is a folder"),
        ("x.bmp", "not a picture"),
    ):
        refused(
            capsys, ["explain", "cifar:11", "image.png", "--attention", "se", "--out", out], says
        )
    assert sorted(tmp_path.iterdir()) == before


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
    assert [m["name"] for m in answer(capsys, ["list", "s?e*"])] == ["sge", "spem"]
    assert cli.main(["list"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("args", "parameters"),
    [
        (["cifar:164"], 1_704_154),
        (["cifar:164", "--attention", "spem"], 1_736_518),
        (["29", "--attention", "spem", "--classes", "100"], 341_638),
        (["cifar:basic-20"], 272_474),
    ],
)
def test_cost(args: list[str], parameters: int, capsys: pytest.CaptureFixture[str]) -> None:
    cost = answer(capsys, ["cost", *args])
    assert cost["parameters"] == parameters
    assert sum(layer["flops"] for layer in cost["layers"]) == cost["flops"]


def test_cost_by_stage_and_by_layer(capsys: pytest.CaptureFixture[str]) -> None:
    """Stages sum the layers; what is not counted is "-"; both end in the same total."""
    args = ["cost", "cifar:11", "--attention", "se(reduction=8)", "--batch", "2"]
    cost = answer(capsys, args)
    tables: list[list[list[str]]] = []
    for more in ([], ["--layers"]):
        assert cli.main([*args, *more]) == 0
        told = capsys.readouterr().out
        head, _, rest = told.partition("\nlayer" if more else "\nstage")
        assert " ".join(head.split()) == (
            "CIFAR ResNet-11, bottleneck blocks, attention se(reduction=8), input 2 x 3 x 32 x 32"
        )
        lines = rest.splitlines()
        assert max(map(len, [*head.splitlines(), *lines])) <= 80
        tables.append([line.split() for line in lines[1 : lines.index("")]])
    stages, layers = tables
    assert [row[0] for row in stages] == [
        *("conv1", "bn1", "layer1", "layer2", "layer3", "fc"),
        *("total", "of"),
    ]
    assert stages[-2:] == layers[-2:]
    assert int(stages[-2][-1].replace(",", "")) == cost["flops"]
    for column in (-1, -2):
        numbers = [row[column].replace(",", "").replace("-", "0") for row in stages[:-2]]
        assert sum(map(int, numbers)) == int(stages[-2][column].replace(",", ""))
    (norm,) = [row for row in stages if row[0] == "bn1"]
    assert norm[-1] == "-"
    assert len(layers) == len(cost["layers"]) + 2


def test_a_file_says_itself_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = weights(tmp_path)
    assert answer(capsys, ["cost", str(path)])["attention_parameters"] == 1798
    refused(capsys, ["cost", str(path), "--attention", "se"], "--attention is for a named network")
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    for command in ("eval", "cost"):
        refused(capsys, [command, str(path)], f"{path} is damaged")


def test_a_difference_that_is_no_number_is_not_hidden(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A network whose outputs are NaN on a first output, and finite on a second."""
    Path("own.py").write_text(
        "import torch, torchvision\n"
        "class Own(torchvision.models.ResNet):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x) * float('nan'), super().forward(x)\n"
        "def net(): return Own(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])\n"
    )
    refused(capsys, ["attach", "own.py:net", "--size", "32"], "not finite numbers")


def test_too_little_memory_is_no_fault_inside(capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, ["cost", "cifar:11", "--batch", "1000000000"], "not enough memory. Use a")


def test_what_a_start_changes_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Also in timm's fresh networks, whose branches begin closed, so that nothing shows."""
    pytest.importorskip("timm", reason="timm is not installed")
    for start in ("identity", "module"):
        args = ["attach", "resnet10t", "se", "--size", "32", "--start", start]
        assert (answer(capsys, args)["change"] > 1e-3) == (start == "module")


def test_train_then_eval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["train", *TINY_RUN, "--epochs", "2", "--seed", "3"]
    result = answer(capsys, args)
    assert (result["attention"], result["seed"], result["epochs"]) == ("spem", 3, 2)
    folder = Path(result["folder"])
    assert folder.parts[0] == "runs"
    assert folder.name == "seed3"

    # a finished run shows its result at once
    before = (folder / "result.json").stat().st_mtime_ns
    assert cli.main(args) == 0
    assert f"{result['accuracy']:.2f} % after the last epoch" in capsys.readouterr().out
    assert (folder / "result.json").stat().st_mtime_ns == before

    for network in (str(folder), str(folder / "model.safetensors")):
        evaluation = answer(capsys, ["eval", network, "--predictions", "told.csv"])
        assert evaluation["accuracy"] == pytest.approx(result["accuracy"])
        assert evaluation["loss"] == pytest.approx(result["loss"])
        assert evaluation["data_sha256"] == result["test_sha256"]
        with Path("told.csv").open(newline="") as file:
            told = list(csv.DictReader(file))
        assert len(told) == evaluation["count"]
        assert sum(row["label"] == row["prediction"] for row in told) == evaluation["correct"]
        assert [int(row["index"]) for row in told] == list(range(len(told)))
    larger = answer(capsys, ["eval", str(folder), "--size", "16"])
    assert larger["data_sha256"] != evaluation["data_sha256"]
    assert larger["id"] == evaluation["id"]
    same = answer(capsys, ["eval", str(folder), "--size", "8"])
    assert same["data_sha256"] == evaluation["data_sha256"]
    same, other = (
        answer(capsys, ["explain", str(folder), "test:0", *size])["answers"]
        for size in ([], ["--size", "16"])
    )
    assert same != other
    assert cli.main(["eval", str(folder)]) == 0
    assert f"({evaluation['correct']}/{evaluation['count']}" in capsys.readouterr().out


def test_options_come_before_and_after_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    first, *rest = TINY_RUN
    one = answer(capsys, ["train", "--epochs", "1", *rest, first])
    two = answer(capsys, ["train", "--recipe", first, *rest, "--optim.epochs", "1"])
    assert one == two  # the second found the first one's run


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
    config = read_weights(tmp_path / "here" / "model.safetensors").config
    assert config.model.block == "basic"
    assert (config.data.name, config.data.val, config.data.limit) == ("digits", 40, 64)
    assert not config.data.flip
    assert config.data.normalisation == "digits"
    assert config.optim.milestones == ()


def test_outputs_that_are_no_numbers_have_no_accuracy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("own.py").write_text(
        "import torch\n"
        "def net():\n"
        "    layer = torch.nn.Linear(3, 10)\n"
        "    torch.nn.init.constant_(layer.bias, float('nan'))\n"
        "    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), layer)\n"
    )
    model = spem.resnet(11)
    with torch.no_grad():
        model.fc.weight.fill_(float("nan"))
    save_weights(model, smoke(attention="none"), tmp_path / "nan.safetensors")
    args = ["eval", "own.py:net", "--data", "digits"]
    refused(capsys, args, "outputs of own.py:net are not finite", status=1)
    Path("deep.py").write_text(
        "import spem, torch\n"
        "def net():\n"
        "    model = spem.resnet(11, attention='se')\n"
        "    torch.nn.init.constant_(model.fc.bias, float('nan'))\n"
        "    return model\n"
    )
    Image.new("RGB", (32, 32)).save("image.png")
    args = ["explain", "deep.py:net", "image.png", "--size", "32"]
    refused(capsys, args, "outputs of deep.py:net for image.png are not finite", status=1)
    assert not Path("explain.png").exists()
    refused(capsys, ["eval", "nan.safetensors"], "infinite or NaN")


def test_images_of_other_classes_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten classes are not ten classes: those of the old weights are known by the set's name."""
    old = REPOSITORY / "tests" / "data" / "weights" / "spem-seed0.safetensors"
    hundred = weights(tmp_path, attention="none", classes=100)
    for args, says in (
        (["eval", str(hundred)], "answers [1, 100] for one image, digits has 10 classes"),
        (["eval", str(old), "--data", "digits"], "class 0 is 'airplane' there and '0' here"),
        (["export", str(old), "--fold", "digits", "--out", "x.onnx"], "other classes"),
    ):
        refused(capsys, args, says)
    assert not Path("x.onnx").exists()


def test_broken_images_are_left_out_by_the_flag_that_the_message_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (16, 16), (40 * i, 0, 0)).save(tmp_path / f"pets/{name}/{i}.png")
    for name in "stuvwxyz":  # of the held-out images too
        (tmp_path / "pets" / "dog" / f"{name}.png").write_bytes(name.encode())
    data = ["--data", "pets", "--data.skip-broken", "--size", "16", "--epochs", "1"]
    assert cli.main(["train", "smoke", *data, "--folder", "run"]) == 0
    for args in (["eval", "run", "--data"], ["export", "run", "--out", "x.onnx", "--fold"]):
        assert cli.main([*args, "pets"]) == 2
        assert "or leave them out with --skip-broken:" in capsys.readouterr().err
        assert cli.main([*args, "pets", "--skip-broken"]) == 0
    assert cli.main(["eval", "run"]) == 0  # as it was trained
    capsys.readouterr()
    refused(
        capsys, ["export", "run", "--out", "y", "--fold", "cifar10", "--root", "gone"], "--root"
    )


@pytest.mark.parametrize("network", ["cifar:11", "resnet10t"])
def test_attention_in_a_network_with_plain_weights_changes_no_answer(
    network: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("timm")
    model = load_network(network, classes=10, size=16).model
    save_file(model.state_dict(), tmp_path / "plain.safetensors")
    args = [*f"eval {network} --classes 10 --size 16 --data digits".split()]
    args += ["--weights", "plain.safetensors"]
    plain = answer(capsys, args)
    assert answer(capsys, [*args, "--attention", "spem"]) == plain | {"attention": "spem"}
    assert cli.main([*args, "--attention", "spem", "--start", "module"]) == 0
    assert "attention spem, without weights of" in capsys.readouterr().out


def test_plain_weights_in_attention_that_cannot_start_as_the_identity(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(spem.resnet(11).state_dict(), tmp_path / "plain.safetensors")
    args = ["eval", "cifar:11", "--data", "digits", "--weights", "plain.safetensors"]
    args += ["--attention", "dia"]
    refused(capsys, args, "lack dia, which cannot start as the identity. Give weights with it")
    assert cli.main([*args, "--start", "module"]) == 0


def test_a_folded_export_has_no_attention_and_says_what_it_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    assert cli.main(["train", *TINY_RUN, "--epochs", "1", "--folder", "run"]) == 0
    capsys.readouterr()
    whole = answer(capsys, ["export", "run", "--out", "whole.onnx"])
    folded = answer(capsys, ["export", "run", "--fold", "digits", "--out", "folded.onnx"])
    assert whole["folded"] is None
    assert whole["operators"]["Sigmoid"] == 6
    assert {"Sigmoid", "ReduceMax", "Mul"}.isdisjoint(folded["operators"])
    report = folded["folded"]
    assert len(report["sites"]) == 3
    assert 0 <= report["agreement"] <= 1
    assert report["accuracy_before"] is not None


@pytest.mark.parametrize("name", ["spem.cli.options", "spem.cli.cost", "torch"])
def test_ctrl_c_in_the_first_seconds_ends_in_one_line(name: str) -> None:
    """The signal comes as a module is being imported."""
    program = (
        "import os, signal, sys\n"
        # Ignored where the tests run in the background of a shell.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Stop:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {name!r}: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Stop())\n"
        "from spem.cli import main\n"
        "sys.exit(main(['cost', 'cifar:11']))\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 130
    assert done.stderr in ("spem cost: stopped.\n", "spem: stopped.\n")
