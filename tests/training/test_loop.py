"""What a training records, the curve it follows, and what it refuses to go on with."""

from __future__ import annotations

import hashlib
import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tolerance import TOLERANCE
from training.tiny import Stop, begun, tiny, validated

from spem.data import augment, epoch_plan, load_images
from spem.training import (
    RunConfig,
    Silent,
    evaluate,
    loop,
    read_metrics,
    read_result,
    read_run,
    read_weights,
    recipes,
    train,
)
from spem.training.folder import load_checkpoint
from spem.training.loop import best_line
from spem.training.progress import PlainLines
from spem.training.sets import epoch_batches, load_sets

# Loss of three epochs of `tiny`, seed 0, on one processor. Another one sums in another order; the
# differences grow along the training and stay far below these.
CURVE = {"none": [2.3902, 2.2045, 1.9503], "spem": [2.3273, 2.1972, 2.0986]}
CURVE_TOLERANCE = 0.02


@pytest.mark.parametrize("attention", CURVE)
def test_loss_follows_the_committed_curve(attention: str, tmp_path: Path):
    train(tiny(attention, epochs=3), tmp_path, progress=Silent())
    losses = [line["loss"] for line in read_metrics(tmp_path)]
    assert losses == pytest.approx(CURVE[attention], abs=CURVE_TOLERANCE)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    config, folder = validated(tiny(epochs=2), 50), tmp_path_factory.mktemp("finished")
    train(config, folder, progress=Silent())
    return config, folder


def test_metrics_line_holds_what_is_promised(finished: tuple[RunConfig, Path]):
    lines = read_metrics(finished[1])
    assert [line["epoch"] for line in lines] == [0, 1]
    assert [line["lr"] for line in lines] == pytest.approx([0.1, 0.01])
    for line in lines:
        assert set(line) == {
            *("epoch", "lr", "loss", "penalty", "train_accuracy", "test_loss", "test_accuracy"),
            *("validation_loss", "validation_accuracy", "best_epoch", "best_test_accuracy"),
            *("seconds", "evaluation_seconds", "images_per_second", "mixes", "gradients"),
        }
        assert list(line["mixes"]) == [f"layer{i}.0.attention.pool" for i in (1, 2, 3)]
        assert list(line["gradients"]) == ["layer1.0", "layer2.0", "layer3.0"]
        assert all(0 < norm < 100 for norm in line["gradients"].values())
    for mix in lines[0]["mixes"].values():
        assert mix["change"] > 0
        assert abs(mix["lambda"] - 0.5) <= 7 * mix["change"] + 1e-9


def test_penalty_and_magnitude_follow_the_closed_form(finished: tuple[RunConfig, Path]):
    line = read_metrics(finished[1])[0]
    # While lambda stays near 1/2, nothing but penalty and weight decay acts on p0 = p1 = p.
    p, velocity, penalties = 0.5, 0.0, []
    for _ in range(7):
        penalties.append(3 * (p**2 + p**2))
        velocity = 0.9 * velocity + (2 * 0.1 + 1e-4) * p
        p -= 0.1 * velocity
    assert line["penalty"] == pytest.approx(sum(penalties) / 7, rel=1e-5)
    for mix in line["mixes"].values():
        assert mix["magnitude"] == pytest.approx(2**0.5 * abs(p), rel=1e-5)


def test_result_agrees_with_metrics_and_weights(finished: tuple[RunConfig, Path]):
    config, folder = finished
    result, lines = read_result(folder), read_metrics(folder)
    assert result is not None
    assert (result.id, result.seed, result.attention) == (config.id, 0, "spem")
    assert result.accuracy == lines[-1]["test_accuracy"]
    assert result.best_selected_on == "validation"
    assert result.best_accuracy == lines[result.best_epoch]["test_accuracy"]
    assert result.steps == 2 * 7
    assert result.parameters == 129_440
    assert result.attention_parameters == 1_798
    test = load_images("digits", "test", size=8)
    assert result.test_sha256 == test.sha256
    model = read_weights(folder / "model.safetensors").network
    again = evaluate(model, test, normalisation="digits")
    assert again.top1 == result.accuracy
    assert again.loss == pytest.approx(result.loss, rel=1e-5)


def test_folder_holds_the_documented_files(finished: tuple[RunConfig, Path]):
    config, folder = finished
    staying = {"config.json", "metrics.jsonl", "model.safetensors"}
    assert {p.name for p in folder.iterdir()} == {*staying, "result.json", ".lock"}
    run = read_run(folder)
    assert run.starts[0]["versions"]["torch"] == torch.__version__
    assert run.data.classes == tuple("0123456789")
    assert run.config == config
    assert run.result is not None
    sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in staying}
    assert run.result.files == sums


