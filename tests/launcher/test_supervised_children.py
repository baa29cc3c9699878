"""Children of the supervisor, played by tiny real processes."""

from __future__ import annotations

import asyncio
import errno
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from hosts.processes import MARK, end_marked, marked_processes
from launcher.supervisor.child import Backoff, Child, ChildSpec, Restart
from launcher.supervisor.children import Children, StartError
from launcher.supervisor.output import Output


def quick() -> Backoff:
    return Backoff(first_delay=0.02, longest_delay=0.1)


@pytest.fixture
def screen() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def output(tmp_path: Path, screen: io.StringIO) -> Iterator[Output]:
    output = Output(tmp_path / "log", stream=screen)
    yield output
    output.close()


def spec(name: str, program: str, **more: object) -> ChildSpec:
    settings: dict[str, object] = {"stop_seconds": 300.0, **more}
    return ChildSpec(
        name=name,
        argv=(sys.executable, "-S", "-c", program),
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        **settings,  # type: ignore[arg-type]
    )


async def until(condition: Callable[[], bool], seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.02)


async def test_a_killed_service_comes_back_and_it_is_said_aloud(
    output: Output, screen: io.StringIO
) -> None:
    child = Child(spec("clock", "import time; time.sleep(900)"), output, quick())
    task = asyncio.create_task(child.keep_running())
    await until(lambda: child.pid is not None)
    first = child.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await until(lambda: child.pid not in (None, first))
    await child.stop()
    await task
    assert "clock ended (killed by SIGKILL)" in screen.getvalue()
    assert "starting it again" in screen.getvalue()


async def test_a_service_that_always_crashes_is_down_and_comes_back_when_the_cause_goes(
    output: Output, screen: io.StringIO, tmp_path: Path
) -> None:
    table = tmp_path / "table"
    program = f"""
import pathlib, time
if not pathlib.Path({str(table)!r}).exists():
    print("no such table")
    raise SystemExit(3)
print("serving")
time.sleep(900)
"""
    seen: list[bool] = []
    backoff = Backoff(first_delay=0.02, longest_delay=0.05, steady_after=600.0)
    child = Child(
        spec("broken", program),
        output,
        backoff,
        on_change=lambda: seen.append(child.down is not None),
    )
    task = asyncio.create_task(child.keep_running())
    await until(lambda: child.down is not None and child.down.ends > 6)
    assert child.down is not None
    assert child.down.why == "ended (exit code 3)"
    assert "no such table" in child.down.tail
    assert screen.getvalue().count("broken is down") == 1
    table.touch()
    backoff.steady_after = 0.3  # not before: a busy machine takes longer to start what crashes
    with suppress(ProcessLookupError):  # one that began before may serve, and is timed as before
        if child.pid is not None:
            os.kill(child.pid, signal.SIGKILL)
    await until(lambda: child.down is None)
    assert child.pid is not None
    assert "broken runs again" in screen.getvalue()
    assert seen[-1] is False
    await child.stop()
    await task


async def test_a_program_that_cannot_be_started_is_down_and_its_task_goes_on(
    output: Output,
) -> None:
    missing = replace(spec("gone", ""), argv=("/no/such/program",))
    child = Child(missing, output, quick())
    task = asyncio.create_task(child.keep_running())
    await until(lambda: child.down is not None)
    assert child.down is not None
    assert "FileNotFoundError" in child.down.why
    assert not task.done()
    await child.stop()
    await task


async def test_a_finished_job_is_not_started_again(output: Output) -> None:
    child = Child(spec("trainer", "pass", restart=Restart.ON_FAILURE), output, quick())
    await child.keep_running()
    assert child.finished
    assert child.restarts == 0


