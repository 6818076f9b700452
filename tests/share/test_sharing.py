"""The model card, the hub's client replaced by a recorder, runs and the command `spem share`."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import spem
from spem import cli
from spem.share import formula, read_shared
from spem.training import ModelConfig, Silent, read_result, read_weights, recipes, train

hub = pytest.importorskip("huggingface_hub")
WEIGHTS = Path(__file__).resolve().parents[1] / "data" / "weights"


class Recorder:
    """Stands for the hub: keeps what is sent to it, and gives it back."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.refuses: Exception | None = None

    def HfApi(self, **options: Any) -> Recorder:  # noqa: N802  # the client's name
        self.calls.append(("HfApi", options))
        return self

    def whoami(self) -> None:
        self.calls.append(("whoami", {}))
        if self.refuses is not None:
            raise self.refuses

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))

    def upload_folder(self, *, repo_id: str, folder_path: str, **options: Any) -> SimpleNamespace:
        self.calls.append(("upload_folder", {"repo_id": repo_id, **options}))
        shutil.copytree(folder_path, self.place / repo_id, dirs_exist_ok=True)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def snapshot_download(self, repo_id: str, **options: Any) -> str:
        self.calls.append(("snapshot_download", {"repo_id": repo_id, **options}))
        if self.refuses is not None:
            raise self.refuses
        return str(self.place / repo_id)


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder(tmp_path / "hub")
    monkeypatch.setattr(hub, "HfApi", recorder.HfApi)
    monkeypatch.setattr(hub, "snapshot_download", recorder.snapshot_download)
    return recorder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = recipes.smoke("spem", epochs=1)
    data = replace(base.data, size=8, pad=1, limit=32, test_limit=20)
    config = replace(base, model=ModelConfig(depth=11, attention="spem"), data=data)
    folder = tmp_path_factory.mktemp("run")
    train(config, folder, progress=Silent())
    return folder


# ---- the hub


def test_what_is_pushed_comes_back(recorder: Recorder):
    model = spem.resnet(11, attention="spem").eval()
    url = spem.push_to_hub(
        model, "me/net", private=True, token="secret", revision="dev", license="mit", create_pr=True
    )
    assert url == "https://hub/me/net/commit/1"
    again = spem.from_pretrained("me/net", revision="abc", token="secret", local_files_only=True)
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(model(x), again(x))
    calls = dict(recorder.calls)
    assert list(calls) == ["HfApi", "whoami", "create_repo", "upload_folder", "snapshot_download"]
    assert calls["HfApi"]["token"] == "secret"
    assert calls["create_repo"] == {"repo_id": "me/net", "private": True, "exist_ok": True}
    sent = calls["upload_folder"]
    assert (sent["revision"], sent["create_pr"]) == ("dev", True)
    files = sorted(path.name for path in (recorder.place / "me/net").iterdir())
    assert files == ["README.md", "config.json", "model.safetensors"]
    got = calls["snapshot_download"]
    assert (got["revision"], got["token"], got["local_files_only"]) == ("abc", "secret", True)
    assert got["allow_patterns"] == ["config.json", "model.safetensors"]
    assert 'from_pretrained("me/net")' in (recorder.place / "me/net" / "README.md").read_text()


def test_the_recorder_takes_what_the_client_takes():
    """Every argument that is passed exists in the client that is installed."""
    import inspect

    got = "repo_id revision token cache_dir local_files_only allow_patterns library_name"
    sent = "repo_id folder_path revision create_pr commit_message"
    for call, names in (
        (hub.HfApi, "token library_name"),
        (hub.HfApi.create_repo, "repo_id private exist_ok"),
        (hub.HfApi.upload_folder, sent),
        (hub.snapshot_download, got),
    ):
        assert {*names.split()} <= set(inspect.signature(call).parameters)


