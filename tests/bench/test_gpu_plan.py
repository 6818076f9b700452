"""`benchmarks/gpu`: the order of its stages, their time, and how a later call goes on."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from gpu import __main__ as command
from gpu import work
from gpu.plan import Outcome, Record, Stage, State, carry_on

from spem.bench import tails

STAGES = command.STAGES
DONE = Outcome(0, cut_off=False)


class Machine:
    """A clock and processes that take as long as they are told to."""

    def __init__(self, needs: dict[str, float], codes: dict[str, int] | None = None) -> None:
        self.time = 0.0
        self.needs, self.codes = dict(needs), codes or {}
        self.ran: list[tuple[str, float]] = []
        self.said: list[str] = []

    def run(self, stage: Stage, limit: float) -> Outcome:
        self.ran.append((stage.name, limit))
        spent = min(limit, self.needs[stage.name])
        self.time += spent
        self.needs[stage.name] -= spent
        if self.needs[stage.name] > 0:
            return Outcome(143, cut_off=True)
        return Outcome(self.codes.get(stage.name, 0), cut_off=False, note="")

    def call(self, state: State, minutes: float, stages=STAGES) -> bool:
        deadline = self.time + 60 * minutes
        finished = carry_on(
            stages,
            state,
            self.run,
            now=lambda: self.time,
            deadline=deadline,
            save=lambda: None,
            say=self.said.append,
        )
        assert self.time <= deadline
        return finished


def statuses(state: State) -> dict[str, str]:
    return {name: record.status for name, record in state.records.items()}


def test_all_in_order_and_over_several_calls():
    needs = {"tests": 100, "ops-first": 300, "step": 250, "ops": 600}
    needs |= {"train-spem": 500, "train-none": 400}
    machine, state = Machine(needs), State()
    assert not machine.call(state, 9)
    # the operators leave time for the step
    assert machine.ran == [("tests", 540.0), ("ops-first", 240), ("step", 200.0)]
    assert statuses(state)["ops-first"] == statuses(state)["step"] == "open"
    assert not machine.call(state, 9)
    # the two trainings share what is left
    assert machine.ran[3:] == [
        ("ops-first", 240),
        ("step", 480.0),
        ("train-spem", 215.0),
        ("train-none", 215.0),
    ]
    assert not machine.call(state, 9)
    assert machine.ran[7:] == [("train-spem", 270.0), ("train-none", 270.0), ("ops", 85.0)]
    assert machine.call(state, 9)
    assert [name for name, _ in machine.ran[10:]] == ["train-spem", "ops"]
    assert set(statuses(state).values()) == {"done"}
    assert sum(needs.values()) == pytest.approx(machine.time)
    before = len(machine.ran)
    assert machine.call(state, 9)
    assert len(machine.ran) == before


def test_no_speed_after_failed_tests_but_training():
    machine = Machine(dict.fromkeys([s.name for s in STAGES], 10.0), {"tests": 1})
    state = State()
    assert machine.call(state, 9)
    assert [name for name, _ in machine.ran] == ["tests", "train-spem", "train-none"]
    assert {statuses(state)[name] for name in ("ops-first", "step", "ops")} == {"blocked"}
    state.records.pop("tests")
    machine.codes = {}
    assert machine.call(state, 9)
    assert statuses(state)["ops"] == "done"


def test_tests_without_an_end_fail_at_the_second_call():
    machine, state = Machine({"tests": 10_000.0}), State()
    only = [STAGES[0]]
    assert not machine.call(state, 9, only)
    assert machine.call(state, 9, only)
    assert state.of("tests").status == "failed"
    assert "cut off 2 times" in state.of("tests").note


def test_too_little_time_starts_nothing():
    machine, state = Machine({"tests": 1.0}), State()
    assert not machine.call(state, 1)
    assert machine.ran == []
    assert "60 s left of 90" in machine.said[0]


def test_a_stage_that_waits_for_an_unfinished_one_ends_the_call():
    machine, state = Machine({"ops": 1.0}), State()
    assert not machine.call(state, 9, [STAGES[1]])
    assert machine.ran == []


def test_the_state_survives(tmp_path: Path):
    path = tmp_path / "state.json"
    state = State({"tests": Record("done", 1, 12.5, "")})
    state.save(path)
    assert State.load(path) == state
    assert State.load(tmp_path / "absent.json") == State()
    path.write_text('{"tests": {"colour": 1}}')
    with pytest.raises(SystemExit, match="damaged"):
        State.load(path)


def test_processes_are_stopped_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(command, "GRACE", 1.0)
    processes = command.Processes(tmp_path, tmp_path, State())
    environment = dict(os.environ)

    def python(text: str, limit: float) -> Outcome:
        return processes.execute([sys.executable, "-c", text], "ops", limit, environment)

    assert python("print('fine')", 30) == DONE
    assert python("print('it broke'); raise SystemExit(1)", 30) == Outcome(1, False, "it broke")
    assert python("import time; time.sleep(60)", 2).cut_off
    text = processes.log.read_text()
    assert "fine" in text
    assert "== ops, at most 30 s" in text


def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert command.main(["--out", str(tmp_path / "out")]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_folder_travels(tmp_path: Path):
    folder = tmp_path / "run"
    work.unpack(tmp_path / "absent.tar", folder)
    for name in ("config.json", "checkpoint.pt", "claim.lock"):
        (folder / name).write_text(name)
    work.pack(folder, tmp_path / "run.tar")
    work.unpack(tmp_path / "run.tar", tmp_path / "again")
    found = sorted(p.name for p in (tmp_path / "again").iterdir())
    assert found == ["checkpoint.pt", "config.json"]


def test_tests_of_the_kernels_are_counted(tmp_path: Path):
    record = tmp_path / "tests.xml"
    assert work.kernel_tests(record) == {"test_kernels": 0, "test_tail": 0}
    record.write_text(
        '<testsuites><testsuite><testcase classname="tests.ops.test_kernels" name="a"/>'
        '<testcase classname="tests.ops.test_kernels" name="b"><skipped/></testcase>'
        '<testcase classname="ops.test_tail" name="all[triton-float32]"/>'
        '<testcase classname="ops.test_tail" name="all[numba-float32]"/>'
        '<testcase classname="ops.test_cpu" name="c"/></testsuite></testsuites>'
    )
    assert work.kernel_tests(record) == {"test_kernels": 1, "test_tail": 1}
    folder = Path(work.REPOSITORY) / "tests" / "ops"
    assert all((folder / f"{name}.py").exists() for name in (*work.NO_GPU, *work.LEAST))
    assert all((Path(work.REPOSITORY) / name).exists() for name in work.TRAINING)


def test_the_first_maps_of_the_operators():
    maps, compiled = work.first_maps()
    assert len(compiled) == 2
    kinds = {(c.layout, c.dtype) for c in maps}
    assert kinds == {(a, b) for a in tails.LAYOUTS for b in ("bfloat16", "float32")}
    assert {c.op for c in (*maps, *compiled)} == {"bn_train"}
    assert sum(c.shape == (16, 256, 8, 8) for c in maps) == 2
    assert not set(maps) & set(compiled)


def test_pytest_selects_what_needs_a_gpu():
    found = [pytest.mark.skipif(True, reason=text) for text in ("needs a CUDA device", "other")]

    class Item:
        def __init__(self, *marks: pytest.MarkDecorator) -> None:
            self.marks = [one.mark for one in marks]

        def iter_markers(self, name: str) -> list[pytest.Mark]:
            return [mark for mark in self.marks if mark.name == name]

    items = [Item(found[0]), Item(found[1]), Item()]
    first = items[0]
    work.OnlyGpu().pytest_collection_modifyitems(items)
    assert items == [first]
    for name in work.TRAINING:  # the reason that is looked for is theirs
        text = (Path(work.REPOSITORY) / name).read_text(encoding="utf-8")
        assert 'reason="needs a CUDA device"' in text


def test_failed_providers_fail_the_stage(capsys: pytest.CaptureFixture[str]):
    assert work.told([]) == 0
    assert work.told(["spem, fused: out of memory"]) == 1
    assert "spem, fused" in capsys.readouterr().out


def test_what_matters_in_a_run_folder_travels():
    from spem.training.folder import FILES, LOCK

    assert all(Path(name).suffix in work.TRAVELS for name in FILES if name != LOCK)
