"""The table of families: where in the blocks of other people's networks attention stands.

Classes are known by the module they are defined in and their name, so that neither timm nor
torchvision is loaded; a subclass has the rule of its base.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

How = Literal["slot", "after", "before", "replace"]
Stage = Literal["name", "channels", "site"]
Find = Callable[[nn.Module], list[str]]


@dataclass(frozen=True)
class Rule:
    """Where attention stands in the blocks of a family.

    Attributes:
        classes: The blocks: module path and class name, ``"timm.models.resnet:Bottleneck"``.
        how: ``"slot"``: an attribute of the block that is None or an identity where it is free;
            ``"after"`` or ``"before"``: a module of the block, which is wrapped.
        find: Names, within the block, of the slot or of the modules to wrap.
        reads: Attribute of the block that has the channels (a module, a parameter or a number);
            "" is the wrapped module itself. If it has none, they are found by a traced forward.
        stage: What a stage is: ``"name"``: sites whose names agree up to their first number
            (layer1, blocks.0); ``"channels"``: neighbours of one width; ``"site"``: each its own.
    """

    classes: tuple[str, ...]
    how: How
    find: Find
    reads: str = ""
    stage: Stage = "name"


def at(*paths: str) -> Find:
    """Fixed names; those of them that the block has."""
    return lambda block: [path for path in paths if child(block, path) is not None]


def first_of(*paths: str) -> Find:
    """The first of these names that the block has."""
    return lambda block: at(*paths)(block)[:1]


def slot(name: str) -> Find:
    """A slot, if the block has one."""
    return lambda block: [name] if hasattr(block, name) else []


def if_true(flag: str, path: str) -> Find:
    """A fixed name in blocks whose flag is set; the others are no blocks but bare layers."""
    return lambda block: [path] if getattr(block, flag) else []


def last_norm(inside: str) -> Find:
    """The last norm in a part of the block, in the order of the forward pass (a Sequential's)."""

    def find(block: nn.Module) -> list[str]:
        part = block.get_submodule(inside)
        norms = [name for name, module in part.named_modules() if is_norm(module)]
        return [f"{inside}.{norms[-1]}"] if norms else []

    return find


def before_pools(inside: str) -> Find:
    """In a Sequential, the last norm before every pooling; the last convolution without norms."""

    def find(net: nn.Module) -> list[str]:
        found: list[str] = []
        norm = conv = None
        for name, layer in net.get_submodule(inside).named_children():
            norm = name if is_norm(layer) else norm
            conv = name if isinstance(layer, nn.Conv2d) else conv
            if isinstance(layer, nn.MaxPool2d) and (norm or conv):
                found.append(f"{inside}.{norm or conv}")
                norm = conv = None
        return found

    return find


def itself(_: nn.Module) -> list[str]:
    """The block as a whole."""
    return [""]


def child(module: nn.Module, path: str) -> nn.Module | None:
    """A submodule by its dotted name, or None."""
    for name in path.split("."):
        found = getattr(module, name, None)
        if not isinstance(found, nn.Module):
            return None
        module = found
    return module


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm of maps: torch's, timm's or torchvision's."""
    if isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)):  # pyright: ignore[reportPrivateUsage]  # the base of batch and instance norms
        return True
    names = {cls.__name__ for cls in type(module).__mro__}
    return bool(names & {"FrozenBatchNorm2d", "FrozenBatchNormAct2d", "FrozenBatchNorm"})


