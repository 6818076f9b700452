"""The whole training step: forward, loss, backward and SGD of a CIFAR ResNet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from spem.bench.checks import BenchError, reason
from spem.bench.facts import facts
from spem.bench.nets import (
    DTYPES,
    IMAGE,
    NetProvider,
    checked,
    fold,
    fusable,
    images,
    network,
    parameters,
)
from spem.bench.ratios import no_columns, ratio_columns, time_columns
from spem.bench.settings import (
    CODE,
    COMPILED,
    COMPOSED,
    FOLDED,
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
from spem.bench.table import Row
from spem.bench.tails import LAYOUTS
from spem.bench.timing import Countdown, round_robin

ATTENTIONS = ("none", "scale", "se", "cbam", "eca", "srm", "sge", "spem")
RATIOS = ("attention_cost", "to_plain", "to_official")


@dataclass(frozen=True)
class Workload:
    """The network and batch that are trained or evaluated.

    Attributes:
        depth: Of the CIFAR ResNet, 9n + 2.
        batch: Images a step.
        dtype: ``"float32"``, or ``"bfloat16"`` for autocast.
        layout: ``"contiguous"`` or ``"channels_last"``.
        attentions: Who takes part; ``"none"`` always does.
    """

    depth: int = 29
    batch: int = 128
    dtype: str = "float32"
    layout: str = "contiguous"
    attentions: tuple[str, ...] = ATTENTIONS

    def __post_init__(self) -> None:
        for name, known in (("dtype", DTYPES), ("layout", LAYOUTS)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"bench: {name}={value!r} is unknown. Use {', '.join(known)}.")
        if self.batch < 1:
            raise ValueError(f"bench: batch={self.batch} must be positive.")
        object.__setattr__(
            self, "attentions", ("none", *(a for a in self.attentions if a != "none"))
        )

    def quick(self) -> Workload:
        """The smallest network and batch."""
        return Workload(11, 4, self.dtype, self.layout, self.attentions)

    @property
    def columns(self) -> Row:
        """What a table says of it."""
        return {
            "depth": str(self.depth),
            "batch": str(self.batch),
            "image": str(IMAGE),
            "dtype": self.dtype,
            "layout": self.layout,
        }


def subjects(settings: Settings, work: Workload, *, compiled: bool) -> list[Subject]:
    """Who is timed: every attention composed, and fused where it can be; SPEM as published."""
    impl, _ = fused_impl(settings, DTYPES[work.dtype])
    found: list[Subject] = []
    for attention in work.attentions:
        ways = [COMPOSED]
        if impl is not None and fusable(attention):
            ways.append(FUSED)
        if compiled:
            ways += [COMPILED, FORMULA] if fusable(attention) else [COMPILED]
        found += [Subject(attention, way) for way in ways]
    if any(attention.startswith("spem") for attention in work.attentions):
        found.append(Subject(CODE, OFFICIAL))
    return found


def run_step(settings: Settings, work: Workload, *, quiet: bool = False) -> list[Row]:
    """Times the training step of every subject.

    Raises:
        BenchError: A subject deviates from the reference.
    """
    device = settings.where()
    if settings.quick:
        work = work.quick()
    with full_precision(settings.threads):
        chosen = subjects(settings, work, compiled=settings.compiled)
        if device.type == "cuda":
            # The last of these is what `train` captures.
            ways = (COMPOSED, FUSED, FORMULA)
            chosen = with_graphs(chosen, ("none", "se", "eca", "spem"), ways)
        ready, failed, countdown = providers(settings, work, chosen, training=True, quiet=quiet)
        run_facts = {"rounds": str(settings.rounds), **facts(device)}
        return measured(settings, work, ready, failed, countdown, run_facts, RATIOS)


def providers(
    settings: Settings,
    work: Workload,
    chosen: Sequence[Subject],
    *,
    training: bool,
    quiet: bool,
) -> tuple[dict[Subject, NetProvider], dict[Subject, str], Countdown]:
    """Builds, checks and first calls every subject; those that cannot run, with the reason."""
    device = settings.where()
    fused, _ = fused_impl(settings, DTYPES[work.dtype])
    batch = images(work.batch, work.layout)
    inputs = (batch[0].to(device), batch[1].to(device))
    countdown = Countdown(1, quiet=quiet)
    countdown.start(f"ResNet-{work.depth}, batch {work.batch}")
    ready: dict[Subject, NetProvider] = {}
    failed: dict[Subject, str] = {}
    for subject in chosen:
        countdown.check(str(subject))
        try:
            impl = checked(subject, fused, device, work.dtype, work.layout)
            provider = NetProvider(
                subject,
                build(subject, work, device),
                impl,
                inputs,
                training=training,
                dtype=DTYPES[work.dtype],
            )
            provider.prepare()
        except BenchError:
            raise
        except Exception as error:  # noqa: BLE001 - compilers fail in many ways, and alone
            failed[subject] = reason(error)
            continue
        ready[subject] = provider
    return ready, failed, countdown


def build(subject: Subject, work: Workload, device: torch.device) -> torch.nn.Module:
    """The network of a subject, on its device and in its layout."""
    model = network(subject, work.depth)
    if subject.way.endswith(FOLDED):
        model = fold(model, keep_gates_bare=subject.way.startswith(FUSED))
    return model.to(device, memory_format=LAYOUTS[work.layout])  # pyright: ignore[reportCallIssue]


def measured(
    settings: Settings,
    work: Workload,
    ready: dict[Subject, NetProvider],
    failed: dict[Subject, str],
    countdown: Countdown,
    run_facts: Row,
    ratios: Sequence[str],
) -> list[Row]:
    """Times the networks that are ready, and writes a row for each, and for those that are not."""
    found = round_robin(
        {str(subject): provider for subject, provider in ready.items()},
        settings.rounds,
        settings.warm_up,
        tell=countdown.tell,
    )
    countdown.finish()
    times = {s: [x["step"] for x in found[str(s)]] for s in ready}
    plain = parameters(network(Subject("none", COMPOSED), work.depth))
    rows: list[Row] = []
    for subject in (*ready, *failed):
        provider = ready.get(subject)
        extra = parameters(network(subject, work.depth)) - plain
        fused, _ = fused_impl(settings, DTYPES[work.dtype])
        columns = no_columns(ratios)
        if provider is not None:
            columns = time_columns(times[subject]) | ratio_columns(subject, times, ratios)
        rows.append(
            {
                "attention": subject.attention,
                "way": subject.way,
                "impl": impl_of(subject.way, fused),
                "attention_parameters": str(extra),
                **columns,
                "first_call_s": "" if provider is None else f"{provider.first_call_s:.3f}",
                "note": failed.get(subject, ""),
                **work.columns,
                **run_facts,
            }
        )
    return rows
