"""Training: plan or resume a run in its folder, train its epochs, write its result."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spem.attention import attention_parameters, learned_mixes
from spem.cost import count
from spem.data import NORMALISATION, ImageSet, normalise
from spem.extras import rephrased, require
from spem.files import save_json
from spem.models import ResNet, blocks, start_branches
from spem.ops import use_impl
from spem.seeding import initialise
from spem.training import folder as store
from spem.training.config import RunConfig, RuntimeConfig
from spem.training.distributed import Team, gather_team, shared_step
from spem.training.environment import commit, hardware, versions
from spem.training.evaluation import Accuracy, describe_gates, evaluate, gradient_norms, norm_report
from spem.training.folder import DataIdentity, Result, Run, require_same_run
from spem.training.progress import Progress, Silent, choose_progress
from spem.training.sets import Sets, epoch_batches, load_sets, require_batches
from spem.training.signals import Interrupted, StopSignals, stop_signals
from spem.training.step import (
    CapturedStep,
    choose_impl,
    evaluation_impl,
    execution,
    lambdas,
    make_optimizer,
    make_step,
    map_dtype,
    set_rate,
    tails_of,
)

DIVIDED = ("loss", "correct")  # sums that are split over processes; of the others each has all


def train(config: RunConfig, folder: str | Path, *, progress: Progress | None = None) -> Result:
    """Train in a folder, from the start or its checkpoint; the result of a finished run is read.

    On the CPU a resumed run matches an uninterrupted one bit for bit. If torch.distributed has a
    group of several processes (`spem.training.process_group` joins torchrun's), all call this with
    the same arguments and train together: each batch is split among them, and the result is that
    of one process, within rounding.

    Args:
        config: what to train; whatever it leaves open (device, threads, implementation, step) is
            resolved and recorded.
        folder: the run folder, created if needed; only one process at a time may train in it.
        progress: receives the run's reports; None shows a live bar or plain lines.

    Raises:
        ValueError: the folder holds another run, a damaged file or unrelated files; the images
            cannot be read or are not those the run started with; or the requested implementation
            or step is unavailable.
        HeldError: another process is training in the folder.
        RuntimeError: another process of this run is gone.
        ImportError: safetensors or filelock is not installed.
        FloatingPointError: the loss became infinite or NaN, now or when the run was last trained.
        Interrupted: SIGTERM or Ctrl-C; a checkpoint is written.
    """
    folder = Path(folder)
    # Needed only after the last epoch, but it should fail before the first.
    require("safetensors", extra="train", purpose="train")
    with (
        gather_team() as team,
        stop_signals() as stop,
        team.watched(folder / store.CHECKPOINT),
        ExitStack() as until,
    ):
        team.require_same("run", [config.id, config.seed])
        progress = (progress or choose_progress()) if team.leads else Silent()
        until.callback(progress.close)
        team.lead(partial(store.require_own, folder))
        finished = partial(_finished, config, folder)
        result = team.lead(finished)
        if result is None:
            # Before the folder is created: without images there is nothing to train.
            sets = load_sets(config.data, config.seed)
            team.require_same("images", [sets.train.sha256, sets.test.sha256])
            team.lead(lambda: until.enter_context(store.held(folder)))
            result = team.lead(finished)  # finished by another process meanwhile
            if result is None:
                run = team.lead(lambda: _plan(config, folder, sets, progress, team.size))
                with execution(run.runtime, team.device(run.runtime.device)) as device:
                    return _Training(run, sets, device, stop, team, progress).run()
        progress.message(f"finished on {result.date}, so there is nothing to train: {folder}")
        return result


def _finished(config: RunConfig, folder: Path) -> Result | None:
    """The result of this run if the folder holds it; raises the error of a diverged run."""
    if not (folder / store.RESULT).exists():
        return None
    run = store.read_run(folder)
    require_same_run(run.config, config, folder)
    if run.error is not None:
        raise FloatingPointError(f"{run.error} (Trained before, in {folder}.)")
    return run.result


def _plan(config: RunConfig, folder: Path, sets: Sets, progress: Progress, processes: int) -> Run:
    """Resolve what a config leaves open, or keep the plan of the folder's run."""
    train, test = sets.train, sets.test
    data = DataIdentity(config.data.name, train.classes, train.sha256, test.sha256)
    stored, runtime, starts = store.read_plan(folder), config.runtime, list[dict[str, Any]]()
    if stored is not None:
        require_same_run(stored.config, config, folder)
        if replace(stored.data, name=data.name) != data:
            raise ValueError(
                f"train: the images, or the names of their classes, differ from those that the run "
                f"in {folder} started with. Use another folder."
            )
    if not (folder / store.CHECKPOINT).exists():
        stored = None  # nothing has been trained yet: plan it again
    if stored is not None:
        starts = stored.starts
        # Each of these can change the last bits.
        runtime = replace(stored.runtime, checkpoint_minutes=runtime.checkpoint_minutes)
        for name in ("device", "threads"):
            asked, kept = getattr(config.runtime, name), getattr(runtime, name)
            if asked not in ("auto", 0, kept):
                told = f"resuming as planned, so that the result stays exact: {name} {kept}"
                progress.message(f"{told} (asked: {asked})")
        # Several step eagerly, each on its own device, even in a run that started otherwise.
        if processes > 1 and config.runtime.step in ("auto", "eager"):
            runtime = replace(runtime, step="eager", device=runtime.device.partition(":")[0])
    try:
        runtime = resolved(runtime, processes, attention=config.model.attention != "none")
    except ValueError as error:
        if stored is None:
            raise
        raise ValueError(f"{error} But the run in {folder} was started this way.") from error
    machine = f"{processes} x " * (processes > 1)
    machine += hardware(torch.device(runtime.device), runtime.threads)
    start = {"date": store.now(), "hardware": machine, "versions": versions(), "commit": commit()}
    run = Run(folder, config, runtime, data, [*starts, start])
    save_json(run.to_dict(), folder / store.CONFIG)
    return run


def resolved(runtime: RuntimeConfig, processes: int, *, attention: bool = True) -> RuntimeConfig:
    """Fill in what was left open, and refuse what is unavailable."""
    device = runtime.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with rephrased(f"train: runtime.device={device!r} cannot be used", "Use 'cpu' or 'auto'."):
        torch.zeros(1, device=device).item()
    kind, step = torch.device(device).type, runtime.step
    if step == "auto":
        step = "graph" if kind == "cuda" and processes == 1 else "eager"
    if processes > 1 and step != "eager":
        raise ValueError(
            f"train: runtime.step={step!r} is for one process, and {processes} train this run. Use "
            "'eager' or 'auto'."
        )
    if processes > 1 and device not in ("cpu", "cuda"):
        raise ValueError(
            f"train: runtime.device={device!r} cannot serve {processes} processes: each of them "
            "needs its own device. Use 'cuda', 'cpu' or 'auto'."
        )
    if step == "graph" and kind != "cuda":
        raise ValueError(
            f"train: runtime.step='graph' captures the step as a CUDA graph, which {kind!r} does "
            "not have. Use 'auto', 'compile' or 'eager'."
        )
    threads = runtime.threads or torch.get_num_threads()
    settled = replace(runtime, device=device, threads=threads, step=step)
    return replace(settled, impl=choose_impl(settled, kind, attention=attention))


def starting_network(config: RunConfig, classes: int) -> ResNet:
    """The network before the first step, on the CPU."""
    model, start = store.build_network(config, classes), config.model
    initialise(model, config.seed, scope=start.init_scope)
    if start.weights is not None:
        store.start_from(model, start.weights, start.weights_sha256)
    if start.branch_start is not None:
        start_branches(model, start.branch_start)
    return model


@dataclass
class _State:
    """The state of a run: a checkpoint without model and optimiser."""

    # Over the current epoch's steps: loss, penalty, correct answers, change of each lambda; and the
    # last step's gradient norm of each block.
    sums: dict[str, Tensor]
    epoch: int = 0
    step: int = 0  # steps done in the current epoch
    seconds: float = 0.0  # time of those steps
    history: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])  # metrics.jsonl