def test_best_epoch_is_the_first_best_on_validation_images_if_there_are_any():
    test_only = [{"test_accuracy": a} for a in (80.0, 90.0, 90.0)]
    assert best_line(test_only) is test_only[1]
    held_out = [{"test_accuracy": 95.0, "validation_accuracy": 70.0}]
    held_out += [{"test_accuracy": 85.0, "validation_accuracy": 75.0}]
    assert best_line(held_out) is held_out[1]


def test_evaluation_equals_counting_by_hand():
    test = load_images("digits", "test", size=8).take(torch.arange(23))
    model = begun(tiny()).model
    next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)).eval()  # frozen
    modes = [module.training for module in model.modules()]
    found = evaluate(model, test, normalisation="digits", batch=7)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ValueError, match="no images"):
        evaluate(model, test.take(torch.arange(0)))
    with pytest.raises(ValueError, match=r"normalisation='digit' .* Did you mean 'digits'"):
        evaluate(model, test, normalisation="digit")
    still = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Softmax(1))  # without parameters
    assert evaluate(still, test).count == 23
    mean, std = 0.3061, 0.3766
    logits = model.eval()((test.images / 255 - mean) / std).detach().double()
    losses = [-torch.log_softmax(z, 0)[y] for z, y in zip(logits, test.labels, strict=True)]
    assert found.count == 23
    assert found.correct == sum(
        int(z.argmax()) == int(y) for z, y in zip(logits, test.labels, strict=True)
    )
    assert found.top1 == 100 * found.correct / 23
    torch.testing.assert_close(
        torch.tensor(found.loss), torch.stack(losses).mean().float(), **TOLERANCE[torch.float32]
    )


def test_validation_images_are_held_out_before_the_limit():
    sets = load_sets(validated(tiny(), 50).data)
    assert sets.validation is not None
    assert (len(sets.train), len(sets.validation)) == (256, 50)


def shown(config: RunConfig, *, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The images and labels of an epoch of batches of 10, in order."""
    train_set = load_sets(config.data).train
    found = list(epoch_batches(train_set, config.data, 0, 0, batch=10, first=first))
    assert [len(images) for images, _ in found[:-1]] == [10] * (25 - first)
    return torch.cat([i for i, _ in found]), torch.cat([t for _, t in found])


def test_epoch_shows_every_image_once_and_flips_only_if_asked():
    config = tiny()
    train_set = load_sets(config.data).train

    def changed(**fields: object) -> RunConfig:
        return replace(config, data=replace(config.data, **fields))

    images, labels = shown(changed(augment=False))
    mine, theirs = ([i.tobytes() for i in s.numpy()] for s in (images, train_set.images))
    assert sorted(mine) == sorted(theirs)
    assert torch.equal(labels.bincount(), train_set.labels.bincount())
    assert torch.equal(shown(changed(pad=0))[0], images)
    flipped = shown(changed(pad=0, flip=True))[0]
    mirrored = (flipped == images.flip(3)).flatten(1).all(1)
    kept = (flipped == images).flatten(1).all(1)
    assert bool((mirrored | kept).all())
    assert 80 < int((mirrored & ~kept).sum()) < 176


def test_batches_augmented_a_few_at_a_time_have_the_bits_of_the_whole_epoch():
    config = replace(tiny(), data=replace(tiny().data, flip=True, pad=2))
    train_set = load_sets(config.data).train
    plan = epoch_plan(0, 0, len(train_set), pad=2)
    whole = augment(train_set.images[plan.permutation], plan.offsets, plan.flips, pad=2)
    for first in (0, 3, 8, 25):
        images, labels = shown(config, first=first)
        assert torch.equal(images, whole[10 * first :])
        assert torch.equal(labels, train_set.labels[plan.permutation][10 * first :])


def one_step(config: RunConfig, count: int = 1) -> list[float]:
    """Losses of some steps on one batch."""
    step = begun(config).step
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(16, 3, 8, 8, generator=generator)
    labels = torch.randint(0, 10, (16,), generator=generator)
    return [float(step(images, labels).loss) for _ in range(count)]


@pytest.mark.parametrize("how", [{"step": "compile"}, {"precision": "bf16"}])
def test_other_steps_follow_the_eager_one_in_float32(how: dict[str, str]):
    eager, other = one_step(tiny("spem"), 3), one_step(tiny("spem", **how), 3)
    torch.testing.assert_close(
        torch.tensor(other), torch.tensor(eager), **TOLERANCE[torch.bfloat16]
    )
    assert len(set(eager)) == 3
    assert other != eager or "step" in how


def test_penalty_is_in_the_loss_that_is_descended_but_not_in_the_one_reported():
    config = tiny("spem")
    free = replace(config, optim=replace(config.optim, penalty=0.0))
    assert one_step(config) == one_step(free)
    # It reaches the loss through lambda alone, at first in single bits.
    assert one_step(config, 14) != one_step(free, 14)


def test_diverged_training_stops_and_names_epoch_layers_and_checkpoint(tmp_path: Path):
    config = tiny("none")
    config = replace(config, optim=replace(config.optim, lr=1e30))
    with pytest.raises(FloatingPointError) as stopped:
        train(config, tmp_path, progress=Silent())
    text = str(stopped.value)
    assert all(p in text for p in ("in epoch 1 at rate 1e+30", "bn", "There is no checkpoint yet"))
    assert not (tmp_path / "checkpoint.pt").exists()
    run = read_run(tmp_path)
    assert (run.result, run.error, run.finished) == (None, text, True)
    with pytest.raises(ValueError, match="the run has no trained weights"):
        run.network()
    # It would end so again: that is told, and nothing trained.
    with pytest.raises(FloatingPointError, match=r"in epoch 1 at rate 1e\+30.*Trained before"):
        train(config, tmp_path, progress=Stop(1))


def test_weights_that_became_infinite_are_of_the_epoch_that_just_ended(tmp_path: Path):
    config = tiny("spem", epochs=1)
    config = replace(config, optim=replace(config.optim, penalty=1e6))
    with pytest.raises(FloatingPointError, match=r"norm of the weights became \w+ in epoch 1 at"):
        train(config, tmp_path, progress=Silent())


def test_divergence_leaves_the_last_good_checkpoint(tmp_path: Path):
    config = tiny("none", epochs=3)
    # The "factor" raises the rate after the first epoch.
    config = replace(config, optim=replace(config.optim, factor=1e30, milestones=(1,)))
    with pytest.raises(FloatingPointError, match=r"in epoch 2 .*last good checkpoint is .*pt"):
        train(config, tmp_path, progress=Silent())
    content = load_checkpoint(tmp_path / "checkpoint.pt")
    assert content["epoch"] == 1
    assert all(bool(t.isfinite().all()) for t in content["model"].values())


@pytest.mark.parametrize("attention", ["spem", "cbam"])
def test_nothing_in_an_epoch_reads_a_tensor(
    attention: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """On a GPU each of these would wait for the device; Numba's kernels run on CPUs alone."""
    whole_epoch = loop._Training._train_epoch

    def read(tensor: torch.Tensor, *arguments: object) -> None:
        raise AssertionError("a tensor was read within an epoch")

    def watched(training: loop._Training) -> None:
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "numpy", "__bool__", "__float__", "__int__"):
                patch.setattr(torch.Tensor, name, read)
            whole_epoch(training)

    monkeypatch.setattr(loop._Training, "_train_epoch", watched)
    config = tiny(attention, epochs=1)
    config = replace(config, runtime=replace(config.runtime, impl="formula"))
    train(config, tmp_path, progress=Silent())
    assert read_result(tmp_path) is not None


