"""What every registered module costs: parameters, FLOPs and the training step, in one run."""

from __future__ import annotations

from spem.attention import list_attention
from spem.bench.nets import IMAGE, network
from spem.bench.settings import COMPOSED, Settings, Subject
from spem.bench.step import Workload, run_step
from spem.bench.table import Row
from spem.cost import count

FORMS = (
    "spem(form=figure)",
    "spem(form=code)",
    "ge(form=theta)",
    "ge(form=theta_plus)",
    "gct(placement=conv)",
    "se(pool=mix)",
    "se(pool=srp)",
)
"""Forms of registered modules that cost something else than their defaults."""


def family() -> tuple[str, ...]:
    """The specs of the table: every registered module, and the forms."""
    return (*list_attention(), *FORMS)


def run_family(settings: Settings, work: Workload, *, quiet: bool = False) -> list[Row]:
    """Times the training step with every module, and counts what each adds.

    FLOPs are those of one image's forward pass, two a multiply-add, of convolutions and products.

    Raises:
        BenchError: A subject deviates from the reference.
    """
    rows = run_step(settings, work, quiet=quiet)
    depth = int(rows[0]["depth"])
    costs = {
        subject.attention: count(network(subject, depth), (1, 3, IMAGE, IMAGE))
        for subject in {Subject(row["attention"], COMPOSED) for row in rows}
    }
    plain = costs["none"]
    return [
        {
            "attention": row.pop("attention"),
            "way": row.pop("way"),
            "parameters": str(costs[name].parameters),
            "attention_parameters": row.pop("attention_parameters"),
            "mflops": f"{costs[name].flops / 1e6:.3f}",
            "attention_mflops": f"{(costs[name].flops - plain.flops) / 1e6:.3f}",
            **row,
        }
        for row in rows
        for name in [row["attention"]]
    ]
