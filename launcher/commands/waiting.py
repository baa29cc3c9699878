"""``--wait``: until the trainer has done what was asked for, as an exit status."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import click

from esper.contracts import ADAPTATION_ENDED
from launcher.remote.client import Client, Exit, RefusedError
from launcher.remote.tables import Json

POLL_SECONDS = 1.0
wait_option = click.option("--wait", is_flag=True, help="Wait until the trainer has answered.")
timeout_option = click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    default=300.0,
    show_default=True,
    metavar="SECONDS",
    help="With --wait: for so long at most; then the exit status is 8.",
)


def wait_for_adaptation(
    client: Client, uid: str, reached: frozenset[str], *, timeout: float
) -> Json:
    """The adaptation once it is in one of the states ``reached``.

    Raises:
        RefusedError: it has ended otherwise, or did not get there in time.
    """
    done: Json = _until(
        lambda: client.get(f"adaptations/{uid}").data,
        lambda found: found["state"] in reached | ADAPTATION_ENDED,
        timeout=timeout,
        what=f"The adaptation {uid}",
    )
    # Kept is an end and a beginning: it can still be taken back.
    if done["state"] not in reached:
        why = done["end_reason"] or "no reason was given"
        raise RefusedError(f"A-{done['number']} has ended as {done['state']}: {why}", Exit.OUTCOME)
    return done


def wait_for_command(client: Client, run: str, seq: int, *, timeout: float) -> Json:
    """The command of a run with this sequence number, once its trainer has answered it.

    Raises:
        RefusedError: the trainer has refused it, or did not answer in time.
    """
    done: Json = _until(
        lambda: client.get(f"runs/{run}/commands", after=seq - 1, limit=200).data["results"][-1],
        lambda command: command["state"] not in {"issued", "accepted"},
        timeout=timeout,
        what=f"Command {seq} of the run",
    )
    if done["state"] != "applied":
        why = done["reason"] or "no reason was given"
        raise RefusedError(f"The trainer has {done['state']} the command: {why}", Exit.OUTCOME)
    return done


def _until(
    read: Callable[[], Any], settled: Callable[[Any], bool], *, timeout: float, what: str
) -> Any:
    deadline = time.monotonic() + timeout
    while not settled(found := read()):
        if time.monotonic() >= deadline:
            raise RefusedError(
                f"{what} is {found['state']} after {timeout:g} s; it may still go on.", Exit.TIMEOUT
            )
        time.sleep(POLL_SECONDS)
    return found
