"""All GPU work, one command: tests, operators, training step, paper-scale training, all maps.

    python benchmarks/gpu --out DIR --minutes 9

Every call ends before its minutes are over; the next one goes on from what lies in DIR, on any
machine. DIR stays flat and small: state.json, log.txt, tests.xml, ops.csv, step.csv and a .tar for
each trained network (its checkpoint, weights and metrics), below 16 MiB each. It needs torch,
Triton and numpy; tests need pytest, training safetensors, pyarrow, Pillow and the images.

Exit codes: 0 all is done; 1 a stage failed; 2 there is no CUDA device; 3 there is more to do.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

STARTED = time.monotonic()
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from gpu.plan import STATE, Outcome, Stage, State, carry_on  # noqa: E402 - the path comes first

STAGES = (
    Stage("tests", least=90, calls=2),
    # What decides, and no longer than leaves time for the others.
    Stage("ops-first", least=60, most=240, after=("tests",)),
    Stage("step", least=90, after=("tests",)),
    Stage("train-spem", least=90, group="train"),
    Stage("train-none", least=90, group="train"),
    Stage("ops", least=60, after=("tests",)),
)
GRACE = 25.0
"""Seconds within which a process that was told to stop has to end."""
RESERVE = 15.0
"""Seconds kept for writing down what happened."""
LOG_BYTES = 1 << 20


class Processes:
    """Runs stages as processes, whose output goes into one log."""

    def __init__(self, out: Path, images: Path, state: State) -> None:
        self._out, self._images, self._state = out, images, state
        self.log = out / "log.txt"

    def run(self, stage: Stage, limit: float) -> Outcome:
        work = [
            sys.executable,
            str(HERE / "work.py"),
            stage.name,
            str(self._out),
            str(self._images),
        ]
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment["PYTHONUNBUFFERED"] = "1"
        # The package need not be installed there, and tests start processes of their own.
        places = [str(HERE.parents[1] / "src"), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, places))
        if stage.group == "train" and self._state.done("tests"):
            environment.setdefault("SPEM_IMPL", "triton")  # proven on this machine
        return self.execute(work, stage.name, limit, environment)

    def execute(
        self, command: Sequence[str], name: str, limit: float, environment: dict[str, str]
    ) -> Outcome:
        """A process, told to stop in time, and killed if it does not."""
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"\n== {name}, at most {limit:.0f} s\n")
            log.flush()
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment
            )
            try:
                code, cut_off = process.wait(max(limit - GRACE, 1.0)), False
            except subprocess.TimeoutExpired:
                # pytest writes its record after an interruption only.
                process.send_signal(signal.SIGINT if name == "tests" else signal.SIGTERM)
                cut_off = True
                try:
                    code = process.wait(GRACE)
                except subprocess.TimeoutExpired:
                    process.kill()
                    code = process.wait()
        note = "" if code == 0 or cut_off else self._last_line()
        return Outcome(code, cut_off and code != 0, note)

    def _last_line(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "")[:300]

    def shorten_log(self) -> None:
        """Keeps the end of a log that has grown large."""
        if self.log.exists() and self.log.stat().st_size > LOG_BYTES:
            self.log.write_bytes(self.log.read_bytes()[-LOG_BYTES:])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu",
        description=(__doc__ or "").split("\n", 1)[0],
    )
    names = [*dict.fromkeys(stage.group or stage.name for stage in STAGES)]
    parser.add_argument("--out", type=Path, required=True, help="folder of everything")
    parser.add_argument("--minutes", type=float, default=9.0, help="length of this call")
    parser.add_argument("--stage", choices=names, default=None, help="this one only")
    parser.add_argument(
        "--again", choices=names, action="append", default=[], help="forget how this one ended"
    )
    parser.add_argument(
        "--images",
        type=Path,
        default=Path(os.environ.get("SPEM_DATA") or HERE.parents[1] / "shared" / "data"),
        help="folder that holds cifar10/ (default: $SPEM_DATA, else shared/data)",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parse(arguments)
    import torch

    if not torch.cuda.is_available():
        print("gpu: torch sees no CUDA device here, so there is nothing to do.", file=sys.stderr)
        return 2
    chosen.out.mkdir(parents=True, exist_ok=True)
    path = chosen.out / STATE
    state = State.load(path)
    for stage in STAGES:
        if (stage.group or stage.name) in chosen.again:
            state.records.pop(stage.name, None)
    processes = Processes(chosen.out.resolve(), chosen.images.resolve(), state)
    finished = carry_on(
        [s for s in STAGES if chosen.stage in (None, s.group or s.name)],
        state,
        processes.run,
        now=time.monotonic,
        deadline=STARTED + 60 * chosen.minutes - RESERVE,
        save=lambda: state.save(path),
        say=lambda text: print(text, flush=True),
    )
    processes.shorten_log()
    if any(record.status == "failed" for record in state.records.values()):
        return 1
    return 0 if finished else 3


if __name__ == "__main__":
    sys.exit(main())