async def test_a_failed_job_is_started_again(output: Output, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    program = f"""
import pathlib, sys
seen = pathlib.Path({str(seen)!r})
if not seen.exists():
    seen.touch()
    sys.exit(1)
"""
    child = Child(spec("trainer", program, restart=Restart.ON_FAILURE), output, quick())
    await child.keep_running()
    assert child.finished
    assert child.restarts == 1


def test_the_pause_before_a_restart_doubles_up_to_a_limit_and_starts_over() -> None:
    backoff = Backoff(first_delay=1, longest_delay=4, steady_after=10, limit=6)
    assert [backoff.next_delay(0.5) for _ in range(4)] == [1, 2, 4, 4]
    assert backoff.next_delay(11.0) == 1
    assert [backoff.next_delay(0.5) for _ in range(4)] == [2, 4, 4, 4]
    assert not backoff.exhausted
    assert {backoff.next_delay(0.5) for _ in range(5000)} == {4}
    assert backoff.exhausted


async def test_a_child_that_ignores_the_signal_is_killed_with_its_own_children(
    output: Output, screen: io.StringIO
) -> None:
    program = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("grandchild", os.fork() or os.getpid())
time.sleep(900)
"""
    mark = f"test-{os.getpid()}-{time.monotonic_ns()}"
    stubborn = spec("stubborn", program, stop_seconds=0.3)
    child = Child(replace(stubborn, env={**stubborn.env, MARK: mark}), output)
    task = asyncio.create_task(child.keep_running())
    await until(lambda: screen.getvalue().count("grandchild") == 2)
    assert len(marked_processes(mark)) == 2
    await child.stop()
    await task
    await until(lambda: marked_processes(mark) == [])
    assert "stubborn does not stop" in screen.getvalue()


async def test_children_are_stopped_in_the_stated_order(
    output: Output, screen: io.StringIO
) -> None:
    program = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("bye"), sys.exit(0)))
print("up")
time.sleep(900)
"""
    children = Children(output)
    names = {"valkey": 3, "web": 2, "worker": 1, "beat": 0}
    await children.start([spec(name, program, stop_order=order) for name, order in names.items()])
    await until(lambda: screen.getvalue().count("| up") == 4)
    await children.stop()
    stopped = [line.split()[1] for line in screen.getvalue().splitlines() if line.endswith("bye")]
    assert stopped == ["beat", "worker", "web", "valkey"]
    assert children.pids() == {}


async def test_the_start_waits_until_a_child_answers(output: Output, tmp_path: Path) -> None:
    flag = tmp_path / "ready"

    async def is_ready() -> bool:
        return flag.exists()

    program = (
        "import pathlib, time; time.sleep(0.3); "
        f"pathlib.Path({str(flag)!r}).touch(); time.sleep(900)"
    )
    children = Children(output)
    await children.start([spec("web", program, ready=is_ready)])
    assert flag.exists()
    await children.stop()


async def test_a_child_that_never_answers_stops_the_start_with_its_last_lines(
    output: Output, screen: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = 0.0
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + later)
    monkeypatch.setattr("launcher.supervisor.child.time", clock)

    async def never() -> bool:
        nonlocal later
        later = 3600.0 * ("cannot bind" in screen.getvalue())
        return False

    children = Children(output)
    with pytest.raises(StartError, match=r"web does not start(.|\n)*cannot bind"):
        await children.start(
            [spec("web", "print('cannot bind'); import time; time.sleep(900)", ready=never)]
        )
    await children.stop()


async def test_a_child_that_is_down_leaves_the_others_alone_but_stops_the_first_start(
    output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Backoff.__init__, "__defaults__", (0.01, 0.02, 600.0, 3, 0))

    async def never() -> bool:
        return False

    children = Children(output)
    crash = "raise SystemExit(1)"
    await children.start([spec("worker", "import time; time.sleep(900)"), spec("demo", crash)])
    before = children.pids()["worker"]
    await until(lambda: "demo" in children.down())
    assert children.pids()["worker"] == before
    with pytest.raises(StartError, match="web does not start"):
        await children.start([spec("web", crash, ready=never)])
    await children.stop()


async def test_a_full_disk_ends_no_task_and_the_log_goes_on_when_there_is_space(
    small_disk: Path, screen: io.StringIO
) -> None:
    """The child prints more than a pipe holds: it goes on only while its pipe is drained."""
    program = "import sys, time\nfor n in range(3000): print(n, 'x' * 60)\ntime.sleep(900)"
    output = Output(small_disk / "log", stream=screen)
    children = Children(output)
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 200_000)
    await children.start([spec("chatty", program)])
    await until(lambda: "2999 " in screen.getvalue())
    assert "log lines cannot be written" in screen.getvalue()
    assert "No space left on device" in screen.getvalue()
    first = children.pids()["chatty"]
    os.kill(first, signal.SIGKILL)
    await until(lambda: children.pids().get("chatty", first) != first)
    filler.unlink()
    await until(lambda: "log lines are written again" in screen.getvalue())
    await children.stop()
    output.close()
    assert "chatty ended (killed by SIGKILL)" in screen.getvalue()
    assert "were lost (No space left on device)" in screen.getvalue()


