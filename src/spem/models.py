"""CIFAR ResNets with any attention in each block, and a reader for official checkpoints."""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from spem.attention import PLACES, AttentionSpec, ChannelAttention, as_spec
from spem.attention.base import Place, Tail
from spem.attention.options import one_of, positive_int
from spem.depths import STEPS, blocks_per_stage
from spem.ops import bn_gate_tail, norm_relu
from spem.seeding import initialise

BlockName = Literal["bottleneck", "basic"]
Slot = Place | Literal["shared"]
"""A place, or that of the one module for the tails of all blocks of a stage."""


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


class Places:
    """Answers a network at each of its slots: the attention of the spec, or the plain layer.

    The network asks at every slot it has, so that it knows no module.
    """

    def __init__(self, spec: AttentionSpec | None) -> None:
        self._spec = spec

    def at(
        self, slot: Slot, channels: int, *, size: int | None = None, stride: int | None = None
    ) -> ChannelAttention | None:
        """The module of a slot, if the attention goes there."""
        spec = self._spec
        if spec is None or slot != ("shared" if spec.shared else spec.place):
            return None
        return spec.build(channels, size=size, stride=stride)

    def norm(self, channels: int) -> nn.Module:
        """A batch norm, or the module that replaces it."""
        return self.at("norm", channels) or nn.BatchNorm2d(channels)

    def conv(self, conv: nn.Conv2d) -> nn.Conv2d:
        """A convolution, with the module before it if there is one."""
        attention = self.at("conv", conv.in_channels)
        return conv if attention is None else GatedConv(conv, attention)

    def middle(self, conv: nn.Conv2d, norm: nn.Module) -> tuple[nn.Module, nn.Module]:
        """A bottleneck's 3x3 convolution and its norm, or the module in place of both."""
        attention = self.at("middle", conv.out_channels, stride=conv.stride[0])
        return (conv, norm) if attention is None else (attention, nn.Identity())


class GatedConv(nn.Conv2d):
    """A convolution of attention(x); weight and bias keep the names they have without attention."""

    def __init__(self, conv: nn.Conv2d, attention: ChannelAttention) -> None:
        vars(self).update(vars(conv))  # all of it
        self.attention = attention

    def forward(self, input: Tensor) -> Tensor:  # torch's name
        """conv(attention(x)), [N, C, H, W]."""
        return super().forward(self.attention(input))


