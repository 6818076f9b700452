"""Complete configs to start from; a variant calls one and uses `dataclasses.replace`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from spem.training.config import DataConfig, ModelConfig, OptimConfig, RunConfig, RuntimeConfig


def paper(dataset: str = "cifar10", depth: int = 164, attention: str = "spem") -> RunConfig:
    """Return the paper's recipe: 164 epochs of SGD in float32, everything decayed.

    Paper:
        Mix-Pooling Strategy for Attention Mechanism (2022), https://arxiv.org/abs/2208.10322,
        section 4; rate, milestones, augmentation and decay from the official program.
    """
    return RunConfig(
        model=ModelConfig(depth=depth, attention=attention),
        data=DataConfig(name=dataset),
        runtime=RuntimeConfig(channels_last=False),
    )


def fast(dataset: str = "cifar10", depth: int = 164, attention: str = "spem") -> RunConfig:
    """Return `paper` with speed-ups that do not change the distribution of trained networks.

    These are channels_last and, on CUDA, a captured step. It stays in float32.
    """
    recipe = paper(dataset, depth, attention)
    return replace(recipe, runtime=replace(recipe.runtime, channels_last=True, step="auto"))


def short(
    dataset: str = "cifar10", depth: int = 11, attention: str = "spem", epochs: int = 3
) -> RunConfig:
    """Return the paper's recipe scaled down for a CPU; tables mark it as another recipe.

    Few epochs, with milestones at the same fractions of the run, and bf16 if the processor supports
    it natively.
    """
    recipe = fast(dataset, depth, attention)
    optim = replace(recipe.optim, epochs=epochs, milestones=scaled_milestones(epochs))
    precision = "bf16" if native_bf16() else "fp32"
    runtime = replace(recipe.runtime, step="eager", precision=precision)
    return replace(recipe, optim=optim, runtime=runtime, experiment="short")


def smoke(attention: str = "spem", epochs: int = 10) -> RunConfig:
    """Return a run on scikit-learn's digits: well under a minute on one CPU thread, no download.

    Images are shifted by up to a pixel, never flipped.
    """
    return RunConfig(
        model=ModelConfig(depth=11, attention=attention),
        data=DataConfig(name="digits", size=8, flip=False, pad=1, normalisation="digits"),
        optim=OptimConfig(epochs=epochs, batch=16, milestones=scaled_milestones(epochs)),
        runtime=RuntimeConfig(threads=1),
        experiment="smoke",
    )


def scaled_milestones(epochs: int) -> tuple[int, ...]:
    """Milestones at the paper's fractions (81/164 and 122/164) of a run of this many epochs."""
    scaled = {round(epochs * m / OptimConfig.epochs) for m in OptimConfig.milestones}
    return tuple(sorted(m for m in scaled if 0 < m < epochs))


def native_bf16() -> bool:
    """Whether this processor computes in bfloat16 (AMX, AVX-512) rather than emulating it."""
    cpuinfo = Path("/proc/cpuinfo")
    words = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set[str]()
    return bool(words & {"amx_bf16", "avx512_bf16"})
