"""``python -m launcher.supervisor``, which ``./up`` runs: starts all processes, keeps them up.

lock data directory ─► end what a killed predecessor left ─► Valkey ─► preparation ─► web
  ─► "Esper is at …" ─► workers, beat, Tamiyo ─► demo trainers ─► wait ─► stop, Valkey last
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from hosts.keyring import ensure_keyring
from hosts.processes import MARK, dies_with_parent, end_marked, signal_group
from launcher.supervise import plan
from launcher.supervise.family import Family, StartError
from launcher.supervise.output import Output
from launcher.supervise.plan import ROOT, Site
from launcher.supervise.ports import PortBusyError, demand_port, prefer_port
from launcher.supervise.runtime import (
    DEFAULT_REDIS_PORT,
    DataDirectoryBusyError,
    data_directory_lock,
    read_runtime,
    remove_runtime,
    write_runtime,
)
from launcher.supervise.valkey import ValkeyMissingError

DEFAULT_PORT = 8080
DEFAULT_DATA_DIR = ROOT / "var"


class PreparationError(Exception):
    """Tables, catalogue or people could not be made."""


STARTING_ERRORS = (
    PortBusyError,
    DataDirectoryBusyError,
    ValkeyMissingError,
    PreparationError,
    StartError,
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a person asked for. ``port`` None: 8080, or its next free neighbour."""

    data_dir: Path = DEFAULT_DATA_DIR
    port: int | None = None
    demos: tuple[str, ...] = plan.DEMOS
    setup_only: bool = False
    show_people: bool = True


