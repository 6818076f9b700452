"""From times to tables, summaries and pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spem.bench import ops, plots, ratios, report, settings, step, table, timing
from spem.bench.checks import BenchError
from spem.bench.infer import run_network
from spem.bench.runs import measure
from spem.bench.settings import CODE, Settings, Subject
from spem.bench.tails import Case

PLAIN, BARE = Subject("none", "composed"), Subject("none", "fused")
GATED, PUBLISHED = Subject("spem", "fused"), Subject(CODE, "official")
QUICK = Settings("cpu", rounds=2, warm_up=0, impl="formula", compiled=False, quick=True)
CASES = [Case("bn_train", 2, 16, 4, 4), Case("bn_eval", 2, 16, 4, 4)]


def test_quantiles():
    assert timing.quantiles([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == (2.0, 3.5, 5.0)


def test_the_two_ratios_are_kept_apart():
    """A round that was slow for all moves the ratio of medians and that of rounds differently."""
    times = {
        PLAIN: [1.0, 10.0, 2.0],
        BARE: [0.5, 5.0, 1.0],
        GATED: [2.0, 30.0, 3.0],
        PUBLISHED: [4.0, 60.0, 6.0],
    }
    columns = ratios.ratio_columns(GATED, times, step.RATIOS)
    assert (columns["to_plain"], columns["to_plain_rounds_median"]) == ("1.500", "2.000")
    assert (columns["to_plain_rounds_q20"], columns["to_plain_rounds_q80"]) == ("1.700", "2.600")
    assert columns["attention_cost"] == "3.000"
    assert columns["to_official"] == "0.500"
    published = ratios.ratio_columns(PUBLISHED, times, step.RATIOS)
    assert published["attention_cost"] == published["to_plain"] == "3.000"
    bare = ratios.ratio_columns(BARE, times, step.RATIOS)
    assert (bare["attention_cost"], bare["to_plain"], bare["to_official"]) == ("1.000", "0.500", "")
    assert set(bare) | set(ratios.TIMES) == set(ratios.no_columns(step.RATIOS))


def test_everybody_has_a_turn_each_round():
    order: list[str] = []

    class Told:
        def __init__(self, name: str) -> None:
            self.name = name

        def sample(self) -> timing.Sample:
            order.append(self.name)
            return {"both": 1.0}

    providers = {name: Told(name) for name in "abc"}
    found = timing.round_robin(providers, rounds=9, warm_up=1)
    assert {name: len(samples) for name, samples in found.items()} == dict.fromkeys("abc", 9)
    rounds = ["".join(order[i : i + 3]) for i in range(0, 30, 3)]
    assert {"".join(sorted(one)) for one in rounds} == {"abc"}
    # Who follows whom changes, and is the same in another run.
    assert len(set(rounds)) > 3
    order.clear()
    timing.round_robin(providers, rounds=9, warm_up=1)
    assert rounds == ["".join(order[i : i + 3]) for i in range(0, 30, 3)]


def test_rows_of_the_tail():
    saved: list[int] = []
    rows = ops.run_ops(QUICK, only=CASES, quiet=True, save=lambda r: saved.append(len(r)))
    modes = [{r["mode"] for r in rows if r["op"] == op} for op in ("bn_train", "bn_eval")]
    assert modes == [{"forward", "backward", "both"}, {"forward"}]
    assert saved == [33, 44]
    for row in rows:
        assert float(row["time_ms_median"]) > 0
        assert row["commit"]
        assert (row["device"], row["l2"], row["note"]) == ("cpu", "", "")
    spem = [r for r in rows if (r["attention"], r["way"], r["mode"]) == ("spem", "fused", "both")]
    assert spem[0]["bytes_model"] == str(11 * 2 * 16 * 16 * 4)
    assert spem[0]["impl"] == "formula"

    again = ops.run_ops(QUICK, only=CASES, kept=rows[:33], quiet=True)
    assert again[:33] == rows[:33]
    assert len(again) == 44
    other = [{**row, "commit": "another"} for row in rows]
    assert all(row["commit"] != "another" for row in ops.run_ops(QUICK, only=CASES, kept=other))


def test_bytes_of_inference():
    size = 2 * 16 * 16 * 4
    assert ops.bytes_model(CASES[1], "forward", reads_statistics=True) == 4 * size
    assert ops.bytes_model(CASES[1], "forward", reads_statistics=False) == 3 * size
    half = Case("bn_train", 2, 16, 4, 4, dtype="bfloat16")
    assert ops.bytes_model(half, "backward", reads_statistics=True) == 7 * size // 2


def test_who_cannot_run_is_named_and_the_others_are_timed(monkeypatch: pytest.MonkeyPatch):
    right = ops.TailProvider.prepare

    def prepare(self: ops.TailProvider) -> None:
        if self.subject == GATED:
            raise RuntimeError("no such instruction\nand more")
        right(self)

    monkeypatch.setattr(ops.TailProvider, "prepare", prepare)
    rows = ops.run_ops(QUICK, only=CASES[:1], quiet=True)
    assert report.failures(rows) == ["spem, fused: RuntimeError: no such instruction"]
    assert {row["time_ms_median"] for row in rows if row["note"]} == {""}
    assert len(rows) == 31
    monkeypatch.undo()
    again = ops.run_ops(QUICK, only=CASES[:1], kept=rows, quiet=True)
    assert len(again) == 33  # a map of which one could not run is timed anew
    assert not report.failures(again)


def test_a_wrong_provider_ends_the_run_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(self: ops.TailProvider) -> None:
        raise BenchError("bench: it differs")

    monkeypatch.setattr(ops.TailProvider, "prepare", refuse)
    with pytest.raises(BenchError):
        measure("ops", QUICK, path=tmp_path / "ops.csv", quiet=True)
    assert not list(tmp_path.iterdir())


def test_rows_of_the_step_and_a_table(tmp_path: Path):
    work = step.Workload(attentions=("se", "cbam", "spem"))
    path = tmp_path / "deep" / "step_cpu.csv"
    rows = measure("step", QUICK, work, path=path, quiet=True)
    assert [(row["attention"], row["way"]) for row in rows] == [
        ("none", "composed"),
        ("none", "fused"),
        ("se", "composed"),
        ("se", "fused"),
        ("cbam", "composed"),
        ("spem", "composed"),
        ("spem", "fused"),
        (CODE, "official"),
    ]
    assert rows[5]["attention_parameters"] == rows[7]["attention_parameters"] == "1798"
    assert (rows[0]["depth"], rows[0]["batch"]) == ("11", "4")
    assert table.read(path) == rows
    (drawn,) = {plots.draw("step", path).read_bytes() for _ in range(2)}
    assert b"spem, fused (formula)" in drawn or b"<svg" in drawn


def test_rows_of_inference():
    work = step.Workload(attentions=("se",))
    rows = run_network(QUICK, work, quiet=True)
    assert {row["batch"] for row in rows} == {"1", "2"}
    ways = [(row["attention"], row["way"]) for row in rows if row["batch"] == "1"]
    assert ("none", "folded") in ways
    assert ("se", "fused folded") in ways
    folded = [row for row in rows if row["way"] == "folded"]
    assert {row["to_folded"] for row in folded} == {"1.000"}


def test_aims():
    row = {"device": "cpu", "dtype": "float32", "way": "fused", "attention": "spem"}
    good = {**row, "attention_cost": "1.049", "to_plain": "0.9", "to_official": "0.71"}
    good |= {"depth": "29", "batch": "128", "layout": "contiguous"}
    others = ({"attention": "srm"}, {"device": "cuda"}, {"depth": "11"}, {"batch": "1"})
    found = report.aims("step", [good, *({**good, **other} for other in others)])
    assert [aim.met for aim in found] == [True, True, False]
    assert str(found[2]).startswith("MISSED")
    shape = {"batch": "128", "channels": "256", "height": "8", "width": "8"}
    tail = {**row, **shape, "op": "bn_train", "mode": "both", "layout": "contiguous"}
    (aim,) = report.aims("ops", [{**tail, "to_plain": "1.08"}])
    assert (aim.bound, aim.met) == (1.10, True)
    (aim,) = report.aims("ops", [{**tail, "to_plain": "1.08", "height": "16"}])
    assert not aim.met
    assert not report.aims("ops", [{**tail, "mode": "forward", "to_plain": "2"}])
    folded = {**good, "way": "fused folded", "to_folded": "1.01"}
    found = report.aims("network", [good, folded, {**good, "batch": "1"}, {**good, "depth": "11"}])
    assert [(aim.bound, aim.met) for aim in found] == [(1.05, True), (1.00, True), (1.00, False)]
    assert "fused folded / plain, folded" in found[2].text
    (aim,) = report.aims("memory", [{**good, "mode": "training"}])
    assert aim.met
    assert not report.aims("memory", [{**good, "mode": "training", "layout": "channels_last"}])


def test_tables_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="nothing to write"):
        table.write([], tmp_path / "a.csv")
    with pytest.raises(ValueError, match="different columns"):
        table.write([{"a": "1"}, {"b": "1"}], tmp_path / "a.csv")
    assert table.read(tmp_path / "a.csv") == []


def test_settings_are_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="at least 2"):
        Settings(rounds=1)
    with pytest.raises(ValueError, match="impl='reference' has no fused passes"):
        Settings(impl="reference")
    with pytest.raises(ValueError, match="cannot be timed"):
        Settings("meta").where()
    with pytest.raises(ValueError, match="dtype='int8' is unknown"):
        step.Workload(dtype="int8")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    impl, reason = settings.fused_impl(Settings("cpu", impl="triton"), torch.float32)
    assert impl is None
    assert "interpreter" in reason


def test_a_copy_has_a_bandwidth():
    assert timing.copy_bandwidth((4, 4), torch.float32, torch.device("cpu")) > 0
