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


@dataclass(frozen=True)
class Rule:
    """Where attention goes in the blocks of a family.

    Attributes:
        how: ``"slot"``: an attribute of the block that is None or an identity where it is free;
            ``"after"`` or ``"before"``: a module of the block, which is wrapped.
        place: Name, within the block, of the slot or the module; ``"conv.*"`` is the last norm in
            ``conv``, "" the block itself; or a function that gives all names.
        reads: Attribute of the block that has the channels (a module, a parameter or a number);
            "" is the wrapped module. If it has none, they are found by a traced forward.
        stage: What a stage is: ``"name"``: sites whose names agree up to their first number
            (layer1, blocks.0); ``"channels"``: neighbours of one width; ``"site"``: each its own.
    """

    how: How
    place: str | Callable[[nn.Module], list[str]]
    reads: str = ""
    stage: Stage = "name"

    def places(self, block: nn.Module) -> list[str]:
        """Names of the slot or the modules within a block; none where it lacks them."""
        if callable(self.place):
            return self.place(block)
        inside, found, _ = self.place.partition(".*")
        if found:  # in the order of the forward pass, which is a Sequential's
            norms = [n for n, part in block.get_submodule(inside).named_modules() if is_norm(part)]
            return [f"{inside}.{name}" for name in norms[-1:]]
        held = isinstance(attribute(block, self.place), nn.Module)
        return [self.place] * (hasattr(block, self.place) if self.how == "slot" else held)


def attribute(holder: object, path: str) -> object:
    """The attribute of a dotted name, "" the holder itself; None if there is none."""
    for name in path.split(".") if path else ():
        holder = getattr(holder, name, None)
    return holder


def is_norm(module: object) -> bool:
    """Whether a module is a norm of maps: torch's, timm's or torchvision's."""
    if isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)):  # pyright: ignore[reportPrivateUsage]  # the base of batch and instance norms
        return True
    names = {cls.__name__ for cls in type(module).__mro__}
    return bool(names & {"FrozenBatchNorm2d", "FrozenBatchNormAct2d", "FrozenBatchNorm"})


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