class Esper:
    """A running Esper, as an async context manager.

    Raises:
        PortBusyError, DataDirectoryBusyError, ValkeyMissingError, PreparationError, StartError:
            with a sentence for a person; whatever had been started is stopped again.
    """

    def __init__(self, options: Options, output: Output) -> None:
        self._options = options
        self._output = output
        self._stack = AsyncExitStack()
        self._ready = False
        self.family = Family(output, on_change=self._note_runtime)
        self.site: Site

    async def __aenter__(self) -> Esper:
        async with AsyncExitStack() as stack:
            stack.enter_context(data_directory_lock(self._options.data_dir))
            self._end_leftovers()
            self.site = self._choose_site()
            stack.callback(remove_runtime, self._options.data_dir)
            # After the workers: what they have started from recipes outlives them, but not Esper.
            stack.push_async_callback(asyncio.to_thread, end_marked, self.site.mark, patience=10.0)
            stack.push_async_callback(self.family.stop)
            await self._start()
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self._output.say("stopping")
        await self._stack.aclose()
        self._output.say("everything has stopped")

    async def _start(self) -> None:
        self._note_runtime()
        if self.site.redis_port is not None:
            await self.family.start([plan.valkey_child(self.site)])
        await self._prepare()
        if self._options.setup_only:
            return
        await self.family.start([plan.web_child(self.site)])
        self._output.plain(f"Esper is at {self.site.url}")
        capabilities = await asyncio.to_thread(plan.capabilities_of_this_machine)
        await self.family.start(plan.service_children(self.site, capabilities))
        await self.family.start([plan.demo_child(self.site, demo) for demo in self._options.demos])
        self._ready = True
        self._note_runtime()

    async def _prepare(self) -> None:
        """Tables, catalogue, people. It prints to the person: passwords are not for log files."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "launcher.supervise.preparation"),
            env=self.site.environment,
            cwd=ROOT,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=None if self._options.show_people else asyncio.subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=dies_with_parent(),
        )
        try:
            code = await process.wait()
        except asyncio.CancelledError:
            signal_group(process.pid, signal.SIGKILL)
            raise
        if code != 0:
            raise PreparationError("The database could not be prepared; the reason stands above.")
        self.site = self._with_fresh_keyring(self.site)

    def _choose_site(self) -> Site:
        keyring = ensure_keyring(self._options.data_dir)
        given = os.environ.get("REDIS_URL")
        redis_port = None if given else prefer_port(DEFAULT_REDIS_PORT)
        own = f"redis://:{quote(keyring['redis_password'], safe='')}@127.0.0.1:{redis_port}/0"
        return Site(
            data_dir=self._options.data_dir,
            port=self._choose_port(),
            redis_url=given or own,
            redis_port=redis_port,
            mark=uuid.uuid4().hex,
            keyring=keyring,
        )

    def _choose_port(self) -> int:
        if self._options.port is not None:
            return demand_port(self._options.port)
        port = prefer_port(DEFAULT_PORT)
        if port != DEFAULT_PORT:
            self._output.say(f"port {DEFAULT_PORT} is taken by another program; using {port}")
        return port

    def _with_fresh_keyring(self, site: Site) -> Site:
        return Site(**{**vars(site), "keyring": ensure_keyring(site.data_dir)})

    def _end_leftovers(self) -> None:
        mark = read_runtime(self._options.data_dir).get("id")
        if mark and (ended := end_marked(str(mark))):
            self._output.say(f"ended {len(ended)} processes that a killed Esper had left behind")

    def _note_runtime(self) -> None:
        state = {
            "id": self.site.mark,
            "pid": os.getpid(),
            "url": self.site.url,
            "redis_port": self.site.redis_port,
            "ready": self._ready,
            "children": self.family.pids(),
        }
        write_runtime(self._options.data_dir, state)


async def supervise(options: Options, output: Output) -> int:
    """Runs Esper until it is told to stop; the exit status."""
    stop = asyncio.Event()
    running = asyncio.current_task()

    def on_signal() -> None:
        if stop.is_set() and running is not None:
            output.say("stopping at once")
            running.cancel()
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, on_signal)
    start = asyncio.create_task(_run_until(stop, options, output))
    return await start


async def _run_until(stop: asyncio.Event, options: Options, output: Output) -> int:
    esper = Esper(options, output)
    entering = asyncio.create_task(esper.__aenter__())
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait({entering, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if not entering.done():
        entering.cancel()
        await asyncio.wait({entering})
        return 130
    entering.result()
    try:
        if options.setup_only:
            output.say("everything is prepared; start it with ./up")
            return 0
        failure = asyncio.create_task(esper.family.wait_for_failure())
        await asyncio.wait({failure, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not failure.done():
            failure.cancel()
            return 0
        error = failure.result()
        output.say(f"cannot go on without {error.name}. Its last lines:")
        for line in error.tail:
            output.plain(f"    {line}")
        return 1
    finally:
        await esper.__aexit__()


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line of ``./up``."""
    parser = argparse.ArgumentParser(
        prog="./up", description="Sets up and runs Esper on this machine. Ctrl-C stops all of it."
    )
    parser.add_argument("--setup", action="store_true", help="prepare everything, start nothing")
    parser.add_argument("--no-demo", action="store_true", help="without the two demo trainers")
    parser.add_argument("--port", type=int, metavar="N", help="the web port (0: any free one)")
    parser.add_argument("--data-dir", type=Path, default=DEFAULT_DATA_DIR, metavar="DIR")
    parser.add_argument(
        "--smoke", action="store_true", help="one adaptation, end to end, in a temporary directory"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the command line says; the exit status."""
    given = parse(sys.argv[1:] if arguments is None else arguments)
    if given.smoke:
        from launcher import smoke

        return smoke.main()
    options = Options(
        data_dir=given.data_dir.expanduser().resolve(),
        port=given.port,
        demos=() if given.no_demo else plan.DEMOS,
        setup_only=given.setup,
    )
    options.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    output = Output(options.data_dir / "log")
    os.environ.pop(MARK, None)
    try:
        return asyncio.run(supervise(options, output))
    except STARTING_ERRORS as error:
        output.plain(f"{error}")
        return 1
    finally:
        output.close()


if __name__ == "__main__":
    sys.exit(main())
