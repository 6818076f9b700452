"""The tail alone: norm, attention, addition and ReLU of a block, without the convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import torch

from spem.bench.checks import BenchError, reason
from spem.bench.facts import facts
from spem.bench.ratios import no_columns, ratio_columns, time_columns
from spem.bench.settings import (
    CODE,
    COMPILED,
    COMPOSED,
    FORMULA,
    FUSED,
    OFFICIAL,
    Settings,
    Subject,
    full_precision,
    fused_impl,
    impl_of,
    with_graphs,
)
from spem.bench.table import Row, select, without_failed
from spem.bench.tails import Case, TailProvider, make_inputs
from spem.bench.timing import Countdown, Sample, copy_bandwidth, flusher, round_robin

ATTENTIONS = ("none", "se", "eca", "srm", "spem")
"""Modules whose gate is a function of plane statistics, so that their tail can be fused."""
RATIOS = ("attention_cost", "to_plain", "to_official")
SAME_RUN = ("hardware", "torch", "numba", "triton", "commit", "threads", "rounds")
"""Facts that must agree before rows of a run that was cut short are kept."""
CASE = ("op", "batch", "channels", "height", "width", "dtype", "layout")
"""The columns that say which map it is."""

_CIFAR = ((128, 64, 32, 32), (128, 128, 16, 16), (128, 256, 8, 8))
_IMAGENET = ((128, 256, 56, 56), (128, 512, 28, 28), (128, 1024, 14, 14), (128, 2048, 7, 7))


def cases(device: torch.device, *, quick: bool = False) -> list[Case]:
    """The maps of a device: those of a CIFAR ResNet, and of an ImageNet ResNet's stages."""
    if quick:
        shapes = [(4, 16, 8, 8), (2, 32, 7, 7)]
        found = [Case(op, *shape) for shape in shapes for op in ("bn_train", "bn_eval")]
        return [*found, Case("bn_train", 4, 16, 8, 8, layout="channels_last")]
    if device.type == "cpu":
        maps = (*_CIFAR, (32, 256, 56, 56))
        found = [Case(op, *shape) for op in ("bn_train", "bn_eval") for shape in maps]
        return [*found, Case("bn_train", 128, 64, 32, 32, layout="channels_last")]
    # What decides comes first, since a borrowed GPU may be gone before the end.
    order = product(
        ("channels_last", "contiguous"),
        ("bn_train", "bn_eval"),
        (_CIFAR, _IMAGENET),
        ("bfloat16", "float32"),
    )
    return [
        Case(op, *shape, dtype=dtype, layout=layout)
        for layout, op, maps, dtype in order
        for shape in maps
    ]


def subjects(settings: Settings, case: Case) -> list[Subject]:
    """Who is timed on a map, without attention first."""
    impl, _ = fused_impl(settings, getattr(torch, case.dtype))
    cuda = settings.where().type == "cuda"
    # Compiling takes far longer than measuring, and minutes on a GPU are few.
    compiled = ("none", "spem") if cuda else ATTENTIONS
    found: list[Subject] = []
    for attention in ATTENTIONS:
        ways = [COMPOSED]
        if settings.compiled and attention in compiled:
            ways += [COMPILED, FORMULA]
        if impl is not None:
            ways.append(FUSED)
        found += [Subject(attention, way) for way in ways]
    found.append(Subject(CODE, OFFICIAL))
    return with_graphs(found, ATTENTIONS) if cuda else found


def run_ops(
    settings: Settings,
    *,
    only: Sequence[Case] | None = None,
    kept: Sequence[Row] = (),
    save: Callable[[list[Row]], None] | None = None,
    quiet: bool = False,
) -> list[Row]:
    """Times the tail on every map.

    Args:
        settings: How to measure.
        only: These maps instead of the device's own.
        kept: Rows of a run that was cut short; their maps are not timed again if that run was of
            the same commit, versions and machine, and every provider of a map could run.
        save: Given all rows so far after each map.
        quiet: No progress line.

    Raises:
        BenchError: A provider deviates from the reference.
    """
    device = settings.where()
    with full_precision(settings.threads):
        run_facts = {"rounds": str(settings.rounds), **facts(device)}
        chosen = list(cases(device, quick=settings.quick) if only is None else only)
        same = {name: run_facts[name] for name in SAME_RUN}
        rows = [dict(row) for row in without_failed(select(kept, same), CASE)]
        missing = [case for case in chosen if not select(rows, _identity(case))]
        countdown = Countdown(len(missing), quiet=quiet)
        for case in missing:
            countdown.start(str(case))
            rows += _run_case(settings, case, countdown, run_facts)
            countdown.finish()
            if save is not None:
                save(rows)
            torch.compiler.reset()
    return rows


