"""Paired comparison: against scipy and by simulation, and tables that people have."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from spem.cli.stats import choose_columns, read_table
from spem.stats import (
    answer,
    compare,
    holm,
    prediction_interval,
    sentence,
    sign_flip,
)


def table(**groups: list[float]) -> pd.DataFrame:
    rows = [
        {"module": name, "seed": seed, "accuracy": value}
        for name, values in groups.items()
        for seed, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


def line(found: pd.DataFrame, group: str) -> pd.Series:
    return found[found["group"] == group].iloc[0]


NONE = [91.0, 92.1, 90.7, 91.9, 91.2, 92.4]
SE = [91.9, 92.2, 91.6, 92.0, 92.3, 92.6]
SPEM = [90.1, 91.7, 91.0, 91.2, 90.2, 92.0]


def test_numbers_are_those_of_scipy():
    found = compare(table(none=NONE, se=SE, spem=SPEM))
    assert list(found["group"]) == ["none", "se", "spem"]
    p = []
    for name, values in (("se", SE), ("spem", SPEM)):
        one, test = line(found, name), scipy_stats.ttest_rel(values, NONE)
        low, high = test.confidence_interval(0.95)
        assert one[["low", "high"]].tolist() == pytest.approx([low, high], rel=1e-9)
        assert one["p"] == pytest.approx(test.pvalue, rel=1e-9)
        assert (one["n"], one["pairs"]) == (6, 6)
        numbers = [np.mean(values) - np.mean(NONE), np.mean(values), np.std(values, ddof=1)]
        numbers.append(np.std(np.subtract(values, NONE), ddof=1))
        names = ["difference", "mean", "sd", "difference_sd"]
        assert one[names].tolist() == pytest.approx(numbers)
        p.append(test.pvalue)
    small, large = sorted(p)
    assert sorted(found["p_holm"].dropna()) == pytest.approx([2 * small, max(2 * small, large)])
    wide = compare(table(none=NONE, se=SE), level=0.99)
    low, high = scipy_stats.ttest_rel(SE, NONE).confidence_interval(0.99)
    assert line(wide, "se")[["low", "high"]].tolist() == pytest.approx([low, high])
    for others, first in (({"se": SE, "none": NONE}, "none"), ({"se": SE, "spem": SPEM}, "se")):
        assert set(compare(table(**others))["baseline"]) == {first}


def signs_of(n: int) -> np.ndarray:
    return np.array(list(itertools.product((-1, 1), repeat=n)))


def test_sign_flips_are_counted():
    d = np.random.default_rng(7).normal(0.5, 1, 7)
    means = np.abs((signs_of(7) * d).mean(1))
    assert sign_flip(d) == pytest.approx((means >= abs(d.mean()) - 1e-12).mean())
    assert sign_flip(np.zeros(7)) == 1
    assert sign_flip(np.arange(40) + 1.0) == 1 / 10_000  # of 9999 random patterns and this one
    for right in np.random.default_rng(1).integers(7000, 7010, (20, 2, 8)):  # answers of 9,000
        d = right[1] - right[0]
        exact = (np.abs(signs_of(8) @ d) >= abs(d.sum())).mean()
        none, se = (100 * right / 9000).tolist()
        assert line(compare(table(none=none, se=se)), "se")["p_flip"] == exact


@pytest.mark.parametrize("n", [3, 5, 8])
def test_every_interval_covers_what_it_says(n: int):
    """Normal differences about a known mean, and one more run of the same kind."""
    rng, times = np.random.default_rng(n), 1500
    base, differences = rng.normal(90, 3, n), rng.normal(0.7, 0.4, (times, n))
    groups = {str(trial): list(base + d) for trial, d in enumerate(differences)}
    found = compare(table(none=list(base), **groups)).iloc[1:]
    covered = ((found["low"] <= 0.7) & (found["high"] >= 0.7)).mean()
    runs = rng.normal(0.7, 0.4, times)
    ends = np.array([prediction_interval(list(values)) for values in differences])
    predicted = ((ends[:, 0] <= runs) & (runs <= ends[:, 1])).mean()
    for share in (covered, predicted):  # four standard errors of a share of 0.95
        assert abs(share - 0.95) < 4 * math.sqrt(0.95 * 0.05 / times)


def test_two_pairs_say_nothing():
    found = compare(table(none=[90.0, 91.0], se=[95.0, 96.01]))
    one = line(found, "se")
    assert one["verdict"] == "too few seeds"
    assert one[["low", "high", "p", "p_holm"]].isna().all()
    assert "too few seeds" in sentence(one)
    assert "too few seeds" in answer(found).lower()
    assert "above" not in answer(found)


def test_a_verdict_needs_p_after_holm():
    gain = [1.0, 1.6, 0.7, 1.3]
    base = [90.0, 91.0, 92.0, 90.5]
    groups = {"se": [b + g for b, g in zip(base, gain, strict=True)]}
    assert line(compare(table(none=base, **groups)), "se")["verdict"] == "above"
    noise = np.random.default_rng(0).normal(0, 1, (60, 4))
    many = {f"m{i}": list(np.array(base) + noise[i]) for i in range(60)}
    found = compare(table(none=base, **groups, **many))
    assert line(found, "se")["p"] < 0.05 < line(found, "se")["p_holm"]
    assert line(found, "se")["verdict"] == "no difference shown"
    together = pd.concat([table(none=base, **groups).assign(part=p) for p in range(40)])
    apart = compare(together, within="part")
    assert set(apart[apart["group"] == "se"]["verdict"]) == {"above"}
    assert set(compare(together, within="part", together=True)["verdict"]) == {
        "reference",
        "no difference shown",
    }


def test_near_guessing_nothing_is_concluded():
    """Limits: 20 % for ten classes, 2 % for a hundred, 62.5 % for two."""
    low = table(none=[15.0, 16.0, 15.5], se=[18.0, 19.1, 18.4])
    for classes, more, verdict in (
        *((10, 0, "hardly trained"), (10, 2, "above"), (100, 0, "above")),
        *((2, 43.5, "hardly trained"), (2, 44.5, "above")),
    ):
        rows = low.assign(classes=classes, accuracy=low["accuracy"] + more)
        for some in (rows, rows.assign(accuracy=rows["accuracy"] / 100)):
            assert line(compare(some), "se")["verdict"] == verdict
    assert "Hardly trained" in answer(compare(low.assign(classes=10)))


def test_small_differences_of_large_numbers_are_differences():
    base = [1_073_741_824.0, 1_073_741_952.0, 1_073_742_080.0, 1_073_741_900.0]
    more = [b + 588 + d for b, d in zip(base, (1, -1, 2, 0), strict=True)]
    one = line(compare(table(none=base, se=more)), "se")
    assert one["difference"] == pytest.approx(588.5)
    assert one["p"] < 1e-5
    assert one["verdict"] == "above"
    equal = line(compare(table(none=[0.1, 0.2, 0.3], se=[0.4, 0.5, 0.6])), "se")
    assert equal["verdict"] == "all differences equal"  # but for the rounding of 0.1 + 0.3
    assert math.isnan(equal["low"])


@pytest.mark.parametrize("scale", [1e-308, 1e300])
def test_what_is_too_small_or_large_to_square_is_said(scale: float):
    with pytest.raises(
        ValueError, match=r"compare: .* in 'accuracy' is out of range. Rescale the column"
    ):
        compare(table(none=[v * scale for v in NONE], se=[v * scale for v in SE]))


def test_mistakes_are_one_sentence():
    rows = table(none=NONE, se=SE)
    with pytest.raises(ValueError, match=r"none has seed 0 2 times.*differ in lr"):
        compare(pd.concat([rows.assign(lr=1), rows.assign(lr=2)]))
    with pytest.raises(ValueError, match=r"none has seed 0 2 times. Remove one, or name"):
        compare(pd.concat([rows, rows]))
    with pytest.raises(ValueError, match="no group 'spme'"):
        compare(rows, baseline="spme")
    with pytest.raises(KeyError, match=r"no column 'modul'. Nearest: module"):
        compare(rows, by="modul")
    with pytest.raises(ValueError, match="level=1 is not a level"):
        compare(rows, level=1)
    with pytest.raises(ValueError, match="no row holds a finite number"):
        compare(rows.assign(accuracy=float("nan")))
    with pytest.raises(ValueError, match="and a value in 'seed'"):
        compare(rows.assign(seed=None))
    for name, role in (("group", "pair"), ("group", "within"), ("n", "within")):
        with pytest.raises(ValueError, match=f"the result has a column '{name}' too"):
            compare(rows.assign(**{name: rows["seed"]}), **{role: name})
    assert len(compare(rows.assign(classes="ten"))) == 2  # somebody else's column


def test_columns_of_any_type_are_compared():
    rows = table(none=NONE, se=SE)
    usual = compare(rows)
    for kind in ("Float64", "string[pyarrow]", object):
        pd.testing.assert_frame_equal(compare(rows.astype({"accuracy": kind})), usual)
    assert line(compare(rows.assign(accuracy=rows["accuracy"] > 91.5)), "se")["difference"] > 0
    numbered = rows.assign(module=rows["module"] == "se").astype({"module": int})
    assert line(compare(numbered, baseline=1), "0")["difference"] < 0
    with pytest.raises(KeyError, match=r"names no group for the table \('a',\)"):
        compare(rows.assign(part="a"), within="part", baseline={("b",): "se"})


def test_runs_without_a_number_or_a_partner_are_left_out():
    rows = table(none=NONE[:4], se=[*SE[:3], float("inf")], spem=[float("nan")] * 4)
    others = [("eca", 9), ("none", None), ("se", None)]
    other = pd.DataFrame([{"module": m, "seed": s, "accuracy": 90.0} for m, s in others])
    found = compare(pd.concat([rows, other]))
    assert list(found["group"]) == ["none", "se", "eca"]
    assert line(found, "se")["pairs"] == 3
    assert line(found, "eca")["pairs"] == 0
    assert "share no seed" in sentence(line(found, "eca"))


def test_holm_by_hand():
    adjusted = holm([0.01, float("nan"), 0.04, 0.03])
    assert adjusted[[0, 2, 3]] == pytest.approx([0.03, 0.06, 0.06])
    assert math.isnan(adjusted[1])
    assert np.isnan(holm([float("nan")])).all()


READABLE = {
    "usual": "attention,seed,accuracy\n{0}",
    "capitals": "Model,Seed,Top1\n{0}",
    "semicolons and decimal commas": "Model;Seed;Accuracy\n{1}",
    "per cent signs": "model,seed,acc\n{2}",
    "three digits behind decimal commas": "model;seed;acc\n{3}",
    "a column a seed": "model,seed0,seed1,seed2\nnone,90.0,91.5,90.7\nse,91.0,92.0,91.9\n",
    "a column a module": "seed,none,se\n0,90.0,91.0\n1,91.5,92.0\n2,90.7,91.9\n",
    "numbers as columns": "Method,0,1,2\nnone,90.0%,91.5%,90.7%\nse,91.0%,92.0%,91.9%\n",
}
VALUES = {"none": (90.0, 91.5, 90.7), "se": (91.0, 92.0, 91.9)}


@pytest.mark.parametrize("kind", READABLE)
def test_tables_that_people_have(kind: str, tmp_path: Path):
    cells = [
        (name, seed, value) for name, values in VALUES.items() for seed, value in enumerate(values)
    ]
    texts = (
        "".join(f"{n},{s},{v}\n" for n, s, v in cells),
        "".join(f"{n};{s};{v}\n".replace(".", ",") for n, s, v in cells),
        "".join(f"{n},{s},{v} %\n" for n, s, v in cells),
        "".join(f"{n};{s};{v:.3f} %\n".replace(".", ",") for n, s, v in cells),
    )
    path = tmp_path / "runs.csv"
    path.write_text(READABLE[kind].format(*texts), encoding="utf-8-sig")
    rows, chosen = choose_columns(read_table(path))
    one = line(compare(rows, **chosen), "se")
    assert one["difference"] == pytest.approx(0.9)
    assert one["pairs"] == 3


def test_names_of_groups_are_not_read_as_numbers(tmp_path: Path):
    path = tmp_path / "runs.csv"
    path.write_text("lambda;seed;acc\n0,5;0;90,125\n0,5;1;90,250\n1;0;91,125\n1;1;91,250\n")
    rows, chosen = choose_columns(read_table(path), by=["lambda"])
    assert list(rows["lambda"]) == ["0,5", "0,5", "1", "1"]
    assert line(compare(rows, **chosen, baseline="0,5"), "1")["difference"] == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not a CSV file that can be read"),
        ("model,seed,acc\n", "no rows"),
        ("a,b\n1,2\n", "there is no column 'module'. Name one with --by: a, b"),
        ("model,acc\nnone,1\n", "there is no column 'seed'"),
        ("seed,none,se\n0,90.0,high\n", "'high' in column 'se' is not a number"),
        ("seed,none\n0,90.0\n", "there is no column 'module'"),
        ("model,seed,acc\nnone,0,high\n", "'high' in column 'acc' is not a number"),
        ('model,seed,acc\n"none,0,1\n', "not a CSV file"),
        ('model,seed,acc\nnone,0,"12,345"\n', "'12,345' in column 'acc' may be a decimal or a"),
        ("model,seed,acc\nnone,0,90,5\nse,0,91,5\n", "more cells than the heading; quote"),
    ],
)
def test_files_that_are_no_table(text: str, says: str, tmp_path: Path):
    path = tmp_path / "runs.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=says):
        choose_columns(read_table(path))
