"""Two trained networks compared image by image, from their stored answers (McNemar's test).

The test is about two networks, not about two methods: a second network of the same method, trained
with another seed, also differs from the first on hundreds of images. Seeds share the test images,
so the tests of several seeds depend on one another and are reported one by one, never pooled.
"""

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spem.extras import require

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class McNemar:
    """Where one of two networks is right and the other is wrong, and the exact test of it.

    Args:
        images: Number of test images.
        only_a: Images that only a answers rightly.
        only_b: Images that only b answers rightly.
        p: Exact two-sided p value of equal chances for both; 1 if there is no such image.
        difference: Accuracy of a minus that of b, in percentage points.
    """

    images: int
    only_a: int
    only_b: int
    p: float
    difference: float


@dataclass(frozen=True)
class Predictions:
    """The stored answers of finished runs.

    Args:
        answers: (id, seed) -> [n] class answered for each test image.
        labels: id -> [n] class of each test image.
    """

    answers: Mapping[tuple[str, int], Array]
    labels: Mapping[str, Array]

    def seeds(self, run: str) -> list[int]:
        """The seeds of a config for which there are answers."""
        return sorted(seed for name, seed in self.answers if name == run)

    def right(self, run: str, seed: int) -> Array:
        """Whether each image was answered rightly, [n] booleans.

        Raises:
            ValueError: There are no answers or no labels, or not as many of one as of the other.
        """
        answers, labels = self.answers.get((run, seed)), self.labels.get(run)
        if answers is None or labels is None:
            what = "labels" if labels is None else f"answers with seed {seed}"
            raise ValueError(f"predictions: no {what} of run {run} are stored. Collect again.")
        if answers.shape != labels.shape:
            raise ValueError(
                f"predictions: run {run} has {len(labels)} labels and with seed {seed} "
                f"{len(answers)} answers. Collect again."
            )
        return answers == labels


def mcnemar(a_right: Array, b_right: Array) -> McNemar:
    """McNemar's exact test of two networks on the same images.

    **Formula** p = min(1, 2 P(X <= min(only_a, only_b))), X binomial with only_a + only_b trials of
    chance 1/2.

    Args:
        a_right: [n] booleans, whether a answers image i rightly.
        b_right: The same of b.

    Raises:
        ValueError: The two are no equally long vectors of booleans with at least one image.
    """
    a, b = np.asarray(a_right), np.asarray(b_right)
    if a.dtype != bool or b.dtype != bool or a.ndim != 1 or a.shape != b.shape or not len(a):
        raise ValueError(
            f"mcnemar: found {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}. Pass two "
            "vectors of booleans about the same images."
        )
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    binom = require("scipy.stats", extra="train", purpose="McNemar's test").binom
    p = min(1.0, 2 * float(binom.cdf(min(only_a, only_b), only_a + only_b, 0.5)))
    return McNemar(len(a), only_a, only_b, p, 100 * (only_a - only_b) / len(a))


def image_by_image(predictions: Predictions, a: str, b: str) -> dict[int, McNemar]:
    """McNemar's test of two configs for every seed that both have, seed by seed.

    Args:
        predictions: Stored answers.
        a: Id of the one config.
        b: Id of the other.

    Raises:
        ValueError: The two were tested on different images.
    """
    seeds = [seed for seed in predictions.seeds(a) if seed in predictions.seeds(b)]
    if seeds and not np.array_equal(predictions.labels.get(a, []), predictions.labels.get(b, [])):
        raise ValueError(f"image_by_image: {a} and {b} were tested on different images.")
    return {seed: mcnemar(predictions.right(a, seed), predictions.right(b, seed)) for seed in seeds}


def image_sentence(name: str, baseline: str, tests: Mapping[int, McNemar]) -> str:
    """What the tests say, seed by seed, and what they do not say.

    Args:
        name: The method of a.
        baseline: The method of b.
        tests: Seed -> test.
    """
    if not tests:
        return f"{name} and {baseline}: no answers of the same seed are stored."
    counts = "; ".join(
        f"{t.only_a} : {t.only_b} (seed {seed}, p = {t.p:.2g})" for seed, t in tests.items()
    )
    return (
        f"Images that only {name} answers rightly : only {baseline}: {counts}. Each p is about "
        "two trained networks, not about the methods; seeds share the images and are not pooled."
    )


def read_predictions(path: Path) -> Predictions:
    """Read predictions.npz: "<id>-<seed>" answers and "labels-<id>"; nothing is unpickled.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is damaged or holds something else.
    """
    answers: dict[tuple[str, int], Array] = {}
    labels: dict[str, Array] = {}
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            for key in stored.files:
                if key.startswith("labels-"):
                    labels[key.removeprefix("labels-")] = _vector(stored[key])
                    continue
                name, _, seed = key.rpartition("-")  # the id of an arm has a hyphen too
                answers[name, int(seed)] = _vector(stored[key])
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path} is damaged or holds no stored answers ({error}). Collect the runs again."
        ) from error
    return Predictions(answers, labels)


def _vector(array: Array) -> Array:
    if array.ndim != 1 or array.dtype.kind not in "ui":
        raise ValueError(f"{array.dtype} {list(array.shape)} instead of a vector of integers")
    return array
