"""Networks of timm and torchvision with the sites they have, and everything in them at random.

timm starts the last norm of a branch at zero, which hides every error in the branch; so all
parameters and running statistics are drawn.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from spem.insert.sites import attentions_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    timm = pytest.importorskip("timm", reason="timm is not installed")
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")

M = TypeVar("M", bound=nn.Module)

# the blocks of each stage; run forward and backward, with all that is checked of a family
RUN = {
    "timm:resnet18": "2 2 2 2",
    "timm:seresnext26t_32x4d": "2 2 2 2",  # after their SE
    "timm:skresnet18": "2 2 2 2",
    "timm:legacy_seresnet18": "2 2 2 2",  # after their SE
    "timm:regnetx_002": "1 1 4 7",
    "timm:regnety_002": "1 1 4 7",  # their SE is in the middle
    "timm:resnest14d": "1 1 1 1",
    "timm:densenet121": "1 1 1 1",  # 3 transitions and the final norm
    "timm:mobilenetv2_050": "1 2 3 4 3 3 1",
    "timm:mobilenetv3_small_050": "1 2 3 2 3",  # the head's has no shortcut
    "timm:mobilenetv4_conv_small": "6 6",  # universal blocks; the others are bare layers
    "timm:efficientnet_b0": "1 2 2 3 3 4 1",
    "timm:tf_efficientnetv2_b0": "2 2 3 5 8",  # the first stage is bare
    "timm:ghostnet_050": "1 1 1 1 1 1 5 1 4",
    "timm:convnext_atto": "2 2 6 2",
    "timm:dla46_c": "2 4 4 2",  # trees of depth 1, 2, 2, 1
    "timm:hrnet_w18_small": "1 4 6 8 1 1 1 1",  # 2 a branch of 1 x 2, 1 x 3, 1 x 4; 4 in the head
    "timm:cspresnet50": "3 3 5 2",  # their first convolutions in one
    "timm:cspdarknet53": "1 2 8 8 4",
    "timm:repvgg_a0": "1 2 4 14 1",  # the first is the stem
    "timm:gernet_s": "1 3 7 2 1",
    "timm:ese_vovnet19b_dw": "1 1 1 1",  # after their ESE
    "timm:hgnetv2_b0": "1 1 2 1",
    "timm:rexnet_100": "1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1",  # each of a width of its own
    "timm:resnetv2_18": "2 2 2 2",
    "timm:dpn48b": "3 4 6 3",
    "timm:repvit_m0_9": "2 4 16 4",  # 2 + 2 + 14 + 2, and 2 branches before each of 3 stages
    "timm:fasternet_t0": "1 2 8 2",
    "torchvision:resnet18": "2 2 2 2",
    "torchvision:resnext50_32x4d": "3 4 6 3",
    "torchvision:regnet_y_400mf": "1 3 6 6",
    "torchvision:densenet121": "1 1 1 1",
    "torchvision:mobilenet_v2": "1 2 3 4 3 3 1",
    "torchvision:mobilenet_v3_small": "1 2 3 2 3",
    "torchvision:efficientnet_b0": "1 2 2 3 3 4 1",
    "torchvision:convnext_tiny": "3 3 9 3",
    "torchvision:mnasnet0_5": "3 3 3 2 4 1",
    "torchvision:shufflenet_v2_x0_5": "4 8 4",
    "torchvision:googlenet": "2 5 2",
    "torchvision:squeezenet1_1": "2 2 2 2",  # of 4 widths
}

# only counted: too large to be run here; their blocks are those of the families above
COUNTED = {
    **dict.fromkeys(
        [
            *("timm:resnet50", "timm:resnet50d", "timm:resnext50_32x4d", "timm:wide_resnet50_2"),
            *("timm:seresnet50", "timm:ecaresnet50t", "timm:res2net50_26w_4s", "timm:resnest50d"),
            *("timm:resnetv2_50", "torchvision:resnet50", "torchvision:wide_resnet50_2"),
        ],
        "3 4 6 3",
    ),
    "timm:resnext26ts": "2 2 2 2",
    "timm:dla34": "2 4 4 2",
    "timm:darknet53": "1 2 8 8 4",
    "timm:cspresnext50": "3 3 5 2",
    "timm:vgg11_bn": "1 1 1 1 1",  # poolings
    "timm:vgg16": "1 1 1 1 1",  # after a convolution for want of norms
    "timm:mobileone_s0": "1 4 16 20 2",  # the first is the stem
    "timm:inception_v3": "3 5 3",
    "timm:inception_v4": "4 8 4",
    "timm:inception_resnet_v2": "10 20 10",
    "timm:legacy_xception": "1 1 9 1",  # modules of 128, 256, 728 and 1024 channels
    "timm:xception41": "1 1 9 1 1",  # of 128, 256, 728, 1024 and 2048 channels
    "timm:tresnet_m": "3 4 11 3",
    "timm:nf_resnet26": "2 2 2 2",
    "timm:mnasnet_100": "1 3 3 3 2 4 1",
    "timm:fbnetc_100": "1 3 4 4 4 4 1",
    "timm:repghostnet_050": "1 1 1 1 1 1 5 1 4",
    "timm:dpn68": "3 4 12 3",
    "timm:selecsls42": "1 1 1 1 1 1",
    "timm:fastvit_t8": "2 2 4 2",
    "torchvision:vgg16_bn": "1 1 1 1 1",
    "torchvision:efficientnet_v2_s": "2 4 4 6 9 15",
    "torchvision:inception_v3": "3 5 3",
    "torchvision:alexnet": "1 1 1",
    "torchvision:maxvit_t": "2 2 5 2",
}

# one of each way in which attention is put in; the others are run with the slow tests
FAST = {
    *("timm:resnet18", "timm:seresnext26t_32x4d", "timm:convnext_atto", "timm:densenet121"),
    *("timm:mobilenetv4_conv_small", "timm:efficientnet_b0", "timm:mobilenetv3_small_050"),
    *("torchvision:resnet18", "torchvision:mobilenet_v2", "torchvision:squeezenet1_1"),
    *("torchvision:mobilenet_v3_small", "timm:vgg11_bn", "timm:inception_v3", "timm:resnet50"),
}


def sampled(names: Iterable[str]) -> list[Any]:
    """Parameters of a test: those that are not `FAST` are slow."""
    return [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in names]


def stages_of(name: str) -> list[int]:
    """The number of sites in each stage."""
    return [int(number) for number in (RUN | COUNTED)[name].split()]


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


def small(norm: Any = nn.BatchNorm2d, block: str = "BasicBlock", **options: Any) -> nn.Module:
    """torchvision's ResNet with one block a stage."""
    kind = getattr(models.resnet, block)
    return models.resnet.ResNet(kind, [1, 1, 1, 1], num_classes=5, norm_layer=norm, **options)


def small_timm(block: str = "BasicBlock", layers: Any = (1, 1, 1, 1), **options: Any) -> nn.Module:
    """timm's."""
    return timm.models.resnet.ResNet(
        getattr(timm.models.resnet, block), layers, num_classes=5, **options
    )


def meta(name: str) -> nn.Module:
    """An architecture on the meta device, where one of any size is built and run in no time."""
    if "regnet" in name and name.startswith("torchvision"):
        return build(name)  # it computes its widths with tensors
    with torch.device("meta"):
        return build(name)


def attentions(model: nn.Module) -> list[Any]:
    """The attention modules that a network holds by themselves, not those inside others."""
    return list(attentions_of(model).values())


def set_alpha(model: nn.Module, value: float) -> None:
    """Sets the alpha of every identity start."""
    for module in attentions(model):
        nn.init.constant_(module.alpha, value)


def draw_inner(model: nn.Module, std: float) -> None:
    """Draws what every identity start starts."""
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in attentions(model):
            for parameter in module.inner.parameters():
                parameter.normal_(0.0, std, generator=rng)
