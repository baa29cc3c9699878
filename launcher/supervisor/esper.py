"""A running Esper, as one context manager.

lock data directory ─► end what a killed predecessor left ─► Valkey ─► preparation ─► web
  ─► "Esper is at …" ─► workers, beat, Tamiyo ─► demo trainers ─► (runs) ─► stop, Valkey last
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import sys
import uuid
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from urllib.parse import quote

from hosts.keyring import ensure_keyring
from hosts.paths import ROOT
from hosts.processes import dies_with_parent, end_marked, signal_group
from hosts.runtime import (
    DEFAULT_REDIS_PORT,
    DataDirectoryBusyError,
    data_directory_lock,
    read_runtime,
    remove_runtime,
    write_runtime,
)
from launcher.supervisor import plan
from launcher.supervisor.children import Children, StartError
from launcher.supervisor.output import Output
from launcher.supervisor.plan import Site
from launcher.supervisor.ports import PortBusyError, any_free_port, demand_port, prefer_port
from launcher.supervisor.valkey import ValkeyMissingError

DEFAULT_PORT = 8080
RETRY_SECONDS = 2.0


class PreparationError(Exception):
    """The tables, the catalogue or the demo people could not be made."""


class DataDirectoryError(Exception):
    """The data directory cannot be written: the disk is full or read-only, or access is denied."""

    def __init__(self, directory: Path, error: OSError) -> None:
        where = error.filename or directory
        super().__init__(
            f"Esper cannot start on {directory}: {where} cannot be written "
            f"({error.strerror}). Free some space or fix the access, or choose another directory "
            "with --data-dir."
        )


UNWRITABLE = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.ENOTDIR}
)
STARTING_ERRORS = (
    DataDirectoryError,
    PortBusyError,
    DataDirectoryBusyError,
    ValkeyMissingError,
    PreparationError,
    StartError,
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to start. ``port`` None: 8080, or the next free port."""

    data_dir: Path
    port: int | None = None
    demos: tuple[plan.Demo, ...] = plan.DEMOS
    setup_only: bool = False
    show_people: bool = True


class Esper:
    """A running Esper, as an async context manager.

    Raises:
        PortBusyError, DataDirectoryBusyError, DataDirectoryError, ValkeyMissingError,
        PreparationError, StartError: with a message for a person; every process that was started
            is stopped again.
    """

    def __init__(self, options: Options, output: Output) -> None:
        self._options = options
        self._output = output
        self._stack = AsyncExitStack()
        self._ready = False
        self._noted = True  # the last state was written to runtime.json
        self.children = Children(output, on_change=self._note_runtime)
        self.site: Site

    async def __aenter__(self) -> Esper:
        try:
            return await self._enter()
        except OSError as error:
            if error.errno in UNWRITABLE:
                raise DataDirectoryError(self._options.data_dir, error) from error
            raise

    async def _enter(self) -> Esper:
        async with AsyncExitStack() as stack:
            stack.enter_context(data_directory_lock(self._options.data_dir))
            self._end_leftovers()
            self.site = self._choose_site()
            stack.callback(self._output.say, "everything has stopped")
            stack.callback(self._forget_runtime)
            # After the workers: programs started from recipes outlive a worker, but not Esper.
            stack.push_async_callback(asyncio.to_thread, end_marked, self.site.mark, timeout=10.0)
            stack.push_async_callback(self.children.stop)
            await self._start()
            self._stack = stack.pop_all()
        return self

    async def run(self) -> None:
        """Runs until it is cancelled. What the disk did not take is written again."""
        while True:
            await asyncio.sleep(RETRY_SECONDS)
            if not self._noted:
                self._note_runtime()

    async def __aexit__(self, *_exc: object) -> None:
        await self._stack.aclose()

    async def _start(self) -> None:
        self._write_runtime()
        if self.site.redis_port is not None:
            await self.children.start([plan.valkey_child(self.site)])
        await self._prepare()
        if self._options.setup_only:
            return
        await self.children.start([plan.web_child(self.site)])
        self._output.plain(f"Esper is at {self.site.url}")
        capabilities = await asyncio.to_thread(plan.capabilities_of_this_machine)
        await self.children.start(plan.service_children(self.site, capabilities))
        demos = [plan.demo_child(self.site, demo) for demo in self._options.demos]
        await self.children.start(demos)
        self._ready = True
        self._note_runtime()

    async def _prepare(self) -> None:
        """Tables, catalogue, people. It prints to the terminal only: passwords stay out of logs."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "launcher.supervisor.preparation"),
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
            await process.wait()
            raise
        if code != 0:
            raise PreparationError("The database could not be prepared; see the lines above.")
        self.site = replace(self.site, keyring=ensure_keyring(self.site.data_dir))

    def _choose_redis_port(self) -> int:
        """With --port 0 any port: two that start at once would both find the usual one free."""
        return any_free_port() if self._options.port == 0 else prefer_port(DEFAULT_REDIS_PORT)

    def _choose_site(self) -> Site:
        keyring = ensure_keyring(self._options.data_dir)
        given = os.environ.get("REDIS_URL")
        redis_port = None if given else self._choose_redis_port()
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

    def _end_leftovers(self) -> None:
        mark = read_runtime(self._options.data_dir).get("id")
        if mark and (ended := end_marked(str(mark))):
            self._output.say(f"ended {len(ended)} processes that a killed Esper had left behind")

    def _note_runtime(self) -> None:
        """Never raises: the supervision must go on. ``run`` writes it again."""
        try:
            self._write_runtime()
        except OSError as error:
            if self._noted:
                self._output.say(f"runtime.json cannot be written: {error.strerror}")
            self._noted = False
        else:
            self._noted = True

    def _write_runtime(self) -> None:
        state = {
            "id": self.site.mark,
            "pid": os.getpid(),
            "url": self.site.url,
            "redis_port": self.site.redis_port,
            "ready": self._ready,
            "children": self.children.pids(),
            "down": {name: asdict(down) for name, down in self.children.down().items()},
        }
        write_runtime(self._options.data_dir, state)

    def _forget_runtime(self) -> None:
        try:
            remove_runtime(self._options.data_dir)
        except OSError as error:
            self._output.say(f"runtime.json cannot be removed: {error.strerror}")
