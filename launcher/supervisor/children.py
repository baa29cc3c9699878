"""All child processes together: started in order, watched, stopped in their stop order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import groupby

from launcher.supervisor.child import Child, ChildSpec, Down
from launcher.supervisor.output import Output

READY_SECONDS = 180.0  # a loaded machine imports slowly; a crash is noticed at once


class StartError(Exception):
    """A child process did not become ready."""


class Children:
    """Child processes by name, each with the task that keeps it running.

    Args:
        output: where lines go.
        on_change: called when any process id changes, and when a child goes down or comes back.
    """

    def __init__(self, output: Output, on_change: Callable[[], None] = lambda: None) -> None:
        self.by_name: dict[str, Child] = {}
        self._output = output
        self._on_change = on_change
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def pids(self) -> dict[str, int]:
        """The process ids of the children that run."""
        return {name: child.pid for name, child in self.by_name.items() if child.pid is not None}

    def down(self) -> dict[str, Down]:
        """The children that cannot be kept running at present."""
        return {name: child.down for name, child in self.by_name.items() if child.down is not None}

    async def start(self, specs: Sequence[ChildSpec]) -> None:
        """Starts children one after the other; each must be ready before the next.

        Raises:
            StartError: a child is not ready in time, or goes down before it is.
        """
        for spec in specs:
            child = Child(spec, self._output, on_change=self._on_change)
            self.by_name[spec.name] = child
            self._tasks[spec.name] = asyncio.create_task(child.keep_running(), name=spec.name)
            await self._wait_ready(child)

    async def stop(self) -> None:
        """Stops all, group by group; a low ``stop_order`` comes first."""
        ordered = sorted(self.by_name.values(), key=lambda child: child.spec.stop_order)
        for _, group in groupby(ordered, key=lambda child: child.spec.stop_order):
            await asyncio.gather(*(child.stop() for child in group))
        for task in self._tasks.values():
            # A builder that outlives its worker still holds the worker's output open. Then the task
            # does not end by itself, and wait_for has cancelled it.
            with suppress(asyncio.CancelledError, TimeoutError):
                await asyncio.wait_for(task, 5.0)

    async def _wait_ready(self, child: Child) -> None:
        if await child.wait_ready(READY_SECONDS):
            return
        tail = "\n  ".join(self._output.tail(child.spec.name))
        raise StartError(f"{child.spec.name} does not start. Its last lines:\n  {tail}")
