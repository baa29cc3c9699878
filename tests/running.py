"""A real ``esper up`` for tests: started, watched through its files, stopped."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from hosts.keyring import read_keyring
from hosts.paths import ROOT
from hosts.processes import end_marked, marked_processes
from hosts.runtime import read_runtime

# Limits, so that a broken test ends. Generous: a busy machine is no fault of the code.
START_SECONDS = 300.0
RESTART_SECONDS = 300.0
STOP_SECONDS = 120.0
# A spare one imports torch at each start of a worker; the tests of the worker pool have two.
ONE_BUILDER = {"ESPER_BUILDERS": "1"}


@dataclass
class RunningEsper:
    """A real ``esper up`` on free ports in a temporary directory."""

    data_dir: Path
    process: subprocess.Popen[bytes]
    mark: str
    console: Path

    @property
    def runtime(self) -> dict[str, Any]:
        """``url, redis_port, ready, children {name: pid}``; see hosts.runtime."""
        return read_runtime(self.data_dir)

    @property
    def url(self) -> str:
        return str(self.runtime["url"])

    @property
    def keyring(self) -> dict[str, Any]:
        """Redis password, tokens and people."""
        return read_keyring(self.data_dir)

    @property
    def people(self) -> dict[str, str]:
        """Passwords by user name: vera, rafi, olga, carl, ada."""
        return {name: who["password"] for name, who in self.keyring["people"].items()}

    @property
    def redis_url(self) -> str:
        return f"redis://:{self.keyring['redis_password']}@127.0.0.1:{self.runtime['redis_port']}/0"

    def pid(self, child: str) -> int:
        """The process id of a child: valkey, web, worker-control, beat, tamiyo, …"""
        return int(self.runtime["children"][child])

    def kill(self, child: str) -> int:
        """``kill -9``; returns the process id that was killed."""
        pid = self.pid(child)
        os.kill(pid, signal.SIGKILL)
        return pid

    def wait_restarted(self, child: str, old_pid: int, seconds: float = RESTART_SECONDS) -> int:
        """The new process id, once there is one."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            pid = self.runtime.get("children", {}).get(child, old_pid)
            if pid != old_pid:
                return int(pid)
            time.sleep(0.1)
        raise AssertionError(f"{child} was not started again within {seconds} s:\n{self.tail()}")

    def processes(self) -> list[int]:
        """The process ids of everything that it has started and that runs."""
        return marked_processes(str(self.runtime.get("id", self.mark)))

    def tail(self, characters: int = 6000) -> str:
        """The end of what it printed."""
        return self.console.read_text(errors="replace")[-characters:]

    def start_again(self, *arguments: str) -> None:
        """With the same data, after it has ended; at another port."""
        again = launch_esper(self.data_dir, *arguments)
        self.process, self.mark, self.console = again.process, again.mark, again.console

    def stop(self) -> int:
        """Ctrl-C; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            end_marked(self.mark)
            raise AssertionError(f"Esper did not stop:\n{self.tail()}") from None

    def end(self) -> None:
        """At once, without the orderly stop; for tests of something else."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        kill_marked(self.mark)


def kill_marked(mark: str) -> None:
    """Kills all processes with this mark, and waits until they are gone."""
    while found := marked_processes(mark) if mark else []:
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def start_up(
    data_dir: Path,
    *arguments: str,
    file: BinaryIO,
    environment: dict[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """``esper up`` with its output in ``file``, in a session of its own."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in {"DJANGO_SETTINGS_MODULE", "DATABASE_URL", "REDIS_URL"}
    }
    return subprocess.Popen(
        [*(sys.executable, "-m", "launcher", "up"), *("--data-dir", str(data_dir)), *arguments],
        cwd=ROOT,
        env=inherited | ONE_BUILDER | (environment or {}),
        stdout=file,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


def launch_esper(
    data_dir: Path, *arguments: str, environment: dict[str, str] | None = None
) -> RunningEsper:
    """Starts one and waits until all its processes are up."""
    data_dir.mkdir(parents=True, exist_ok=True)
    console = data_dir / f"console-{secrets.token_hex(3)}.log"
    with console.open("wb") as file:
        process = start_up(data_dir, "--port", "0", *arguments, environment=environment, file=file)
    esper = RunningEsper(data_dir, process, "", console)
    deadline = time.monotonic() + START_SECONDS
    # A killed predecessor may have left a file that says ready.
    while not (esper.runtime.get("ready") and esper.runtime["pid"] == process.pid):
        if process.poll() is not None or time.monotonic() > deadline:
            esper.stop()
            raise AssertionError(f"Esper did not start:\n{esper.tail()}")
        time.sleep(0.1)
    esper.mark = str(esper.runtime["id"])
    return esper
