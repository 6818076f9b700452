"""A network by one text, in all commands: a name, a function of one's own, or trained weights."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Literal

from spem.cli.options import RARE, unknown
from spem.extras import rephrased, require

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spem.data import ImageSet
    from spem.training import DataIdentity, RunConfig

NETWORK_HELP = (
    "a name of timm or torchvision (resnet50), cifar:29 for ours, file.py:function for your own, "
    "or a run's folder or weights"
)
Named = Annotated[str, "NETWORK", NETWORK_HELP]
Start = Literal["identity", "module"]
_START = "how attention without weights starts: as if it were not there, or as the module does"
SkipBroken = Annotated[bool, "leave out images that cannot be read", RARE]
Size = Annotated[int | None, "PIXELS", "side of its images; else what it is made for"]
_ATTENTION = 'put into it: spem, "se(reduction=8)" ...'
_WEIGHTS = "weights (.safetensors) of a named network"
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and deviation of images where nothing else is known."""
REGISTERED: list[str] = []
"""What `register_from_file` was given in this process."""


@dataclass(frozen=True)
class Network:
    """A network in evaluation mode on the CPU, and what is known of the images that it takes.

    `text` says what it is; `lacking`, that a file of weights held none of its attention; `config`,
    `data` and `impl` (of its tails) are of the run that trained it.
    """

    model: nn.Module
    text: str
    channels: int = 3
    size: int | None = None
    mean: tuple[float, ...] = IMAGENET[0]
    std: tuple[float, ...] = IMAGENET[1]
    classes: tuple[str, ...] | None = None
    random: bool = True
    lacking: bool = False
    config: RunConfig | None = None
    data: DataIdentity | None = None
    impl: str | None = None

    def shape(self, batch: int = 1) -> tuple[int, int, int, int]:
        """Of its input; ValueError where trained weights do not say how large their images were."""
        if self.size is None and self.config is not None:
            images = f"the images of {self.config.data.name}"
            raise ValueError(f"the weights do not say how large {images} were. Give --size.")
        return batch, self.channels, self.size or 224, self.size or 224

    def titled(self, name: str) -> str:
        """What it is, after the name it was asked for by, which may say so already."""
        head = "" if name in self.text else f"{name}: "
        lacking = ", without weights of its attention" * self.lacking
        return f"{head}{self.text}{', random weights' * self.random}{lacking}"

    def test_images(
        self, name: str | None, root: Path | None, *, skip_broken: bool = False
    ) -> ImageSet:
        """Of the run that trained it, or others, as large as it takes them now."""
        from spem.data.names import native_size
        from spem.training import load_test_images

        assert self.config is not None
        trained = self.config.data
        trained = replace(trained, skip_broken=skip_broken or trained.skip_broken)
        config = replace(self.config, data=trained)
        if name is not None or self.size != (trained.size or native_size(trained.name)):
            config = replace(config, data=replace(trained, size=self.size))
            name = name or trained.name
        return load_test_images(config, self.data, name=name, root=root)

    def require_input(self) -> None:
        """Raises ValueError where it does not run on such images."""
        import torch

        from spem.insert.sites import float_like
        from spem.ops import use_impl

        shape, like = self.shape(), float_like(self.model)
        said = f"{self.text} does not run on an input {list(shape)}"
        remedy = "Name a network of images, or give another --size."
        with rephrased(said, remedy), use_impl("reference"), torch.no_grad():
            self.model(torch.zeros(shape, dtype=like.dtype, device=like.device))

    def require_colour(self) -> None:
        """Raises ValueError unless it takes images as they are read here."""
        if self.channels != 3:
            said = f"{self.text} takes images of {self.channels} channel(s)"
            raise ValueError(f"{said}, and images are read in colour, with 3 channels.")

    def require_classes(self, images: ImageSet) -> None:
        """Raises ValueError for images whose labels mean something else than its outputs."""
        self.require_colour()
        if self.classes is not None:
            images.require_classes(self.classes)


