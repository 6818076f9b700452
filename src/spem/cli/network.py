"""A network by one text, in all commands: a name, a function of one's own, or trained weights."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spem.cli.options import Options, UsageError, integer, one_of, unknown
from spem.extras import require

if TYPE_CHECKING:
    from torch import nn

    from spem.data import ImageSet
    from spem.training import DataIdentity, RunConfig

NETWORK_HELP = (
    "a name of timm or torchvision (resnet50), cifar:29 for ours, file.py:function for your own, "
    "or a run's folder or weights"
)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and deviation of images where nothing else is known."""


@dataclass(frozen=True)
class Network:
    """A network, and what is known of the images that it takes.

    Attributes:
        model: In evaluation mode, on the CPU.
        text: What it is, in words.
        channels: Of the images.
        size: Height and width of the images, or None.
        mean: Of the normalisation.
        std: Of the normalisation.
        classes: Names of the classes, or None.
        random: Whether its weights are random.
        lacking: Names of attention's weights that a file of weights did not hold.
        config: Of the run that trained it, or None.
        data: What that run was trained on, or None.
        impl: What ran its tails then, or None.
    """

    model: nn.Module
    text: str
    channels: int = 3
    size: int | None = None
    mean: tuple[float, ...] = IMAGENET[0]
    std: tuple[float, ...] = IMAGENET[1]
    classes: tuple[str, ...] | None = None
    random: bool = True
    lacking: tuple[str, ...] = ()
    config: RunConfig | None = None
    data: DataIdentity | None = None
    impl: str | None = None

    def shape(self, size: int | None = None, batch: int = 1) -> tuple[int, int, int, int]:
        """Of its input, at another size if one is given.

        Raises:
            ValueError: Trained weights do not say how large their images were.
        """
        side = size or self.size
        if side is None and self.config is not None:
            raise ValueError(
                f"the weights do not say how large the images of {self.config.data.name} were. "
                f"Give --size."
            )
        side = side or 224
        return (batch, self.channels, side, side)

    def require_classes(self, images: ImageSet) -> None:
        """Refuse images whose labels mean something else than the network's outputs.

        Raises:
            ValueError: The classes are others.
        """
        if self.data is not None:
            self.data.require_classes(images)
        elif self.classes is not None and self.classes != images.classes:
            raise ValueError(
                f"the network was trained on other classes ({', '.join(self.classes[:3])} ...) "
                f"than those of {images.name} ({', '.join(images.classes[:3])} ...). Use images of "
                f"the same classes."
            )


def add_network(options: Options, *, attention: bool = True, weights: bool = True) -> None:
    """Adds the argument NETWORK and what else `load_network` takes."""
    options.add("network", "NETWORK", NETWORK_HELP)
    if attention:
        options.add("--attention", "ATTENTION", 'put into it, such as spem or "se(reduction=8)"')
    if weights:
        options.add(
            "--weights", "FILE", "a .safetensors file of weights for a named network", kind=Path
        )
    options.add("--classes", "N", "outputs of a named network", kind=integer(1))
    options.add("--size", "PIXELS", "side of its images; else what it is made for", kind=integer(1))


def add_start(options: Options) -> None:
    """Adds the option for how attention starts."""
    options.add(
        "--start",
        "identity|module",
        "how attention without weights starts: as if it were not there, or as the module does",
        kind=one_of("identity", "module"),
        rare=True,
    )


