"""Processes of one supervisor: they end with it, and carry a mark in their environment."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

# All descendants inherit this variable, and /proc shows it even when their parent is gone.
MARK = "ESPER_UP_ID"
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def dies_with_parent(niceness: int = 0) -> Callable[[], None]:
    """A ``preexec_fn``: the kernel ends the child when its parent is killed (Linux)."""
    parent = os.getpid()

    def prepare() -> None:
        if _libc is not None:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # the parent ended between fork and prctl
                os._exit(1)
        if niceness:
            os.nice(niceness)

    return prepare


def signal_group(leader: int, number: signal.Signals) -> None:
    """Signals a child and every process in its group."""
    try:
        os.killpg(leader, number)
    except (ProcessLookupError, PermissionError):
        return


def signal_process(pid: int, number: signal.Signals) -> None:
    """Signals one process, if it still runs."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def marked_processes(mark: str) -> list[int]:
    """Running processes with this mark, ourselves excepted. Linux only; elsewhere none."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            marked = wanted in (entry / "environ").read_bytes().split(b"\0")
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if marked and state != "Z" and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return sorted(found)


def end_marked(mark: str, *, timeout: float = 3.0) -> list[int]:
    """Ends all processes with this mark; returns the process ids that it found."""
    found = marked_processes(mark)
    for pid in found:
        signal_process(pid, signal.SIGTERM)
    deadline = time.monotonic() + timeout
    while marked_processes(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in marked_processes(mark):
        signal_process(pid, signal.SIGKILL)
    return found


def process_identity(pid: int) -> str:
    """When this process started, empty when it does not run. Process ids are used again."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except FileNotFoundError:
        return _identity_by_ps(pid) if sys.platform != "linux" else ""
    except ProcessLookupError:  # it ended between open and read
        return ""
    return "" if fields[0] in "ZX" else f"{boot}:{fields[19]}"


def _identity_by_ps(pid: int) -> str:
    answer = subprocess.run(
        ["ps", "-o", "stat=,lstart=", "-p", str(pid)],  # noqa: S607 (the path of ps differs)
        capture_output=True,
        text=True,
        check=False,
    )
    state, _, started = answer.stdout.strip().partition(" ")
    return "" if state.startswith("Z") else started.strip()


def describe_exit(code: int) -> str:
    """``exit code 1`` or ``killed by SIGKILL``."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
