"""How large an experiment is trained: the paper's recipe, or the same scaled down by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from spem.training import DataConfig, OptimConfig, RunConfig, recipes
from spem.training.recipes import scaled_milestones

SHORT_IMAGES, SHORT_EPOCHS, SMOKE_EPOCHS = 5000, 5, 4


@dataclass(frozen=True)
class Scale:
    """A size of experiment.

    Args:
        name: `paper`, `short` or `smoke`; also the folder of its runs.
        title: What differs from the paper, in one line.
        base: The config for a data set of the paper: the plain network of `depth`, seed 0.
        depth: What stands for the paper's ResNet164 wherever depth is not the question.
        ladder: What stands for each of the paper's four depths where it is.
        datasets: The paper's data sets that are trained at this scale.
        seeds: Seeds of a cell.
        control_seeds: Seeds of a cell of the controls, the one question fixed beforehand.
    """

    name: str
    title: str
    base: Callable[[str], RunConfig]
    depth: int
    ladder: Mapping[int, int]
    datasets: tuple[str, ...]
    seeds: tuple[int, ...]
    control_seeds: tuple[int, ...]


def _paper(dataset: str) -> RunConfig:
    return _settled(recipes.fast(dataset, attention="none"))


def _short(dataset: str) -> RunConfig:
    full = recipes.fast(dataset, depth=11, attention="none")
    return _settled(
        replace(
            full,
            data=DataConfig(name=dataset, limit=SHORT_IMAGES),
            optim=OptimConfig(epochs=SHORT_EPOCHS, milestones=scaled_milestones(SHORT_EPOCHS)),
            # Compiling a network of this size costs more than its few steps gain.
            runtime=replace(full.runtime, step="eager"),
        )
    )


def _smoke(dataset: str) -> RunConfig:
    del dataset  # the digits stand for it
    return _settled(recipes.smoke("none", epochs=SMOKE_EPOCHS))


def _settled(config: RunConfig) -> RunConfig:
    """One thread a run, since a grid has many, and tails composed of torch's own operations."""
    # Fused kernels round differently; they may enter a table of the paper only after the experiment
    # `equivalence` has shown that this does not move accuracy.
    return replace(config, runtime=replace(config.runtime, threads=1, impl="reference"))


SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            "paper",
            "the paper's recipe: 164 epochs on 50,000 images",
            _paper,
            164,
            {83: 83, 164: 164, 245: 245, 326: 326},
            ("cifar10", "cifar100"),
            (0, 1, 2),
            tuple(range(8)),
        ),
        Scale(
            "short",
            f"another recipe than the paper's: depth 11, {SHORT_IMAGES:,} training images, "
            f"{SHORT_EPOCHS} epochs",
            _short,
            11,
            {83: 11, 164: 20, 245: 29, 326: 38},
            ("cifar10", "cifar100"),
            (0, 1, 2),
            tuple(range(8)),
        ),
        Scale(
            "smoke",
            f"a test of the machinery: depth 11, {SMOKE_EPOCHS} epochs on scikit-learn's digits",
            _smoke,
            11,
            {83: 11, 164: 20, 245: 29, 326: 38},
            ("cifar10",),
            (0, 1, 2),
            (0, 1, 2),
        ),
    )
}
