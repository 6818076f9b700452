"""Facts about the named data sets, without reading them; nothing here loads torch."""

Triple = tuple[float, float, float]

HUB_IDS = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}
"""Short name of a set -> its id on the Hugging Face hub."""

NORMALISATION: dict[str, tuple[Triple, Triple]] = {
    # The paper's, for both CIFARs: its deviations are means over single images.
    "paper": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    # Mean and deviation over all pixels of the training images.
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "digits": ((0.3054, 0.3054, 0.3054), (0.3753, 0.3753, 0.3753)),
}
"""(mean, standard deviation) per channel of pixels scaled to 0 .. 1, by name."""

DIGITS_SIZE = 16
"""Default height and width of the digits."""

_CLASSES = {
    "cifar10": "airplane automobile bird cat deer dog frog horse ship truck",
    "digits": "0 1 2 3 4 5 6 7 8 9",
}


def known_name(name: str) -> str | None:
    """The short name of a known set, from that name or its hub id; None for a folder.

    A folder's name says nothing, since it may hold anything.

    Examples:
        >>> known_name("uoft-cs/cifar10"), known_name("mine/cifar10")
        ('cifar10', None)
    """
    short = {hub_id: key for key, hub_id in HUB_IDS.items()}.get(name, name)
    return short if short == "digits" or short in HUB_IDS else None


def native_size(name: str) -> int | None:
    """Default height and width of a set's images; None if unknown."""
    short = known_name(name)
    return None if short is None else DIGITS_SIZE if short == "digits" else 32


def class_names(name: str, count: int) -> tuple[str, ...] | None:
    """The names of a set's classes in the order of their labels; None if unknown."""
    names = tuple(_CLASSES.get(known_name(name) or "", "").split())
    return names if len(names) == count else None
