"""All child processes together: started in order, watched, stopped in their stop order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import groupby

from launcher.supervisor.child import Child, ChildSpec, CrashLoopError
from launcher.supervisor.output import Output

READY_SECONDS = 180.0  # a loaded machine imports slowly; a crash is noticed at once


class StartError(Exception):
    """A child process did not become ready."""


class Children:
    """Child processes by name, each with the task that keeps it running.

    Args:
        output: where lines go.
        on_change: called when any process id changes.
    """

    def __init__(self, output: Output, on_change: Callable[[], None] = lambda: None) -> None:
        self.by_name: dict[str, Child] = {}
        self._output = output
        self._on_change = on_change
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._failure: asyncio.Future[CrashLoopError] | None = None

    def pids(self) -> dict[str, int]:
        """The process ids of the children that run."""
        return {name: child.pid for name, child in self.by_name.items() if child.pid is not None}

    async def start(self, specs: Sequence[ChildSpec]) -> None:
        """Starts children one after the other; each must be ready before the next.

        Raises:
            StartError: a child is not ready in time, or keeps crashing.
        """
        for spec in specs:
            child = Child(spec, self._output, on_change=self._on_change)
            self.by_name[spec.name] = child
            task = asyncio.create_task(self._watch(child), name=spec.name)
            self._tasks[spec.name] = task
            await self._wait_ready(child, task)

    async def wait_for_failure(self) -> CrashLoopError:
        """Returns when an essential child cannot be kept running."""
        self._failure = self._failure or asyncio.get_running_loop().create_future()
        return await self._failure

    async def stop(self) -> None:
        """Stops all, group by group; a low ``stop_order`` comes first."""
        ordered = sorted(self.by_name.values(), key=lambda child: child.spec.stop_order)
        for _, group in groupby(ordered, key=lambda child: child.spec.stop_order):
            await asyncio.gather(*(child.stop() for child in group))
        for task in self._tasks.values():
            # A builder that outlives its worker still holds the worker's output open. Then the task
            # does not end by itself, and wait_for has cancelled it.
            with suppress(CrashLoopError, asyncio.CancelledError, TimeoutError):
                await asyncio.wait_for(task, 5.0)

    async def _wait_ready(self, child: Child, task: asyncio.Task[None]) -> None:
        ready = asyncio.create_task(child.wait_ready(READY_SECONDS))
        try:
            await asyncio.wait({ready, task}, return_when=asyncio.FIRST_COMPLETED)
            if ready.done() and ready.result():
                return
        finally:
            ready.cancel()
        tail = "\n  ".join(self._output.tail(child.spec.name))
        raise StartError(f"{child.spec.name} does not start. Its last lines:\n  {tail}")

    async def _watch(self, child: Child) -> None:
        try:
            await child.keep_running()
        except CrashLoopError as error:
            self._output.say(f"{error}; it is not started again")
            if child.spec.essential:
                self._failure = self._failure or asyncio.get_running_loop().create_future()
                if not self._failure.done():
                    self._failure.set_result(error)
