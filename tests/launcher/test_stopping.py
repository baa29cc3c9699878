"""Ctrl-C in any phase: an orderly stop, nothing left, and never a traceback."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hosts.paths import ROOT
from hosts.processes import end_marked, marked_processes
from hosts.runtime import read_runtime
from tests.running import START_SECONDS, STOP_SECONDS, start_up

pytestmark = [pytest.mark.process, pytest.mark.timeout(900)]
INTERRUPTED = 130


class Started:
    """``esper up`` with its output in a file."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        self.data_dir = directory / "data"
        self.console = directory / "console.log"
        with self.console.open("wb") as file:
            self.process = start_up(self.data_dir, *arguments, file=file)
        self.mark = ""

    @property
    def output(self) -> str:
        return self.console.read_text(errors="replace")

    def wait_until(self, condition: Callable[[Started], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not condition(self):
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.02)
        self.mark = str(read_runtime(self.data_dir).get("id", ""))

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def wait_ended(self) -> int:
        return self.process.wait(STOP_SECONDS)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    started: list[Started] = []

    def begin(*arguments: str) -> Started:
        started.append(Started(tmp_path, *arguments))
        return started[-1]

    yield begin
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()
        if one.mark:
            end_marked(one.mark)


def valkey_runs(esper: Started) -> bool:
    return "valkey" in read_runtime(esper.data_dir).get("children", {})


def web_runs(esper: Started) -> bool:
    return "web" in read_runtime(esper.data_dir).get("children", {})


def address_is_printed(esper: Started) -> bool:
    return "Esper is at" in esper.output


def trainers_run(esper: Started) -> bool:
    return "digits_perceptron" in read_runtime(esper.data_dir).get("children", {})


def assert_quiet(esper: Started) -> None:
    for word in ("Traceback", "Event loop is closed", "never awaited"):
        assert word not in esper.output, esper.output
    assert marked_processes(esper.mark) == []
    assert read_runtime(esper.data_dir) == {}


# Between the first process and the last: each phase takes half a start.
LATER = [pytest.param(phase, marks=pytest.mark.full) for phase in (web_runs, address_is_printed)]


@pytest.mark.parametrize("phase", [valkey_runs, *LATER, trainers_run])
def test_a_smoke_run_that_is_interrupted_stops_without_a_traceback(
    start: Callable[..., Started], phase: Callable[[Started], bool]
) -> None:
    esper = start("--smoke")
    esper.wait_until(phase)
    esper.interrupt()
    assert esper.wait_ended() == 1
    assert "The smoke run failed: it was stopped" in esper.output
    assert_quiet(esper)


def test_up_that_is_interrupted_while_it_starts_stops_without_a_traceback(
    start: Callable[..., Started],
) -> None:
    esper = start("--no-demo", "--port", "0")
    esper.wait_until(valkey_runs)
    esper.interrupt()
    assert esper.wait_ended() == INTERRUPTED
    assert "everything has stopped" in esper.output
    assert_quiet(esper)


def test_a_second_interrupt_stops_at_once_without_a_traceback(
    start: Callable[..., Started],
) -> None:
    esper = start("--port", "0")
    esper.wait_until(trainers_run)
    esper.interrupt()
    esper.wait_until(lambda one: "| stopping" in one.output)
    esper.interrupt()
    assert esper.wait_ended() in (0, INTERRUPTED)
    assert "stopping at once" in esper.output
    assert_quiet(esper)


def test_an_interrupt_before_signals_are_handled_prints_nothing() -> None:
    program = (
        "import runpy, sys, types\n"
        "def main(): raise KeyboardInterrupt\n"
        "command = types.ModuleType('launcher.command'); command.main = main\n"
        "sys.modules['launcher.command'] = command\n"
        "runpy.run_module('launcher', run_name='__main__')"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=False, timeout=600
    )
    assert (answer.returncode, answer.stdout, answer.stderr) == (INTERRUPTED, b"", b"")
