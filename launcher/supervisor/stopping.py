"""Signals stop the work of an event loop in order, without a traceback."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from launcher.supervisor.output import Output

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
Result = TypeVar("Result")


def run_until_signal(
    work: Callable[[], Coroutine[Any, Any, Result]], output: Output
) -> Result | None:
    """The result of ``work``; None when a signal stopped it.

    A signal cancels ``work``, which stops its processes in order. A second signal cancels that
    too, and the processes are killed.
    """

    async def interruptible() -> Result:
        task = asyncio.current_task()
        loop = asyncio.get_running_loop()
        signals = 0

        def on_signal() -> None:
            nonlocal signals
            signals += 1
            output.say("stopping" if signals == 1 else "stopping at once")
            if task is not None:
                task.cancel()

        for number in SIGNALS:
            loop.add_signal_handler(number, on_signal)
        return await work()

    try:
        return asyncio.run(interruptible())
    except asyncio.CancelledError:
        return None
