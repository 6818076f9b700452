"""The table of families: where attention goes in the blocks of other people's networks.

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
    """Where attention goes in the blocks of a family.

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


def _rule(how: How, find: str | Find, classes: str, reads: str = "", stage: Stage = "name") -> Rule:
    """A rule whose classes lack "models."; a text is the name of the slot or the module."""
    if isinstance(find, str):
        find = _slot(find) if how == "slot" else _at(find)
    full = tuple(name.replace(".", ".models.", 1) for name in classes.split())
    return Rule(full, how, find, reads, stage)


def _slot(name: str) -> Find:
    """A slot, if the block has one."""
    return lambda block: [name] if hasattr(block, name) else []


def _at(*paths: str) -> Find:
    """The first of these names that is a module of the block."""
    return lambda block: [p for p in paths if isinstance(attribute(block, p), nn.Module)][:1]


def attribute(holder: object, path: str) -> object:
    """The attribute of a dotted name; None if there is none."""
    for name in path.split("."):
        holder = getattr(holder, name, None)
    return holder


def _last_norm(inside: str) -> Find:
    """The last norm in a part of the block, in the order of the forward pass (a Sequential's)."""

    def find(block: nn.Module) -> list[str]:
        part = block.get_submodule(inside)
        norms = [name for name, module in part.named_modules() if is_norm(module)]
        return [f"{inside}.{name}" for name in norms[-1:]]

    return find


def _before_pools(net: nn.Module) -> list[str]:
    """In ``features``, the last norm before every pooling; the last convolution without norms."""
    found: list[str] = []
    norm = conv = None
    for name, layer in net.get_submodule("features").named_children():
        norm = name if is_norm(layer) else norm
        conv = name if isinstance(layer, nn.Conv2d) else conv
        if isinstance(layer, nn.MaxPool2d) and (norm or conv):
            found.append(f"features.{norm or conv}")
            norm = conv = None
    return found


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm of maps: torch's, timm's or torchvision's."""
    if isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)):  # pyright: ignore[reportPrivateUsage]  # the base of batch and instance norms
        return True
    names = {cls.__name__ for cls in type(module).__mro__}
    return bool(names & {"FrozenBatchNorm2d", "FrozenBatchNormAct2d", "FrozenBatchNorm"})


_EFFICIENTNET = "timm._efficientnet_blocks:"
_MOBILE = "torchvision.mobilenetv"

