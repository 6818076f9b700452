"""Two networks image by image: McNemar against statsmodels and by hand; stored answers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar

from spem.reproduce.agreement import (
    image_by_image,
    image_sentence,
    mcnemar,
    read_predictions,
)


def right(both: int, only_a: int, only_b: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    counts = [both, only_a, only_b, neither]
    a, b = np.repeat([True, True, False, False], counts), np.repeat([True, False] * 2, counts)
    order = np.random.default_rng(0).permutation(len(a))
    return a[order], b[order]


@pytest.mark.parametrize(
    "counts", [(5, 0, 0, 2), (0, 1, 0, 0), (10, 6, 0, 3), (90, 12, 3, 7), (80, 9, 9, 2)]
)
def test_the_exact_test_of_statsmodels(counts: tuple[int, int, int, int]) -> None:
    found = mcnemar(*right(*counts))
    both, only_a, only_b, neither = counts
    other = statsmodels_mcnemar([[both, only_a], [only_b, neither]], exact=True)
    assert (found.images, found.only_a, found.only_b) == (sum(counts), only_a, only_b)
    assert found.p == pytest.approx(min(1.0, other.pvalue), abs=1e-12)
    assert found.difference == pytest.approx(100 * (only_a - only_b) / sum(counts))


def test_by_hand() -> None:
    """Four against none: 2 of 16 outcomes are as far. Eight against two: 2 (1 + 10 + 45) / 1024."""
    assert mcnemar(*right(3, 4, 0, 3)).p == pytest.approx(2 / 16)
    assert mcnemar(*right(3, 2, 8, 3)).p == pytest.approx(112 / 1024)


def test_as_many_as_a_test_set_has() -> None:
    found = mcnemar(*right(8800, 450, 350, 400))
    assert found.difference == pytest.approx(1.0)
    normal = math.erfc((100 - 1) / math.sqrt(800) / math.sqrt(2))  # with continuity correction
    assert found.p == pytest.approx(normal, rel=0.05)


def test_identical_networks() -> None:
    a, _ = right(7, 2, 1, 4)
    assert mcnemar(a, a).p == 1.0
    assert mcnemar(a, a).difference == 0.0


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.ones(3, bool), np.ones(4, bool)),
        (np.ones(3, int), np.ones(3, bool)),
        (np.ones(0, bool), np.ones(0, bool)),
        (np.ones((2, 2), bool), np.ones((2, 2), bool)),
    ],
)
def test_no_two_vectors(a: np.ndarray, b: np.ndarray) -> None:
    with pytest.raises(ValueError, match="vectors of booleans"):
        mcnemar(a, b)


def stored(path: Path, **changes: np.ndarray) -> Path:
    """Six images; a is right on four of them with seed 0, b on three."""
    arrays = {
        "labels-a1": np.array([0, 1, 2, 0, 1, 2], np.uint8),
        "labels-b2": np.array([0, 1, 2, 0, 1, 2], np.uint8),
        "a1-0": np.array([0, 1, 2, 0, 0, 0], np.uint8),
        "a1-3": np.array([0, 1, 2, 0, 1, 2], np.uint8),
        "a1-10": np.array([1, 1, 1, 1, 1, 1], np.uint8),
        "b2-0": np.array([0, 0, 0, 0, 1, 0], np.uint8),
        "b2-3": np.array([0, 1, 2, 0, 1, 0], np.uint8),
        "b2-4": np.array([0, 0, 0, 0, 0, 0], np.uint8),
    }
    np.savez(path, **(arrays | changes))
    return path


def test_stored_answers_seed_by_seed(tmp_path: Path) -> None:
    predictions = read_predictions(stored(tmp_path / "predictions.npz"))
    assert predictions.seeds("a1") == [0, 3, 10]
    assert predictions.right("a1", 0).tolist() == [True] * 4 + [False] * 2
    tests = image_by_image(predictions, "a1", "b2")
    assert list(tests) == [0, 3]
    assert (tests[0].only_a, tests[0].only_b) == (2, 1)
    assert (tests[3].only_a, tests[3].only_b) == (1, 0)
    text = image_sentence("spem", "none", tests)
    assert "only spem answers rightly : only none: 2 : 1 (seed 0, p = 1); 1 : 0 (seed 3" in text
    assert "not about the methods" in text
    assert "no answers of the same seed" in image_sentence("spem", "none", {})
    assert image_by_image(predictions, "a1", "gone") == {}


def test_other_images_are_refused(tmp_path: Path) -> None:
    others = np.array([0, 1, 2, 0, 2, 1], np.uint8)
    predictions = read_predictions(stored(tmp_path / "p.npz", **{"labels-b2": others}))
    with pytest.raises(ValueError, match="a1 and b2 were tested on different images"):
        image_by_image(predictions, "a1", "b2")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    few = np.array([0, 1], np.uint8)
    predictions = read_predictions(stored(tmp_path / "p.npz", **{"c3-0": few, "a1-0": few}))
    with pytest.raises(ValueError, match="no labels of run c3"):
        predictions.right("c3", 0)
    with pytest.raises(ValueError, match="no answers with seed 7 of run a1"):
        predictions.right("a1", 7)
    with pytest.raises(ValueError, match="6 labels and with seed 0 2 answers"):
        predictions.right("a1", 0)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    whole = stored(tmp_path / "p.npz").read_bytes()
    array = tmp_path / "array.npy"
    np.save(array, np.zeros(3, np.uint8))
    contents = [whole[:-40], whole[: len(whole) // 2], b"", b"no archive", array.read_bytes()]
    for content in contents:
        path = tmp_path / "bad.npz"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.npz is damaged or holds no stored answers"):
            read_predictions(path)
    with pytest.raises(FileNotFoundError):
        read_predictions(tmp_path / "gone.npz")


@pytest.mark.parametrize(
    "changes",
    [
        {"a1-x": np.zeros(6, np.uint8)},
        {"a1-1": np.zeros((2, 3), np.uint8)},
        {"a1-1": np.zeros(6)},
        {"a1-1": np.array([{}] * 6, dtype=object)},  # would need unpickling
    ],
)
def test_other_content_is_refused(tmp_path: Path, changes: dict[str, np.ndarray]) -> None:
    path = stored(tmp_path / "p.npz", **changes)
    with pytest.raises(ValueError, match="holds no stored answers"):
        read_predictions(path)
