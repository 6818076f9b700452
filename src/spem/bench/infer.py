"""Inference of whole networks, also against the plain one with its norms folded away."""

from __future__ import annotations

from dataclasses import replace

from spem.bench.facts import facts
from spem.bench.nets import DTYPES, fusable
from spem.bench.settings import (
    COMPOSED,
    COMPOSED_FOLDED,
    FOLDED,
    FUSED_FOLDED,
    Settings,
    Subject,
    full_precision,
    fused_impl,
    with_graphs,
)
from spem.bench.step import Workload, measured, providers, subjects
from spem.bench.table import Row

RATIOS = ("attention_cost", "to_plain", "to_folded", "to_official")
BATCHES = (128, 1)


def run_network(
    settings: Settings, work: Workload, *, batches: tuple[int, ...] = BATCHES, quiet: bool = False
) -> list[Row]:
    """Times the forward pass in evaluation, for each number of images.

    Beside the ways of training there are the folded ones: norms folded into the convolutions
    before them, as a network is deployed. A gate then follows a bare convolution.

    Raises:
        BenchError: A subject deviates from the reference.
    """
    device = settings.where()
    if settings.quick:
        work, batches = work.quick(), (2, 1)
    rows: list[Row] = []
    with full_precision(settings.threads):
        for size in batches:
            here = replace(work, batch=size)
            chosen = with_folded(settings, here)
            if device.type == "cuda":
                chosen = with_graphs(chosen, ("none", "se", "eca", "spem"))
            ready, failed, countdown = providers(
                settings, here, chosen, training=False, quiet=quiet
            )
            run_facts = {"rounds": str(settings.rounds), **facts(device)}
            rows += measured(settings, here, ready, failed, countdown, run_facts, RATIOS)
    return rows


def with_folded(settings: Settings, work: Workload) -> list[Subject]:
    """The subjects of training and the folded ones."""
    impl, _ = fused_impl(settings, DTYPES[work.dtype])
    found = subjects(settings, work, compiled=settings.compiled)
    for subject in list(found):
        if subject.way != COMPOSED:
            continue
        if subject.attention == "none":
            found.append(Subject("none", FOLDED))
            continue
        found.append(Subject(subject.attention, COMPOSED_FOLDED))
        if impl is not None and fusable(subject.attention):
            found.append(Subject(subject.attention, FUSED_FOLDED))
    return found
