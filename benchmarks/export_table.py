"""How every attention module leaves PyTorch: ONNX operators, errors in two precisions, latency.

    python benchmarks/export_table.py              # goes on where it stopped; times nothing
    python benchmarks/export_table.py --latency    # adds the times, on a machine that does no more

The operators are those of the module alone. The errors are those of a whole ResNet-11 with it on
32 x 32 images, of which every parameter and running statistic is drawn at random: the largest
difference to PyTorch in float32 over the largest output. Latency is that network's in onnxruntime
at batch 1 over the plain one's, the two called in turns; the median of the ratios.
"""
# ruff: noqa: BLE001  # an error of any type is a cell: the other rows are measured all the same

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from attach_table import Plain, error_text, scattered
from record import Row, read, write
from torch import nn

import spem
from spem.export import Session, to_onnx
from spem.training.environment import commit, hardware

RESULTS = Path(__file__).parent / "results"
FORMS = (
    "spem(form=figure)",
    "spem(form=code)",
    "ge(form=theta)",
    "ge(form=theta_plus)",
    "ge(extent=2)",
    "gct(placement=conv)",
    "se(pool=mix())",
    "se(pool=srp)",
)
CHANNELS, SIDE, IMAGE = 64, 8, 32
TIMES = ("latency_over_plain", "latency_q20", "latency_q80", "latency_rounds", "latency_on")
FIXED = "is built for maps of one size"


def specs() -> list[str]:
    return ["none", *sorted([*spem.list_attention(), *FORMS])]


def host(spec: str) -> nn.Module:
    """The network of a row; it is the same every time."""
    return scattered(spem.resnet(11, attention=spec), 0).eval()


def measured(spec: str, folder: Path) -> Row:
    """The cells of one row; an error stands in the cells that it leaves empty."""
    cells: Row = {"operators": "", "opset": "", "dynamic_size": "", "fp32": "", "fp16": ""}
    if spec != "none":
        cells |= alone(spec, folder)
    shape = (1, 3, IMAGE, IMAGE)
    try:
        for precision in ("fp32", "fp16"):
            exported = to_onnx(host(spec), folder / f"{precision}.onnx", shape, precision=precision)
            cells[precision] = f"{max(found.relative for found in exported.differences):.2g}"
            cells["opset"] = str(exported.opset)
    except Exception as error:
        empty = [name for name in ("fp32", "fp16") if not cells[name]]
        cells |= dict.fromkeys(empty, error_text(error))
    return cells


def alone(spec: str, folder: Path) -> Row:
    """The module by itself, with height and width that change where it lets them."""
    try:
        module = scattered(spem.create_attention(spec, CHANNELS, size=SIDE), 0)
    except Exception as error:
        return {"operators": error_text(error), "dynamic_size": error_text(error)}
    path, shape = folder / "module.onnx", (2, CHANNELS, SIDE, SIDE)
    try:
        exported, dynamic = to_onnx(module, path, shape, dynamic_size=True), "yes"
    except Exception as error:
        dynamic = error_text(error).removeprefix("to_onnx: dynamic_size=True: ")
        try:
            exported = to_onnx(module, path, shape)
        except Exception as other:
            return {"operators": error_text(other), "dynamic_size": error_text(other)}
    return {"operators": " ".join(exported.operators), "dynamic_size": dynamic}


def failed(row: Row) -> bool:
    """Whether a cell holds an error; that a module is built for one size is none."""
    numbers = all(row[name][:1].isdigit() for name in ("fp32", "fp16"))
    dynamic = row["dynamic_size"] in ("", "yes") or FIXED in row["dynamic_size"]
    return not numbers or not dynamic or ": " in row["operators"]


def latencies(rows: list[Row], rounds: int) -> None:
    """Fills the columns of times in, all networks in turns within every round."""
    rows = [row for row in rows if not failed(row)]
    if "none" not in {row["spec"] for row in rows}:
        raise SystemExit("export_table: the plain network failed; run it again with --retry.")
    with tempfile.TemporaryDirectory() as name:
        sessions: dict[str, Session] = {}
        for row in rows:
            path = Path(name) / "network.onnx"
            to_onnx(host(row["spec"]), path, (1, 3, IMAGE, IMAGE))
            sessions[row["spec"]] = Session(path.read_bytes())
    x = torch.randn(1, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(4))
    ratios: dict[str, list[float]] = {spec: [] for spec in sessions}
    for number in range(rounds + 3):
        for spec, session in sessions.items():
            # The plain network right before: what else the machine does strikes both alike.
            plain, other = seconds(sessions["none"], x), seconds(session, x)
            if number >= 3:
                ratios[spec].append(other / plain)
    on = hardware(torch.device("cpu"), 1)
    for row in rows:
        low, *_, high = statistics.quantiles(ratios[row["spec"]], n=5)
        median = statistics.median(ratios[row["spec"]])
        values = (f"{median:.3f}", f"{low:.3f}", f"{high:.3f}", str(rounds), on)
        row |= dict(zip(TIMES, values, strict=True))


def seconds(session: Session, x: torch.Tensor) -> float:
    """The shortest of five calls."""
    times: list[float] = []
    for _ in range(5):
        start = time.perf_counter()
        session(x)
        times.append(time.perf_counter() - start)
    return min(times)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Plain)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of export.csv")
    parser.add_argument("--retry", action="store_true", help="run rows with an error again")
    parser.add_argument("--latency", action="store_true", help="measure times; rows must be there")
    parser.add_argument("--only", nargs="*", help="these specs alone, beside none")
    parser.add_argument("--rounds", type=int, default=51, help="rounds of --latency")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # what the exporter and the quantiser say about themselves
    path: Path = given.out / "export.csv"
    rows = [row for row in read(path) if not (given.retry and failed(row))]
    order = {spec: number for number, spec in enumerate(specs())}
    rows = [row for row in rows if row["spec"] in order]
    wanted = order if given.only is None else [s for s in order if s in ("none", *given.only)]
    for spec in wanted:
        if spec in {row["spec"] for row in rows}:
            continue
        with tempfile.TemporaryDirectory() as folder:
            cells = measured(spec, Path(folder))
        packages = ("torch", "onnx", "onnxscript", "onnxruntime")
        rows.append(
            {
                "spec": spec,
                **cells,
                **dict.fromkeys(TIMES, ""),
                "note": "failed" if failed(cells) else "",
                **{name: version(name) for name in packages},
                "commit": commit() or "installed",
                "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            }
        )
        rows.sort(key=lambda row: order[row["spec"]])
        write(rows, path)
        print(spec, *cells.values(), flush=True)
    if given.latency:
        latencies(rows, given.rounds)
        write(rows, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