class _Training:
    """One run in progress, in its first process or another."""

    def __init__(
        self,
        run: Run,
        sets: Sets,
        device: torch.device,
        stop: StopSignals,
        team: Team,
        progress: Progress,
    ) -> None:
        self.plan, self.config, self.runtime, self.folder = run, run.config, run.runtime, run.folder
        self.device, self.stop, self.team, self.progress = device, stop, team, progress
        self.sets, optim, runtime = sets.to(device), run.config.optim, run.runtime
        model = starting_network(self.config, classes=len(sets.train.classes))
        self.format = torch.channels_last if runtime.channels_last else torch.contiguous_format
        self.model = model.to(device, memory_format=self.format).train()  # pyright: ignore[reportCallIssue]
        require_batches(self.model, len(sets.train), optim.batch)
        self.optimizer = make_optimizer(self.model, optim)
        if team.size > 1:
            self.take_step = shared_step(self.model, self.optimizer, optim, runtime, team)
        else:
            self.take_step = make_step(self.model, self.optimizer, optim, runtime)
        self.mixes = learned_mixes(self.model)
        self.blocks = [name for name, _ in blocks(self.model)]
        self.steps = math.ceil(len(sets.train) / optim.batch)
        self.state = _State(self._zero_sums())
        self.saved_at = time.monotonic()

    def run(self) -> Result:
        """Train the remaining epochs and write the result."""
        self._resume()
        self._prepare()
        state, optim = self.state, self.config.optim
        while state.epoch < optim.epochs:
            rate = set_rate(self.optimizer, optim, state.epoch)
            self._train_epoch()
            line = self.team.lead(partial(self._epoch_line, rate, self._totals()))
            history = [*state.history, line]
            state = self.state = _State(self._zero_sums(), state.epoch + 1, history=history)
            self._save()
            if self.team.leads:
                store.write_metrics(history, self.folder)
            self.progress.epoch(line, optim.epochs)
            if self.team.agree(self.stop)[0] and state.epoch < optim.epochs:
                raise self._interruption(f"after epoch {state.epoch}")
        result = self.team.lead(self._finish)
        if self.team.agree(self.stop)[0]:
            raise self.stop.interruption("after its last epoch", "The result is written.")
        return result

    def _train_epoch(self) -> None:
        """Run the remaining steps of the epoch, without waiting for the device in between."""
        config, state = self.config, self.state
        data, seed, batch = config.data, config.seed, config.optim.batch
        before = lambdas(self.model)
        started, carried, first = time.monotonic(), state.seconds, state.step
        train, epoch = self.sets.train, state.epoch
        for images, labels in epoch_batches(train, data, seed, epoch, batch=batch, first=first):
            output = self.take_step(self._normalised(images), labels)
            state.sums["loss"] += output.loss * len(images)
            state.sums["penalty"] += output.penalty
            state.sums["correct"] += output.correct
            state.sums["change"] += (output.lambdas - before).abs()
            before = output.lambdas
            state.step += 1
            if state.step == self.steps:
                state.sums["gradients"].copy_(gradient_norms(self.model))
            state.seconds = carried + time.monotonic() - started
            due = time.monotonic() - self.saved_at > 60 * self.runtime.checkpoint_minutes
            stop, due = self.team.agree(self.stop, due)
            if stop or due:
                self._save()
            if stop:
                raise self._interruption(self._place())
            self._report(max(state.seconds - carried, 1e-6) / (state.step - first))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        state.seconds = carried + time.monotonic() - started

    def _place(self) -> str:
        return f"in epoch {self.state.epoch + 1} after step {self.state.step} of {self.steps}"

    def _interruption(self, where: str) -> Interrupted:
        again = "run the same command again to resume from it"
        return self.stop.interruption(where, f"The checkpoint is in {self.folder}; {again}.")

    def _normalised(self, images: Tensor) -> Tensor:
        mean, std = NORMALISATION[self.config.data.normalisation]
        pixels = normalise(images, mean, std, map_dtype(self.runtime))
        return pixels.contiguous(memory_format=self.format)

    def _prepare(self) -> None:
        """Report images and how steps run; capture steps, if at all, before the clock starts."""
        runtime, train, test = self.runtime, self.sets.train, self.sets.test
        counts = f"{len(train):,} training images, {len(test):,} test images"
        self.progress.message(f"{counts}, {len(train.classes)} classes")
        self.progress.message(f"{tails_of(self.model, runtime)}, step: {runtime.step}")
        if isinstance(self.take_step, CapturedStep):
            started = time.monotonic()
            batch = min(self.config.optim.batch, len(train))
            sizes = sorted({batch, len(train) % batch or batch}, reverse=True)
            for size in sizes:
                self.take_step.prepare(self._normalised(train.images[:size]), train.labels[:size])
            text, seconds = " and ".join(map(str, sizes)), time.monotonic() - started
            self.progress.message(f"captured the step for {text} images in {seconds:.0f} s")

    def _epoch_line(self, rate: float, sums: dict[str, Tensor]) -> dict[str, Any]:
        """Read the epoch's sums (once), evaluate, and assemble the epoch's line."""
        state, count = self.state, len(self.sets.train)
        loss = float(sums["loss"]) / count
        self._require_finite("training loss", loss)

        def stop_if_asked() -> None:
            if self.stop.received:
                self._write_checkpoint(sums)
                raise self._interruption(self._place())

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
        line["gradients"] = dict(zip(self.blocks, sums["gradients"].tolist(), strict=True))
        return line

    def _evaluate(self, images: ImageSet, between: Callable[[], None]) -> Accuracy:
        normalisation = self.config.data.normalisation
        with use_impl(evaluation_impl(self.runtime.impl)):
            return evaluate(self.model, images, normalisation=normalisation, between=between)

    def _finish(self) -> Result:
        """Write weights and result, and delete the checkpoint."""
        config, sets, history, impl = self.config, self.sets, self.state.history, self.runtime.impl
        path, pixels = self.folder / store.WEIGHTS, config.data.normalisation
        store.save_weights(self.model, config, path, data=self.plan.data, impl=impl)
        with use_impl(evaluation_impl(impl)):
            gates = describe_gates(self.model, sets.test, normalisation=pixels)
        last, best, start = history[-1], best_line(history), self.plan.starts[-1]
        train_seconds = sum(line["seconds"] for line in history)
        assert impl is not None  # it was planned
        result = Result(
            id=config.id,
            seed=config.seed,
            dataset=config.data.name,
            depth=config.model.depth,
            attention=config.model.attention,
            epochs=config.optim.epochs,
            accuracy=last["test_accuracy"],
            loss=last["test_loss"],
            train_accuracy=last["train_accuracy"],
            train_loss=last["loss"],
            validation_accuracy=last.get("validation_accuracy"),
            best_accuracy=best["test_accuracy"],
            best_epoch=best["epoch"],
            best_selected_on="test" if sets.validation is None else "validation",
            parameters=sum(p.numel() for p in self.model.parameters()),
            attention_parameters=attention_parameters(self.model),
            flops=count(self.model, (1, *sets.test.images.shape[1:])).flops,
            steps=self.steps * config.optim.epochs,
            train_seconds=train_seconds,
            evaluation_seconds=sum(line["evaluation_seconds"] for line in history),
            step_seconds=statistics.median(line["seconds"] for line in history) / self.steps,
            images_per_second=len(sets.train) * len(history) / train_seconds,
            hardware=start["hardware"],
            versions=start["versions"],
            train_sha256=sets.train.sha256,
            test_sha256=sets.test.sha256,
            commit=start["commit"],
            date=store.now(),
            impl=impl,
            step=self.runtime.step,
            gates=gates,
        )
        sums = store.write_result(asdict(result), self.folder)
        (self.folder / store.CHECKPOINT).unlink(missing_ok=True)
        return replace(result, files=sums)

    def _save(self) -> None:
        """Write the checkpoint. This waits for the device, so it does not happen every step."""
        self.team.lead(partial(self._write_checkpoint, self._totals()))
        self.saved_at = time.monotonic()

    def _totals(self) -> dict[str, Tensor]:
        """The epoch's sums over all processes."""
        sums = self.state.sums
        return {k: self.team.total(v) if k in DIVIDED else v for k, v in sums.items()}

    def _write_checkpoint(self, sums: dict[str, Tensor]) -> None:
        self._require_finite("training loss", float(sums["loss"]))
        weights = [parameter.detach() for parameter in self.model.parameters()]
        self._require_finite("norm of the weights", float(nn.utils.get_total_norm(weights)))
        content = {
            "plan": self.plan.to_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **vars(self.state),
            "sums": sums,
        }
        store.save_checkpoint(content, self.folder / store.CHECKPOINT)

    def _resume(self) -> None:
        """Load the checkpoint, if there is one."""
        path = self.folder / store.CHECKPOINT
        # The first process reads for all: other machines may not see the folder.
        content = self.team.lead(lambda: store.load_checkpoint(path) if path.exists() else None)
        if content is not None:
            of_checkpoint = RunConfig.from_dict(content["plan"]["config"])
            require_same_run(of_checkpoint, self.config, self.folder)
            self.model.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
            self.state = _State(**{name: content[name] for name in vars(self.state)})
            self.state.sums = {k: v.to(self.device) for k, v in self.state.sums.items()}
            if not self.team.leads:
                for name in DIVIDED:
                    self.state.sums[name].zero_()
            self.progress.message(f"resuming {self._place()}")
        if self.team.leads:
            store.write_metrics(self.state.history, self.folder)

    def _require_finite(self, name: str, value: float) -> None:
        """End the run with a FloatingPointError at infinity or NaN."""
        if math.isfinite(value):
            return
        path, rate = self.folder / store.CHECKPOINT, self.optimizer.param_groups[0]["lr"]
        epoch = self.state.epoch + (self.state.step > 0)  # the last checkpoint follows an epoch
        there = path.exists()
        good = f"The last good checkpoint is {path}" if there else "There is no checkpoint yet"
        message = (
            f"train: the {name} became {value} in epoch {epoch} at rate {rate:.3g}. "
            f"Norm layers, worst first: {norm_report(self.model)}. {good}. Use a lower optim.lr."
        )
        failed = {"id": self.config.id, "seed": self.config.seed, "error": message}
        store.write_result(failed, self.folder)
        raise FloatingPointError(message)

    def _report(self, per_step: float) -> None:
        """Report progress and the time left, from the current seconds per step."""
        state, optim, last = self.state, self.config.optim, ""
        left = (optim.epochs - state.epoch) * self.steps * per_step - state.step * per_step
        if state.history:
            line = state.history[-1]
            left += (optim.epochs - state.epoch) * line["evaluation_seconds"]
            last = f"loss {line['loss']:.3f}, accuracy {line['test_accuracy']:.2f} %, "
        text = (
            f"epoch {state.epoch + 1}/{optim.epochs}, step {state.step}/{self.steps}, {last}"
            f"{optim.batch / per_step:.0f} images/s, {timedelta(seconds=round(left))} left"
        )
        done, total = state.epoch * self.steps + state.step, optim.epochs * self.steps
        self.progress.step(done, total, text)

    def _zero_sums(self) -> dict[str, Tensor]:
        """The sums of an epoch before its first step."""
        real = torch.float32 if self.device.type == "mps" else torch.float64
        kinds = {"correct": torch.int64}
        sizes: dict[str, tuple[int, ...]] = {"loss": (), "penalty": (), "correct": ()}
        sizes |= {"change": (len(self.mixes),), "gradients": (len(self.blocks),)}
        return {
            name: torch.zeros(size, dtype=kinds.get(name, real), device=self.device)
            for name, size in sizes.items()
        }


def best_line(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The first epoch with the best accuracy, on validation images if any, else on test."""
    return max(history, key=lambda line: line.get("validation_accuracy", line["test_accuracy"]))
