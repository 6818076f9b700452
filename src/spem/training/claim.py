"""The claim on a run folder: one process trains in it, and a dead one's claim can be taken over."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

from spem.training.checkpoint import write_atomic

SILENCE_SECONDS = 120.0
"""A claim from another host counts as dead when its heartbeat is older than this."""

_NAME = ".claim"


class HeldError(RuntimeError):
    """Another living process has the run folder."""


class Claim:
    """The right to write into a run folder, held from `acquire` to `release`.

    The file `.claim` holds host, process id and the process's start time (an id alone may have
    been given to another process since). A thread touches it as a heartbeat, for processes on
    other hosts that share the folder.
    """

    def __init__(self, folder: Path, *, silence_seconds: float = SILENCE_SECONDS) -> None:
        self.folder = folder
        self.silence_seconds = silence_seconds
        self.taken_over: str | None = None
        """A sentence on the dead claim that `acquire` replaced, if there was one."""
        self._path = folder / _NAME
        self._token = uuid.uuid4().hex
        self._stop = threading.Event()
        self._heartbeat: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the folder.

        Raises:
            HeldError: another living process holds the folder.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with folder_lock(self.folder):
            for leftover in self.folder.glob(f"{_NAME}.*.probe"):  # of a process killed in here
                leftover.unlink()
            self.taken_over = self._dead_holder()
            record = {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "started": process_start(os.getpid()),
                "token": self._token,
            }
            write_atomic(self._path, json.dumps(record).encode())
        self._heartbeat = threading.Thread(target=self._beat, name="claim-heartbeat", daemon=True)
        self._heartbeat.start()

    def check(self) -> None:
        """Make sure that the folder is still ours, before writing results into it.

        Raises:
            HeldError: another process has taken the claim over, for instance because this
                one was suspended for longer than the heartbeat allows.
        """
        if self._read().get("token") != self._token:
            raise HeldError(
                f"train: the claim on {self.folder} was taken over by another process while this "
                "one was silent. Nothing more is written; leave the run to that process."
            )

    def release(self) -> None:
        """Give the folder back, if it is still ours."""
        self._stop.set()
        if self._heartbeat is not None:
            self._heartbeat.join()
        with folder_lock(self.folder):
            if self._read().get("token") == self._token:
                self._path.unlink()

    def _beat(self) -> None:
        while not self._stop.wait(self.silence_seconds / 8):
            # A claim taken over by another process must not be kept alive by this one.
            with contextlib.suppress(OSError):
                if self._read().get("token") == self._token:
                    os.utime(self._path)

    def _read(self) -> dict[str, Any]:
        """Content of `.claim`; empty if there is none or it cannot be understood."""
        try:
            values = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            return {}
        return cast("dict[str, Any]", values) if isinstance(values, dict) else {}

    def _dead_holder(self) -> str | None:
        """Refuse if a living process holds the folder; describe a dead one; None if nobody does."""
        try:
            touched = self._path.stat().st_mtime
        except FileNotFoundError:
            return None
        age = _folder_time(self.folder) - touched
        holder = self._read()
        host, pid = holder.get("host", "an unknown host"), holder.get("pid", 0)
        if host == socket.gethostname():
            started = process_start(pid) if isinstance(pid, int) else None
            alive, sign = started is not None and started == holder.get("started"), "is gone"
        else:
            alive, sign = age <= self.silence_seconds, f"has been silent for {age:.0f} s"
        if alive:
            raise HeldError(
                f"train: {self.folder} is in use by process {pid} on {host} (heartbeat {age:.0f} s "
                "ago). Wait for it to end, stop it, or train into another folder."
            )
        return f"took the folder over from process {pid} on {host}, which {sign}"


@contextlib.contextmanager
def claimed(folder: Path, *, silence_seconds: float = SILENCE_SECONDS) -> Generator[Claim]:
    """Hold the claim on a folder for the length of a `with` block."""
    claim = Claim(folder, silence_seconds=silence_seconds)
    claim.acquire()
    try:
        yield claim
    finally:
        claim.release()


def process_start(pid: int) -> str | None:
    """A text that tells two processes of one id apart; None if no such process runs."""
    try:
        # The second field is the program's name in parentheses and may hold spaces.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self/stat").exists():
            return None
    else:
        state, ticks = fields[0], fields[19].decode()
        return None if state in (b"Z", b"X") else f"{boot} {ticks}"
    asked = subprocess.run(
        ["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return asked.stdout.strip() or None


@contextlib.contextmanager
def folder_lock(folder: Path) -> Generator[None]:
    """Let one process at a time do something in a folder; a dead one's lock is freed at once."""
    import fcntl  # not on every system, and `import spem.training` must work everywhere

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _folder_time(folder: Path) -> float:
    """Now, by the clock of the file system: hosts that share a folder may not share a clock."""
    probe = folder / f"{_NAME}.{os.getpid()}.{time.monotonic_ns()}.probe"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()
