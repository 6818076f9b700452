"""Channel attention for convolutional networks: SPEM, its competitors, their comparison.

Names load what they need when they are first used (PEP 562), so that ``import spem`` is immediate
and loads no torch. A new attention module becomes a name here by its line in `spem.attention`.
"""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from spem.version import __version__ as __version__

if TYPE_CHECKING:
    from spem import (
        attention as attention,
        cost as cost,
        data as data,
        explain as explain,
        export as export,
        ops as ops,
        reproduce as reproduce,
        stats as stats,
        training as training,
    )
    from spem.attention import *  # noqa: F403
    from spem.export import to_onnx as to_onnx
    from spem.gates import inspect as inspect
    from spem.insert import (
        attach as attach,
        attn_layer as attn_layer,
        detach as detach,
        find_sites as find_sites,
        fold as fold,
    )
    from spem.models import ResNet as ResNet, load_official as load_official, resnet as resnet
    from spem.seeding import initialise as initialise, keyed_generator as keyed_generator
    from spem.share import (
        from_pretrained as from_pretrained,
        push_to_hub as push_to_hub,
        save_pretrained as save_pretrained,
    )

# Where the public names live that are not those of `spem.attention`.
_NAMES = {
    "export": ["to_onnx"],
    "gates": ["inspect"],
    "insert": ["attach", "attn_layer", "detach", "find_sites", "fold"],
    "models": ["ResNet", "load_official", "resnet"],
    "seeding": ["initialise", "keyed_generator"],
    "share": ["from_pretrained", "push_to_hub", "save_pretrained"],
}
_HOME = {name: home for home, names in _NAMES.items() for name in names}


def _attention() -> dict[str, Any]:
    """What `spem.attention` offers, and every module class that it imports."""
    package = import_module("spem.attention")
    base: type = package.ChannelAttention
    classes = {n for n, v in vars(package).items() if isinstance(v, type) and issubclass(v, base)}
    return {name: getattr(package, name) for name in {*package.__all__, *classes}}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted({*_HOME, *_attention()})
    if name.startswith("_"):
        raise AttributeError(f"module 'spem' has no attribute {name!r}")
    if name in _HOME:
        value = getattr(import_module(f"spem.{_HOME[name]}"), name)
    elif find_spec(f"spem.{name}") is not None:
        return import_module(f"spem.{name}")
    elif name in (found := _attention()):
        value = found[name]
    else:
        raise AttributeError(f"module 'spem' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    parts = {part.name for part in iter_modules([str(Path(__file__).parent)])} - {"__main__"}
    own = {name for name in globals() if name.startswith("__")}
    return sorted({*own, *parts, *__getattr__("__all__")})
