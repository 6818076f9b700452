"""Results folders made up for tests: plausible numbers that come from a formula, not from runs."""

from __future__ import annotations

import csv
import io
import random
from pathlib import Path
from typing import Any

import numpy as np

COPY = "c6c82dd55698c5e9b34539deaf04c87e44798a9c8b72fafb723e0e6fabac4d84"
NASTY = 'row <script>alert("1")</script> & $x_1$ | \\input{a} #% *b* [c](d)'
PLAN = """
experiment row data scale dataset depth attention id seeds reference paper_row paper_depth
paper_parameters_millions paper_top1 note
"""
RUN = """
dataset depth attention seed id status epochs steps train_images test_images batch branch_start
penalty precision impl accuracy loss train_accuracy train_loss validation_accuracy best_accuracy
best_epoch best_selected_on parameters attention_parameters flops train_sha256 test_sha256 message
time_train_seconds time_evaluation_seconds time_step_ms time_images_per_second time_date host_commit
host_hardware host_step host_python host_torch
"""
EPOCHS = 5
PAPER = {
    "none": (1.70, 93.39),
    "se": (1.91, 94.24),
    "cbam": (1.92, 93.88),
    "eca": (1.70, 94.47),
    "srm": (1.74, 94.55),
    "sge": (1.71, 94.25),
    "spem": (1.74, 94.80),
}
MEANS = {"none": 36.0, "se": 37.0, "cbam": 36.5, "eca": 37.2, "srm": 36.8, "sge": 36.4}


def text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.7g}" if isinstance(value, float) else str(value)