class Block(nn.Module):
    """A residual block with attention on its last norm's output.

    Other kinds of attention go elsewhere; `Places` returns what each slot holds.
    """

    expansion: ClassVar[int]
    last: ClassVar[str]
    """The norm that ends its branch."""

    def __init__(
        self,
        inputs: int,
        planes: int,
        stride: int = 1,
        attention: AttentionSpec | None = None,
        size: int | None = None,
    ) -> None:
        super().__init__()
        outputs, places = planes * self.expansion, Places(attention)
        self._add_layers(places, inputs, planes, stride)
        self.attention = places.at("tail", outputs, size=size)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            conv = places.conv(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False))
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def _add_layers(self, places: Places, inputs: int, planes: int, stride: int) -> None:
        raise NotImplementedError

    def _branch(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def last_norm(self) -> nn.Module:
        """The norm that ends the residual branch, before the attention."""
        return self.get_submodule(self.last)

    def forward(self, x: Tensor, shared: Tail | None = None) -> Tensor:
        """[N, inputs, H, W] -> [N, expansion planes, H/stride, W/stride].

        It ends in relu(attention(norm(z)) + residual), in one operation if the gate depends only on
        plane statistics (`spem.ops`). ``shared`` is the tail of the attention that a stage's blocks
        share; attention that replaces the norm ends the branch itself.
        """
        residual = x if self.downsample is None else self.downsample(x)
        z, norm, attention = self._branch(x), self.last_norm, self.attention
        if shared is not None:
            return shared(z, residual, norm)
        if isinstance(attention, ChannelAttention):
            return attention.tail(z, residual, norm)
        if attention is not None:  # two in a row: `spem.attach` added one
            return torch.relu(attention(norm(z)) + residual)
        if isinstance(norm, ChannelAttention):
            return norm.tail(z, residual)
        return bn_gate_tail(z, residual, norm)


class Bottleneck(Block):
    """1x1, 3x3 (stride here) and 1x1 convolutions."""

    expansion, last = 4, "bn3"

    def _add_layers(self, places: Places, inputs: int, planes: int, stride: int) -> None:
        self.conv1 = places.conv(nn.Conv2d(inputs, planes, 1, bias=False))
        self.bn1 = places.norm(planes)
        middle = places.conv(_conv3x3(planes, planes, stride))
        self.conv2, self.bn2 = places.middle(middle, places.norm(planes))
        self.conv3 = places.conv(nn.Conv2d(planes, 4 * planes, 1, bias=False))
        self.bn3 = places.norm(4 * planes)

    def _branch(self, x: Tensor) -> Tensor:
        x = norm_relu(self.conv1(x), self.bn1)
        return self.conv3(norm_relu(self.conv2(x), self.bn2))


class Basic(Block):
    """Two 3x3 convolutions, the first with the stride."""

    expansion, last = 1, "bn2"

    def _add_layers(self, places: Places, inputs: int, planes: int, stride: int) -> None:
        self.conv1 = places.conv(_conv3x3(inputs, planes, stride))
        self.bn1 = places.norm(planes)
        self.conv2 = places.conv(_conv3x3(planes, planes))
        self.bn2 = places.norm(planes)

    def _branch(self, x: Tensor) -> Tensor:
        return self.conv2(norm_relu(self.conv1(x), self.bn1))


class Stage(nn.Module):
    """Blocks "0", "1" ... in sequence, and the attention of the stage.

    ``shared`` is one module for the tails of all blocks (any state it carries is reset in every
    forward pass), ``after`` one for the stage's output; or None.
    """

    def __init__(
        self,
        stack: Sequence[Block],
        shared: ChannelAttention | None = None,
        after: ChannelAttention | None = None,
    ) -> None:
        super().__init__()
        self._count = len(stack)
        for number, block in enumerate(stack):
            self.add_module(str(number), block)
        self.shared = shared
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] -> [N, outputs, H/stride, W/stride]."""
        tails = None if self.shared is None else self.shared.begin(len(self))
        for number in range(len(self)):
            x = self[number](x, tails and tails[number])
        return x if self.after is None else self.after(x)

    def __len__(self) -> int:
        """The number of blocks."""
        return self._count

    def __getitem__(self, number: int) -> Block:
        """A block by its number."""
        # What wraps a block is called as the block is: it need not be of its class.
        return cast("Block", self.get_submodule(str(range(self._count)[number])))


_BLOCKS: dict[str, type[Block]] = {"bottleneck": Bottleneck, "basic": Basic}


class ResNet(nn.Module):
    """The CIFAR ResNet: 3x3 stem, three stages of n blocks (planes 16, 32, 64), mean, linear.

    ``depth``, ``classes`` and ``block`` are as for `resnet`, ``spec`` is the attention or None.
    """

    def __init__(
        self,
        depth: int,
        classes: int = 10,
        *,
        attention: AttentionSpec | None = None,
        block: BlockName = "bottleneck",
    ) -> None:
        super().__init__()
        one_of("resnet", tuple(_BLOCKS), block=block)
        kind, count = _BLOCKS[block], blocks_per_stage(depth, block, label="resnet: depth")
        positive_int("resnet", classes=classes)
        self.depth, self.classes, self.block, self.spec = depth, classes, block, attention
        places = Places(attention)
        self.conv1 = places.conv(_conv3x3(3, 16))
        self.bn1 = places.norm(16)

        def stage(inputs: int, planes: int, stride: int, size: int, *, last: bool = False) -> Stage:
            outputs = planes * kind.expansion
            first = kind(inputs, planes, stride, attention, size)
            rest = [kind(outputs, planes, 1, attention, size) for _ in range(count - 1)]
            shared = places.at("shared", outputs, size=size)
            after = None if last else places.at("between", outputs, size=size)
            return Stage([first, *rest], shared, after or places.at("stage", outputs, size=size))

        # The last number is the map's side for 32 x 32 images, for attention built for one size.
        self.layer1 = stage(16, 16, 1, 32)
        self.layer2 = stage(16 * kind.expansion, 32, 2, 16)
        self.layer3 = stage(32 * kind.expansion, 64, 2, 8, last=True)
        self.fc = nn.Linear(64 * kind.expansion, classes)
        placed = any(isinstance(module, ChannelAttention) for module in self.modules())
        if attention is not None and not placed:
            raise ValueError(
                f"resnet: {attention} goes {PLACES[attention.place]}, and a network of {block} "
                f"blocks has no such place. Use block='bottleneck'."
            )

    def forward(self, x: Tensor) -> Tensor:
        """Logits, [N, 3, H, W] -> [N, classes]; any H, W >= 1."""
        x = norm_relu(self.conv1(x), self.bn1)
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))  # no adaptive pool: deterministic, and a plain reduction


def blocks(model: nn.Module) -> list[tuple[str, Block]]:
    """The residual blocks of a network with their names, in order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Block)]