def load_network(
    text: str,
    *,
    attention: str | None = None,
    start: str | None = None,
    fuse: bool = False,
    classes: int | None = None,
    weights: Path | None = None,
    size: int | None = None,
) -> Network:
    """The network that a text names.

    Args:
        text: ``resnet50`` (timm's, else torchvision's; ``torchvision:resnet50`` says which),
            ``cifar:29`` or ``29`` (ours; ``cifar:basic-56`` has basic blocks),
            ``path/to/file.py:function`` (called without arguments, returns the module), the folder
            of a run or of `save_pretrained`, or weights that a training wrote.
        attention: Attention to put into a named network.
        start: ``"identity"`` or ``"module"``; None is what the weights were trained with, without
            weights the identity.
        fuse: Give blocks of timm and torchvision the fused tail.
        classes: Number of outputs of a named network.
        weights: Weights of a named network; those of its attention may be missing.
        size: Height and width of the images.

    Raises:
        FileNotFoundError: There is no such file, or no weights in the folder.
        ValueError: The text names nothing, what it names cannot be built, or an option
            contradicts it.
    """
    path = Path(text)
    if path.is_dir() or text.endswith(".safetensors"):
        named = {"--attention": attention, "--start": start, "--weights": weights}
        for flag, value in {**named, "--classes": classes}.items():
            if value is not None:
                raise UsageError(f"{flag} is for a named network; trained weights bring their own.")
        if fuse:
            raise UsageError("--fuse is for a network of timm or torchvision.")
        found = _trained(path)
        return found if size is None else replace(found, size=size)
    state = None if weights is None else _read(weights)
    if state is not None and start is None:
        start = "identity" if any(key.endswith(".alpha") for key in state) else "module"
    match = re.fullmatch(r"(?:cifar:)?(basic-)?(\d+)", text)
    if match is not None:
        if fuse:
            raise UsageError(f"{text} is fused without --fuse. Leave it out.")
        found = _cifar(int(match[2]), bool(match[1]), attention, classes)
        plain = set(found.model.state_dict())
    else:
        found = _own(text) if re.search(r"\.py(:|$)", text) else _architecture(text, classes)
        if classes is not None and re.search(r"\.py(:|$)", text):
            raise UsageError("--classes is for a network of a package; yours says it itself.")
        plain = set(found.model.state_dict())
        if attention not in (None, "none"):
            from spem.insert import attach

            shape = found.shape(size)
            options: Any = {"start": start or "identity", "fuse": fuse, "input_shape": shape}
            attach(found.model, attention, **options)
        elif fuse:
            raise UsageError("--fuse is for attention that --attention names.")
    if attention not in (None, "none"):
        found = replace(found, text=f"{found.text}, attention {attention}")
    if state is not None:
        lacking = _load(found.model, state, weights, plain)
        found = replace(found, random=False, lacking=tuple(sorted(lacking)))
    return found if size is None else replace(found, size=size)


def _cifar(depth: int, basic: bool, attention: str | None, classes: int | None) -> Network:
    from spem.models import resnet

    block = "basic" if basic else "bottleneck"
    model = resnet(depth, classes or 10, attention=attention or "none", block=block).eval()
    return Network(model, f"CIFAR ResNet-{depth}, {block} blocks", size=32)


def _architecture(text: str, classes: int | None) -> Network:
    from spem.architectures import build
    from spem.insert.sites import default_input

    options = {} if classes is None else {"num_classes": classes}
    try:
        model = build(text, options, asker="network")
    except ValueError as error:
        said = str(error).removeprefix("network: ")
        ours = re.fullmatch(r"resnet(?:-basic)?(\d+)", text)
        if ours is not None and any(int(ours[1]) % each == 2 for each in (6, 9)):
            said = f"no package has a network {text}. Ours of CIFAR are written cifar:{ours[1]}."
        elif "unknown" in said and not re.fullmatch(r"[\w.:-]+", text):
            said = f"{text!r} is no file, folder or name. NETWORK is {NETWORK_HELP}."
        raise ValueError(said) from error
    said = getattr(model, "pretrained_cfg", None)
    known = said if isinstance(said, dict) else {}
    channels, side = default_input(model)[1], default_input(model)[-1]
    mean, std = tuple(known.get("mean", IMAGENET[0])), tuple(known.get("std", IMAGENET[1]))
    return Network(model, text, channels, side, mean, std)