class Folder:
    """Collects rows and writes them as `spem reproduce` would."""

    def __init__(self, scale: str = "short") -> None:
        self.scale = scale
        self.random = random.Random(scale)
        self.seed_effect = {seed: self.random.gauss(0, 0.5) for seed in range(20)}
        self.plan: list[dict[str, Any]] = []
        self.tables: dict[str, list[dict[str, Any]]] = {
            name: [] for name in ("runs", "epochs", "mixes", "gates", "gradients")
        }
        self.answers: dict[str, np.ndarray] = {}
        self.done: set[tuple[str, int]] = set()

    def cell(self, experiment: str, row: str, data: str, attention: str, **more: Any) -> str:
        """Plan a cell; returns its id."""
        depth = more.get("depth", 11)
        name = more.get("id", f"{abs(hash_of(data, depth, attention, more.get('penalty'))):010x}")
        top = more.get("paper", (None, None))
        self.plan.append(
            {
                "experiment": experiment,
                "row": row,
                "data": data,
                "scale": self.scale,
                "dataset": data if name else "",
                "depth": depth if name else None,
                "attention": attention,
                "id": name,
                "seeds": " ".join(map(str, more.get("seeds", (0, 1, 2)))) if name else "",
                "reference": more.get("reference", ""),
                "paper_row": more.get("paper_row", "1") if top[1] else "",
                "paper_depth": 164 if top[1] else None,
                "paper_parameters_millions": top[0],
                "paper_top1": top[1],
                "note": more.get("note", ""),
            }
        )
        return name

    def run(
        self, name: str, data: str, attention: str, seed: int, mean: float, **more: Any
    ) -> None:
        """A finished (or diverged) run with all that is written down of it."""
        if (name, seed) in self.done:
            return
        self.done.add((name, seed))
        key = {
            "dataset": data,
            "depth": more.pop("depth", 11),
            "attention": attention,
            "seed": seed,
            "id": name,
        }
        settings = {
            "train_images": more.pop("train_images", 5000),
            "test_images": None,
            "batch": 128,
            "branch_start": more.pop("branch_start", None),
            "penalty": more.pop("penalty", 0.1),
            "precision": more.pop("precision", "fp32"),
            "impl": more.pop("impl", "reference"),
        }
        message = more.pop("message", None)
        if message is not None:
            self.tables["runs"].append(
                {**key, "status": "diverged", **settings, "message": message}
            )
            return
        accuracy = round(mean + self.seed_effect[seed] + self.random.gauss(0, 0.2), 2)
        facts = {
            "epochs": EPOCHS,
            "accuracy": accuracy,
            "loss": 1.7,
            "train_accuracy": accuracy + 1,
            "train_loss": 1.66,
            "best_accuracy": accuracy + 0.1,
            "best_epoch": EPOCHS - 1,
            "best_selected_on": "test",
            "parameters": 127642 + 100 * len(attention),
            "attention_parameters": 0,
            "flops": 40735744,
            "steps": 200,
            "train_sha256": "a" * 64,
            "test_sha256": COPY if data == "cifar10" else "b" * 64,
            "time_train_seconds": 90.5,
            "time_evaluation_seconds": 40.25,
            "time_step_ms": 400.0 + 10 * len(attention) + seed,
            "time_images_per_second": 280.0,
            "time_date": "2026-01-01T00:00:00+00:00",
            "host_commit": "0123456789",
            "host_hardware": "a machine & more, 1 thread",
            "host_step": "eager",
            "host_python": "3.11.7",
            "host_torch": "2.15.0",
        }
        self.tables["runs"].append({**key, "status": "finished", **settings, **facts, **more})
        self.inside(key, accuracy)
        right = np.random.default_rng(seed).random(200) < accuracy / 100
        self.answers[f"{name}-{seed}"] = np.where(right, 1, 0).astype(np.uint8)
        self.answers[f"labels-{name}"] = np.ones(200, dtype=np.uint8)

    def inside(self, key: dict[str, Any], accuracy: float) -> None:
        blocks = [f"layer{1 + i}.0" for i in range(3)]
        for epoch in range(EPOCHS):
            self.tables["epochs"].append(
                {
                    **key,
                    "epoch": epoch,
                    "lr": 0.1,
                    "loss": 2.2 - 0.1 * epoch + 0.3,
                    "penalty": 0.3,
                    "train_accuracy": 20.0 + 3 * epoch,
                    "test_loss": 2.0,
                    "test_accuracy": accuracy - 3.0 * (EPOCHS - 1 - epoch),
                    "best_epoch": epoch,
                    "best_test_accuracy": accuracy,
                    "time_seconds": 18.5,
                }
            )
            for i, block in enumerate(blocks):
                self.tables["gradients"].append(
                    {**key, "epoch": epoch, "block": block, "index": i, "norm": 0.9 ** (3 - i)}
                )
                if key["attention"].startswith("spem"):
                    place = {"epoch": epoch, "mix": f"{block}.attention.pool"}
                    values = {
                        "lambda": min(1.0, max(0.0, 0.5 + 0.1 * (i - 1) * epoch)),
                        "magnitude": 0.7 * 0.2**epoch,
                        "change": 0.01 * (epoch + 1),
                    }
                    self.tables["mixes"].append({**key, **place, **values})
        if key["attention"] == "none":
            return
        for i, block in enumerate(blocks):
            middle = 0.3 + 0.1 * i
            self.tables["gates"].append(
                {
                    **key,
                    "block": f"{block}.attention",
                    "index": i,
                    "channels": 64 * 2**i,
                    "mean": middle,
                    "sd": 0.1,
                    **{f"q{q:02d}": middle + 0.2 * (q / 100 - 0.5) for q in (5, 25, 50, 75, 95)},
                    "sd_channels": 0.08,
                    "sd_images": 0.02 + 0.01 * i,
                }
            )

    def write(self, out: Path) -> Path:
        out.mkdir(parents=True, exist_ok=True)
        (out / "plan.csv").write_text(table(self.plan, PLAN.split()), encoding="utf-8")
        for name, rows in self.tables.items():
            if rows:
                columns = RUN.split() if name == "runs" else list(rows[0])
                (out / f"{name}.csv").write_text(table(rows, columns), encoding="utf-8")
        if self.answers:
            np.savez_compressed(out / "predictions.npz", **self.answers)
        return out