def is_trained(text: str) -> bool:
    """Whether a text names trained weights, which say themselves what network they are of."""
    return Path(text).is_dir() or text.endswith(".safetensors")


def load_network(
    text: str,
    *,
    attention: Annotated[str | None, "ATTENTION", _ATTENTION] = None,
    weights: Annotated[Path | None, "FILE", _WEIGHTS] = None,
    classes: Annotated[int | None, "N", "outputs of a named network"] = None,
    size: Size = None,
    start: Annotated[Start | None, _START, RARE] = None,
    fuse: bool = False,
) -> Network:
    """The network that a text names; the options of the commands that take a network.

    ``resnet50`` is timm's, else torchvision's (``torchvision:resnet50`` says which), ``cifar:29``
    or ``29`` ours (``cifar:basic-56`` has basic blocks), ``path/to/file.py:function`` is called
    without arguments; and there are folders of runs and of `save_pretrained`, and weights. Weights
    of a named network may lack its attention; `start` None is as they were trained.
    """
    if is_trained(text):
        given = {"attention": attention, "start": start, "weights": weights, "classes": classes}
        for name, value in (given | {"fuse": fuse or None}).items():
            if value is not None:
                raise ValueError(
                    f"--{name} is for a named network; trained weights come with their own."
                )
        found = _trained(Path(text))
        if size is not None:
            found = replace(found, size=size)
            found.require_input()
        return found
    own, cifar = re.search(r"\.py(:|$)", text), re.fullmatch(r"(?:cifar:)?(basic-)?(\d+)", text)
    attention = None if attention == "none" else attention
    state = None if weights is None else _read(weights)
    if own and classes is not None:
        raise ValueError("--classes is for a network of a package; yours says it itself.")
    if (fuse or start) and attention is None:
        option = "--fuse" if fuse else "--start"
        raise ValueError(f"{option} is for attention that --attention names.")
    ours: Callable[..., nn.Module] | None = None
    if cifar:
        from spem.models import resnet

        depth, block = int(cifar[2]), "basic" if cifar[1] else "bottleneck"
        ours = partial(resnet, depth, classes or 10, block=block)
        found = Network(ours().eval(), f"CIFAR ResNet-{depth}, {block} blocks", size=32)
    else:
        found = _own(text) if own else _architecture(text, classes)
    found = replace(found, size=size or found.size)
    found.require_input()
    plain = set(found.model.state_dict())
    asked = start
    if start is None:  # as the weights were trained
        closed = any(key.endswith(".alpha") for key in state or ())
        start = "identity" if closed or (state is None and ours is None) else "module"
    if attention is not None:
        found = replace(found, text=f"{found.text}, attention {attention}")
        if ours is not None and start == "module":
            found = replace(found, model=ours(attention=attention).eval())
        else:
            from spem.insert import attach

            attach(found.model, attention, start=start, fuse=fuse, input_shape=found.shape())
    if state is None:
        return found
    lacking = _load(found.model, state, f"--weights {weights}", plain)
    if lacking and asked is None:  # of a plain network, which computes what it did
        how: Any = {"attention": attention, "weights": weights, "classes": classes, "size": size}
        try:
            return load_network(text, **how, start="identity", fuse=fuse)
        except ValueError as error:  # has no place in a network of ours but from the start
            said = f"--weights {weights} lack {attention}, which cannot start as the identity"
            raise ValueError(f"{said}. Give weights with it, or --start module.") from error
    return replace(found, random=False, lacking=lacking)


