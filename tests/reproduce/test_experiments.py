"""The paper's tables as run configs: every printed cell has its place, at every scale."""

from __future__ import annotations

from pathlib import Path

import pytest

from spem.attention import create_attention
from spem.cli import reproduce
from spem.cli.reproduce import PAPER
from spem.models import resnet
from spem.reproduce.experiments import (
    EXPERIMENTS,
    SCALES,
    comparison,
    experiment,
    module_name,
    printed,
    run_configs,
)
from spem.training import recipes, smoke


def test_every_printed_number_stands_in_exactly_one_place_of_its_table():
    assert len(printed()) == 60
    for number in "1234":
        wanted = sorted(
            (key[1], key[2], key[3], cell.top1)
            for key, cell in printed().items()
            if key[0] == number
        )
        cells = [cell for cell in experiment(f"table{number}", "paper").cells if cell.paper]
        found = sorted(
            # Table 3 and 4 are of SPEM alone
            (c.data, c.attention if number in "12" else "spem", str(c.depth or 164), c.paper.top1)
            for c in cells
            if c.paper
        )
        assert found == wanted


def test_the_grid_has_the_size_that_was_planned():
    sizes = {name: len(run_configs([experiment(name, "paper")])) for name in PAPER}
    assert sizes == {"table1": 42, "table2": 48, "table3": 36, "table4": 66, "figure2": 60}
    everything = run_configs([experiment(name, "paper") for name in PAPER])
    assert len(everything) == 222  # 74 configurations, 3 seeds: what two tables share is run once
    assert len({(config.id, config.seed) for config in everything}) == 222
    spem = next(c for c in everything if c.model.attention == "spem" and c.model.depth == 164)
    assert everything[spem] == ["table1", "table2", "table3", "table4"]


def test_paper_scale_is_the_papers_recipe():
    for cell in experiment("table1", "paper").cells:
        config, wanted = cell.config, recipes.paper(cell.data, 164)
        assert config is not None
        assert (config.optim, config.data) == (wanted.optim, wanted.data)
        assert (config.model.depth, config.runtime.precision) == (164, "fp32")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_cells_are_told_apart_and_can_be_built(name: str):
    for scale in SCALES:
        one = experiment(name, scale)
        assert len({(cell.data, cell.row) for cell in one.cells}) == len(one.cells)
        configs = [cell.config for cell in one.cells if cell.config]
        for cell in one.cells:
            assert cell.config or cell.note or cell.data not in one.scale.datasets
        for config in configs:
            assert config.experiment.partition("-")[0] == scale
            assert (config.runtime.threads, config.seed) == (1, 0)
            if scale == "smoke":
                resnet(config.model.depth, attention=config.model.attention)
        # nothing but the named thing differs within a data set, and each group has one reference
        kept = {(c.data, c.optim.epochs) for c in configs}
        assert len(kept) == len({c.data for c in one.cells if c.config})
        groups = {(c.data, c.group) for c in one.cells}
        assert sorted((c.data, c.group) for c in one.cells if c.reference) == sorted(groups)
        assert len({config.id for config in configs}) == len(configs)


def test_tables_of_the_paper_are_float32_and_composed():
    scales = [scale for scale in SCALES if scale != "study"]  # of our own questions
    for config in run_configs([experiment(n, s) for n in PAPER for s in scales]):
        assert (config.runtime.precision, config.runtime.impl) == ("fp32", "reference")


def test_table4_gives_letters_only_where_they_are_certain():
    cells = [c for c in experiment("table4", "paper").cells if c.data == "cifar10"]
    assert [c.row for c in cells if c.reference] == ["shared_sum"]
    for c in cells:
        if c.config:
            own = "spem" if c.reference else f"spem(reweight={c.row})"
            assert c.config.model.attention == own
    certain = {c.row: c.note for c in cells if c.config and c.paper}
    names = {"shared_sum": "ours", "unshared_sum": "a", "none": "without"}
    assert certain == {row: f"the paper's '{name}'" for row, name in names.items()}
    assert [c.row for c in cells if c.config is None] == [f"the paper's ({x})" for x in "bcdefg"]
    notes = {c.row: c.note for c in cells if c.config and not c.paper}
    assert len(notes) == 8
    assert notes["max_only"] == "candidate for (f) or (g)"
    assert notes["linear_sum"] == "candidate for (b) to (e)"


def test_controls_start_a_branch_where_spem_does():
    cells = {c.row: c for c in experiment("controls", "short").cells}
    small = cells["plain, branches start at 0.032"]
    assert small.config is not None
    assert small.reference
    gate = create_attention("spem", 64).start_gate
    assert small.config.model.branch_start == pytest.approx(gate, rel=1e-5)
    assert module_name(small.config.model) == "control"
    assert len(experiment("controls", "short").seeds) >= 8


def test_runs_come_seed_by_seed_and_once():
    configs = list(run_configs([experiment("controls", "smoke"), experiment("table1", "smoke")]))
    assert [c.seed for c in configs] == sorted(c.seed for c in configs)
    assert len({(c.id, c.seed) for c in configs}) == len(configs)
    assert {c.seed for c in run_configs([experiment("forms", "smoke", seeds=[7])])} == {7}


def test_arms_of_other_arithmetic_have_folders_of_their_own():
    configs = run_configs([experiment("equivalence", "smoke", seeds=[0])])
    assert len(configs) == 6  # of numba and triton that which the machine has
    assert len({c.folder(Path("runs")) for c in configs}) == 6
    assert len({c.id for c in configs}) == 6


def test_a_comparison_is_an_experiment_that_was_typed_in():
    configs, reference = comparison(smoke(), ["none", "control", "se", "spem"], [0, 1])
    assert reference == "none"
    assert [c.seed for c in configs] == [0] * 4 + [1] * 4
    assert [module_name(c.model) for c in configs[:4]] == ["none", "control", "se", "spem"]
    with pytest.raises(ValueError, match="arm se is named twice"):
        comparison(smoke(), ["none", "se", "se()"], [0])


def test_the_command_knows_the_names_without_loading_them():
    assert (*reproduce.PAPER, *reproduce.OWN) == EXPERIMENTS
    assert tuple(SCALES) == reproduce.SCALES
