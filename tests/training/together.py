"""What two processes do together for the tests: train runs, stop one, take steps.

Run as a program with the folder that holds `jobs.json`; the two are forked from it before torch has
computed anything, and do all jobs one after the other in one process group.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from training.processes import ended, environment, forked
from training.tiny import Stop, tiny, trained

from spem.attention import AttentionSpec
from spem.models import ResNet, resnet
from spem.training import Interrupted, OptimConfig, RunConfig, Silent
from spem.training.distributed import gather_team, shared_step
from spem.training.step import Step, StepOutput, make_optimizer

STEPS = ("none", "spem", "srm")
"""Attentions of the tests of the step."""
OPTIM = OptimConfig(lr=0.1, batch=7, penalty=2.0)


def step_case(attention: str) -> ResNet:
    """A network of which every parameter is drawn at random, in float64."""
    generator = torch.Generator().manual_seed(7)
    spec = None if attention == "none" else AttentionSpec.parse(attention)
    model = resnet(11, attention=spec).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_((0.3 if parameter.dim() > 1 else 1.0) * drawn)
    return model


def two_steps(step: Step) -> list[StepOutput]:
    """A batch of 7 images, and one of 3."""
    generator = torch.Generator().manual_seed(8)
    found: list[StepOutput] = []
    for count in (7, 3):
        images = torch.randn(count, 3, 8, 8, generator=generator, dtype=torch.float64)
        found.append(step(images, torch.arange(count)))
    return found


def take_steps(rank: int, folder: Path) -> None:
    """Save what a process comes to by its parts of two steps of each network."""
    for attention in STEPS:
        model = step_case(attention)
        with gather_team() as team:
            optimizer = make_optimizer(model, OPTIM)
            found = two_steps(shared_step(model, optimizer, OPTIM, tiny().runtime, team))
        torch.save(
            (model.state_dict(), [tuple(each) for each in found]), folder / f"{attention}.{rank}.pt"
        )


def work(rank: int, folder: Path) -> None:
    """Do all jobs as one of two processes; what each came to stands in `said.RANK.json`."""
    meeting = f"file://{folder / 'meeting'}"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    take_steps(rank, folder)
    said: list[dict[str, Any]] = []
    for job in json.loads((folder / "jobs.json").read_text()):
        config = RunConfig.from_dict(job["config"])
        # Progress is told to the first process only, so that is the one that gets the signal.
        progress = Stop(job["stop"]) if job["stop"] else Silent()
        try:
            result = trained(config, folder / job["name"], progress)
            said.append({"loss": result.train_loss, "hardware": result.hardware})
        except Interrupted as stopped:
            said.append({"stopped": str(stopped), "code": stopped.code})
        except (ValueError, RuntimeError) as error:
            said.append({"error": f"{type(error).__name__}: {error}"})
    (folder / f"said.{rank}.json").write_text(json.dumps(said))
    distributed.destroy_process_group()


def run_together(folder: Path, jobs: dict[str, tuple[RunConfig, int]]) -> list[dict[str, Any]]:
    """Let two processes train these runs, each stopped after so many steps (0: not at all).

    Returns:
        What each process came to, by the name of the job.
    """
    listed = [{"name": n, "config": c.to_dict(), "stop": s} for n, (c, s) in jobs.items()]
    (folder / "jobs.json").write_text(json.dumps(listed))
    command = [sys.executable, __file__, str(folder)]
    subprocess.run(command, check=True, timeout=800, env=environment())
    said = [json.loads((folder / f"said.{rank}.json").read_text()) for rank in range(2)]
    return [dict(zip(jobs, each, strict=True)) for each in said]


if __name__ == "__main__":
    torch.set_num_threads(1)
    where = Path(sys.argv[1])
    children = [forked(work, rank, where) for rank in range(2)]
    sys.exit(max(abs(ended(child) or 0) for child in children))
