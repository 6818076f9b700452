"""Configs: the paper's numbers, the schedule, the id, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spem.training import DataConfig, ModelConfig, OptimConfig, RunConfig, RuntimeConfig, recipes
from spem.training.config import differing_fields
from spem.training.step import make_optimizer, set_rate


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_paper_recipe_is_the_papers(dataset: str):
    config = recipes.paper(dataset)
    assert (config.model.depth, config.model.attention, config.model.block) == (
        164,
        "spem",
        "bottleneck",
    )
    assert config.model.init_scope == "backbone"
    assert config.optim == OptimConfig(
        epochs=164,
        batch=128,
        lr=0.1,
        momentum=0.9,
        weight_decay=1e-4,
        milestones=(81, 122),
        factor=0.1,
        penalty=0.1,
        rules="host",
    )
    assert config.data == DataConfig(
        name=dataset, val=0, augment=True, flip=True, pad=4, normalisation="paper"
    )
    assert config.runtime.precision == "fp32"


def test_fast_changes_nothing_but_the_execution():
    paper, fast = recipes.paper("cifar100", 83, "se"), recipes.fast("cifar100", 83, "se")
    assert fast.id == paper.id
    assert replace(fast, runtime=paper.runtime) == paper
    assert fast.runtime.precision == "fp32"


def test_short_scales_the_milestones_and_says_another_experiment():
    config = recipes.short(epochs=12)
    assert config.optim == replace(recipes.paper(depth=11).optim, epochs=12, milestones=(6, 9))
    assert config.experiment == "short"
    assert config.id != replace(config, optim=recipes.paper().optim).id


@pytest.mark.parametrize(
    ("epochs", "expected"), [(164, (81, 122)), (3, (1, 2)), (1, ()), (2, (1,)), (8, (4, 6))]
)
def test_scaled_milestones(epochs: int, expected: tuple[int, ...]):
    assert recipes.scaled_milestones(epochs) == expected


def test_schedule_of_the_paper_is_81_41_42_epochs():
    optim = recipes.paper().optim
    optimizer = make_optimizer(torch.nn.Linear(2, 2), optim)
    rates = []
    for epoch in range(optim.epochs):
        returned = set_rate(optimizer, optim, epoch)
        rates.append(optimizer.param_groups[0]["lr"])
        assert returned == rates[-1]
    expected = [0.1] * 81 + [0.01] * 41 + [0.001] * 42
    assert rates == pytest.approx(expected, rel=1e-12)


def test_rate_of_an_epoch_does_not_depend_on_the_epochs_before():
    optim = recipes.paper().optim
    fresh, used = (make_optimizer(torch.nn.Linear(2, 2), optim) for _ in range(2))
    for epoch in range(123):
        set_rate(used, optim, epoch)
    assert set_rate(fresh, optim, 122) == set_rate(used, optim, 122)


def test_host_rules_decay_everything_and_declared_rules_do_not():
    from spem import resnet

    model = resnet(11, attention="srm")
    host = make_optimizer(model, OptimConfig(rules="host")).param_groups
    assert [g["weight_decay"] for g in host] == [1e-4]
    assert sum(p.numel() for p in host[0]["params"]) == sum(p.numel() for p in model.parameters())
    declared = make_optimizer(model, OptimConfig(rules="declared")).param_groups
    assert {g["weight_decay"] for g in declared} == {1e-4, 0.0}


def test_mixes_can_have_a_rate_of_their_own_that_falls_with_the_others():
    from spem import resnet

    optim = OptimConfig(rules="declared", mix_lr=0.02)
    optimizer = make_optimizer(resnet(11, attention="spem"), optim)
    set_rate(optimizer, optim, 100)
    assert sorted({g["lr"] for g in optimizer.param_groups}) == pytest.approx([0.002, 0.01])


def test_id_names_what_can_change_the_result_and_nothing_else():
    config = recipes.paper()
    same = [
        replace(config, seed=7),
        replace(config, experiment="other"),
        replace(config, data=replace(config.data, root="elsewhere", sha256="0" * 64)),
        replace(config, runtime=RuntimeConfig(threads=3, step="compile", tensorboard=True)),
    ]
    assert {c.id for c in same} == {config.id}
    others = [
        replace(config, model=replace(config.model, attention="se")),
        replace(config, data=replace(config.data, val=5000)),
        replace(config, optim=replace(config.optim, lr=0.05)),
        replace(config, runtime=replace(config.runtime, precision="bf16")),
    ]
    assert len({c.id for c in [config, *others]}) == 5
    assert len(config.id) == 10


def test_id_is_stable_between_versions():
    # A change here makes every finished run a stranger to its config: raise SCHEMA and say so.
    assert recipes.paper().id == "d2ba1ed038"


def test_a_config_from_before_other_implementations_loads_with_its_id():
    values = recipes.paper().to_dict()
    values["runtime"] |= {"impl": "reference", "step": "eager"}
    old = RunConfig.from_dict(values)
    assert (old.id, old.runtime.impl, old.runtime.step) == ("d2ba1ed038", "reference", "eager")
    every = [replace(old, runtime=RuntimeConfig(impl=i, step="auto")) for i in ("numba", "triton")]
    assert {config.id for config in every} == {old.id}


def test_equal_attention_texts_give_one_run():
    a = ModelConfig(attention="se(reduction=8, pool=mix(0.3))")
    b = ModelConfig(attention="se( pool = mix(0.3), reduction = 8 )")
    assert a == b


def test_numbers_of_either_type_give_one_id():
    assert RunConfig(optim=OptimConfig(lr=1)).id == RunConfig(optim=OptimConfig(lr=1.0)).id


def test_folder_is_readable_and_safe():
    config = RunConfig(model=ModelConfig(attention="se(pool=mix(0.3))"), seed=2)
    folder = config.folder(Path("runs"))
    assert folder == Path(f"runs/train/164-cifar10-se-pool-mix-0.3-{config.id}/seed2")


def test_dict_and_back_is_the_identity():
    config = replace(recipes.smoke("eca"), data=DataConfig(name="digits", limit=7, size=8), seed=3)
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        (None, "colour", 1, "config has no field colour"),
        ("optim", "nesterov", True, "config: optim has no field nesterov"),
        ("optim", "epochs", "many", r"optim.epochs='many' must be of type int"),
        ("optim", "epochs", True, r"optim.epochs=True must be of type int"),
        ("model", "depth", 12, r"depth=12 is not 9n \+ 2, .* Nearest: 11 or 20"),
        ("model", "attention", "speem", "speem"),
        ("data", "val", -1, r"data.val=-1 is too small"),
        ("runtime", "step", "grahp", r"step='grahp' is unknown.*Did you mean 'graph'"),
        ("runtime", "impl", "numbra", r"impl='numbra' is unknown.*Did you mean 'numba'"),
        ("optim", "milestones", [9, 3], r"optim.milestones=\(9, 3\) must be rising"),
        (None, "seed", "x", r"config.seed='x' must be of type int"),
        (None, "experiment", "a/b", "experiment='a/b' must be a folder name"),
    ],
)
def test_wrong_fields_are_refused_by_name(
    section: str | None, field: str, value: object, message: str
):
    values = RunConfig().to_dict()
    (values if section is None else values[section])[field] = value
    with pytest.raises(ValueError, match=message):
        RunConfig.from_dict(values)


def test_missing_field_is_refused():
    values = RunConfig().to_dict()
    del values["data"]["val"]
    with pytest.raises(ValueError, match="data lacks the field val"):
        RunConfig.from_dict(values)


def test_mix_rate_without_its_rules_is_refused():
    with pytest.raises(ValueError, match="has no effect"):
        OptimConfig(mix_lr=0.1)


def test_differing_fields_are_named_with_both_values():
    a, b = RunConfig(), RunConfig(optim=OptimConfig(lr=0.05))
    assert differing_fields(a.identity, b.identity) == "optim.lr 0.1 -> 0.05"
