"""The step benchmark: its yardstick computes what it should, and a wrong one is found."""

from __future__ import annotations

import csv
from pathlib import Path

import official_way
import pytest
import step
import torch


def test_official_way_is_form_code() -> None:
    step.check_official_way()


def test_another_function_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = official_way.OfficialWay.forward
    monkeypatch.setattr(official_way.OfficialWay, "forward", lambda self, x: 1.001 * right(self, x))
    with pytest.raises(SystemExit, match="differ"):
        step.check_official_way()


def test_quantiles() -> None:
    assert step.quantiles([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == (2.0, 3.5, 5.0)


def test_ratios_and_columns(tmp_path: Path) -> None:
    """A round that was slow for all moves the two ratios differently."""
    providers = [step.provider(name, 11) for name in ("none", "spem")]
    step.check_networks(providers, blocks=3)
    times = {"none": [1.0, 10.0, 2.0], "spem": [2.0, 30.0, 3.0]}
    plain, spem = step.rows(providers, times, {"threads": torch.get_num_threads()})
    assert plain["ratio_of_medians"] == plain["round_ratio_median"] == "1.000"
    assert (spem["ratio_of_medians"], spem["round_ratio_median"]) == ("1.500", "2.000")
    assert (spem["round_ratio_q20"], spem["round_ratio_q80"]) == ("1.700", "2.600")
    assert spem["attention_parameters"] == 1798
    out = tmp_path / "deep" / "step.csv"
    step.write([plain, spem], out)
    with out.open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert [row["attention"] for row in found] == ["none", "spem"]


def test_a_network_without_its_attention_is_refused() -> None:
    providers = [step.provider(name, 11) for name in ("none", "none")]
    providers[1].name = "se"
    with pytest.raises(SystemExit, match="se has 0 attention modules in 3 blocks"):
        step.check_networks(providers, blocks=3)