def test_refusals_of_the_hub_are_told_in_a_sentence(recorder: Recorder, tmp_path: Path):
    model = spem.resnet(11)
    recorder.refuses = hub.errors.LocalEntryNotFoundError("not in the cache\nand a long story")
    said = r"cannot write to me/net: not in the cache\. Look at your connection, and log in"
    with pytest.raises(OSError, match=said):
        spem.push_to_hub(model, "me/net")
    with pytest.raises(OSError, match=r"no folder me/net, and .* cannot be fetched: not in the"):
        spem.from_pretrained("me/net")
    for wrong in ("net", "a/b/c", "../x", "https://hub/me/net", ""):
        with pytest.raises(ValueError, match="is not the id of a repository"):
            spem.push_to_hub(model, wrong)
    with pytest.raises(FileNotFoundError, match="is neither a folder nor the id"):
        spem.from_pretrained(tmp_path / "gone" / "deep")
    assert not any(name == "upload_folder" for name, _ in recorder.calls)


def test_an_unreachable_hub_is_told_in_a_line_and_not_asked_again(
    run: Path,
    unreachable_hub: list[float],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    with pytest.raises(OSError, match=r"no folder me/net, .* cannot be fetched: .*refused"):
        spem.from_pretrained("me/net")
    assert cli.main(["share", str(run), "--to", "me/net"]) == 2
    out, err = capfd.readouterr()
    assert (out, sum(unreachable_hub)) == ("", 0)
    sentence = r"spem share: cannot write to me/net: .*refused\. Look at your connection"
    assert re.match(sentence, " ".join(err.split()))
    assert "Traceback" not in err
    assert "Retry" not in err


# ---- the card


def parsed(folder: Path) -> Any:
    """The card as the hub's own library reads it."""
    return hub.ModelCard((folder / "README.md").read_text())


def test_a_card_states_what_was_measured_and_nothing_else(tmp_path: Path):
    results = [
        {"dataset": "cifar10", "metric": "accuracy", "value": 44.08, "note": "mean | of 3\nseeds"},
        {"dataset": "mine", "metric": "loss", "value": 1e-05, "split": "val"},
    ]
    model = spem.resnet(11, attention="spem")
    spem.save_pretrained(model, tmp_path, results=results, license="apache-2.0")
    card = parsed(tmp_path)
    data = card.data.to_dict()
    assert data["library_name"] == "spem"
    assert data["license"] == "apache-2.0"
    assert data["datasets"] == ["uoft-cs/cifar10"]
    assert data["metrics"] == ["accuracy", "loss"]
    assert {"spem", "channel-attention"} <= set(data["tags"])
    told = [(r.dataset_name, r.dataset_split, r.metric_value) for r in card.data.eval_results]
    assert told == [("cifar10", "test", 44.08), ("mine", "val", 1e-05)]
    assert card.data.eval_results[0].dataset_type == "uoft-cs/cifar10"
    text = card.text
    assert "| cifar10, test | accuracy | 44.08 | mean \\| of 3 seeds |" in text
    assert "129,440 parameters, 1,798 of them attention's" in text
    assert "u = lambda M + (1 - lambda) m" in text
    assert "eprint = {2208.10322}" in text
    # no number of a result that was not given
    assert len(re.findall(r"accuracy \|", text)) == 1


def test_a_card_without_results_says_so_and_its_example_runs(tmp_path: Path):
    spem.save_pretrained(spem.resnet(11), tmp_path, repo_id=str(tmp_path))
    card = parsed(tmp_path)
    assert card.data.eval_results is None
    assert "license" not in card.data.to_dict()
    assert "No results are stated." in card.text
    assert "Citation" not in card.text
    assert 'from a checkout of spem: `pip install ".[hub]"`' in card.text
    (example,) = re.findall(r"```python\n(.*?)```", card.text, re.S)
    names: dict[str, Any] = {}
    exec(example, names)
    assert isinstance(names["model"], spem.ResNet)


def test_every_module_has_its_formula_on_the_card():
    for name in spem.list_attention():
        text = formula(name)
        assert len(text) > 20, name
        assert not re.search("^(Args|Differences|Raises):", text, re.MULTILINE), name


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({"dataset": "a", "metric": "b"}, "missing value for field .value."),
        ({"dataset": "a", "metric": "b", "value": "93"}, "wrong value type for field .value."),
        ({"dataset": "a", "metric": "b", "value": float("nan")}, "value=nan is not a number"),
        ({"dataset": "a", "metric": "b", "value": True}, "value=True is not a number"),
        ([{"dataset": "a", "metric": "b", "value": 1, "best": 2}], "can not match .best. to any"),
        ("nowhere", "nowhere holds no result.json, so its run has not finished"),
    ],
)
def test_what_is_no_result_is_refused(results: Any, message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        spem.save_pretrained(spem.resnet(11), tmp_path / "out", results=results)
    assert not (tmp_path / "out").exists()


# ---- runs


def test_a_run_is_shared_with_its_result(run: Path, tmp_path: Path):
    out = tmp_path / "out"
    assert cli.main(["share", str(run), "--folder", str(out)]) == 0
    shared, result = read_shared(out), read_result(run)
    assert result is not None
    weights = read_weights(run / "model.safetensors").network.state_dict()
    assert all(torch.equal(weights[k], v) for k, v in shared.model.state_dict().items())
    (told,) = parsed(out).data.eval_results
    assert (told.metric_value, told.dataset_name) == (result.accuracy, "digits")
    for words in (
        f"run {result.id}",
        "Images of 8x8 pixels, red, green and blue, as (pixels / 255",
    ):
        assert words in parsed(out).text
    assert shared.classes == tuple("0123456789")
    assert shared.images is not None
    assert shared.images.size == 8
    model = spem.from_pretrained(out)
    spem.save_pretrained(model, tmp_path / "again", results=run)
    assert parsed(tmp_path / "again").data.eval_results[0].metric_value == result.accuracy


def test_a_run_on_a_folder_named_like_a_known_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Its images may be anything: its own classes are stated, and not the hub's id of the name."""
    from PIL import Image

    from spem.data import load_images

    digits = load_images("digits", "test", size=16)
    folder = tmp_path / "cifar10"
    for i in range(40):
        place = folder / f"kind {int(digits.labels[i]) % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits.images[i].permute(1, 2, 0).numpy()).save(place / f"{i}.png")
    args = ["train", "smoke", "--data", str(folder), "--epochs", "1", "--depth", "11"]
    assert cli.main([*args, "--folder", str(tmp_path / "run")]) == 0, capsys.readouterr().err
    assert cli.main(["share", str(tmp_path / "run"), "--folder", str(tmp_path / "out")]) == 0
    shared = read_shared(tmp_path / "out")
    assert shared.classes == ("kind 0", "kind 1")
    card = parsed(tmp_path / "out")
    assert "datasets" not in card.data.to_dict()
    (told,) = card.data.eval_results
    assert told.dataset_type == told.dataset_name == "cifar10 (a folder of the author's)"
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text()


def test_what_is_no_finished_run_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    mixed = tmp_path / "mixed"
    shutil.copytree(run, mixed)
    shutil.copy(WEIGHTS / "spem-seed0.safetensors", mixed / "model.safetensors")
    out = ["--folder", str(tmp_path / "out")]
    for change, message in (
        (lambda: None, "is not the file that result.json was written for"),
        ((mixed / "result.json").unlink, "It has not finished"),
        (lambda: shutil.rmtree(mixed), "there is no run"),
    ):
        change()
        assert cli.main(["share", str(mixed), *out]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_sends_nothing_unless_asked(
    run: Path, tmp_path: Path, recorder: Recorder, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "shared"
    folder.mkdir()
    (folder / "notes.txt").write_text("not of this command")
    assert cli.main(["share", str(run), "--folder", str(folder), "--license", "mit"]) == 0
    out = capsys.readouterr().out
    assert f"{folder}: README.md, config.json, model.safetensors\n" in out
    assert recorder.calls == []
    assert parsed(folder).data.license == "mit"
    assert cli.main(["share", str(run), "--to", "me/net"]) == 0
    assert "sent: https://hub/me/net/commit/1" in capsys.readouterr().out
    assert isinstance(spem.from_pretrained("me/net"), spem.ResNet)
    assert cli.main(["share", str(run)]) == 2
    assert "nowhere to write. Give --folder DIR" in capsys.readouterr().err
    assert cli.main(["share", str(run), "--to", "net"]) == 2
    assert "is not the id of a repository" in capsys.readouterr().err


def test_the_committed_weights_can_be_shared(tmp_path: Path):
    weights = str(WEIGHTS / "spem-seed0.safetensors")
    assert cli.main(["share", weights, "--folder", str(tmp_path)]) == 0
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["network"]["attention"] == "spem"
    assert config["classes"][3] == "cat"
    assert "No results are stated." in parsed(tmp_path).text
