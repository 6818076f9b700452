"""What is known of the sets that go by a name, for weights whose images are not at hand."""

from spem.data.digits import DEFAULT_SIZE
from spem.data.sources import HUB_IDS

_CLASSES = {
    "cifar10": "airplane automobile bird cat deer dog frog horse ship truck",
    "digits": "0 1 2 3 4 5 6 7 8 9",
}


def known_name(name: str) -> str | None:
    """The short name of a known set, from that name or its hub id; None for a folder of images.

    A folder is not known by what it is called, since anything may lie in it.

    >>> known_name("uoft-cs/cifar10"), known_name("mine/cifar10")
    ('cifar10', None)
    """
    short = {hub_id: key for key, hub_id in HUB_IDS.items()}.get(name, name)
    return short if short == "digits" or short in HUB_IDS else None


def native_size(name: str) -> int | None:
    """Height and width of a set's images where a training asks for none; None if not known.

    >>> native_size("cifar100"), native_size("digits"), native_size("mine/cifar100")
    (32, 16, None)
    """
    short = known_name(name)
    return None if short is None else DEFAULT_SIZE if short == "digits" else 32


def class_names(name: str, count: int) -> tuple[str, ...] | None:
    """The names of a set's classes in the order of their labels; None if they are not known.

    >>> class_names("cifar10", 10)[3]
    'cat'
    """
    names = tuple(_CLASSES.get(known_name(name) or "", "").split())
    return names if len(names) == count else None
