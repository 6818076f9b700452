"""What a module declares to its users: where it stands, and what its definition demands."""

from dataclasses import dataclass
from typing import Literal

Place = Literal["tail", "conv", "norm", "middle", "between", "stage"]
PLACES: dict[str, str] = {
    "tail": "after the last norm of every block",
    "conv": "before every convolution",
    "norm": "in place of every norm but the shortcuts'",
    "middle": "in place of the 3x3 convolution of every bottleneck, with its norm",
    "between": "after every stage but the last",
    "stage": "after every stage",
}
"""Places of a network that a module can stand in, and what they are."""


@dataclass(frozen=True)
class Needs:
    """What a module's definition demands of its caller; checked in forward and shown in tables.

    Attributes:
        statistics: Plane statistics its gate reads beside its pool's (``mean``, ``var``, ``max``,
            ``min``).
        pixels: Smallest number of positions of a map (H W).
        batch: Smallest number of images in training.
        values: Smallest number of values N H W in training.
        batch_statistics: Whether training and evaluation differ (the module holds a batch norm).
        divides: Name of the option that must divide the channels, or None.
        no_decay: Parameters (relative names) that its authors train without weight decay.
        size: Whether it is built for one map size (option ``size``, or the ``size`` that
            `create_attention` is told).
        fixed_size: Whether it refuses maps of another size than it was built for.
        stops_gradients: Parameters (relative names) whose gradient leaves out part of what they do,
            as the definition says.
        adds: Whether it also adds to the map: y = x * gate(x) + shift(x).
        place: Where in a network it stands, a key of `PLACES`; a module that can stand in several
            has an option ``placement`` of the same values.
        shared: Whether the blocks of a stage share one module.
        replaces: The layer it is used instead of, ``"norm"`` or ``"conv"``, or None. The output of
            such a module is not x * gate(x): the gate of one that replaces a norm multiplies the
            norm's weight, and one that replaces a convolution runs its convolutions in the dtype of
            the map, before its gate.
    """

    statistics: tuple[str, ...] = ()
    pixels: int = 1
    batch: int = 1
    values: int = 1
    batch_statistics: bool = False
    divides: str | None = None
    no_decay: tuple[str, ...] = ()
    size: bool = False
    fixed_size: bool = False
    stops_gradients: tuple[str, ...] = ()
    adds: bool = False
    place: Place = "tail"
    shared: bool = False
    replaces: Literal["norm", "conv"] | None = None
