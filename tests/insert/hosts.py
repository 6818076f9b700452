"""Networks of timm and torchvision with the sites they have, and everything in them at random.

timm starts the last norm of a branch at zero, which hides every error in the branch; so all
parameters and running statistics are drawn.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple, TypeVar

import pytest
import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    timm = pytest.importorskip("timm", reason="timm is not installed")
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")

M = TypeVar("M", bound=nn.Module)


class Host(NamedTuple):
    """An architecture, how many sites and stages it has, and why so many."""

    name: str
    sites: int
    stages: int
    why: str


# run forward and backward, with all that is checked of a family
RUN = [
    Host("timm:resnet18", 8, 4, "2 blocks in each of 4 stages"),
    Host("timm:seresnext26t_32x4d", 8, 4, "2 blocks in each of 4 stages, after their SE"),
    Host("timm:skresnet18", 8, 4, "2 blocks in each of 4 stages"),
    Host("timm:legacy_seresnet18", 8, 4, "2 blocks in each of 4 stages, after their SE"),
    Host("timm:regnetx_002", 13, 4, "1 + 1 + 4 + 7 blocks"),
    Host("timm:regnety_002", 13, 4, "1 + 1 + 4 + 7 blocks, their SE is in the middle"),
    Host("timm:resnest14d", 4, 4, "1 block in each of 4 stages"),
    Host("timm:densenet121", 4, 4, "3 transitions and the final norm"),
    Host("timm:mobilenetv2_050", 17, 7, "1 + 2 + 3 + 4 + 3 + 3 + 1 blocks"),
    Host(
        "timm:mobilenetv3_small_050", 11, 5, "1 + 2 + 3 + 2 + 3 blocks; the head's has no shortcut"
    ),
    Host(
        "timm:mobilenetv4_conv_small", 12, 2, "6 + 6 universal blocks; the others are bare layers"
    ),
    Host("timm:efficientnet_b0", 16, 7, "1 + 2 + 2 + 3 + 3 + 4 + 1 blocks"),
    Host("timm:tf_efficientnetv2_b0", 20, 5, "2 + 2 + 3 + 5 + 8 blocks; the first stage is bare"),
    Host("timm:ghostnet_050", 16, 9, "16 ghost bottlenecks in 9 stages"),
    Host("timm:convnext_atto", 12, 4, "2 + 2 + 6 + 2 blocks"),
    Host("timm:dla46_c", 12, 4, "trees of depth 1, 2, 2, 1: 2 + 4 + 4 + 2 blocks"),
    Host(
        "timm:hrnet_w18_small", 23, 8, "1, then 2 per branch of 1 x 2, 1 x 3, 1 x 4; 4 in the head"
    ),
    Host("timm:cspresnet50", 13, 4, "2 + 3 + 5 + 3 blocks, their first convolutions in one"),
    Host("timm:cspdarknet53", 23, 5, "1 + 2 + 8 + 8 + 4 blocks"),
    Host("timm:repvgg_a0", 22, 5, "the stem, then 2 + 4 + 14 + 1 blocks"),
    Host("timm:gernet_s", 14, 5, "1 + 3 + 7 + 2 + 1 blocks"),
    Host(
        "timm:ese_vovnet19b_dw", 4, 4, "1 one-shot aggregation in each of 4 stages, after their ESE"
    ),
    Host("timm:hgnetv2_b0", 5, 4, "1 + 1 + 2 + 1 blocks"),
    Host("timm:rexnet_100", 16, 16, "16 blocks, each of a width of its own"),
    Host("timm:resnetv2_18", 8, 4, "2 blocks in each of 4 stages"),
    Host("timm:dpn48b", 16, 4, "3 + 4 + 6 + 3 dual-path blocks"),
    Host(
        "timm:repvit_m0_9", 26, 4, "2 + 2 + 14 + 2 blocks, and 2 branches before each of 3 stages"
    ),
    Host("timm:fasternet_t0", 13, 4, "1 + 2 + 8 + 2 blocks"),
    Host("torchvision:resnet18", 8, 4, "2 blocks in each of 4 stages"),
    Host("torchvision:resnext50_32x4d", 16, 4, "3 + 4 + 6 + 3 blocks"),
    Host("torchvision:regnet_y_400mf", 16, 4, "1 + 3 + 6 + 6 blocks"),
    Host("torchvision:densenet121", 4, 4, "3 transitions and the final norm"),
    Host("torchvision:mobilenet_v2", 17, 7, "1 + 2 + 3 + 4 + 3 + 3 + 1 blocks"),
    Host("torchvision:mobilenet_v3_small", 11, 5, "1 + 2 + 3 + 2 + 3 blocks"),
    Host("torchvision:efficientnet_b0", 16, 7, "1 + 2 + 2 + 3 + 3 + 4 + 1 blocks"),
    Host("torchvision:convnext_tiny", 18, 4, "3 + 3 + 9 + 3 blocks"),
    Host("torchvision:mnasnet0_5", 16, 6, "3 + 3 + 3 + 2 + 4 + 1 blocks"),
    Host("torchvision:shufflenet_v2_x0_5", 16, 3, "4 + 8 + 4 blocks"),
    Host("torchvision:googlenet", 9, 3, "2 + 5 + 2 inception modules"),
    Host("torchvision:squeezenet1_1", 8, 4, "2 fire modules of each of 4 widths"),
]

# only counted: too large to be run here; their blocks are those of the families above
COUNTED = [
    Host("timm:resnet50", 16, 4, "3 + 4 + 6 + 3 blocks"),
    Host("timm:resnet50d", 16, 4, "3 + 4 + 6 + 3 blocks"),
    Host("timm:resnext50_32x4d", 16, 4, "3 + 4 + 6 + 3 blocks"),
    Host("timm:wide_resnet50_2", 16, 4, "3 + 4 + 6 + 3 blocks"),
    Host("timm:seresnet50", 16, 4, "3 + 4 + 6 + 3 blocks"),
    Host("timm:ecaresnet50t", 16, 4, "3 + 4 + 6 + 3 blocks"),
    Host("timm:resnext26ts", 8, 4, "2 blocks in each of 4 stages"),
    Host("timm:res2net50_26w_4s", 16, 4, "3 + 4 + 6 + 3 blocks"),
    Host("timm:resnest50d", 16, 4, "3 + 4 + 6 + 3 blocks"),
    Host("timm:dla34", 12, 4, "trees of depth 1, 2, 2, 1: 2 + 4 + 4 + 2 blocks"),
    Host("timm:darknet53", 23, 5, "1 + 2 + 8 + 8 + 4 blocks"),
    Host("timm:cspresnext50", 13, 4, "2 + 3 + 5 + 3 blocks"),
    Host("timm:vgg11_bn", 5, 5, "5 poolings"),
    Host("timm:vgg16", 5, 5, "5 poolings, after a convolution for want of norms"),
    Host("timm:mobileone_s0", 43, 5, "the stem, then 4 + 16 + 20 + 2 blocks"),
    Host("timm:inception_v3", 11, 3, "3 + 5 + 3 modules"),
    Host("timm:inception_v4", 16, 3, "4 + 1 + 7 + 1 + 3 modules"),
    Host("timm:inception_resnet_v2", 40, 3, "10 + 20 + 10 residual modules"),
    Host("timm:legacy_xception", 12, 4, "12 modules of 128, 256, 728 and 1024 channels"),
    Host("timm:xception41", 13, 5, "3 + 8 + 2 modules of 128, 256, 728, 1024 and 2048 channels"),
    Host("timm:tresnet_m", 21, 4, "3 + 4 + 11 + 3 blocks"),
    Host("timm:resnetv2_50", 16, 4, "3 + 4 + 6 + 3 blocks"),
    Host("timm:nf_resnet26", 8, 4, "2 blocks in each of 4 stages"),
    Host("timm:mnasnet_100", 17, 7, "1 + 3 + 3 + 3 + 2 + 4 + 1 blocks"),
    Host("timm:fbnetc_100", 21, 7, "1 + 3 + 4 + 4 + 4 + 4 + 1 blocks"),
    Host("timm:repghostnet_050", 16, 9, "16 ghost bottlenecks in 9 stages"),
    Host("timm:dpn68", 22, 4, "3 + 4 + 12 + 3 dual-path blocks"),
    Host("timm:selecsls42", 6, 6, "6 modules"),
    Host("timm:fastvit_t8", 10, 4, "2 + 2 + 4 + 2 blocks"),
    Host("torchvision:resnet50", 16, 4, "3 + 4 + 6 + 3 blocks"),
    Host("torchvision:wide_resnet50_2", 16, 4, "3 + 4 + 6 + 3 blocks"),
    Host("torchvision:vgg16_bn", 5, 5, "5 poolings"),
    Host("torchvision:efficientnet_v2_s", 40, 6, "2 + 4 + 4 + 6 + 9 + 15 blocks"),
    Host("torchvision:inception_v3", 11, 3, "3 + 5 + 3 modules"),
    Host("torchvision:alexnet", 3, 3, "3 poolings"),
    Host("torchvision:maxvit_t", 11, 4, "2 + 2 + 5 + 2 blocks, their convolutional parts"),
]


def build(name: str, classes: int = 7) -> nn.Module:
    """An architecture without weights, in evaluation mode."""
    library, _, arch = name.partition(":")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if library == "timm":
            return timm.create_model(arch, pretrained=False, num_classes=classes).eval()
        options = {"aux_logits": False} if arch == "googlenet" else {}
        if arch in ("googlenet", "inception_v3"):
            options["init_weights"] = False
        return models.get_model(arch, weights=None, num_classes=classes, **options).eval()


def scattered(model: M, seed: int = 0) -> M:
    """The network with every parameter and running statistic drawn; maps stay of size one."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2 and parameter[0].numel() > 1:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=rng)
            else:
                parameter.uniform_(0.4, 1.0, generator=rng)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0.0, 0.2, generator=rng)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5, generator=rng)
    return model


def images(batch: int = 2, size: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)


def attentions(model: nn.Module) -> list[nn.Module]:
    """The attention modules that stand in a network by themselves, not those inside others."""
    from spem import ChannelAttention

    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, ChannelAttention) and id(module) not in inside:
            found.append(module)
            inside |= {id(part) for part in module.modules()}
    return found
