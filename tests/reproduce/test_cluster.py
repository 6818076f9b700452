"""The Ray engine on a real cluster of two workers, one of which is killed while it trains."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from reproduce.grids import (
    LONG,
    PATIENCE,
    holders,
    plan,
    undisturbed,
    wait_until,
)
from reproduce.test_reproduce_killed import TABLES, WHOLE, without_machine

from spem.reproduce import cluster

HERE = Path(__file__).resolve()
pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
EPOCHS = 6
PROGRAM = """
import sys
from reproduce.grids import fewer_images
from spem.cli import main
fewer_images()
sys.exit(main())
"""
MINUTES = 420.0
"""Seconds after which a grid counts as stuck."""
SEEDS = os.environ.get("SPEM_TEST_SEEDS", "1")
"""Of the grid; 3 are the whole of it, and take minutes."""


def environment(**more: str) -> dict[str, str]:
    """For Ray and its processes: the package and the tests, nothing reported to anybody."""
    paths = os.pathsep.join([str(HERE.parents[1]), *sys.path])
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return {**os.environ, **quiet, **more}


def token(path: Path | str) -> dict[str, str]:
    """The secret that all parts of the test's cluster share."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}


class Node:
    """`ray start --block` in a process group of its own, which is all that is ever ended."""

    def __init__(self, temporary: Path, *arguments: str) -> None:
        self.log = temporary / f"node-{time.monotonic_ns()}.txt"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(**token(temporary / "token")),
                start_new_session=True,
            )

    def wait(self, text: str) -> str:
        """Wait until the node says something; returns all that it said."""

        def said() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            return text in self.log.read_text()

        wait_until(said)
        return self.log.read_text()

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture
def address() -> Generator[str]:
    """A cluster of two nodes with a processor each, on this machine."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        temporary = Path(folder)  # short: the names of its sockets must fit into 107 bytes
        (temporary / "token").write_text("0123456789abcdef" * 4)
        shared = ("--num-cpus", "1", "--object-store-memory", "80000000")
        nodes: list[Node] = []
        try:
            head = Node(
                temporary,
                *("--head", "--port", "0", "--include-dashboard", "false"),
                *("--temp-dir", folder, *shared),
            )
            nodes.append(head)
            lines = head.wait("ray start --address=").splitlines()
            (found,) = {line.split("'")[1] for line in lines if "ray start --address='" in line}
            nodes.append(Node(temporary, "--address", found, *shared))
            nodes[1].wait("Ray runtime started")
            yield f"{found} {temporary / 'token'}"
        finally:
            for node in reversed(nodes):
                node.stop()


def drive(runs: Path, count: int, address: str, epochs: int = EPOCHS) -> subprocess.Popen[str]:
    """A command that trains a grid on the cluster (or on one of its own, without an address)."""
    where, _, secret = address.partition(" ")
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(HERE), str(runs), str(count), str(epochs), where],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**(token(secret) if secret else {})),
        start_new_session=True,
    )


def listened_on(session: int) -> Iterator[str]:
    """The addresses on which processes of a session (and their children's sessions) listen."""
    parents = {session}
    stats: dict[int, tuple[int, int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            stats[int(path.parent.name)] = int(fields[1]), int(fields[3])
    for _ in range(5):
        parents |= {pid for pid, (up, own) in stats.items() if up in parents or own in parents}
    sockets: set[str] = set()
    for pid in parents:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                sockets.add(str(link.readlink()))
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                raw = bytes.fromhex(fields[1].partition(":")[0])
                # Words of the machine's byte order; IPv4 in IPv6 is its last one.
                word = raw[-4:][::-1]
                mapped = len(raw) == 4 or raw[8:12] == b"\xff\xff\x00\x00"
                yield ".".join(map(str, word)) if mapped else raw.hex()


def reproduce(folder: Path, *options: str, **more: str) -> subprocess.Popen[str]:
    """The command on Table 1's smoke grid."""
    call = ["reproduce", "table1", "--scale", "smoke", "--seeds", SEEDS, "--results", str(folder)]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *call, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(**more),
        start_new_session=True,
    )


@pytest.mark.timeout(1000)
def test_the_smoke_grid_on_two_workers_one_of_them_killed(tmp_path: Path, address: str) -> None:
    """Every run is trained once but the killed one, and all tables equal those of local runs."""
    where, _, secret = address.partition(" ")
    command = reproduce(tmp_path, "--engine", "ray", "--address", where, **token(secret))
    runs = tmp_path / "runs"
    try:
        wait_until(lambda: list(runs.rglob("checkpoint.pt")) or command.poll() is not None)
        killed = holders(runs)[:1]
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        out, _ = command.communicate(timeout=MINUTES)
    finally:
        command.kill()
    assert killed, out
    assert command.returncode == 0, out
    logs = [path.read_text() for path in runs.rglob("log.txt")]
    assert len(logs) == len(list(runs.rglob("result.json"))) == 7 * int(SEEDS), out
    began = sorted(log.count("step: eager") for log in logs)
    assert began == [1] * (len(logs) - 1) + [2], out
    assert not list(runs.glob(".shared-*"))

    local = reproduce(tmp_path / "local")
    out, _ = local.communicate(timeout=MINUTES)
    assert local.returncode == 0, out
    for name in WHOLE:
        assert (tmp_path / name).read_bytes() == (tmp_path / "local" / name).read_bytes(), name
    for name in TABLES:
        rows = without_machine(tmp_path / "local" / name)
        assert len(rows) > len(logs), name
        assert without_machine(tmp_path / name) == rows, name


def test_our_own_cluster_keeps_to_this_machine(tmp_path: Path) -> None:
    """What its processes listen on, as the kernel tells; Ctrl-C then leaves a checkpoint."""
    command = drive(tmp_path, 1, "", epochs=LONG)
    try:
        wait_until(lambda: list(tmp_path.rglob("checkpoint.pt")) or command.poll() is not None)
        listening = list(listened_on(command.pid))
        command.send_signal(signal.SIGINT)
        out, err = command.communicate(timeout=PATIENCE)
    finally:
        command.kill()
    assert (command.returncode, out.splitlines()[-1:]) == (130, ["0 0 0 0 1"]), err
    assert len(listening) > 3
    assert {address for address in listening if not address.startswith("127.")} == set()
    assert holders(tmp_path) == []


def test_a_machine_with_another_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its task trains in a folder of its own and brings all files but the checkpoint."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "other"))
    (tmp_path / "other").mkdir()
    config = plan(1, 2)[0]
    undisturbed([config], tmp_path / "expected")
    folder = config.folder(tmp_path / "runs")
    outcome, brought = cluster._task(config, str(folder), str(tmp_path / "absent"), False)
    assert outcome.kind == "finished"
    assert not folder.exists()
    cluster._bring(brought, folder)
    expected = config.folder(tmp_path / "expected")
    left_out = {"checkpoint.pt"}
    assert {p.name for p in folder.iterdir()} == {p.name for p in expected.iterdir()} - left_out
    for name in ("answers.npy", "gates.json", "config.json"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes()
    # a second try, after the driver was lost, finds the result there and trains nothing
    log = brought["log.txt"]
    assert cluster._task(config, str(folder), str(tmp_path / "absent"), False)[1]["log.txt"] == log


if __name__ == "__main__":
    from reproduce.grids import Recorder

    seen = Recorder()
    done = cluster.run_on_ray(
        plan(int(sys.argv[2]), int(sys.argv[3])),
        Path(sys.argv[1]),
        address=sys.argv[4] or None,
        observer=seen,
    )
    print(*(len(x) for x in (done.finished, done.diverged, done.failed, done.held, done.left)))
    sys.exit(0 if done.stopped_by is None else 128 + done.stopped_by)
