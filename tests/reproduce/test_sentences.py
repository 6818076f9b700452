"""What is said about a test: no more than its interval and its p allow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from spem.reproduce.inference import PairedTest, against, paired_test, reach_sentence, sentence


def apart(differences: Sequence[float]) -> PairedTest:
    """The test of given differences."""
    return paired_test({i: 50 + d for i, d in enumerate(differences)}, dict.fromkeys(range(99), 50))


def noise(n: int, key: int = 0) -> dict[int, float]:
    return dict(enumerate(np.random.default_rng([n, key]).normal(94, 0.3, n).tolist()))


def test_a_sentence_claims_no_more_than_its_interval() -> None:
    wide = apart([0.9, -0.2, 0.4])
    text = sentence("spem", "none", wide)
    assert text.startswith("spem - none: +0.37 points over 3 paired seeds, 95 % interval [-1.00, ")
    # t = 1.153 with two degrees: p = 1 - t / sqrt(2 + t^2)
    assert "(t), p = 0.368 (t): it contains 0, so these runs do not show a difference." in text
    # sd 0.55, and with three pairs 3.26 deviations are found with 80 %: 1.142 / 0.35
    assert "measured deviation of 0.55, 3 pairs find a difference of about 1.80 points" in text
    assert "above" not in text


def test_a_shown_difference_is_said_with_its_side() -> None:
    up, down = apart([0.5, 0.6, 0.55]), apart([-0.5, -0.6, -0.55])
    assert sentence("a", "b", up).endswith("it lies above 0, so in this setting a is above b.")
    assert sentence("a", "b", down).endswith("it lies below 0, so in this setting a is below b.")
    assert "also after correction for all comparisons of the table (Holm p = 0.040)" in sentence(
        "a", "b", up, 0.04
    )


def test_the_corrected_family_is_named() -> None:
    up = apart([0.5, 0.6, 0.55])
    for p, start in ((0.04, "also after"), (0.06, "not after")):
        text = sentence("a", "b", up, p, family="the 5 comparisons with b")
        assert f"{start} correction for the 5 comparisons with b (Holm p = {p:.3f})" in text
        assert "of the table" not in text


def test_what_is_lost_to_the_correction_is_no_difference() -> None:
    text = sentence("a", "b", apart([0.5, 0.6, 0.55]), 0.06)
    assert "lies above 0 if looked at alone, but not after correction" in text
    assert "(Holm p = 0.060)" in text
    assert "do not show a difference" in text
    assert "a is above b" not in text


def test_a_short_bca_interval_is_no_claim_against_the_exact_test() -> None:
    test = apart([-0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert test.excludes_zero
    text = sentence("a", "b", test)
    assert "it leaves 0 out, but the exact test does not reject" in text
    assert "p = 0.062 (sign-flip)" in text or "p = 0.063 (sign-flip)" in text
    assert "(BCa; t [" in text
    assert "a is above b" not in text


@pytest.mark.parametrize(
    ("test", "says"),
    [
        (apart([]), "share no seed"),
        (apart([0.5]), "One seed shows no spread"),
        (apart([0.5, 0.5, 0.5]), "the same for every seed: no interval"),
        (apart([0.5] * 6), "the same for every seed: no interval"),
    ],
)
def test_too_little_for_a_conclusion(test: PairedTest, says: str) -> None:
    text = sentence("a", "b", test)
    assert says in text
    assert "above" not in text


def test_units_and_decimals() -> None:
    text = sentence("a", "b", apart([0.001, 0.002, 0.004]), unit="", decimals=4, pair="fold")
    assert text.startswith("a - b: +0.0023 over 3 paired folds, 95 % interval [-0.0015, +0.0061]")


def test_what_sign_flips_cannot_reach_is_said() -> None:
    """Design: with six comparisons the sign-flip test can reach 0.05 only from 8 seeds."""

    def lines(n: int, comparisons: int) -> list:
        baseline = noise(n)
        others = {f"m{k}": noise(n, k + 1) for k in range(comparisons)}
        return against({"none": baseline, **others}, "none")

    assert "The smallest p that flipping the signs of 7 pairs can give is 0.016" in reach_sentence(
        lines(7, 6)
    )
    assert reach_sentence(lines(8, 6)) == ""
    assert reach_sentence(lines(6, 1)) == ""
    assert "6 pairs" in reach_sentence(lines(6, 2))
    assert reach_sentence(lines(3, 6)) == ""  # the t test has no smallest p