def hash_of(*parts: object) -> int:
    """The same number in every process."""
    return random.Random(repr(parts)).getrandbits(40)


def table(rows: list[dict[str, Any]], columns: list[str]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([text(row.get(column)) for column in columns] for row in rows)
    return stream.getvalue()


def table1(folder: Folder, data: str = "cifar10", seeds: tuple[int, ...] = (0, 1, 2)) -> None:
    label = {"none": "plain"}
    for name, paper in PAPER.items():
        reference = {"none": "plain", "se": "se"}.get(name, "")
        row = label.get(name, name.upper())
        run_id = folder.cell("table1", row, data, name, reference=reference, paper=paper)
        for seed in seeds:
            if name == "cbam" and seed == 2:
                folder.run(run_id, data, name, seed, 0, message="loss is NaN in epoch 3 <b>")
            elif name == "srm" and seed > 0:
                continue  # one seed only
            elif name != "sge":  # not run at all
                mean = MEANS.get(name, 37.5) - (20 if data == "cifar100" else 0)
                folder.run(run_id, data, name, seed, mean)


def everything(out: Path) -> Path:
    """A folder with a bit of everything: missing, diverged, single seeds, letters that hurt."""
    folder = Folder()
    table1(folder)
    table1(folder, "cifar100")
    for depth, paper in ((11, 83), (20, 164), (29, 245), (38, 326)):
        for name, row in (("none", "plain"), ("spem", "SPEM")):
            run_id = folder.cell(
                "table2",
                f"ResNet{paper}, {row}",
                "cifar10",
                name,
                depth=depth,
                reference="plain" if name == "none" else "",
                paper=(1.7, 93.39),
                note=f"depth {depth} stands for {paper}",
            )
            folder.cell("gradients", f"ResNet{paper}, {row}", "cifar10", name, depth=depth)
            for seed in range(3) if depth < 38 else ():
                mean = 36 + depth / 20 + (name == "spem")
                folder.run(run_id, "cifar10", name, seed, mean, depth=depth)
    for experiment, net in (("table3", "spem"), ("figure2", "se")):
        for lam in (0.1, 0.3, 0.5, 0.7, 0.9):
            spec = f"{net}(pool=mix({lam}))"
            run_id = folder.cell(experiment, f"lambda = {lam}", "cifar10", spec)
            for seed in range(3):
                folder.run(run_id, "cifar10", spec, seed, 37 + lam)
        row = "learned" if net == "spem" else "average pooling"
        folder.cell(experiment, row, "cifar10", net, reference="base", paper=(None, 94.8))
    folder.cell("table4", "the paper's (b)", "cifar10", "", id="", paper=(1.74, 92.98), note="lost")
    controls(folder)
    for penalty in (0.1, 0.0):
        run_id = folder.cell(
            "penalty",
            f"penalty {penalty:g}",
            "cifar10",
            "spem",
            penalty=penalty,
            reference="base" if penalty else "",
        )
        for seed in range(3):
            folder.run(run_id, "cifar10", "spem", seed, 37, penalty=penalty)
    folder.cell("family", NASTY, "cifar10", "spem(<script>)", note=NASTY)
    return folder.write(out)


def controls(folder: Folder, seeds: int = 8) -> None:
    arms = (
        ("plain", "none", "plain", 36.0, None),
        ("plain, branches start at 0.032", "none", "control", 37.4, 0.0320586),
        ("scale", "scale", "control", 37.3, None),
        ("SE", "se", "se", 37.0, None),
        ("SPEM (text)", "spem", "", 37.5, None),
        ("SPEM (code)", "spem(form=code)", "", 38.9, None),
    )
    for row, attention, reference, mean, start in arms:
        run_id = folder.cell(
            "controls",
            row,
            "cifar10",
            attention,
            reference=reference,
            seeds=tuple(range(seeds)),
            penalty=start,
        )
        for seed in range(seeds):
            folder.run(run_id, "cifar10", attention, seed, mean, branch_start=start)