def _own(text: str) -> Network:
    """The network that a function of the user's returns."""
    from torch import nn

    file, _, name = text.rpartition(":")
    if not file.endswith(".py") or not name.isidentifier():
        raise ValueError(f"{text!r} does not name the function: write file.py:function.")
    module = import_file(Path(file))
    made = getattr(module, name, None)
    if made is None:
        names = [n for n, value in vars(module).items() if callable(value) and n[0] != "_"]
        raise ValueError(f"{file}: {unknown('function', name, names)}")
    try:
        model = made() if callable(made) else made
    except (Exception, SystemExit) as error:
        raise ValueError(f"{text}: {name}() raised {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{text}: {name}() returns {type(model).__name__}, not a torch.nn.Module.")
    return Network(model.eval(), text)


def import_file(path: Path) -> Any:
    """A Python file of the user's as a module, which `sys.modules` holds too (dataclasses need it).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be imported.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    code = hashlib.sha256(path.read_bytes()).hexdigest()[:6]
    spec = importlib.util.spec_from_file_location(f"spem_user_{path.stem}_{code}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file. Give one that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        raise ValueError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def _trained(path: Path) -> Network:
    """From a run's folder, a shared folder, or weights of a training."""
    from spem.data.names import NORMALISATION, class_names, native_size
    from spem.share import is_shared, read_shared
    from spem.training import read_run, read_weights

    if path.is_dir() and is_shared(path):
        shared = read_shared(path)
        text = type(shared.model).__name__
        found = Network(shared.model, text, classes=shared.classes, random=False)
        if shared.images is None:
            return found
        images = shared.images
        return replace(found, size=images.size, mean=images.mean, std=images.std)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}.")
    alone = path / "model.safetensors"
    if alone.exists() and not (path / "config.json").exists():
        path = alone
    run = read_run(path) if path.is_dir() else None
    weights = read_weights(path) if run is None else run.weights()
    config = weights.config if run is None else run.config
    mean, std = NORMALISATION[config.data.normalisation]
    classes = weights.network.classes
    return Network(
        weights.network,
        f"ResNet-{config.model.depth}, attention {config.model.attention}",
        size=config.data.size or native_size(config.data.name),
        mean=mean,
        std=std,
        classes=weights.data.classes if weights.data else class_names(config.data.name, classes),
        random=False,
        config=config,
        data=weights.data,
        impl=weights.impl,
    )


def _read(path: Path) -> dict[str, Any]:
    safetensors = require("safetensors.torch", extra="hub", purpose="--weights")
    if not path.is_file():
        raise FileNotFoundError(f"--weights: there is no file {path}.")
    try:
        return safetensors.load(path.read_bytes())
    except Exception as error:
        # safetensors has its own exception types for broken files.
        raise ValueError(f"--weights {path} is damaged or no safetensors file.") from error


_REMEDY = "Name the network, --attention, --start and --classes that it was trained with."


def _load(model: nn.Module, state: dict[str, Any], path: Path | None, plain: set[str]) -> set[str]:
    """Loads weights; all keys of the plain network must be there, those of attention may.

    Args:
        plain: The keys of the network before attention was put in.

    Returns:
        The keys of attention that are not there: all of them or none.
    """
    from spem.insert.wrap import true_keys

    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"--weights {path} do not fit: {reason}. {_REMEDY}") from error
    plain = set(true_keys(model, dict.fromkeys(plain)))
    lacking = sorted(plain.intersection(missing))
    added = set(model.state_dict()) - plain
    of_attention = next((key for key in unexpected if ".attention." in key), None)
    if of_attention is not None:
        raise ValueError(f"--weights {path} hold attention ({of_attention}). {_REMEDY}")
    if lacking or unexpected:
        what = f"lack {lacking[0]}" if lacking else f"hold {unexpected[0]} too"
        raise ValueError(f"--weights {path} {what}: they are another network's. {_REMEDY}")
    if missing and set(missing) != added:
        raise ValueError(
            f"--weights {path} hold a part of the attention and lack {min(missing)}. {_REMEDY}"
        )
    return set(missing)