def test_progress_is_told_after_every_step_and_printed_once_an_epoch(tmp_path: Path):
    stream, told = io.StringIO(), list[tuple[int, int, str]]()

    class Watched(PlainLines):
        def step(self, done: int, total: int, text: str) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            told.append((done, total, text))
            super().step(done, total, text)

    train(tiny(epochs=2), tmp_path, progress=Watched(stream))
    assert [(done, total) for done, total, _ in told] == [(i, 14) for i in range(1, 15)]
    speed = r"[1-9]\d* images/s, 0:00:\d\d left"
    assert re.fullmatch(rf"epoch 1/2, step 1/7, {speed}", told[0][2])
    figures = r"loss \d\.\d{3}, accuracy \d+\.\d\d %"
    assert re.fullmatch(rf"epoch 2/2, step 7/7, {figures}, {speed}", told[-1][2])
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4
    assert re.fullmatch(r"\d+ training images, \d+ test images, 10 classes", lines[0])
    assert lines[1].startswith("3 block tails: ")
    assert lines[2].startswith("epoch 1/2: rate 0.1, loss ")
    assert "images/s" in lines[3]


def test_live_bar_shows_epoch_speed_and_time_left(monkeypatch: pytest.MonkeyPatch):
    console = pytest.importorskip("rich.console")
    from spem.training import progress

    stream = io.StringIO()
    screen = console.Console(file=stream, force_terminal=True, width=140)
    monkeypatch.setattr(console, "Console", lambda **kwargs: screen)
    bar = progress.LiveBar()
    bar.step(23, 50, "epoch 3/5, 1:02:03 left")
    bar.message("a [message]")
    bar._bar.refresh()
    bar.close()
    shown = stream.getvalue()
    for part in ("epoch 3/5", "46%", "1:02:03 left", "[message]"):
        assert part in shown


@pytest.mark.slow
def test_smoke_recipe_learns_the_digits(tmp_path: Path):
    result = train(recipes.smoke("se"), tmp_path, progress=Silent())
    assert result.accuracy > 90
