"""Configs: the paper's numbers, the schedule, the id, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from spem import resnet
from spem.training import DataConfig, ModelConfig, OptimConfig, RunConfig, RuntimeConfig, recipes
from spem.training.config import Impl
from spem.training.step import make_optimizer, set_rate


def test_paper_recipe_is_the_papers():
    config, runtime = recipes.paper("cifar100"), RuntimeConfig(channels_last=False)
    model = ModelConfig(164, "spem", "bottleneck", init_scope="backbone")
    data = DataConfig("cifar100", val=0, augment=True, flip=True, pad=4, normalisation="paper")
    optim = OptimConfig(164, 128, 0.1, 0.9, 1e-4, (81, 122), 0.1, 0.1, "host")
    assert config == RunConfig(model, data, optim, runtime)
    assert config.runtime.precision == "fp32"


def test_fast_changes_nothing_but_the_execution():
    paper, fast = recipes.paper("cifar100", 83, "se"), recipes.fast("cifar100", 83, "se")
    assert replace(fast, runtime=paper.runtime) == paper
    assert fast.id != paper.id  # another memory format, perhaps another step: other bits
    assert fast.runtime.precision == "fp32"


def test_short_scales_the_milestones_and_says_another_experiment():
    config = recipes.short(epochs=12)
    assert config.optim == replace(recipes.paper(depth=11).optim, epochs=12, milestones=(6, 9))
    assert config.experiment == "short"
    assert config.id != replace(config, optim=recipes.paper().optim).id


def test_scaled_milestones():
    scaled = {epochs: recipes.scaled_milestones(epochs) for epochs in (164, 3, 1, 2, 8)}
    assert scaled == {164: (81, 122), 3: (1, 2), 1: (), 2: (1,), 8: (4, 6)}


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


def test_host_rules_decay_everything_and_declared_rules_do_not():
    model = resnet(11, attention="srm")
    host = make_optimizer(model, OptimConfig(rules="host")).param_groups
    assert [g["weight_decay"] for g in host] == [1e-4]
    assert sum(p.numel() for p in host[0]["params"]) == sum(p.numel() for p in model.parameters())
    declared = make_optimizer(model, OptimConfig(rules="declared")).param_groups
    assert {g["weight_decay"] for g in declared} == {1e-4, 0.0}
    # Mixes can have a rate of their own that falls with the others.
    optim = OptimConfig(rules="declared", mix_lr=0.02)
    optimizer = make_optimizer(resnet(11, attention="spem"), optim)
    set_rate(optimizer, optim, 100)
    assert sorted({g["lr"] for g in optimizer.param_groups}) == pytest.approx([0.002, 0.01])


def test_id_names_what_can_change_the_result_and_nothing_else():
    config = recipes.paper()

    def changed(section: str, **fields: object) -> RunConfig:
        return replace(config, **{section: replace(getattr(config, section), **fields)})

    same = [
        replace(config, seed=7),
        replace(config, experiment="other"),
        changed("data", root="elsewhere", sha256="0" * 64),
        changed("runtime", threads=3, device="cpu", checkpoint_minutes=1),
    ]
    assert {c.id for c in same} == {config.id}
    others = [
        changed("model", attention="se"),
        changed("model", start="identity"),
        *(changed("data", **f) for f in ({"val": 5000}, {"test": 0.3}, {"skip_broken": True})),
        *(changed("optim", **f) for f in ({"lr": 0.05}, {"schedule": "cosine"})),
        *(changed("runtime", impl=impl) for impl in ("reference", "numba")),
        *(changed("runtime", step=step) for step in ("compile", "graph")),
        changed("runtime", precision="bf16"),
        changed("runtime", channels_last=True),
        changed("runtime", deterministic=True),
    ]
    assert len({c.id for c in [config, *others]}) == 1 + len(others)
    # A change here makes every finished run a stranger to its config: raise SCHEMA and say so.
    assert RunConfig().id == "d2ba1ed038"


def test_equal_configs_give_one_run():
    paths = DataConfig(name=Path("pets"), root=Path("there"))  # pyright: ignore[reportArgumentType]
    assert RunConfig(data=paths) == RunConfig(data=DataConfig(name="pets", root="there"))
    milestones = OptimConfig(milestones=np.array([122, 81]))  # pyright: ignore[reportArgumentType]
    again = RunConfig(optim=milestones, seed=np.int64(0))  # pyright: ignore[reportArgumentType]
    assert hash(again) == hash(RunConfig())
    assert again.to_dict() == RunConfig().to_dict()
    a = ModelConfig(attention="se(reduction=8, pool=mix(0.3))")
    assert a == ModelConfig(attention="se( pool = mix(0.3), reduction = 8 )")
    assert RunConfig(optim=OptimConfig(lr=1)).id == RunConfig(optim=OptimConfig(lr=1.0)).id
    long = RunConfig(data=DataConfig(name="uoft-cs/cifar10"))
    assert long.id == RunConfig(data=DataConfig(name="cifar10")).id


def test_folder_is_readable_and_safe():
    config = RunConfig(model=ModelConfig(attention="se(pool=mix(0.3))"), seed=2)
    folder = config.folder(Path("runs"))
    assert folder == Path(f"runs/train/164-cifar10-se-pool-mix-0.3-{config.id}/seed2")


def test_dict_and_back_is_the_identity():
    config = replace(recipes.smoke("eca"), data=DataConfig(name="digits", limit=7, size=8), seed=3)
    config = replace(config, optim=replace(config.optim, rules="declared", mix_lr=1))
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config

    values = RunConfig().to_dict()
    del values["model"]["branch_start"], values["data"]["test_limit"]  # of before: defaults
    values["runtime"] |= {"tensorboard": True}  # of another version: passed over
    assert RunConfig.from_dict(values) == RunConfig()


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        ("optim", "nesterov", True, "nesterov"),
        ("optim", "epochs", "many", r"optim.epochs.*int.*many"),
        ("optim", "epochs", True, r"optim.epochs=True must be a whole number"),
        ("optim", "lr", float("nan"), r"optim.lr=nan must be a number from 0 on"),
        ("optim", "lr", 10**400, "int too large"),
        ("model", "depth", 12, r"depth=12 is not 9n \+ 2, .* Nearest: 11 or 20"),
        ("model", "depth", 900_002, r"depth=900002 is too large. Use at most 5000"),
        ("model", "attention", "speem", "speem"),
        ("model", "attention", "se(\x00)", "cannot read attention"),
        ("data", "val", -1, r"data.val=-1 is too small"),
        ("data", "size", 60_000, r"data.size=60000 is too large"),
        ("data", "test", 1.5, r"data.test=1.5 is not a share"),
        ("runtime", "step", "grahp", r"runtime.step"),
        ("runtime", "impl", "numbra", r"runtime.impl"),
        ("optim", "milestones", [3, 0], r"optim.milestones=0 is too small"),
        (None, "seed", "x", r"seed.*int"),
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


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RuntimeConfig(impl="numbra"), r"impl='numbra' is unknown.*Did you mean 'numba'"),
        (lambda: DataConfig(normalisation="cifar1"), r"'cifar1'.*Did you mean 'cifar10'"),
        (lambda: RunConfig(model=ModelConfig(attention="speem")).id, "speem.*spem"),
        (lambda: OptimConfig(rules="declared", mix_lr=-1), r"optim.mix_lr=-1 must be a number"),
        (lambda: OptimConfig(mix_lr=0.1), "has no effect"),
        (lambda: DataConfig(augment="no"), r"data.augment='no' must be True or False"),  # pyright: ignore[reportArgumentType]
        (lambda: ModelConfig(attention=None), r"model.attention=None must be a text"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_what_python_asks_for_is_checked_too(build: Callable[[], object], message: str):
    with pytest.raises(ValueError, match=message):
        build()


def test_configs_and_recipes_need_no_torch():
    program = (
        "import sys, spem.training\n"
        "from spem.training import RunConfig, recipes\n"
        "recipes.paper(), recipes.fast(), recipes.short(), recipes.smoke()\n"
        "RunConfig().to_dict()\n"
        "print([m for m in ('torch', 'numpy', 'datasets', 'PIL') if m in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert said.stdout == b"[]\n"


def test_names_of_implementations_are_those_of_the_library():
    from spem.ops.dispatch import IMPLEMENTATIONS

    assert set(get_args(Impl)) == set(IMPLEMENTATIONS)


def test_bf16_is_the_default_where_the_processor_computes_in_it(monkeypatch: pytest.MonkeyPatch):
    for flags, precision in (("avx2 avx512f", "fp32"), ("amx_bf16", "bf16")):
        monkeypatch.setattr(Path, "read_text", lambda *_, flags=flags: f"flags : fpu {flags} x\n")
        monkeypatch.setattr(Path, "exists", lambda *_: True)
        assert recipes.short().runtime.precision == precision
