"""Networks of timm and torchvision by their names, with random weights."""

import inspect
import warnings
from collections.abc import Mapping
from difflib import get_close_matches

from torch import nn

from spem.extras import rephrased, require

OPTIONS: dict[str, dict[str, type]] = {
    "timm": {
        "num_classes": int,
        "in_chans": int,
        "global_pool": str,
        "drop_rate": float,
        "drop_path_rate": float,
        "output_stride": int,
    },
    "torchvision": {"num_classes": int},
}
"""What may be said about an architecture, and of what type. Nothing else is passed on: other
arguments of these packages name files and addresses."""


def library_of(arch: str, asker: str) -> tuple[str, str]:
    """The library of an architecture, and its name there; timm comes first.

    ``torchvision:resnet50`` names one that timm has too. Messages begin with ``asker``.

    Raises:
        ValueError: Neither knows the name; the message lists the nearest.
        ImportError: timm or torchvision is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what these packages say about names of their own
        timm = require("timm", extra="timm", purpose=asker)
        models = require("torchvision.models", extra="timm", purpose=asker)
        library, _, name = arch.rpartition(":")
        theirs: list[str] = models.list_models()
        if library in ("", "timm") and timm.is_model(name):
            return "timm", name
        if library in ("", "torchvision") and name in theirs:
            return "torchvision", name
        known: set[str] = {*timm.list_models(), *theirs}
    near = get_close_matches(name, sorted(known), n=3, cutoff=0.6)
    hint = f"Did you mean {' or '.join(near)}?" if near else "timm.list_models() lists them."
    raise ValueError(f"{asker}: unknown architecture {arch!r}. {hint}")


def build(
    arch: str, options: Mapping[str, object] | None = None, *, asker: str = "build"
) -> nn.Module:
    """An architecture with random weights, in evaluation mode. Nothing is fetched.

    Raises:
        ValueError: An unknown name or option, an option of another type, or one that this
            architecture does not take.
        ImportError: timm or torchvision is not installed.
    """
    library, name = library_of(arch, asker)
    given = dict(options or {})
    _check_options(library, given, asker)
    how = f"with {given}" if given else "at all"
    with rephrased(f"{asker}: {arch} cannot be built {how}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if library == "timm":
            timm = require("timm", extra="timm", purpose=asker)
            return timm.create_model(name, pretrained=False, **given).eval()
        models = require("torchvision.models", extra="timm", purpose=asker)
        takes = inspect.signature(models.get_model_builder(name)).parameters
        fetching = {o: None for o in ("weights", "weights_backbone") if o in takes}
        return models.get_model(name, **fetching, **given).eval()


def _check_options(library: str, options: Mapping[str, object], asker: str) -> None:
    """Raises ValueError unless all options are of `OPTIONS`, each of its type."""
    allowed = OPTIONS[library]
    for option, value in options.items():
        if option not in allowed:
            said = f"{library} architectures take no option {option!r} here"
            raise ValueError(f"{asker}: {said}. Use {', '.join(allowed)}.")
        kind = allowed[option]
        right = isinstance(value, (int, float) if kind is float else kind)
        if not right or isinstance(value, bool):
            raise ValueError(f"{asker}: {option}={value!r} must be of type {kind.__name__}.")
