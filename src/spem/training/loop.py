"""Training, from a config and a folder to a result: plan, resume, epochs, result."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spem.attention import learned_mixes
from spem.data import NORMALISATION, ImageSet, normalise
from spem.extras import require
from spem.models import blocks, start_branches
from spem.ops import use_impl
from spem.seeding import initialise
from spem.training.capture import CapturedStep
from spem.training.checkpoint import (
    build_model,
    save_answers,
    save_checkpoint,
    save_json,
    save_weights,
    unpack_checkpoint,
)
from spem.training.choose_impl import evaluation_impl, tails_of
from spem.training.choose_step import choose_step
from spem.training.config import RunConfig
from spem.training.distributed import Team, gather_team
from spem.training.diverged import require_finite, write_diverged
from spem.training.environment import record_environment
from spem.training.evaluation import Accuracy, evaluate, predict
from spem.training.inside import describe_gates, gradient_norms
from spem.training.log import Progress, Status, read_metrics
from spem.training.opening import Opened, opened
from spem.training.results import Result, best_line, summarise, write_result
from spem.training.runs import ANSWERS, CHECKPOINT, GATES, WEIGHTS, require_same_run, settle_step
from spem.training.sets import epoch_images, load_sets, require_batches
from spem.training.shared_step import shared_step
from spem.training.signals import Interrupted, StopSignals, stop_signals
from spem.training.state import DIVIDED, State, zero_sums
from spem.training.step import execution, lambdas, make_optimizer, make_step, set_rate


def train(config: RunConfig, folder: Path, *, progress: Progress | None = None) -> Result:
    """Train in a folder, from the start or from its checkpoint; at once if it is finished.

    On the CPU a resumed run ends in the same bits as an undisturbed one. Where torch.distributed
    has a process group of several processes (`spem.training.process_group` joins torchrun's), all
    of them call this with the same arguments and train the run together: every batch is divided
    among them, and the result is that of one process, within rounding.

    Args:
        config: what to train; what it leaves open (device, threads, implementation, step) is
            resolved and written down.
        folder: the run folder, made if needed. One run at a time may be trained in it.
        progress: what is told about the run; None shows a live bar or plain lines.

    Raises:
        ValueError: the folder holds another run, or a damaged file, or the config asks for an
            implementation or a step that cannot be had.
        RuntimeError: another process trains in the folder, or one that trained with this one is
            gone.
        ImportError: safetensors is not installed.
        FloatingPointError: the loss became infinite or NaN.
        Interrupted: SIGTERM or Ctrl-C; a checkpoint is written, and the exception carries the
            exit code.
    """
    folder = Path(folder)
    # Needed after the last epoch; missing, it must be missed before the first.
    require("safetensors", extra="train", purpose="train")
    with (
        gather_team() as team,
        stop_signals() as stop,
        team.watched(folder / CHECKPOINT),
        opened(config, folder, progress, team) as run,
    ):
        if isinstance(run, Result):
            return run
        runtime = run.config.runtime
        try:
            with execution(runtime, team.device(runtime.device)) as device:
                return _Training(run, folder, device, stop, team).run()
        except FloatingPointError as error:
            write_diverged(run.config, folder, len(read_metrics(folder)), str(error))
            raise


class _Training:
    """One run in progress, in the process that leads it or in one that follows."""

    def __init__(
        self,
        run: Opened,
        folder: Path,
        device: torch.device,
        stop: StopSignals,
        team: Team,
    ) -> None:
        self.config = config = run.config
        self.log, self.claim = run.log, run.claim
        self.folder, self.device, self.stop, self.team = folder, device, stop, team
        self.sets = load_sets(config.data, device)
        team.require_same("images", self._checksums())
        model = build_model(config, classes=len(self.sets.train.classes))
        initialise(model, config.seed, scope=config.model.init_scope)
        if config.model.branch_start is not None:
            start_branches(model, config.model.branch_start)
        self.format = (
            torch.channels_last if config.runtime.channels_last else torch.contiguous_format
        )
        self.model = model.to(device, memory_format=self.format).train()  # pyright: ignore[reportCallIssue]
        require_batches(self.model, len(self.sets.train), config.optim.batch)
        self.optimizer = make_optimizer(self.model, config.optim)
        if team.size > 1:
            self.take_step = shared_step(
                self.model, self.optimizer, config.optim, config.runtime, team
            )
        elif config.runtime.step == "auto":
            batch = self._sample(min(config.optim.batch, len(self.sets.train)))
            step, self.take_step = choose_step(
                self.model, self.optimizer, config, *batch, self.log.message
            )
            self.config = config = settle_step(config, folder, step)
        else:
            self.take_step = make_step(self.model, self.optimizer, config.optim, config.runtime)
        self.mixes = learned_mixes(self.model)
        self.blocks = [name for name, _ in blocks(self.model)]
        self.steps = math.ceil(len(self.sets.train) / config.optim.batch)
        self.state = State(self._zero_sums())
        self.saved_at = time.monotonic()

    def run(self) -> Result:
        """Train the epochs that are missing and write the result."""
        self._resume()
        self._prepare()
        state, optim = self.state, self.config.optim
        if self.team.leads:
            runtime = self.config.runtime
            record_environment(self.folder, self._checksums(), runtime, self.team.size)
        if self.config.runtime.tensorboard:
            self.log.open_board(first_epoch=state.epoch)
        while state.epoch < optim.epochs:
            rate = set_rate(self.optimizer, optim, state.epoch)
            self._train_epoch()
            line = self.team.lead(partial(self._epoch_line, rate, self._totals()))
            state.history.append(line)
            state.epoch, state.step, state.seconds = state.epoch + 1, 0, 0.0
            state.sums = self._zero_sums()
            self._save()
            self.log.epoch(line, optim.epochs)
            if self._asked_to_stop() and state.epoch < optim.epochs:
                raise self.stop.interruption(f"after epoch {state.epoch}", self._go_on())
        result = self.team.lead(lambda: asdict(self._finish()))
        if self._asked_to_stop():
            raise self.stop.interruption("after its last epoch", "The result is written.")
        return Result(**result)

    def _asked_to_stop(self) -> bool:
        return self.team.agree(self.stop, False)[0]

    def _train_epoch(self) -> None:
        """Take the missing steps of the current epoch, without waiting for the device between."""
        config, state = self.config, self.state
        images, labels = epoch_images(self.sets.train, config.data, config.seed, state.epoch)
        before = lambdas(self.model)
        started, carried, first = time.monotonic(), state.seconds, state.step
        while state.step < self.steps:
            here = slice(state.step * config.optim.batch, (state.step + 1) * config.optim.batch)
            batch = self._normalised(images[here])
            output = self.take_step(batch, labels[here])

            state.sums["loss"] += output.loss * len(batch)
            state.sums["penalty"] += output.penalty
            state.sums["correct"] += output.correct
            state.sums["change"] += (output.lambdas - before).abs()
            before = output.lambdas

            state.step += 1
            if state.step == self.steps:
                state.sums["gradients"].copy_(gradient_norms(self.model))
            state.seconds = carried + time.monotonic() - started
            due = time.monotonic() - self.saved_at > 60 * config.runtime.checkpoint_minutes
            stop, due = self.team.agree(self.stop, due)
            if stop or due:
                self._save()
            if stop:
                raise self._interruption()
            if self.log.progress.due():
                self.log.progress.step(self._status(state.step - first, time.monotonic() - started))
        self._synchronise()
        state.seconds = carried + time.monotonic() - started

    def _interruption(self) -> Interrupted:
        where = f"in epoch {self.state.epoch + 1} after step {self.state.step} of {self.steps}"
        return self.stop.interruption(where, self._go_on())

    def _normalised(self, images: Tensor) -> Tensor:
        config = self.config
        mean, std = NORMALISATION[config.data.normalisation]
        dtype = torch.bfloat16 if config.runtime.precision == "bf16" else torch.float32
        return normalise(images, mean, std, dtype).contiguous(memory_format=self.format)

    def _sample(self, count: int) -> tuple[Tensor, Tensor]:
        """A batch of the shape and kind that steps take."""
        train = self.sets.train
        return self._normalised(train.images[:count]), train.labels[:count]

    def _prepare(self) -> None:
        """Say what runs the steps, and capture them, if they are, before the clock starts."""
        runtime, count = self.config.runtime, len(self.sets.train)
        self.log.message(f"{tails_of(self.model, runtime)}, step: {runtime.step}")
        if isinstance(self.take_step, CapturedStep):
            started = time.monotonic()
            batch = min(self.config.optim.batch, count)
            sizes = sorted({batch, count % batch or batch}, reverse=True)
            for size in sizes:
                self.take_step.prepare(*self._sample(size))
            text = " and ".join(str(size) for size in sizes)
            seconds = time.monotonic() - started
            self.log.message(f"captured the step for {text} images in {seconds:.0f} s")

    def _epoch_line(self, rate: float, sums: dict[str, Tensor]) -> dict[str, Any]:
        """Read the epoch's sums (once), evaluate, and put the epoch's line together."""
        state, count = self.state, len(self.sets.train)
        loss = float(sums["loss"]) / count
        self._require_finite("training loss", loss)

        def stop_if_asked() -> None:
            if self.stop.received:
                self._write_checkpoint(sums)
                raise self._interruption()

        started = time.monotonic()
        test = self._evaluate(self.sets.test, stop_if_asked)
        self._require_finite("test loss", test.loss)
        line: dict[str, Any] = {
            "epoch": state.epoch,
            "lr": rate,
            "loss": loss,
            "penalty": float(sums["penalty"]) / self.steps,
            "train_accuracy": 100.0 * int(sums["correct"]) / count,
            "test_loss": test.loss,
            "test_accuracy": test.top1,
        }
        if self.sets.validation is not None:
            held_out = self._evaluate(self.sets.validation, stop_if_asked)
            line |= {"validation_loss": held_out.loss, "validation_accuracy": held_out.top1}
        best = best_line([*state.history, line])
        line |= {"best_epoch": best["epoch"], "best_test_accuracy": best["test_accuracy"]}
        line["seconds"] = state.seconds
        line["evaluation_seconds"] = time.monotonic() - started
        line["images_per_second"] = count / state.seconds
        line["mixes"] = {
            name: {
                "lambda": float(mix.lam.detach()),
                "magnitude": float(mix.magnitude.detach()),
                "change": change / self.steps,
            }
            for (name, mix), change in zip(self.mixes, sums["change"].tolist(), strict=True)
        }
        norms = sums["gradients"].tolist()
        line["gradients"] = dict(zip(self.blocks, norms, strict=True))
        return line

    def _evaluate(self, images: ImageSet, between: Callable[[], None]) -> Accuracy:
        with use_impl(evaluation_impl(self.config.runtime.impl)):
            return evaluate(
                self.model,
                images,
                normalisation=self.config.data.normalisation,
                between=between,
            )

    def _look_inside(self) -> None:
        """Write down the answers of the finished network on the test set, and its gates."""
        test, normalisation = self.sets.test, self.config.data.normalisation
        with use_impl(evaluation_impl(self.config.runtime.impl)):
            answers = predict(self.model, test, normalisation=normalisation)
            gates = describe_gates(self.model, test, normalisation=normalisation)
        save_answers(answers, self.folder / ANSWERS)
        save_json({"gates": gates}, self.folder / GATES)

    def _go_on(self) -> str:
        return (
            f"The checkpoint lies in {self.folder}; run the same command again to go on from there."
        )

    def _finish(self) -> Result:
        self._check_claim()
        self._look_inside()
        save_weights(self.model, self.config, self.folder / WEIGHTS)
        result = summarise(
            self.config, self.model, self.sets, self.state.history, self.folder, self.team.size
        )
        write_result(result, self.folder)
        if not self.config.runtime.keep_checkpoint:
            (self.folder / CHECKPOINT).unlink(missing_ok=True)
        return result

    def _save(self) -> None:
        """Write the checkpoint. This waits for the device, so it does not happen every step."""
        self.team.alone(partial(self._write_checkpoint, self._totals()))
        self.saved_at = time.monotonic()

    def _totals(self) -> dict[str, Tensor]:
        """The epoch's sums over all processes."""
        total = self.team.total
        return {k: total(v) if k in DIVIDED else v for k, v in self.state.sums.items()}

    def _write_checkpoint(self, sums: dict[str, Tensor]) -> None:
        self._require_finite("training loss", float(sums["loss"]))
        weights = [parameter.detach() for parameter in self.model.parameters()]
        self._require_finite("norm of the weights", float(nn.utils.get_total_norm(weights)))
        self._check_claim()
        content = {
            "config": self.config.to_dict(),
            "data_sha256": self._checksums(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **vars(self.state),
            "sums": sums,
        }
        save_checkpoint(content, self.folder / CHECKPOINT)

    def _check_claim(self) -> None:
        assert self.claim is not None  # only the first process writes
        self.claim.check()

    def _resume(self) -> None:
        """Go to where the checkpoint stands, if there is one."""
        path = self.folder / CHECKPOINT
        # The first process reads for all: another machine need not have the folder.
        stored = self.team.share(lambda: path.read_bytes() if path.exists() else b"")
        if stored:
            content = unpack_checkpoint(stored, path)
            require_same_run(RunConfig.from_dict(content["config"]), self.config, self.folder)
            if content["data_sha256"] != self._checksums():
                raise ValueError(
                    f"train: the images differ from those {path} was trained on "
                    f"({content['data_sha256']} -> {self._checksums()}). Use another folder."
                )
            self.model.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
            names = vars(self.state).keys()
            self.state = State(**{name: content[name] for name in names})
            # A checkpoint of an earlier version lacks the sums that are younger.
            sums = {k: v.to(self.device) for k, v in self.state.sums.items()}
            self.state.sums = self._zero_sums() | sums
            if not self.team.leads:
                for name in DIVIDED:
                    self.state.sums[name].zero_()
            self.log.message(
                f"resuming in epoch {self.state.epoch + 1} after step {self.state.step}"
            )
        self.log.restart(self.state.history)

    def _require_finite(self, name: str, value: float) -> None:
        require_finite(
            name,
            value,
            model=self.model,
            epoch=self.state.epoch,
            rate=self.optimizer.param_groups[0]["lr"],
            checkpoint=self.folder / CHECKPOINT,
        )

    def _status(self, steps_now: int, seconds_now: float) -> Status:
        state, config = self.state, self.config
        per_step = seconds_now / steps_now
        evaluation = state.history[-1]["evaluation_seconds"] if state.history else 0.0
        epochs_left = config.optim.epochs - state.epoch
        steps_left = epochs_left * self.steps - state.step
        return Status(
            epoch=state.epoch,
            epochs=config.optim.epochs,
            step=state.step,
            steps=self.steps,
            images_per_second=config.optim.batch / per_step,
            seconds_left=steps_left * per_step + epochs_left * evaluation,
            last=state.history[-1] if state.history else None,
        )

    def _zero_sums(self) -> dict[str, Tensor]:
        return zero_sums(len(self.mixes), len(self.blocks), self.device)

    def _checksums(self) -> dict[str, str]:
        return {"train": self.sets.train.sha256, "test": self.sets.test.sha256}

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
