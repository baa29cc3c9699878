"""``esper up``: Esper runs until a signal stops it."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress

from hosts.processes import MARK
from launcher.supervisor.esper import STARTING_ERRORS, Esper, Options
from launcher.supervisor.output import Output
from launcher.supervisor.stopping import run_until_signal

STOPPED_BY_SIGNAL = 130  # the exit status of a program that SIGINT stopped, as shells count it


def up(options: Options) -> int:
    """Runs Esper in the foreground; the exit status."""
    output = Output(options.data_dir / "log")
    os.environ.pop(MARK, None)
    try:
        status = run_until_signal(lambda: _run(options, output), output)
    except STARTING_ERRORS as error:
        output.plain(f"{error}")
        return 1
    finally:
        output.close()
    return STOPPED_BY_SIGNAL if status is None else status


async def _run(options: Options, output: Output) -> int:
    async with Esper(options, output) as esper:
        if options.setup_only:
            output.say("everything is prepared")
            return 0
        with suppress(asyncio.CancelledError):  # a running Esper that is stopped has not failed
            await esper.run()
    return 0