RULES = (
    # Residual blocks with a slot for attention after their last norm.
    _rule("slot", "se", "timm.resnet:BasicBlock", "bn2"),
    _rule("slot", "se", "timm.resnet:Bottleneck timm.res2net:Bottle2neck", "bn3"),
    _rule("slot", "se", "timm.sknet:SelectiveKernelBasic timm.tresnet:BasicBlock", "conv2.bn"),
    _rule("slot", "se", "timm.sknet:SelectiveKernelBottleneck", "conv3.bn"),
    _rule("slot", "se_module", "timm.senet:Bottleneck", "bn3"),
    _rule("slot", "se_module", "timm.senet:SEResNetBlock", "bn2"),
    _rule("slot", "attn3", "timm.cspnet:BottleneckBlock", "conv3.bn"),
    _rule("slot", "attn", "timm.vovnet:OsaBlock", "conv_concat.bn"),
    _rule("slot", "attn_last", "timm.byobnet:BasicBlock timm.byobnet:DarkBlock", "conv2_kxk.bn"),
    _rule("slot", "attn_last", "timm.byobnet:BottleneckBlock", "conv3_1x1.bn"),
    _rule("slot", "attn_last", "timm.byobnet:EdgeBlock", "conv2_1x1.bn"),
    # The sum of the branches, before the activation; the slot outlives reparameterize().
    _rule("slot", "attn", "timm.byobnet:RepVggBlock", "conv_1x1.bn"),
    _rule("slot", "attn", "timm.byobnet:MobileOneBlock", "conv_kxk.0.bn"),
    Rule(("spem.models:Bottleneck", "spem.models:Basic"), "slot", _slot("attention"), "last_norm"),
    # Residual blocks whose last norm is wrapped.
    _rule("after", "bn2", "torchvision.resnet:BasicBlock timm.dla:DlaBasic"),
    _rule("after", "bn3", "torchvision.resnet:Bottleneck timm.resnest:ResNestBottleneck"),
    _rule("after", "bn3", "timm.dla:DlaBottleneck timm.dla:DlaBottle2neck"),
    _rule("after", "conv3.bn", "timm.regnet:Bottleneck timm.tresnet:Bottleneck"),
    _rule("after", "conv2.bn", "timm.cspnet:DarkBlock timm.cspnet:EdgeBlock"),
    _rule("after", "norm3", "timm.resnetv2:Bottleneck"),
    _rule("after", _last_norm("f"), "torchvision.regnet:ResBottleneckBlock"),
    _rule("after", _last_norm("rep"), "timm.xception:Block", stage="channels"),
    _rule("after", _last_norm("stack"), "timm.xception_aligned:XceptionModule", stage="channels"),
    # Inverted residuals: their own SE sits in the middle of the block and is left alone.
    _rule("after", "bn3", f"{_EFFICIENTNET}InvertedResidual {_EFFICIENTNET}CondConvResidual"),
    _rule("after", "bn2", f"{_EFFICIENTNET}DepthwiseSeparableConv {_EFFICIENTNET}EdgeResidual"),
    # Without a skip it is not a block but a bare layer.
    _rule("after", lambda block: ["bn1"] * bool(block.has_skip), f"{_EFFICIENTNET}ConvBnAct"),
    _rule("after", "layer_scale", f"{_EFFICIENTNET}UniversalInvertedResidual", "pw_proj.bn"),
    _rule("after", "conv_pwl.bn", "timm.rexnet:LinearBottleneck", stage="channels"),
    _rule("after", _last_norm("conv"), f"{_MOBILE}2:InvertedResidual", stage="channels"),
    _rule("after", _last_norm("block"), f"{_MOBILE}3:InvertedResidual", stage="channels"),
    _rule("after", _last_norm("block"), "torchvision.efficientnet:MBConv"),
    _rule("after", _last_norm("block"), "torchvision.efficientnet:FusedMBConv"),
    _rule("after", _last_norm("layers"), "torchvision.mnasnet:_InvertedResidual"),
    # Half of the channels pass a block of ShuffleNet untouched; the other half is its branch.
    _rule("after", _last_norm("branch2"), "torchvision.shufflenetv2:InvertedResidual"),
    _rule("after", "ghost2", "timm.ghostnet:GhostBottleneck", "ghost2.out_chs"),
    _rule("after", "ghost2", "timm.ghostnet:GhostBottleneckV3", "ghost2.out_chs"),
    _rule("after", "ghost2", "timm.repghost:RepGhostBottleneck"),
    _rule("after", "channel_mixer", "timm.repvit:RepViTBlock"),
    _rule("after", "ffn", "timm.repvit:RepVitDownsample"),
    # Branches that end in layer scale or a bare convolution: before the drop of the branch.
    _rule("before", "drop_path", "timm.convnext:ConvNeXtBlock", "gamma"),
    _rule("before", "stochastic_depth", "torchvision.convnext:CNBlock", "layer_scale", "channels"),
    _rule(
        "before",
        "drop_path",
        "timm.edgenext:ConvBlock timm.fasternet:MLPBlock timm.fastvit:RepMixerBlock "
        "timm.inception_next:MetaNeXtBlock timm.maxxvit:MbConvBlock timm.maxxvit:ConvNeXtBlock "
        "timm.starnet:Block",
    ),
    _rule("before", "stochastic_depth", "torchvision.maxvit:MBConv"),
    _rule(
        "before", "drop_path", "timm.resnetv2:PreActBottleneck timm.nfnet:NormFreeBlock", "conv3"
    ),
    _rule("before", "drop_path", "timm.resnetv2:PreActBasic", "conv2"),
    # Networks without residual blocks.
    _rule("after", _before_pools, "timm.vgg:VGG torchvision.vgg:VGG", stage="site"),
    _rule("after", _before_pools, "torchvision.alexnet:AlexNet", stage="site"),
    _rule("after", "pool", "timm.densenet:DenseTransition", "conv", "site"),
    _rule("after", "pool", "torchvision.densenet:_Transition", "conv", "site"),
    _rule("after", "features.norm5", "timm.densenet:DenseNet", stage="site"),
    _rule("after", "features.norm5", "torchvision.densenet:DenseNet", stage="site"),
    _rule("after", lambda _: [""], "torchvision.squeezenet:Fire", stage="channels"),
    _rule("after", _last_norm("conv6"), "timm.selecsls:SelecSlsBlock"),
    # What is added of a dual path; where it is one convolution with what is appended, both.
    _rule("after", _at("c1x1_c1", "c1x1_c"), "timm.dpn:DualPathBlock"),
    _rule("after", lambda _: [""], "torchvision.googlenet:Inception"),
    *(
        _rule("after", lambda _: [""], f"{library}:Inception{letter}")
        for library in ("torchvision.inception", "timm.inception_v3")
        for letter in "ABCDE"
    ),
    *(
        _rule("after", lambda _: [""], f"timm.inception_v4:{kind}", stage="channels")
        for kind in ("InceptionA", "InceptionB", "InceptionC", "ReductionA", "ReductionB")
    ),
    _rule("after", "aggregation", "timm.hgnet:HighPerfGpuBlock"),
    *(
        _rule("after", "conv2d", f"timm.inception_resnet_v2:Block{size}", stage="channels")
        for size in (35, 17, 8)
    ),
)
"""One row per kind of block. A block without shortcut (the first of a stage of inverted residuals)
has attention where the others add."""

_BY_CLASS = {name: rule for rule in RULES for name in rule.classes}


def rule_of(module: nn.Module) -> Rule | None:
    """The rule of a block, by its class or the nearest base that has one."""
    names = (f"{cls.__module__}:{cls.__name__}" for cls in type(module).__mro__)
    return next((_BY_CLASS[name] for name in names if name in _BY_CLASS), None)
