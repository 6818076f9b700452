"""Measured results for a model card: from the folder of a run, or as they are told."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Results = str | Path | Mapping[str, Any] | Sequence[Mapping[str, Any]] | None


@dataclass(frozen=True)
class Measured:
    """One measured number.

    Attributes:
        dataset: Short name of the set, or its id on the hub; another text for any other set.
        metric: What was measured; accuracies are percent.
        value: The number.
        split: The part of the set.
        note: How it was measured.
    """

    dataset: str
    metric: str
    value: float
    split: str = "test"
    note: str = ""


def measured(results: Results) -> list[Measured]:
    """Results in any of the forms that `save_pretrained` takes.

    Raises:
        ValueError: The run has not finished, a table has other fields, or a value is no finite
            number.
    """
    if results is None:
        return []
    if isinstance(results, (str, Path)):
        return [of_run(Path(results))]
    tables = [results] if isinstance(results, Mapping) else list(results)
    return [_told(table) for table in tables]


def of_run(folder: Path) -> Measured:
    """The accuracy after the last epoch of a finished run.

    Raises:
        ValueError: The run has not finished, or its result is damaged.
    """
    from spem.training import read_result

    result = read_result(folder)
    if result is None:
        raise ValueError(
            f"save_pretrained: {folder} holds no result.json, so its run has not finished. "
            f"Finish it, or leave results out."
        )
    notes = [
        f"after the last of {result.epochs} epochs",
        f"seed {result.seed}",
        f"run {result.id}",
        f"SHA-256 of the decoded test images {result.test_sha256}",
        f"on {result.hardware}",
    ]
    if result.commit is not None:
        notes.append(f"commit {result.commit}")
    return Measured(
        published_name(result.dataset), "accuracy", result.accuracy, note=", ".join(notes)
    )


def published_name(dataset: str) -> str:
    """What a card calls the set of a run: a known set by its name, a folder as a folder.

    Where the folder lies is nobody's business, and it is not the known set it may be named after.
    """
    from spem.data.names import known_name  # reads images with numpy; not at import

    return known_name(dataset) or f"{Path(dataset).name} (a folder of the author's)"


def _told(table: Mapping[str, Any]) -> Measured:
    texts = ("dataset", "metric", "split", "note")
    allowed = (*texts[:2], "value", *texts[2:])
    unknown = sorted(set(table) - set(allowed))
    missing = [name for name in allowed[:3] if name not in table]
    if unknown or missing:
        what = f"has no field {unknown[0]!r}" if unknown else f"lacks {missing[0]!r}"
        raise ValueError(f"save_pretrained: a result {what}; it takes {', '.join(allowed)}.")
    value = table["value"]
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
        raise ValueError(f"save_pretrained: a result's value={value!r} is no finite number.")
    words: dict[str, str] = {}
    for name in texts:
        if not isinstance(table.get(name, ""), str):
            raise ValueError(f"save_pretrained: a result's {name}={table[name]!r} is no text.")
        if name in table:
            words[name] = table[name]
    return Measured(value=float(value), **words)