RULES = (
    # Residual blocks with a slot for attention after their last norm.
    Rule(("timm.models.resnet:BasicBlock",), "slot", slot("se"), "bn2"),
    Rule(
        ("timm.models.resnet:Bottleneck", "timm.models.res2net:Bottle2neck"),
        "slot",
        slot("se"),
        "bn3",
    ),
    Rule(
        ("timm.models.sknet:SelectiveKernelBasic", "timm.models.tresnet:BasicBlock"),
        "slot",
        slot("se"),
        "conv2.bn",
    ),
    Rule(("timm.models.sknet:SelectiveKernelBottleneck",), "slot", slot("se"), "conv3.bn"),
    Rule(("timm.models.senet:Bottleneck",), "slot", slot("se_module"), "bn3"),
    Rule(("timm.models.senet:SEResNetBlock",), "slot", slot("se_module"), "bn2"),
    Rule(("timm.models.cspnet:BottleneckBlock",), "slot", slot("attn3"), "conv3.bn"),
    Rule(("timm.models.vovnet:OsaBlock",), "slot", slot("attn"), "conv_concat.bn"),
    Rule(
        ("timm.models.byobnet:BasicBlock", "timm.models.byobnet:DarkBlock"),
        "slot",
        slot("attn_last"),
        "conv2_kxk.bn",
    ),
    Rule(("timm.models.byobnet:BottleneckBlock",), "slot", slot("attn_last"), "conv3_1x1.bn"),
    Rule(("timm.models.byobnet:EdgeBlock",), "slot", slot("attn_last"), "conv2_1x1.bn"),
    # The sum of the branches, before the activation; the slot outlives reparameterize().
    Rule(("timm.models.byobnet:RepVggBlock",), "slot", slot("attn"), "conv_1x1.bn"),
    Rule(("timm.models.byobnet:MobileOneBlock",), "slot", slot("attn"), "conv_kxk.0.bn"),
    Rule(
        ("spem.models:Bottleneck", "spem.models:Basic"),
        "slot",
        slot("attention"),
        "last_norm",
    ),
    # Residual blocks whose last norm is wrapped.
    Rule(
        (
            "torchvision.models.resnet:BasicBlock",
            "timm.models.dla:DlaBasic",
        ),
        "after",
        at("bn2"),
    ),
    Rule(
        (
            "torchvision.models.resnet:Bottleneck",
            "timm.models.resnest:ResNestBottleneck",
            "timm.models.dla:DlaBottleneck",
            "timm.models.dla:DlaBottle2neck",
        ),
        "after",
        at("bn3"),
    ),
    Rule(
        ("timm.models.regnet:Bottleneck", "timm.models.tresnet:Bottleneck"), "after", at("conv3.bn")
    ),
    Rule(
        (
            "timm.models.cspnet:DarkBlock",
            "timm.models.cspnet:EdgeBlock",
        ),
        "after",
        at("conv2.bn"),
    ),
    Rule(("timm.models.resnetv2:Bottleneck",), "after", at("norm3")),
    Rule(("torchvision.models.regnet:ResBottleneckBlock",), "after", last_norm("f")),
    Rule(("timm.models.xception:Block",), "after", last_norm("rep"), stage="channels"),
    Rule(
        ("timm.models.xception_aligned:XceptionModule",),
        "after",
        last_norm("stack"),
        stage="channels",
    ),
    # Inverted residuals: their own SE sits in the middle of the block and is left alone.
    Rule(
        (
            "timm.models._efficientnet_blocks:InvertedResidual",
            "timm.models._efficientnet_blocks:CondConvResidual",
        ),
        "after",
        at("bn3"),
    ),
    Rule(
        (
            "timm.models._efficientnet_blocks:DepthwiseSeparableConv",
            "timm.models._efficientnet_blocks:EdgeResidual",
        ),
        "after",
        at("bn2"),
    ),
    Rule(("timm.models._efficientnet_blocks:ConvBnAct",), "after", if_true("has_skip", "bn1")),
    Rule(
        ("timm.models._efficientnet_blocks:UniversalInvertedResidual",),
        "after",
        at("layer_scale"),
        "pw_proj.bn",
    ),
    Rule(("timm.models.rexnet:LinearBottleneck",), "after", at("conv_pwl.bn"), stage="channels"),
    Rule(
        ("torchvision.models.mobilenetv2:InvertedResidual",),
        "after",
        last_norm("conv"),
        stage="channels",
    ),
    Rule(
        ("torchvision.models.mobilenetv3:InvertedResidual",),
        "after",
        last_norm("block"),
        stage="channels",
    ),
    Rule(
        ("torchvision.models.efficientnet:MBConv", "torchvision.models.efficientnet:FusedMBConv"),
        "after",
        last_norm("block"),
    ),
    Rule(("torchvision.models.mnasnet:_InvertedResidual",), "after", last_norm("layers")),
    # Half of the channels pass a block of ShuffleNet untouched; the other half is its branch.
    Rule(("torchvision.models.shufflenetv2:InvertedResidual",), "after", last_norm("branch2")),
    Rule(
        ("timm.models.ghostnet:GhostBottleneck", "timm.models.ghostnet:GhostBottleneckV3"),
        "after",
        at("ghost2"),
        "ghost2.out_chs",
    ),
    Rule(("timm.models.repghost:RepGhostBottleneck",), "after", at("ghost2")),
    Rule(("timm.models.repvit:RepViTBlock",), "after", at("channel_mixer")),
    Rule(("timm.models.repvit:RepVitDownsample",), "after", at("ffn")),
    # Branches that end in layer scale or a bare convolution: before the drop of the branch.
    Rule(("timm.models.convnext:ConvNeXtBlock",), "before", at("drop_path"), "gamma"),
    Rule(
        ("torchvision.models.convnext:CNBlock",),
        "before",
        at("stochastic_depth"),
        "layer_scale",
        stage="channels",
    ),
    Rule(
        (
            "timm.models.edgenext:ConvBlock",
            "timm.models.fasternet:MLPBlock",
            "timm.models.fastvit:RepMixerBlock",
            "timm.models.inception_next:MetaNeXtBlock",
            "timm.models.maxxvit:MbConvBlock",
            "timm.models.maxxvit:ConvNeXtBlock",
            "timm.models.starnet:Block",
        ),
        "before",
        at("drop_path"),
    ),
    Rule(("torchvision.models.maxvit:MBConv",), "before", at("stochastic_depth")),
    Rule(("timm.models.resnetv2:PreActBottleneck",), "before", at("drop_path"), "conv3"),
    Rule(("timm.models.resnetv2:PreActBasic",), "before", at("drop_path"), "conv2"),
    Rule(("timm.models.nfnet:NormFreeBlock",), "before", at("drop_path"), "conv3"),
    # Networks without residual blocks.
    Rule(
        (
            "timm.models.vgg:VGG",
            "torchvision.models.vgg:VGG",
            "torchvision.models.alexnet:AlexNet",
        ),
        "after",
        before_pools("features"),
        stage="site",
    ),
    Rule(
        ("timm.models.densenet:DenseTransition", "torchvision.models.densenet:_Transition"),
        "after",
        at("pool"),
        "conv",
        stage="site",
    ),
    Rule(
        ("timm.models.densenet:DenseNet", "torchvision.models.densenet:DenseNet"),
        "after",
        at("features.norm5"),
        stage="site",
    ),
    Rule(("torchvision.models.squeezenet:Fire",), "after", itself, stage="channels"),
    Rule(("timm.models.selecsls:SelecSlsBlock",), "after", last_norm("conv6")),
    # What is added of a dual path; where it is one convolution with what is appended, both.
    Rule(("timm.models.dpn:DualPathBlock",), "after", first_of("c1x1_c1", "c1x1_c")),
    Rule(
        (
            *(f"torchvision.models.inception:Inception{letter}" for letter in "ABCDE"),
            *(f"timm.models.inception_v3:Inception{letter}" for letter in "ABCDE"),
            "torchvision.models.googlenet:Inception",
        ),
        "after",
        itself,
    ),
    Rule(
        tuple(
            f"timm.models.inception_v4:{name}"
            for name in ("InceptionA", "InceptionB", "InceptionC", "ReductionA", "ReductionB")
        ),
        "after",
        itself,
        stage="channels",
    ),
    Rule(("timm.models.hgnet:HighPerfGpuBlock",), "after", at("aggregation")),
    Rule(
        (
            "timm.models.inception_resnet_v2:Block35",
            "timm.models.inception_resnet_v2:Block17",
            "timm.models.inception_resnet_v2:Block8",
        ),
        "after",
        at("conv2d"),
        stage="channels",
    ),
)
"""One row per kind of block. A block without shortcut (the first of a stage of inverted residuals)
has attention where the others add."""

_BY_CLASS = {name: rule for rule in RULES for name in rule.classes}


def rule_of(module: nn.Module) -> Rule | None:
    """The rule of a block, by its class or the nearest base that has one."""
    for cls in type(module).__mro__:
        rule = _BY_CLASS.get(f"{cls.__module__}:{cls.__name__}")
        if rule is not None:
            return rule
    return None
