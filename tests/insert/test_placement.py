"""The place in a block: a factor per channel there is the same as one in the last norm's weights.

The names of these norms are written here by hand for each family, so this does not share the rules
of the table. Positive factors pass the activations that follow a norm in some families.
"""

from __future__ import annotations

import copy
import re
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from insert.hosts import attentions, build, images, meta, sampled, scattered, stages_of
from tolerance import TOLERANCE
from torch import nn

import spem
from spem.insert import IdentityStart
from spem.insert.sites import find_spots, followed
from spem.models import Bottleneck

# what holds a factor on the channels of the branch: parameters, by their whole names
LAST = {
    "timm:resnet18": r"layer\d\.\d\.bn2\.(weight|bias)",
    "timm:skresnet18": r"layer\d\.\d\.conv2\.bn\.(weight|bias)",
    "timm:regnetx_002": r"s\d\.b\d\.conv3\.bn\.(weight|bias)",
    "timm:resnest14d": r"layer\d\.\d\.bn3\.(weight|bias)",
    "timm:dla46_c": r"level\d\.(tree\d\.)+bn3\.(weight|bias)",
    "timm:hrnet_w18_small": r"(layer1\.\d|incre_modules\.\d\.0)\.bn3\.(weight|bias)"
    r"|stage\d\.\d\.branches\.\d\.\d\.bn2\.(weight|bias)",
    "timm:cspresnet50": r"stages\.\d\.blocks\.\d\.conv3\.bn\.(weight|bias)",
    "timm:efficientnet_b0": r"blocks\.(0\.0\.bn2|[1-6]\.\d\.bn3)\.(weight|bias)",
    "timm:convnext_atto": r"stages\.\d\.blocks\.\d\.gamma",
    "timm:gernet_s": r"stages\.([01]\.\d\.conv2_kxk|[2-4]\.\d\.conv3_1x1)\.bn\.(weight|bias)",
    "timm:repvgg_a0": r"(stem|stages\.\d\.\d+)\.(identity|conv_(kxk|1x1)\.bn)\.(weight|bias)",
    "timm:resnetv2_18": r"stages\.\d\.blocks\.\d\.conv2\.weight",
    "torchvision:resnet18": r"layer\d\.\d\.bn2\.(weight|bias)",
    "torchvision:regnet_y_400mf": r"trunk_output\.block\d\.block\d-\d\.f\.c\.1\.(weight|bias)",
    "torchvision:mobilenet_v2": r"features\.(1\.conv\.2|([2-9]|1[0-7])\.conv\.3)\.(weight|bias)",
    "torchvision:mnasnet0_5": r"layers\.\d+\.\d\.layers\.7\.(weight|bias)",
    "torchvision:shufflenet_v2_x0_5": r"stage\d\.\d\.branch2\.6\.(weight|bias)",
    "torchvision:densenet121": r"features\.(transition\d\.conv\.weight|norm5\.(weight|bias))",
}


@pytest.mark.parametrize("name", sampled(LAST))
def test_place(name: str) -> None:
    network = scattered(build(name)).double()
    x = images(2, 64, torch.float64)
    scaled = copy.deepcopy(network)
    with pytest.warns(UserWarning, match="trained") if has_norms(network) else nullcontext():
        names = spem.attach(network, "scale", start="module", input_shape=tuple(x.shape))
    assert len(names) == sum(stages_of(name))
    factors = factor_of_each_site(network)
    prefixes = [site.rpartition(".")[0] for site in names]
    used: set[str] = set()
    with torch.no_grad():
        for key, parameter in scaled.named_parameters():
            if re.fullmatch(LAST[name], key):
                site = key.rpartition(".")[0]
                if "transition" in key:
                    site = site.replace(".conv", ".pool")
                elif site not in names:  # what holds the factor and the site are in one block
                    block = max((p for p in prefixes if key.startswith(f"{p}.")), key=len)
                    site = names[prefixes.index(block)]
                used.add(site)
                shape = (-1,) + (1,) * (parameter.dim() - 1)
                parameter.mul_(factors[names.index(site)].reshape(shape))
        assert used == set(names)
        torch.testing.assert_close(network(x), scaled(x), **TOLERANCE[torch.float64])


def has_norms(network: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())


def factor_of_each_site(network: nn.Module) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(5)
    factors = []
    for attention in attentions(network):
        (parameter,) = attention.parameters()
        with torch.no_grad():
            parameter.uniform_(0.5, 1.5, generator=rng)
        factors.append(parameter.detach())
    return factors


@pytest.mark.parametrize(
    "host",
    [
        *("timm:resnet18", "timm:hrnet_w18_small", "torchvision:resnext50_32x4d"),
        *(pytest.param(f"timm:{n}", marks=pytest.mark.slow) for n in ("dla46_c", "cspdarknet53")),
    ],
)
def test_following_a_forward_pass_finds_what_the_table_says(host: str) -> None:
    """Where every block adds, the additions of a forward pass are at the sites of the table."""
    network = meta(host)
    ends = [spot.layer for spot in followed(network, (1, 3, 64, 64))]
    spots = find_spots(network, None, replacing=False, input_shape=None)
    assert len(ends) == sum(stages_of(host))
    assert set(ends) == {spot.reads if spot.free else spot.layer for spot in spots}


def test_following_leaves_out_blocks_that_do_not_add() -> None:
    """An inverted residual without shortcut has a site of the table, and no addition."""
    network = meta("timm:mobilenetv2_050")
    ends = list(followed(network, (1, 3, 64, 64)))
    # The first blocks of 7 stages change the width: 17 - 7.
    assert len(ends) == 10


@pytest.mark.parametrize("first", ["se", "iebn", "sk"])
def test_a_second_attention_in_our_own_networks(first: str) -> None:
    """It follows the one that is there: relu(second(first(norm(z))) + shortcut)."""
    network, x = scattered(spem.resnet(11, attention=first)).eval(), images(size=32)
    with torch.no_grad(), spem.ops.use_impl("reference"):  # a fused tail rounds in another order
        before = network(x)
        assert len(spem.attach(network, "scale")) == 3
        torch.testing.assert_close(network(x), before, rtol=0, atol=0)
        for attention in network.modules():
            if isinstance(attention, IdentityStart):
                attention.alpha.fill_(1.0)
                attention.inner.factor.fill_(0.0)  # every branch is gone
        moved = network(x)
        spem.detach(network)
        torch.testing.assert_close(network(x), before, rtol=0, atol=0)
        for block in (m for m in network.modules() if isinstance(m, Bottleneck)):
            block.forward = partial(shortcut_alone, block)
        torch.testing.assert_close(moved, network(x))


def shortcut_alone(block: Bottleneck, x: torch.Tensor, shared: object = None) -> torch.Tensor:
    return torch.relu(x if block.downsample is None else block.downsample(x))
