"""Which ONNX form of an attention onnxruntime runs fastest: ResNet-50 at 224, contiguous fp32.

    python benchmarks/onnx_forms.py GRAPHS --rounds 0     # builds the graphs, times nothing
    python benchmarks/onnx_forms.py GRAPHS --images 1 8 --threads 1 2

Every form is an ONNX function that stands behind the last norm of each block; its outputs are
compared with PyTorch's before anything is timed. `exported` is what `to_onnx` writes, `plain` the
network without attention, `folded` what `spem.fold` leaves. All graphs take turns in every round.
"""

import argparse
import re
import statistics
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, inliner, numpy_helper, parser
from record import Row, facts, in_turns, read, write
from torch import Tensor, nn

import spem
from spem.attention import ChannelAttention

RESULTS = Path(__file__).parent / "results" / "onnx_forms.csv"
SHAPE = (1, 3, 224, 224)
PLANES = "flat = Constant<value_ints: ints = [0, 0, -1]>() p = Reshape(x, flat)"
OVER2 = "axes = Constant<value_ints: ints = [2]>()"
OVER23 = "axes = Constant<value_ints: ints = [2, 3]>()"
BACK = "back = Constant<value_ints: ints = [0, 0, 1, 1]>() g = Reshape(v, back)"
NEGATIVE = "o = Neg(x) n = GlobalMaxPool(o)"
SCALED = "y = Mul(x, v)"
# The identity as a depthwise convolution, into which onnxruntime fuses addition and ReLU.
INTO_CONV = "t = Mul(x, v) y = Conv<group={C}>(t, one)"


def spem_gate(axes: str) -> str:
    """SPEM's gate of M and m with weights [C] or [1, C, 1, 1]."""
    return (
        f"a = Mul(M, lam) b = Mul(m, rest) u = Add(a, b) c = Mul(u, w_e{axes}) "
        f"d = Add(c, b_e{axes}) e = Sigmoid(d) s = Add(M, m) f = Mul(s, w_r{axes}) "
        f"h = Add(f, b_r{axes}) r = Sigmoid(h) v = Mul(e, r)"
    )


SPEM_CONVS = (
    "e1 = Conv<group={C}>(M, we_M, b_e) e2 = Conv<group={C}>(n, we_n) e3 = Add(e1, e2) "
    "e = Sigmoid(e3) r1 = Conv<group={C}>(M, wr_M, b_r) r2 = Conv<group={C}>(n, wr_n) "
    "r3 = Add(r1, r2) r = Sigmoid(r3) v = Mul(e, r)"
)
GEMM = "a = Gemm<transB=1>(z, W1, b1) b = Relu(a) c = Gemm<transB=1>(b, W2, b2) v = Sigmoid(c)"
MATMUL = (
    "i = MatMul(z, W1t) a = Add(i, b1) b = Relu(a) j = MatMul(b, W2t) c = Add(j, b2) v = Sigmoid(c)"
)
CONV = "a = Conv(z, W1c, b1) b = Relu(a) c = Conv(b, W2c, b2) v = Sigmoid(c)"
REDUCE23 = f"{OVER23} M = ReduceMax(x, axes) m = ReduceMin(x, axes)"
MIXED = f"{OVER23} M = GlobalMaxPool(x) m = ReduceMin(x, axes)"
REDUCE2 = f"{PLANES} {OVER2} M = ReduceMax<keepdims=0>(p, axes) m = ReduceMin<keepdims=0>(p, axes)"
MEAN2 = f"{PLANES} {OVER2} z = ReduceMean<keepdims=0>(p, axes)"
SCALED2 = f"{BACK} y = Mul(x, g)"
FORMS: dict[str, dict[str, str]] = {
    "spem": {
        "ReduceMax, ReduceMin of [N, C, HW]": f"{REDUCE2} {spem_gate('')} {SCALED2}",
        "ReduceMax, ReduceMin": f"{REDUCE23} {spem_gate('4')} {SCALED}",
        "ReduceMax, ReduceMin, into Conv": f"{REDUCE23} {spem_gate('4')} {INTO_CONV}",
        "GlobalMaxPool, ReduceMin": f"{MIXED} {spem_gate('4')} {SCALED}",
        "GlobalMaxPool, ReduceMin, into Conv": f"{MIXED} {spem_gate('4')} {INTO_CONV}",
        "GlobalMaxPool of x and -x": (
            f"M = GlobalMaxPool(x) {NEGATIVE} m = Neg(n) {spem_gate('4')} {SCALED}"
        ),
        "GlobalMaxPool of x and -x, all as Conv": (
            "M = GlobalMaxPool(x) o = Conv<group={C}>(x, minus) n = GlobalMaxPool(o) "
            f"{SPEM_CONVS} {INTO_CONV}"
        ),
    },
    "se": {
        "ReduceMean of [N, C, HW], Gemm": f"{MEAN2} {GEMM} {SCALED2}",
        "ReduceMean, Conv": f"{OVER23} z = ReduceMean(x, axes) {CONV} {SCALED}",
        "GlobalAveragePool, Gemm": f"q = GlobalAveragePool(x) z = Flatten(q) {GEMM} {SCALED2}",
        "GlobalAveragePool, MatMul": f"q = GlobalAveragePool(x) z = Flatten(q) {MATMUL} {SCALED2}",
        "GlobalAveragePool, Conv": f"z = GlobalAveragePool(x) {CONV} {SCALED}",
        "GlobalAveragePool, Conv, into Conv": f"z = GlobalAveragePool(x) {CONV} {INTO_CONV}",
        "ReduceMean of [N, C, HW], Gemm, into Conv": (
            f"{MEAN2} {GEMM} {BACK} t = Mul(x, g) y = Conv<group={{C}}>(t, one)"
        ),
    },
}


