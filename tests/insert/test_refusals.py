"""Bad input: the message names what, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from insert.hosts import attentions, models, small, timm
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import spem
from spem.insert import find_sites


class Permuted(nn.Module):
    """A norm over channels that come last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x).permute(0, 2, 3, 1))


class Pairs(nn.Sequential):
    """Takes two images."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return super().forward(x - y)


class OneDimensional(nn.Sequential):
    """x + branch(x)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


def one_dimensional() -> nn.Module:
    conv = lambda: nn.Conv1d(8, 8, 3, padding=1)  # noqa: E731
    branch = OneDimensional(conv(), nn.ReLU(), conv(), nn.BatchNorm1d(8))
    return nn.Sequential(nn.Conv1d(2, 8, 3), branch)


def norm_of(module: nn.Module) -> nn.Module | None:
    return module if isinstance(module, nn.LayerNorm) else None


REFUSED: list[tuple[Callable[[], nn.Module], str, dict[str, Any], str]] = [
    (small, "speem", {}, "unknown attention 'speem'. Did you mean spem"),
    (small, "none", {}, "'none' is the plain network; there is nothing to put in"),
    (small, "se(reduction=100)", {}, r"layer1.0.bn2: SE: reduction=100 .* Use reduction <= 64"),
    (small, "sge(groups=48)", {}, r"layer1.0.bn2: SGE: .*48"),
    (small, "bam", {}, "bam goes after every stage but the last, .*placement 'tail'"),
    (small, "sk", {}, "sk goes in place of the 3x3 convolution"),
    (small, "dia", {}, "dia is shared by the blocks of a stage, which only spem.resnet has"),
    (
        lambda: spem.resnet(11, attention="dia"),
        "spem",
        {},
        "3 of 3 sites do not run in a forward pass of ResNet, layer1.0.attention first",
    ),
    (
        small,
        "srm",
        {"input_shape": (1, 3, 32, 32)},  # its last maps have one position
        "ResNet no longer runs with srm in it: SRM: needs maps of at least 2 positions",
    ),
    (small, "spem", {"start": "zero"}, "start='zero' is unknown. Use 'identity' or 'module'"),
    (small, "spem", {"stages": (3, 5)}, r"stages=\[3, 5\], but this network has stages 1 to 4"),
    (
        small,
        "spem",
        {"include": "layer9*"},
        r"include=\['layer9\*'\] matches no site.*layer1.0.bn2",
    ),
    (
        small,
        "spem",
        {"include": "layer1*", "stages": 2},
        r"include=\['layer1\*'\] with stages=\[2\] matches no",
    ),
    (small, "spem", {"stages": ()}, r"attach: stages=\[\] matches no site"),
    (small, "spem", {"include": 5}, "include=5 is not a pattern of names or several"),
    (small, "spem", {"stages": "1"}, "stages='1' is not a number or several"),
    (small, "spem", {"input_shape": "1,3"}, "input_shape='1,3' is not a number or several"),
    (
        small,
        "spem",
        {"where": lambda module: None},
        "where= gave None for every module",
    ),
    (
        small,
        "spem",
        {"where": lambda module: "bn2"},
        "where= gave a str, which is no module of the network, for the network",
    ),
    (
        small,
        "spem",
        {"where": lambda module: nn.ReLU()},
        "gave a ReLU, which is no module of the network, for",
    ),
    (small, spem.SE(64), {}, "attention is a text like .*, got SE. Write 'se'"),
    (small, 64, {}, "a text like .* or an AttentionSpec, got int"),
    (small, None, {}, "'none' is the plain network"),
    (
        small,
        type("Mine", (spem.ChannelAttention,), {}),
        {},
        "register Mine by spem.register_attention",
    ),
    (
        small,
        "spem",
        {"where": "layer1"},
        r"where='layer1' is not a function of a module.*include='layer1\*'",
    ),
    (
        one_dimensional,
        "cbam(reduction=2)",
        {},
        r"cbam takes maps .* at 1.3 has 3 axes",
    ),
    (one_dimensional, "coord", {}, "coord takes maps .* has 3 axes. Use a module"),
    (lambda: nn.DataParallel(models.video.r3d_18()), "cbam", {}, "cbam takes maps .* has 5 axes"),
    (
        lambda: nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d()),
        "spem",
        {"where": lambda m: m if isinstance(m, nn.LazyBatchNorm2d) else None},
        "0 is a LazyConv2d that has seen no data.*Run one batch",
    ),
    (small, "fca", {"input_shape": (1, 4, 64, 64)}, r"does not run on .*\[1, 4, 64, 64\].*Pass"),
    (lambda: Pairs(nn.Conv2d(3, 3, 3)), "spem", {}, "1 required positional .* or where= a rule"),
    (
        Permuted,
        "spem",
        {"where": norm_of, "input_shape": (1, 3, 9, 9)},
        r"norm is \[1, 7, 7, 6\], not .* the 6 channels of its norm",
    ),
    (
        lambda: nn.Sequential(nn.Linear(3, 3)),
        "spem",
        {},
        r"no site found in Sequential \(no convolutional layers\). Pass where= a rule",
    ),
    (
        lambda: nn.Sequential(timm.models.resnet.BasicBlock(8, 8))[0].bn2,
        "spem",
        {},
        r"no site found in BatchNorm2d",
    ),
]


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # deprecated in torch
def test_torchscript() -> None:
    block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), torch.jit.script(nn.BatchNorm2d(3)))
    network = nn.Sequential(nn.Conv2d(3, 3, 3), block)
    with pytest.raises(ValueError, match=r"in Sequential \(1.1 is TorchScript.*Pass where="):
        spem.attach(network, "spem")
    assert spem.attach(network, "spem", where=lambda m: m[1] if m is block else None) == ["1.1"]
    assert network(torch.rand(2, 3, 8, 8)).isfinite().all()
    assert spem.cost.count(network, (1, 3, 8, 8)).layers[-1].attention
    for fixed in (
        torch.jit.script(nn.Conv2d(3, 3, 1)),
        torch.jit.trace(nn.Conv2d(3, 3, 1), torch.rand(1, 3, 8, 8)),
        torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))),
    ):
        for where in (None, lambda m: m if m is not fixed else None):  # noqa: B023
            with pytest.raises(ValueError, match="TorchScript takes no new module"):
                spem.attach(fixed, "spem", where=where)