RULES = {
    # Residual blocks with a slot for attention after their last norm.
    "spem:Basic,Bottleneck": Rule("slot", "attention", "last_norm"),
    "timm.resnet:BasicBlock": Rule("slot", "se", "bn2"),
    "timm.resnet:Bottleneck timm.res2net:Bottle2neck": Rule("slot", "se", "bn3"),
    "timm.sknet:SelectiveKernelBasic timm.tresnet:BasicBlock": Rule("slot", "se", "conv2.bn"),
    "timm.sknet:SelectiveKernelBottleneck": Rule("slot", "se", "conv3.bn"),
    "timm.senet:Bottleneck": Rule("slot", "se_module", "bn3"),
    "timm.senet:SEResNetBlock": Rule("slot", "se_module", "bn2"),
    "timm.cspnet:BottleneckBlock": Rule("slot", "attn3", "conv3.bn"),
    "timm.vovnet:OsaBlock": Rule("slot", "attn", "conv_concat.bn"),
    "timm.byobnet:BasicBlock,DarkBlock": Rule("slot", "attn_last", "conv2_kxk.bn"),
    "timm.byobnet:BottleneckBlock": Rule("slot", "attn_last", "conv3_1x1.bn"),
    "timm.byobnet:EdgeBlock": Rule("slot", "attn_last", "conv2_1x1.bn"),
    # The sum of the branches, before the activation; the slot outlives reparameterize().
    "timm.byobnet:RepVggBlock": Rule("slot", "attn", "conv_1x1.bn"),
    "timm.byobnet:MobileOneBlock": Rule("slot", "attn", "conv_kxk.0.bn"),
    # Residual blocks whose last norm is wrapped.
    "torchvision.resnet:BasicBlock timm.dla:DlaBasic": Rule("after", "bn2"),
    "torchvision.resnet:Bottleneck timm.resnest:ResNestBottleneck": Rule("after", "bn3"),
    "timm.dla:DlaBottleneck,DlaBottle2neck": Rule("after", "bn3"),
    "timm.regnet:Bottleneck timm.tresnet:Bottleneck": Rule("after", "conv3.bn"),
    "timm.cspnet:DarkBlock,EdgeBlock": Rule("after", "conv2.bn"),
    "timm.resnetv2:Bottleneck": Rule("after", "norm3"),
    "torchvision.regnet:ResBottleneckBlock": Rule("after", "f.*"),
    "timm.xception:Block": Rule("after", "rep.*", stage="channels"),
    "timm.xception_aligned:XceptionModule": Rule("after", "stack.*", stage="channels"),
    # Inverted residuals: their own SE sits in the middle of the block and is left alone.
    "timm._efficientnet_blocks:InvertedResidual,CondConvResidual": Rule("after", "bn3"),
    "timm._efficientnet_blocks:DepthwiseSeparableConv,EdgeResidual": Rule("after", "bn2"),
    # Without a skip it is not a block but a bare layer.
    "timm._efficientnet_blocks:ConvBnAct": Rule("after", lambda m: ["bn1"] * bool(m.has_skip)),
    "timm._efficientnet_blocks:UniversalInvertedResidual": Rule(
        "after", "layer_scale", "pw_proj.bn"
    ),
    "timm.rexnet:LinearBottleneck": Rule("after", "conv_pwl.bn", stage="channels"),
    "torchvision.mobilenetv2:InvertedResidual": Rule("after", "conv.*", stage="channels"),
    "torchvision.mobilenetv3:InvertedResidual": Rule("after", "block.*", stage="channels"),
    "torchvision.efficientnet:MBConv,FusedMBConv": Rule("after", "block.*"),
    "torchvision.mnasnet:_InvertedResidual": Rule("after", "layers.*"),
    # Half of the channels pass a block of ShuffleNet untouched; the other half is its branch.
    "torchvision.shufflenetv2:InvertedResidual": Rule("after", "branch2.*"),
    "timm.ghostnet:GhostBottleneck,GhostBottleneckV3": Rule("after", "ghost2", "ghost2.out_chs"),
    "timm.repghost:RepGhostBottleneck": Rule("after", "ghost2"),
    "timm.repvit:RepViTBlock": Rule("after", "channel_mixer"),
    "timm.repvit:RepVitDownsample": Rule("after", "ffn"),
    # Branches that end in layer scale or a bare convolution: before the drop of the branch.
    "timm.convnext:ConvNeXtBlock": Rule("before", "drop_path", "gamma"),
    "torchvision.convnext:CNBlock": Rule("before", "stochastic_depth", "layer_scale", "channels"),
    "timm.edgenext:ConvBlock timm.fasternet:MLPBlock timm.fastvit:RepMixerBlock "
    "timm.inception_next:MetaNeXtBlock timm.maxxvit:MbConvBlock,ConvNeXtBlock "
    "timm.starnet:Block": Rule("before", "drop_path"),
    "torchvision.maxvit:MBConv": Rule("before", "stochastic_depth"),
    "timm.resnetv2:PreActBottleneck timm.nfnet:NormFreeBlock": Rule("before", "drop_path", "conv3"),
    "timm.resnetv2:PreActBasic": Rule("before", "drop_path", "conv2"),
    # Networks without residual blocks.
    "timm.vgg:VGG torchvision.vgg:VGG torchvision.alexnet:AlexNet": Rule(
        "after", _before_pools, stage="site"
    ),
    "timm.densenet:DenseTransition torchvision.densenet:_Transition": Rule(
        "after", "pool", "conv", "site"
    ),
    "timm.densenet:DenseNet torchvision.densenet:DenseNet": Rule(
        "after", "features.norm5", stage="site"
    ),
    "torchvision.squeezenet:Fire": Rule("after", "", stage="channels"),
    "timm.selecsls:SelecSlsBlock": Rule("after", "conv6.*"),
    # What is added of a dual path; where it is one convolution with what is appended, both.
    "timm.dpn:DualPathBlock": Rule(
        "after", lambda m: ["c1x1_c1" if attribute(m, "c1x1_c1") else "c1x1_c"]
    ),
    "torchvision.googlenet:Inception": Rule("after", ""),
    "torchvision.inception:InceptionA,InceptionB,InceptionC,InceptionD,InceptionE "
    "timm.inception_v3:InceptionA,InceptionB,InceptionC,InceptionD,InceptionE": Rule("after", ""),
    "timm.inception_v4:InceptionA,InceptionB,InceptionC,ReductionA,ReductionB": Rule(
        "after", "", stage="channels"
    ),
    "timm.hgnet:HighPerfGpuBlock": Rule("after", "aggregation"),
    "timm.inception_resnet_v2:Block35,Block17,Block8": Rule("after", "conv2d", stage="channels"),
}
"""Classes of blocks, modules without ``models``. A block without shortcut (the first of a stage of
inverted residuals) has attention where the others add."""

_BY_CLASS = {
    f"{path}:{name}": rule
    for kinds, rule in RULES.items()
    for path, names in (kind.split(":") for kind in kinds.split())
    for name in names.split(",")
}


def rule_of(module: nn.Module) -> Rule | None:
    """The rule of a block, by its class or the nearest base that has one."""
    kinds = type(module).__mro__
    names = (f"{cls.__module__.replace('.models', '', 1)}:{cls.__name__}" for cls in kinds)
    return next((_BY_CLASS[name] for name in names if name in _BY_CLASS), None)