def _run_case(
    settings: Settings, case: Case, countdown: Countdown, run_facts: dict[str, str]
) -> list[Row]:
    """The rows of one map; a provider that cannot run here gets rows that say why."""
    device, dtype = settings.where(), getattr(torch, case.dtype)
    impl, _ = fused_impl(settings, dtype)
    inputs = make_inputs(case, device)
    bandwidth = copy_bandwidth(case.shape, dtype, device)
    ready: dict[Subject, TailProvider] = {}
    failed: dict[Subject, str] = {}
    for subject in subjects(settings, case):
        countdown.check(str(subject))
        try:
            provider = TailProvider(case, subject, impl_of(subject.way, impl), inputs)
            provider.prepare()
        except BenchError:
            raise
        except Exception as error:  # noqa: BLE001 - compilers fail in many ways, and alone
            failed[subject] = reason(error)
            continue
        ready[subject] = provider
    rows: list[Row] = []
    states = {"": None} if device.type == "cpu" else {"flushed": flusher(device), "unflushed": None}
    for l2, before in states.items():
        found = round_robin(
            {str(subject): provider for subject, provider in ready.items()},
            settings.rounds,
            settings.warm_up,
            before=before,
            tell=countdown.tell,
        )
        samples = {subject: found[str(subject)] for subject in ready}
        for mode in ("forward", "backward", "both") if inputs.training else ("forward",):
            rows += _rows(case, mode, l2, samples, ready, bandwidth, run_facts)
    return rows + _failed_rows(case, failed, impl, bandwidth, run_facts)


def _rows(
    case: Case,
    mode: str,
    l2: str,
    samples: dict[Subject, list[Sample]],
    ready: dict[Subject, TailProvider],
    bandwidth: float,
    run_facts: dict[str, str],
) -> list[Row]:
    times = {s: [x[mode] for x in found] for s, found in samples.items() if mode in found[0]}
    rows: list[Row] = []
    for subject, mine in times.items():
        columns = time_columns(mine)
        size = bytes_model(case, mode, reads_statistics=ready[subject].reads_statistics)
        share = size / float(columns["time_ms_median"]) / 1e6 / bandwidth
        rows.append(
            {
                **_identity(case),
                "mode": mode,
                "l2": l2,
                "attention": subject.attention,
                "way": subject.way,
                "impl": ready[subject].impl,
                **columns,
                **ratio_columns(subject, times, RATIOS),
                "bytes_model": str(size),
                "copy_gb_s": f"{bandwidth:.2f}",
                "share_of_copy": f"{share:.3f}",
                "first_call_s": f"{ready[subject].first_call_s:.3f}",
                "note": "",
                **run_facts,
            }
        )
    return rows


def _failed_rows(
    case: Case,
    failed: dict[Subject, str],
    impl: str | None,
    bandwidth: float,
    run_facts: dict[str, str],
) -> list[Row]:
    return [
        {
            **_identity(case),
            "mode": "",
            "l2": "",
            "attention": subject.attention,
            "way": subject.way,
            "impl": impl_of(subject.way, impl),
            **no_columns(RATIOS),
            "bytes_model": "",
            "copy_gb_s": f"{bandwidth:.2f}",
            "share_of_copy": "",
            "first_call_s": "",
            "note": note,
            **run_facts,
        }
        for subject, note in failed.items()
    ]


def bytes_model(case: Case, mode: str, *, reads_statistics: bool) -> int:
    """What the four passes move, whoever computes the tail: so that shares can be compared.

    Forward z twice, residual and output (4N); backward 7N; in inference a gate without plane
    statistics needs z only once (3N). A tail that finds its images in the cache when it reads them
    again moves less than this says.
    """
    size = torch.tensor([], dtype=getattr(torch, case.dtype)).element_size()
    for extent in case.shape:
        size *= extent
    training = case.op == "bn_train"
    forward = 4 if training or reads_statistics else 3
    return size * {"forward": forward, "backward": 7, "both": forward + 7}[mode]


def _identity(case: Case) -> dict[str, str]:
    return {name: str(getattr(case, name)) for name in CASE}