def _architecture(text: str, classes: int | None) -> Network:
    from spem.architectures import build

    try:
        model = build(text, {} if classes is None else {"num_classes": classes}, asker="network")
    except ValueError as error:
        said = str(error).removeprefix("network: ")
        ours = re.fullmatch(r"resnet(?:-basic)?(\d+)", text)
        if ours is not None and any(int(ours[1]) % each == 2 for each in (6, 9)):
            said = f"no package has a network {text}. Ours of CIFAR are written cifar:{ours[1]}."
        elif "unknown" in said and not re.fullmatch(r"[\w.:-]+", text):
            said = f"{text!r} is not a file, folder or name. NETWORK is {NETWORK_HELP}."
        raise ValueError(said) from error
    known: Any = getattr(model, "pretrained_cfg", None) or {}
    mean, std = (tuple(known.get(k, v)) for k, v in zip(("mean", "std"), IMAGENET, strict=True))
    return Network(model, text, mean=mean, std=std, **_input(model))


def _input(model: nn.Module) -> dict[str, Any]:
    """What is known of the images that a network of a stranger takes."""
    from spem.insert.sites import default_input

    _, channels, *_, size = default_input(model)
    return {"channels": channels, "size": size}


def _own(text: str) -> Network:
    """The network that a function of the user's returns."""
    from torch import nn

    make, name = _from_file(text, "function", callable), text.rpartition(":")[2]
    with _theirs(f"{text}: {name}() raised"):
        model = make()
    if not isinstance(model, nn.Module):
        raise ValueError(f"{text}: {name}() returns {type(model).__name__}, not a torch.nn.Module.")
    return Network(model.eval(), text, **_input(model))


@contextmanager
def _theirs(said: str) -> Generator[None]:
    """Makes one sentence of what code of the user's raises."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise ValueError(f"{said} {type(error).__name__}: {error}") from error


def _from_file(text: str, what: str, accepts: Callable[[Any], bool]) -> Any:
    """What `file.py:name` names, in a Python file of the user's."""
    file, _, name = text.rpartition(":")
    if not file.endswith(".py") or not name.isidentifier():
        raise ValueError(f"{text!r} does not name the {what}: write file.py:{what}.")
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}. Check the path.")
    inside = vars(_module(path, f"spem_user_{path.stem}_{_digest(path)}"))
    if not accepts(inside.get(name)):
        names = [other for other, value in inside.items() if accepts(value) and other[0] != "_"]
        raise ValueError(f"{file}: {unknown(what, name, names)}")
    return inside[name]


@cache
def _module(path: Path, name: str) -> ModuleType:
    """What a file defines, which is run once."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)  # dataclasses look there
    with _theirs(f"{path} cannot be imported:"):
        spec.loader.exec_module(module)
    return module


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:6]


def _trained(path: Path) -> Network:
    """From a run's folder, a shared folder, or weights of a training."""
    from spem.data.names import NORMALISATION, class_names, native_size
    from spem.share import is_shared, read_shared
    from spem.training import read_run, read_weights

    if path.is_dir() and is_shared(path):
        shared = read_shared(path)
        name, images = type(shared.model).__name__, shared.images
        known = _input(shared.model) | ({} if images is None else vars(images))
        return Network(shared.model, name, classes=shared.classes, random=False, **known)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}.")
    if (path / "model.safetensors").exists() and not (path / "config.json").exists():
        path /= "model.safetensors"
    run = read_run(path) if path.is_dir() else None
    weights = read_weights(path) if run is None else run.weights()
    config = weights.config if run is None else run.config
    mean, std = NORMALISATION[config.data.normalisation]
    classes = class_names(config.data.name, weights.network.classes)
    return Network(
        weights.network,
        f"ResNet-{config.model.depth}, attention {config.model.attention}",
        size=config.data.size or native_size(config.data.name),
        mean=mean,
        std=std,
        classes=weights.data.classes if weights.data else classes,
        random=False,
        config=config,
        data=weights.data,
        impl=weights.impl,
    )


def _read(path: Path) -> dict[str, Any]:
    safetensors = require("safetensors.torch", extra="hub", purpose="--weights")
    if not path.is_file():
        raise FileNotFoundError(f"--weights: there is no file {path}.")
    with rephrased(f"--weights {path} is damaged or no safetensors file"):
        return safetensors.load(path.read_bytes())


