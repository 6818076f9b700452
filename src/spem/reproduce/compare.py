"""Plan the runs of a comparison and run those that are missing, one after the other."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from spem.attention import AttentionSpec, spec_text
from spem.training import Progress, RunConfig, train
from spem.training.runs import finished


class Observer(Progress, Protocol):
    """What a comparison tells its caller, beside what each run tells."""

    def start(self, name: str) -> None:
        """A run begins (or goes on)."""
        ...

    def finish(self, text: str) -> None:
        """The run is finished; `text` is its result."""
        ...


def plan(base: RunConfig, attentions: Sequence[str], seeds: Sequence[int]) -> list[RunConfig]:
    """The runs of a comparison: every attention with every seed, nothing else changed.

    All attentions of a seed come before the next seed, so a comparison that stops early holds
    complete pairs.

    Args:
        base: The config they share.
        attentions: Specs; the first is what the others are compared with.
        seeds: Seeds.

    Raises:
        ValueError: Nothing to compare, an unknown module, or a module or seed named twice.
    """
    if not attentions:
        raise ValueError("compare: no attention given. Name some, such as `none se spem`.")
    if not seeds:
        raise ValueError(
            "compare: no seed given. Use a number of seeds such as 3, or a list such as 0,1,2."
        )
    texts = [spec_text(AttentionSpec.parse(text)) for text in attentions]
    for kind, names in (("attention", texts), ("seed", list(map(str, seeds)))):
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"compare: {kind} {', '.join(twice)} is named twice. Name each once.")
    return [
        replace(base, model=replace(base.model, attention=text), seed=seed)
        for seed in seeds
        for text in texts
    ]


def run_missing(configs: Sequence[RunConfig], runs: Path, observer: Observer) -> list[str]:
    """Train every planned run that has no result yet; an interrupted one goes on where it stopped.

    A run whose loss becomes infinite or NaN does not keep the others from running.

    Args:
        configs: The plan.
        runs: Folder of all runs.
        observer: Told what happens.

    Returns:
        One message for each run that diverged.
    """
    diverged: list[str] = []
    for config in configs:
        folder = config.folder(runs)
        if finished(config, folder) is not None:
            continue
        name = f"{config.model.attention}, seed {config.seed}"
        observer.start(name)
        try:
            result = train(config, folder, progress=observer)
        except FloatingPointError as error:
            diverged.append(f"{name}: {error}")
            observer.finish("diverged")
        else:
            observer.finish(f"{result.accuracy:.2f} %")
    return diverged
