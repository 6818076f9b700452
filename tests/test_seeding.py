"""Keyed generators: pure functions of their key, everywhere and always."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import spem
from spem.seeding import keyed_generator


def draw(*key: object) -> torch.Tensor:
    return torch.randn(8, generator=keyed_generator(*key))


def test_the_same_key_gives_the_same_numbers() -> None:
    assert torch.equal(draw(3, "epoch", 7), draw(3, "epoch", 7))
    assert keyed_generator(0, "a").device.type == "cpu"


def test_different_keys_give_different_numbers() -> None:
    keys = [
        *((0,), (1,), (0, "a"), (0, "b"), (0, "ab"), (0, "a", "b"), (0, "b", "a"), (0, "a/b")),
        *((0, "a,b"), (0, "a", ""), (0, "epoch", 1), (0, "epoch", "1"), (0, "epoch", 11)),
        *((0, "epoch", 1, 1), (0, "epoch1"), (10, "epoch"), (1, "0", "epoch"), (-1, "a")),
        (2**40, "a"),
    ]
    draws = {tuple(draw(*key).tolist()) for key in keys}
    assert len(draws) == len(keys)


def test_streams_are_not_shifted_copies_of_one_another() -> None:
    """Seeds 0, 1, 2 ... must not give overlapping or correlated streams."""
    draws = (torch.randn(4096, generator=keyed_generator(seed, "x")) for seed in range(8))
    streams = torch.stack([*draws])
    correlation = torch.corrcoef(streams) - torch.eye(8)
    assert correlation.abs().max() < 0.09  # 5.7 standard errors
    assert len(set(streams.flatten().tolist())) > 0.99 * streams.numel()


def test_the_global_generator_is_neither_used_nor_moved() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = draw(5, "x")
    model = spem.resnet(11, attention="se")
    torch.set_rng_state(state)
    spem.initialise(model, 3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(draw(5, "x"), first)


def test_the_numbers_do_not_depend_on_the_process() -> None:
    program = (
        "import torch; from spem.seeding import keyed_generator;"
        "print(torch.randint(0, 2**62, (4,), generator=keyed_generator(7, 'epoch', 2)).tolist())"
    )
    elsewhere = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    here = torch.randint(0, 2**62, (4,), generator=keyed_generator(7, "epoch", 2)).tolist()
    assert elsewhere == f"{here}\n"


def test_initialise_depends_on_the_names_not_on_the_order() -> None:
    conv = lambda: nn.Conv2d(3, 8, 3, bias=False)  # noqa: E731
    first = nn.ModuleDict({"a": conv(), "b": conv()})
    second = nn.ModuleDict({"b": conv(), "x": nn.Linear(3, 3), "a": conv()})
    spem.initialise(first, 4)
    spem.initialise(second, 4)
    for name in ("a", "b"):
        assert torch.equal(first[name].weight, second[name].weight)
    assert not torch.equal(first["a"].weight, first["b"].weight)


def test_initialise_is_complete() -> None:
    """Whatever the model was before, the seed alone decides what it is after."""
    for attention in ("se", "cbam", "eca", "srm", "sge", "spem", "scale"):
        for scope in ("backbone", "all"):
            models = []
            for dirt in (0.3, -7.0):
                model = spem.resnet(11, attention=attention)
                with torch.no_grad():
                    for tensor in [*model.parameters(), *model.buffers()]:
                        tensor.fill_(dirt)
                spem.initialise(model, 9, scope=scope)
                models.append(model.state_dict())
            for name, value in models[0].items():
                assert torch.equal(value, models[1][name]), (attention, scope, name)


def test_an_unknown_scope_is_refused() -> None:
    with pytest.raises(ValueError, match=r"everything.*backbone.*all"):
        spem.initialise(nn.Linear(2, 2), 0, scope="everything")


@pytest.mark.filterwarnings("ignore:.*weight_norm")  # deprecated in torch
def test_initialise_leaves_what_it_does_not_know() -> None:
    """A gain, and what weight norm or pruning has renamed, would be taken for biases."""

    class Gained(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(3, 4, 3)
            self.gain = nn.Parameter(torch.ones(4, 1, 1))

    model = nn.Sequential(Gained(), nn.utils.weight_norm(nn.Conv2d(4, 4, 3)), nn.Conv2d(4, 4, 3))
    prune.l1_unstructured(model[2], "weight", 0.5)
    for scope in ("backbone", "all"):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        spem.initialise(model, 1 if scope == "all" else 0, scope=scope)
        same = [n for n, p in model.named_parameters() if torch.equal(p, before[n])]
        left = ["0.gain", "1.weight_g", "1.weight_v", "2.weight_orig"]
        assert [name for name in same if not name.endswith("bias")] == left
        assert model(torch.rand(1, 3, 9, 9)).isfinite().all()