def _load(model: nn.Module, state: dict[str, Any], title: str, plain: set[str]) -> bool:
    """Loads weights, all keys of the plain network at least; whether attention's are missing."""
    from spem.insert.wrap import true_keys

    wrong, missing, unexpected = "", list[str](), list[str]()
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        wrong = f"do not fit: {' '.join(str(error).split()).rstrip('.')}"
    of_attention = set(model.state_dict()).difference(true_keys(model, dict.fromkeys(plain)))
    if unexpected:
        strange = next((key for key in unexpected if ".attention." in key), unexpected[0])
        wrong = f"hold {strange} too"
    elif missing and set(missing) != of_attention:
        wrong = f"lack {min(missing)}"
    if wrong:
        raise ValueError(
            f"{title} {wrong}. Name the network, --attention, --start and --classes that it was "
            f"trained with."
        )
    return bool(missing)


def register_files(places: Sequence[str]) -> None:
    """Register several classes of the user's, in a process that trains for this one."""
    for where in places:
        register_from_file(where)


def register_from_file(where: str) -> str:
    """Register a class of the user's, so that a spec can name it: what `--module` takes.

    It is a `ChannelAttention` or any `torch.nn.Module` that takes the number of channels first, and
    a map [N, C, H, W] to one of the same shape. Its name, which is returned, ends in a part of the
    file's SHA-256: runs trained with an edited file are other runs.
    """
    import torch
    from torch import nn

    from spem.attention import ChannelAttention, list_attention, register_attention

    def is_module(value: object) -> bool:
        return inspect.isclass(value) and issubclass(value, nn.Module)

    kind = _from_file(where, "class", is_module)
    path, name = Path(where.rpartition(":")[0]), where.rpartition(":")[2]
    label = f"{name.lower()}_{_digest(path)}"
    if label in list_attention():
        return label
    own = kind
    if not issubclass(kind, ChannelAttention):
        own = _wrapped(kind)
    elif kind.name:
        own = type(name, (kind,), {})  # a class has one name, also its own
    register_attention(label, paper=f"{name} of {path.name}", needs=own.needs)(own)
    tried = f"{name} of {path} does not work as {name}(64) on a map [2, 64, 8, 8]:"
    with _theirs(tried):
        got = list(own(64)(torch.zeros(2, 64, 8, 8)).shape)
    if got != [2, 64, 8, 8]:
        raise ValueError(f"{tried} it must return a map of its input's shape, got {got}.")
    REGISTERED.append(where)
    return label


def _wrapped(kind: type[nn.Module]) -> Any:
    """A class around a plain module, which is neither gate nor shift: y = x + (module(x) - x)."""
    import torch

    from spem.attention import ChannelAttention, Needs

    def draw(channels: int, name: str, parameter: Tensor, generator: Any) -> None:
        """Fill a parameter as the class itself does, from the generator that is given."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            if generator is not None:
                torch.manual_seed(generator.initial_seed())
            parameter.copy_(kind(channels).get_parameter(name))

    class Wrapped(ChannelAttention):
        needs = Needs(adds=True)

        def __init__(self, channels: int, *, device: Any = None, dtype: Any = None) -> None:
            super().__init__(channels, device=device, dtype=dtype)
            self.inner = kind(channels).to(device=device, dtype=dtype)
            names = [name for name, _ in self.inner.named_parameters()]
            self.random_init = {f"inner.{name}": partial(draw, channels, name) for name in names}

        def gate(self, x: Tensor) -> Tensor:
            return torch.ones_like(x[:, :, :1, :1])

        def shift(self, x: Tensor) -> Tensor:
            return self.inner(x) - x

        def forward(self, x: Tensor) -> Tensor:
            self._check(x)
            return self.inner(x)

    Wrapped.__name__ = Wrapped.__qualname__ = kind.__name__
    return Wrapped