class Mark(nn.Module):
    """Stands where an attention was: as an operator that occurs nowhere else."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.erf(x)


def host(attention: str) -> nn.Module:
    """timm's ResNet-50 with an attention whose weights are drawn at random."""
    timm: Any = __import__("timm")
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("resnet50", zero_init_last=False).eval()
    if attention != "plain":
        spem.attach(model, attention, start="module", input_shape=SHAPE)
        for module in model.modules():
            if isinstance(module, ChannelAttention):
                for parameter in module.parameters():
                    nn.init.normal_(parameter, std=0.3)
    return model


def weights(module: Any) -> dict[str, np.ndarray]:
    """What the forms call the weights of an attention."""
    channels = module.channels
    ones = torch.ones(channels)
    if isinstance(module, spem.SPEM):
        lam: Tensor = module.get_submodule("pool").lam  # pyright: ignore[reportAssignmentType]
        rest = 1 - lam
        w_e, b_e, w_r, b_r = module.w_e, module.b_e, module.w_r, 2 * module.b_r
        found = {"lam": lam, "rest": rest, "w_e": w_e, "b_e": b_e, "w_r": w_r, "b_r": b_r}
        found |= {f"{k}4": found[k].view(1, -1, 1, 1) for k in ("w_e", "b_e", "w_r", "b_r")}
        convs = {"we_M": lam * w_e, "we_n": -rest * w_e, "wr_M": w_r, "wr_n": -w_r, "minus": -ones}
    else:
        one, two = module.fc1, module.fc2
        found = {"W1": one.weight, "b1": one.bias, "W2": two.weight, "b2": two.bias}
        found |= {"W1t": one.weight.T, "W2t": two.weight.T}
        found |= {"W1c": one.weight[..., None, None], "W2c": two.weight[..., None, None]}
        convs = {}
    found |= {name: w.reshape(-1, 1, 1, 1) for name, w in (convs | {"one": ones}).items()}
    return {name: np.ascontiguousarray(w.detach().numpy()) for name, w in found.items()}


def with_form(marked: Any, modules: Sequence[ChannelAttention], form: str) -> Any:
    """The graph with this form in the place of each mark."""
    proto = type(marked)()
    proto.CopyFrom(marked)
    proto.graph.ClearField("value_info")
    opset = next(entry.version for entry in proto.opset_import if not entry.domain)
    marks = [node for node in proto.graph.node if node.op_type == "Erf"]
    for number, (node, module) in enumerate(zip(marks, modules, strict=True)):
        body = form.replace("{C}", str(module.channels))
        given = {k: w for k, w in weights(module).items() if re.search(rf"\b{k}\b(?! =)", body)}
        head = f'<domain: "form", opset_import: ["": {opset}]> form{number}'
        text = f"{head} ({', '.join(['x', *given])}) => (y) {{ {body} }}"
        proto.functions.append(parser.parse_function(text))
        node.op_type, node.domain = f"form{number}", "form"
        for name, weight in given.items():
            proto.graph.initializer.append(numpy_helper.from_array(weight, f"site{number}.{name}"))
            node.input.append(f"site{number}.{name}")
    proto.opset_import.append(helper.make_opsetid("form", 1))
    return inliner.inline_local_functions(proto)


