"""Stages of a network, the choice of sites by them and by name, and what a site costs."""

import re
from collections.abc import Collection
from dataclasses import replace
from fnmatch import fnmatchcase

import torch

from spem.attention import AttentionSpec
from spem.insert.sites import Site, Spot


def number_stages(spots: list[Spot]) -> None:
    """Gives every site the number of its stage; needs channels."""
    names = [spot.name.split(".") for spot in spots]
    depth = 0
    shortest = min(len(name) for name in names)
    while depth < shortest - 1 and len({name[depth] for name in names}) == 1:
        depth += 1
    order: dict[object, int] = {}
    run = 0
    for number, (spot, name) in enumerate(zip(spots, names, strict=True)):
        if spot.kind == "channels":
            run += number == 0 or spots[number - 1].channels != spot.channels
            key: object = run
        elif spot.kind == "site":
            key = (spot.name,)
        else:
            rest = ".".join(name[depth:])
            found = re.match(r"\D*\d+", rest)
            key = found[0] if found else rest
        spot.stage = order.setdefault(key, len(order) + 1)


def chosen(
    spots: list[Spot], include: str | Collection[str] | None, stages: int | Collection[int] | None
) -> list[Spot]:
    """The sites whose name matches a pattern and whose stage is asked for.

    Raises:
        ValueError: There is no such stage, or nothing is left.
    """
    kept = spots
    if stages is not None:
        wanted = {stages} if isinstance(stages, int) else set(stages)
        there = sorted({spot.stage for spot in spots})
        if not wanted <= set(there):
            raise ValueError(
                f"attach: stages={sorted(wanted)}, but this network has stages {there[0]} to "
                f"{there[-1]}. `spem attach --dry-run` shows them."
            )
        kept = [spot for spot in kept if spot.stage in wanted]
    if include is not None:
        patterns = [include] if isinstance(include, str) else list(include)
        kept = [s for s in kept if any(fnmatchcase(s.name, pattern) for pattern in patterns)]
    if not kept:
        raise ValueError(
            f"attach: include={include!r} matches no site. The names are {spots[0].name} to "
            f"{spots[-1].name}; use a pattern such as '*{spots[0].name.rpartition('.')[2]}'."
        )
    return kept


def costed(site: Site, spec: AttentionSpec) -> Site:
    """A site with what an attention costs there: it is built without memory and counted."""
    from torch.utils.flop_counter import FlopCounterMode

    size = None if site.shape is None else (site.shape[2], site.shape[3])
    try:
        attention = spec.build(site.channels, size=size, device="meta").eval()
    except ValueError as error:
        raise ValueError(f"find_sites: {site.name}: {error}") from None
    parameters = sum(p.numel() for p in attention.parameters())
    if site.shape is None:
        return replace(site, parameters=parameters)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        attention(torch.empty(site.shape, device="meta"))
    return replace(site, parameters=parameters, flops=counter.get_total_flops())
