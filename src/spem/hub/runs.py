"""A training run as a folder to share."""

from __future__ import annotations

from pathlib import Path

from spem.hub.folder import save_pretrained
from spem.hub.measured import Measured, of_run


def share_run(
    run: str | Path, folder: str | Path, *, license: str | None = None, repo_id: str | None = None
) -> Path:
    """Writes what a training left behind into a folder that `from_pretrained` reads.

    Args:
        run: The folder of a finished run, or a weights file that a training wrote; a file alone
            brings no results.
        folder: As for `save_pretrained`, and so are the others.
        license: Of the weights.
        repo_id: Where it will be found.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: There are no weights.
        ValueError: The run has not finished, a file is damaged, or the result is that of another
            run than the weights.
    """
    from spem.data import NORMALISATION
    from spem.data.names import class_names, native_size
    from spem.training import load_weights, read_result

    run = Path(run)
    weights = run / "model.safetensors" if run.is_dir() else run
    if not weights.is_file():
        raise FileNotFoundError(f"share: there are no weights {weights}. Name a finished run.")
    model, config = load_weights(weights)
    results: list[Measured] = []
    name = config.data.name
    if run.is_dir():
        results = [of_run(run)]
        result = read_result(run)
        assert result is not None
        if (result.id, result.seed) != (config.id, config.seed):
            raise ValueError(
                f"share: {run} holds the weights of run {config.id}, seed {config.seed}, and the "
                f"result of run {result.id}, seed {result.seed}. Name a folder of one run."
            )
        name = result.dataset  # weights keep the last part of a path alone
    mean, std = NORMALISATION[config.data.normalisation]
    size = config.data.size or native_size(name)
    return save_pretrained(
        model,
        folder,
        results=[vars(result) for result in results],
        images={"size": size, "mean": list(mean), "std": list(std)},
        classes=class_names(name, model.classes),
        license=license,
        repo_id=repo_id,
    )