def build(folder: Path) -> None:
    """Writes every graph that the folder lacks, after it has been run beside PyTorch."""
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    for attention, forms in FORMS.items():
        network = host(attention)
        exported = folder / f"{attention}.exported.onnx"
        if not exported.exists():
            spem.to_onnx(network, exported, SHAPE)
        modules = [m for m in network.modules() if isinstance(m, ChannelAttention)]
        with torch.no_grad():
            expected = network(x)
        names = [name for name, m in network.named_modules() if isinstance(m, ChannelAttention)]
        for name in names:
            network.set_submodule(name, Mark())
        marked = folder / f"{attention}.marked"
        spem.to_onnx(network, marked, SHAPE, check=False)
        for number, form in enumerate(forms.values()):
            path = folder / f"{attention}.{number}.onnx"
            onnx.save(with_form(onnx.load(marked), modules, form), path)
            (found,) = session(path, 1).run(None, {"input": x.numpy()})
            error = float(abs(found - expected.numpy()).max() / expected.abs().max())
            if not error < 1e-3:
                raise SystemExit(f"onnx_forms: {attention} {number} differs by {error:.2g}.")
    plain, folded = host("plain"), host("spem")
    spem.to_onnx(plain, folder / "plain.exported.onnx", SHAPE)
    spem.fold(folded, [torch.randn(4, *SHAPE[1:])])
    spem.to_onnx(folded, folder / "folded.exported.onnx", SHAPE)


def session(path: Path, threads: int, level: str = "all") -> Any:
    """A graph in onnxruntime, with its optimisations."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # The threads of one graph are not to wait busily while another one runs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    known = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = getattr(known, f"ORT_ENABLE_{level.upper()}")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def timed(folder: Path, images: int, threads: int, level: str, rounds: int) -> list[Row]:
    """A row for each graph of the folder."""
    x = {"input": np.random.default_rng(0).normal(size=(images, *SHAPE[1:])).astype(np.float32)}
    sessions = {path.stem: session(path, threads, level) for path in sorted(folder.glob("*.onnx"))}
    calls = {name: lambda s=s: s.run(None, x) for name, s in sessions.items()}
    times = in_turns(calls, rounds)
    rows: list[Row] = []
    for name, own in times.items():
        attention, _, form = name.partition(".")
        ratios = sorted(a / b for a, b in zip(own, times["plain.exported"], strict=True))
        row = {
            "attention": attention,
            "form": list(FORMS[attention])[int(form)] if form.isdecimal() else form,
            "images": str(images),
            "threads": str(threads),
            "level": level,
            "time_ms": f"{statistics.median(own):.4g}",
            "to_plain": f"{statistics.median(ratios):.3f}",
            "to_plain_low": f"{ratios[rounds // 5]:.3f}",
            "to_plain_high": f"{ratios[-1 - rounds // 5]:.3f}",
            "rounds": str(rounds),
        }
        print(*row.values(), sep=" | ", flush=True)
        rows.append({**row, "onnxruntime": version("onnxruntime"), **facts(torch.device("cpu"))})
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds the graphs and times them; rows of other numbers of images and threads stay."""
    form = argparse.RawDescriptionHelpFormatter
    options = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    options.add_argument("graphs", type=Path, help="folder of the graphs, built if it is not there")
    options.add_argument("--out", type=Path, default=RESULTS, help="the table")
    options.add_argument("--images", type=int, nargs="+", default=[1, 8])
    options.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    about = "of optimisation; extended: no blocked layout"
    options.add_argument("--level", choices=("all", "extended"), default="all", help=about)
    options.add_argument("--rounds", type=int, default=25, help="timed calls of each")
    given = options.parse_args(arguments)
    if not given.graphs.exists():
        given.graphs.mkdir(parents=True)
        build(given.graphs)
    pairs = [(n, t) for n in given.images for t in given.threads] if given.rounds else []
    for images, threads in pairs:
        torch.set_num_threads(threads)
        rows = timed(given.graphs, images, threads, given.level, given.rounds)
        key = [str(images), str(threads), given.level]
        kept = [r for r in read(given.out) if [r["images"], r["threads"], r["level"]] != key]
        write([*kept, *rows], given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
