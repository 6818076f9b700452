"""The paper's tables as run configs: every printed cell has its place, at every scale."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from spem.attention import create_attention
from spem.models import resnet
from spem.reproduce.experiments import EXPERIMENTS, PAPER, experiment, run_configs
from spem.reproduce.paper import find_printed, printed
from spem.reproduce.scales import SCALES
from spem.training import recipes

PRINTED = Path(__file__).resolve().parents[2] / "src" / "spem" / "reproduce" / "paper.csv"


def test_every_printed_number_stands_in_exactly_one_place_of_its_table():
    with PRINTED.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 60
    for number in (1, 2, 3, 4):
        wanted = sorted(
            (r["dataset"].lower(), float(r["top1_percent"]), r["depth"], r["attention"])
            for r in rows
            if r["table"] == str(number)
        )
        cells = [cell for cell in experiment(f"table{number}", "paper").cells if cell.paper]
        found = sorted(
            (c.data, c.paper.top1, str(c.paper.depth), c.paper.attention) for c in cells if c.paper
        )
        assert found == wanted


def test_the_grid_has_the_size_that_was_planned():
    sizes = {name: len(run_configs([experiment(name, "paper")])) for name in PAPER}
    assert sizes == {"table1": 42, "table2": 48, "table3": 36, "table4": 66, "figure2": 60}
    everything = run_configs([experiment(name, "paper") for name in PAPER])
    assert len(everything) == 222  # 74 configurations, 3 seeds: what two tables share is run once
    assert len({(config.id, config.seed) for config in everything}) == 222


def test_paper_scale_is_the_papers_recipe():
    for dataset in ("cifar10", "cifar100"):
        for attention in ("none", "se", "spem"):
            wanted = recipes.paper(dataset, 164, attention).id
            cells = experiment("table1", "paper").cells
            ids = {
                c.config.model.attention: c.config.id
                for c in cells
                if c.config
                if c.data == dataset
            }
            assert ids[attention] == wanted


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_cells_are_told_apart_and_can_be_built(name: str, scale: str):
    one = experiment(name, scale)
    assert one.cells
    assert len({(cell.data, cell.row) for cell in one.cells}) == len(one.cells)
    for cell in one.cells:
        if cell.config is None:
            assert cell.note or scale == "smoke"
            continue
        assert cell.config.experiment.partition("-")[0] == scale
        assert cell.config.runtime.threads == 1
        assert cell.config.seed == 0
        if scale == "smoke":
            resnet(cell.config.model.depth, attention=cell.config.model.attention)
    # nothing but the named thing differs from the reference of the same data set
    kept = {(c.config.data, c.config.optim.epochs) for c in one.cells if c.config}
    assert len(kept) == len({c.data for c in one.cells if c.config})


def test_tables_of_the_paper_are_float32_and_composed():
    for scale in SCALES:
        for name in PAPER:
            for config in run_configs([experiment(name, scale)]):
                assert (config.runtime.precision, config.runtime.impl) == ("fp32", "reference")


def test_table4_gives_letters_only_where_they_are_certain():
    cells = [c for c in experiment("table4", "paper").cells if c.data == "cifar10"]
    certain = {c.row: c.paper.label for c in cells if c.config and c.paper}
    assert certain == {"shared_sum": "ours", "unshared_sum": "a", "none": "without"}
    assert [c.row for c in cells if c.config is None] == [f"the paper's ({x})" for x in "bcdefg"]
    notes = {c.row: c.note for c in cells if c.config and not c.paper}
    assert len(notes) == 8
    assert notes["max_only"] == "candidate for (f) or (g)"
    assert notes["linear_sum"] == "candidate for (b) to (e)"


def test_controls_start_a_branch_where_spem_does():
    cells = {c.row: c for c in experiment("controls", "short").cells}
    small = cells["plain, branches start at 0.032"].config
    spem = cells["SPEM (text)"].config
    assert small is not None
    assert spem is not None
    gate = create_attention("spem", 64).start_gate
    assert small.model.branch_start == pytest.approx(gate, rel=1e-5)
    assert len(experiment("controls", "short").seeds) >= 8
    assert sorted(c.reference for c in cells.values()) == [
        "",
        "",
        "control",
        "control",
        "plain",
        "se",
    ]


def test_runs_come_seed_by_seed_and_once():
    configs = run_configs([experiment("controls", "smoke"), experiment("table1", "smoke")])
    assert [c.seed for c in configs] == sorted(c.seed for c in configs)
    assert len({(c.id, c.seed) for c in configs}) == len(configs)
    assert {c.seed for c in run_configs([experiment("forms", "smoke", seeds=[7])])} == {7}


def test_arms_of_other_arithmetic_have_folders_of_their_own():
    configs = run_configs([experiment("equivalence", "smoke", seeds=[0])])
    assert len(configs) == 6
    assert {c.experiment for c in configs} == {"smoke", "smoke-fused", "smoke-bf16"}
    assert len({c.folder(Path("runs")) for c in configs}) == 6


def test_unknown_names_are_answered_with_near_ones():
    with pytest.raises(ValueError, match=r"unknown experiment 'tabel1'. Did you mean table1"):
        experiment("tabel1", "smoke")
    with pytest.raises(ValueError, match=r"unknown scale 'smok'. Did you mean smoke"):
        experiment("table1", "smok")
    with pytest.raises(ValueError, match="each named once"):
        experiment("table1", "smoke", seeds=[1, 1])


def test_printed_numbers_are_found_by_what_they_are():
    assert find_printed(1, "cifar100").top1 == 76.31
    assert find_printed(2, "cifar100", depth=326, attention="none").top1 == 72.08
    assert find_printed(3, "cifar10", variant="lambda=0.7").parameters_millions is None
    assert find_printed(4, "cifar10", variant="b").top1 == 92.98
    assert len(printed()) == 60
    with pytest.raises(KeyError):
        find_printed(1, "cifar10", depth=83)