@pytest.mark.parametrize(("make", "attention", "options", "message"), REFUSED)
def test_refused(
    make: Callable[[], nn.Module], attention: str, options: dict[str, Any], message: str
) -> None:
    model = make()
    modules = dict(model.named_modules())
    with pytest.raises((ValueError, TypeError), match=f"(?s){message}"):
        spem.attach(model, attention, **options)
    assert dict(model.named_modules()) == modules
    assert model.training


def test_attention_is_put_in_once() -> None:
    model = small()
    spem.attach(model, "spem", stages=(1, 2))
    with pytest.raises(ValueError, match=r"attention at layer1.0.bn2 already.*spem.detach"):
        spem.attach(model, "se")
    assert spem.attach(model, "se", stages=(3, 4)) == ["layer3.0.bn2", "layer4.0.bn2"]


def test_no_module_and_no_network() -> None:
    with pytest.raises(TypeError, match=r"needs a torch.nn.Module, got str"):
        spem.attach("resnet50", "spem")
    assert spem.detach(small()) == []


def test_layers_a_forward_pass_does_not_come_by() -> None:
    model = models.googlenet(weights=None, init_weights=False, aux_logits=False)
    model.inception5b = nn.Identity()

    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.aside = models.googlenet(init_weights=False, aux_logits=False).inception5b

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model.inception3a(self.model.conv1(x)[:, :1].repeat(1, 192, 1, 1))

    with pytest.raises(ValueError, match=r"did not come by model.inception3b.* include="):
        find_sites(Aside(), input_shape=(1, 3, 64, 64))