def start_branches(model: nn.Module, weight: float) -> None:
    """Set the weight of the last norm of every residual branch, a control for SPEM's start."""
    for _, block in blocks(model):
        nn.init.constant_(block.last_norm.get_parameter("weight"), weight)


def resnet(
    depth: int,
    classes: int = 10,
    *,
    attention: str | AttentionSpec | None = None,
    block: BlockName = "bottleneck",
) -> ResNet:
    """Build a CIFAR ResNet; its weights follow torch's generator (`torch.manual_seed`).

    `spem.initialise` draws them from a seed and their names instead, so that networks of one seed
    differ only in their attention.

    Args:
        depth: 9n + 2 for bottleneck blocks (11, 29, 83, 164, 245, 326), 6n + 2 for basic ones
            (20 ... 110).
        classes: Number of classes.
        attention: A spec or its text, for example ``"spem"`` or ``"se(reduction=8)"``; None or
            ``"none"`` is the plain network.
        block: ``"bottleneck"`` or ``"basic"``.

    Raises:
        ValueError: A depth that the blocks cannot make, an unknown block or attention, or an
            attention that does not fit the block's channels.

    Examples:
        >>> sum(p.numel() for p in resnet(164, attention="spem").parameters())
        1736518
    """
    model = ResNet(depth, classes, attention=as_spec(attention), block=block)
    initialise(model, None)
    return model


_OFFICIAL_NAMES = {"w1": "w_e", "b1": "b_e", "w2": "w_r", "b2": "b_r", "p": "pool.p"}


def load_official(path: str | Path) -> ResNet:
    """Read a checkpoint of the official SPEM repository into a network of form ``code``.

    Depth and number of classes follow from the weights. Nothing in the file is executed.

    Args:
        path: A file that ``torch.save`` wrote: a dict with ``state_dict`` (keys with or without
            ``module.``).

    Returns:
        The network in evaluation mode, float32, on the CPU.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, holds objects other than tensors and numbers, or is no such
            checkpoint.
    """
    content = io.BytesIO(Path(path).read_bytes())
    try:
        stored: Any = torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # whose text would have it read without weights_only
        raise ValueError(
            f"load_official: {path} is damaged or no checkpoint of tensors and numbers alone."
        ) from error
    state = stored.get("state_dict") if isinstance(stored, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(
            f"load_official: {path} holds no 'state_dict' of tensors, as the official code "
            f"saves it."
        )
    ours: dict[str, Tensor] = {}
    for key, value in state.items():
        head, _, last = str(key).removeprefix("module.").rpartition(".")
        if re.fullmatch(r"layer[123]\.\d+", head) and last in _OFFICIAL_NAMES:
            last = f"attention.{_OFFICIAL_NAMES[last]}"
            value = value if last.endswith(".p") else value.reshape(-1)  # 1 x C x 1 x 1 there
        ours[f"{head}.{last}" if head else last] = value
    count = len({key.split(".")[1] for key in ours if key.startswith("layer1.")})
    spec = AttentionSpec("spem", {"form": "code"})
    try:
        classes = ours["fc.weight"].shape[0]
        model = ResNet(STEPS["bottleneck"] * count + 2, classes, attention=spec)
        model.load_state_dict(ours)
    except (LookupError, ValueError, RuntimeError) as error:
        why = shorten(str(error), 200, placeholder=" ...")  # it lists every key
        raise ValueError(
            f"load_official: {path} is not a SPEM network of the official layout (layer1.0.w1, "
            f"fc.weight): {why}"
        ) from None
    return model.eval()
