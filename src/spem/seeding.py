"""Randomness as a pure function of what it is for: keyed generators, initialisation by name.

With one global stream, inserting a module changes every weight drawn after it, so "the same seed"
means nothing across attention modules. Here each parameter is drawn from a generator keyed by
(seed, parameter name): all attention variants of one seed start from the identical backbone, and
differences between them are paired.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

Initialiser = Callable[[Tensor, torch.Generator | None], object]
"""Fills a tensor in place from a generator (None: torch's global one)."""
Owner = tuple[str, Mapping[str, Initialiser]]
"""The name of an attention module, and its rules for the parameters inside it."""

_Conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_Norm = nn.modules.batchnorm._BatchNorm  # pyright: ignore[reportPrivateUsage]  # the one class all batch norms share


def keyed_generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator that depends on the seed and on what it is for, and on nothing else.

    Args:
        seed: The seed of the run.
        purpose: What is drawn, for example ``("epoch", 3)`` or a parameter's name.

    Examples:
        >>> a, b = keyed_generator(0, "epoch", 1), keyed_generator(0, "epoch", 1)
        >>> bool(torch.rand(1, generator=a) == torch.rand(1, generator=b))
        True
    """
    text = "\x00".join([str(int(seed)), *(f"{type(part).__name__}:{part}" for part in purpose)])
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") % 2**63)


def kaiming_normal_fan_out(weight: Tensor, generator: torch.Generator | None) -> None:
    """N(0, 2 / (k k out)): Kaiming normal over fan_out (the paper's backbone, official CBAM)."""
    fan_out = weight.shape[0] * math.prod(weight.shape[2:])
    nn.init.normal_(weight, 0.0, math.sqrt(2.0 / fan_out), generator)


def kaiming_normal_fan_in(weight: Tensor, generator: torch.Generator | None) -> None:
    """N(0, 2 / fan_in): Kaiming normal over fan_in, Caffe's "msra"."""
    nn.init.normal_(weight, 0.0, math.sqrt(2.0 / math.prod(weight.shape[1:])), generator)


def initialise(
    model: nn.Module, seed: int | None, *, scope: Literal["backbone", "all"] = "backbone"
) -> None:
    """Redraws the weights and biases of a model, each from a generator keyed by (seed, its name).

    Convolutions of the backbone get N(0, 2/(k k out)) and zero biases, batch norms 1/0 (running
    statistics 0/1), linear layers torch's default. An attention module owns its initialisation (its
    ``random_init`` and ``reset_parameters``); inside it, layers without a rule of their own get
    torch's default. All else outside attention modules is left as it is: other layers, other
    parameters of these layers, such as a gain, and what weight norm or pruning has renamed. Draws
    are made on the CPU in float32, whatever the device and dtype. Modules that draw in training
    (those with a method ``reseed``) start their sequences, keyed by (seed, name) too.

    Args:
        model: The network, changed in place.
        seed: The seed of the run; None draws from torch's own generator, one after the other.
        scope: ``"all"`` imitates the official training code, whose loop over all convolutions and
            batch norms also overwrites those inside attention modules.

    Raises:
        ValueError: ``scope`` is neither ``"backbone"`` nor ``"all"``.
    """
    if scope not in ("backbone", "all"):
        raise ValueError(f"initialise: scope={scope!r} is unknown. Use 'backbone' or 'all'.")
    layers = [
        (".".join(part for part in name.split(".") if part != "_orig_mod"), module)
        for name, module in model.named_modules()  # where torch.compile adds this part
    ]
    owners: dict[str, Owner | None] = {}
    for name, module in layers:  # parents come first
        rules = getattr(module, "random_init", None)
        parent = owners.get(name.rpartition(".")[0])
        owners[name] = parent if rules is None else (name, rules)
        _draw(name, module, owners[name], seed)
    for name, module in layers:
        reset = getattr(module, "reset_parameters", None)
        if getattr(module, "random_init", None) is not None and callable(reset):
            reset()
        if scope == "all" and isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
            _draw(name, module, None, seed)
        reseed = getattr(module, "reseed", None)
        if callable(reseed):
            reseed(int(torch.randint(2**31, (), device="cpu")) if seed is None else seed, name)


def _draw(name: str, module: nn.Module, owner: Owner | None, seed: int | None) -> None:
    """Draws the parameters of a layer by the rules of its owner, or those of the backbone."""
    if isinstance(module, _Norm):
        module.reset_running_stats()
    for local, parameter in module.named_parameters(recurse=False):
        full = f"{name}.{local}".removeprefix(".")
        rule = None if owner is None else owner[1].get(full.removeprefix(f"{owner[0]}."))
        rule = rule or _default_rule(module, local, backbone=owner is None)
        if rule is None or parameter.is_meta:  # which has no memory, that a draw would take
            continue
        # The CPU by name: torch.set_default_device must not move the draw away from its generator.
        drawn = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
        rule(drawn, None if seed is None else keyed_generator(seed, full))
        with torch.no_grad():
            parameter.copy_(drawn)


def _default_rule(module: nn.Module, local: str, *, backbone: bool) -> Initialiser | None:
    """The rule for weight and bias of the layers that are known, None for other parameters."""
    if local not in ("weight", "bias"):
        return None
    if isinstance(module, _Norm):
        return _constant(1.0 if local == "weight" else 0.0)
    if isinstance(module, _Conv) and backbone:
        return kaiming_normal_fan_out if local == "weight" else _constant(0.0)
    if isinstance(module, nn.Linear):
        return _uniform(module.in_features)
    if isinstance(module, _Conv):
        return _uniform(module.in_channels // module.groups * math.prod(module.kernel_size))
    return None


def _constant(value: float) -> Initialiser:
    return lambda parameter, _: nn.init.constant_(parameter, value)


def _uniform(fan_in: int) -> Initialiser:
    """Torch's default for linear layers and convolutions."""
    bound = 1.0 / math.sqrt(fan_in)
    return lambda parameter, generator: nn.init.uniform_(parameter, -bound, bound, generator)