@pytest.mark.skipif(sys.platform != "linux", reason="prctl and /proc are Linux")
async def test_children_of_a_killed_supervisor_do_not_stay(tmp_path: Path) -> None:
    mark = f"test-{os.getpid()}-{time.monotonic_ns()}"
    program = f"""
import asyncio, os, sys
from pathlib import Path
from launcher.supervisor.child import Child, ChildSpec
from launcher.supervisor.output import Output
child = ChildSpec(name="sleeper", argv=(sys.executable, "-S", "-c", "import time; time.sleep(900)"),
                  env={{**os.environ, "{MARK}": "{mark}"}})
asyncio.run(Child(child, Output(Path({str(tmp_path)!r}))).keep_running())
"""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdout=asyncio.subprocess.DEVNULL
    )
    await until(lambda: len(marked_processes(mark)) == 1)
    process.kill()
    await process.wait()
    await until(lambda: marked_processes(mark) == [])


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux")
async def test_what_was_left_behind_is_found_by_its_mark_and_ended() -> None:
    mark = f"test-{os.getpid()}-{time.monotonic_ns()}"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-S", "-c", "import time; time.sleep(900)", env={**os.environ, MARK: mark}
    )
    await until(lambda: marked_processes(mark) == [process.pid])
    waiting = asyncio.create_task(process.wait())
    assert await asyncio.to_thread(end_marked, mark) == [process.pid]
    assert await waiting == -signal.SIGTERM


def test_lines_are_prefixed_logged_and_without_secrets(tmp_path: Path) -> None:
    screen = io.StringIO()
    output = Output(tmp_path, stream=screen)
    output.line("tamiyo", "Authorization: Bearer esp_abcdefgh1234567890\n")
    output.line("tamiyo", "two\x1b[2Jthree")
    output.close()
    log = (tmp_path / "tamiyo.log").read_text()
    for text in (screen.getvalue(), log):
        assert "esp_abcdefgh" not in text
        assert "\x1b" not in text
        assert "\\x1b[2J" in text
    assert " tamiyo          | Authorization" in screen.getvalue()


def test_a_terminal_on_a_full_disk_is_written_again_when_there_is_space(tmp_path: Path) -> None:
    class FullDisk(io.StringIO):
        full = True

        def flush(self) -> None:
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")

    screen = FullDisk()
    output = Output(tmp_path, stream=screen)
    output.line("web", "one")
    output.plain("two")
    screen.full = False
    output.line("web", "three")
    output.close()
    assert "three" in screen.getvalue()
    assert "one" in (tmp_path / "web.log").read_text()


def test_a_terminal_that_has_gone_does_not_stop_esper(tmp_path: Path) -> None:
    class GoneTerminal(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    output = Output(tmp_path, stream=GoneTerminal())
    output.line("web", "one")
    output.line("web", "two")
    output.close()
    assert "two" in (tmp_path / "web.log").read_text()


async def test_a_line_without_an_end_is_cut_instead_of_kept_in_memory(
    output: Output, screen: io.StringIO
) -> None:
    program = "import sys; sys.stdout.write('x' * 300_000); sys.stdout.write('\\nlast')"
    await Child(spec("web", program, restart=Restart.ON_FAILURE), output).keep_running()
    assert screen.getvalue().count("x") >= 300_000
    assert "| last" in screen.getvalue()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux")
async def test_a_child_has_ended_although_a_grandchild_keeps_its_output_open(
    output: Output, screen: io.StringIO
) -> None:
    program = """
import os, time
gate, left = os.pipe()
if os.fork():
    os.close(left)
    os.read(gate, 1)  # until the grandchild is in a session of its own
else:
    os.setsid()
    os.close(left)
    time.sleep(900)
"""
    mark = f"test-{os.getpid()}-{time.monotonic_ns()}"
    parent = spec("parent", program, restart=Restart.ON_FAILURE)
    child = Child(replace(parent, env={**parent.env, MARK: mark}), output)
    await child.keep_running()
    assert child.finished
    assert await asyncio.to_thread(end_marked, mark) != []