def test_what_is_no_map_can_be_left_out() -> None:
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.BatchNorm1d(8)).eval()
    where = lambda m: m if hasattr(m, "running_mean") else None  # noqa: E731
    with pytest.raises(ValueError, match=r"map at 4 is \[1, 8\].* Leave it out with include="):
        spem.attach(model, "spem", where=where)
    assert spem.attach(model, "spem", where=where, include="1") == ["1"]


def test_layers_that_have_seen_no_data_are_not_given_the_guessed_input() -> None:
    """A lazy layer takes its size from the first batch, which is the user's to choose."""
    body = small()
    body.fc = nn.LazyLinear(5)
    model = nn.Sequential(nn.Sequential(*body.children())[:8], nn.Flatten(), body.fc)
    assert len(spem.attach(model, "spem", dry_run=True)) == 4
    assert len(spem.attach(model, "spem")) == 4
    assert body.fc.has_uninitialized_params()
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 5)


def test_a_network_that_processes_share_is_refused() -> None:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        wrapped = nn.Sequential(nn.parallel.DistributedDataParallel(small()))
        with pytest.raises(ValueError, match=r"is in a DistributedDataParallel.* Attach first"):
            spem.attach(wrapped, "spem")
        sharded = small()
        spem.attach(sharded, "spem")
        for attention in attentions(sharded):
            attention.alpha = nn.Parameter(attention.alpha.detach().reshape(1))
        fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
        sharded(torch.zeros(1, 3, 64, 64))
        with pytest.raises(ValueError, match=r"is in a FSDPModule.* an alpha only in the shape"):
            spem.attach(sharded, "spem")
    finally:
        torch.distributed.destroy_process_group()


def test_a_class_is_taken_as_its_spec() -> None:
    model = small()
    assert len(spem.attach(model, spem.SPEM)) == 4
    assert isinstance(model.layer1[0].bn2.attention.inner, spem.SPEM)


class Picky(nn.Module):
    """Takes images of one size, which nothing says."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = small(), nn.Linear(1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[-1] == 48
        return self.body(x)


def test_find_sites_takes_what_attach_takes() -> None:
    """A guess at the input that does not fit is not a fault; sizes of maps are missing then."""
    sites = find_sites(Picky(), "se", start="module", fuse=True)
    assert [site.shape for site in sites] == [None] * 4
    assert sites[0].parameters
    assert find_sites(Picky(), "se", input_shape=(1, 3, 48, 48))[0].shape == (1, 64, 12, 12)
    model = Picky()
    assert spem.attach(model, "se", fuse=True) == [site.name for site in sites]
    with pytest.raises(ValueError, match=r"does not run on an input of \[1, 3, 32, 32\]"):
        find_sites(Picky(), "se", input_shape=(1, 3, 32, 32))
    assert find_sites(Picky(), "fca(size=12)", stages=1)  # else its size has to be found
    with pytest.raises(ValueError, match="does not run on an input of"):
        find_sites(Picky(), "fca", stages=1)


def test_new_modules_take_the_mode_of_their_place_and_old_ones_that_of_the_network() -> None:
    model = timm.create_model("test_resnet", num_classes=3).eval()
    model.stages[0].train() if hasattr(model, "stages") else model.layer1.train()
    modes = {name: module.training for name, module in model.named_modules()}
    spem.attach(model, "spem")
    for name, module in model.named_modules():
        if name not in modes:
            assert module.training == modes[name.rpartition(".se")[0]]
    replaced = timm.create_model("seresnext26t_32x4d", num_classes=3).train()
    with pytest.warns(UserWarning, match="do not go over"):
        spem.attach(replaced, "spem", replace=True)
    replaced.eval()
    spem.detach(replaced)
    assert not [name for name, module in replaced.named_modules() if module.training]
    frozen = small().train()
    for module in frozen.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    spem.attach(frozen, "spem")
    assert frozen.layer1[0].bn2.attention.training
    assert not frozen.layer1[0].bn2.norm.training
