"""``esper watch RUN``: a run in the terminal, live: numbers, loss, adaptations, findings."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import click
from rich.console import Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from launcher.commands.asking import asks_server
from launcher.commands.finding import run_uid
from launcher.commands.reading import ADAPTATION_COLUMNS, FINDING_COLUMNS
from launcher.remote.client import Client, Exit, RefusedError
from launcher.remote.tables import Json, console, shown, table

BARS = "▁▂▃▄▅▆▇█"
POINTS = 60
ROWS = 8
ENDED = frozenset({"finished", "failed", "lost"})


@click.command("watch")
@click.argument("run")
@click.option("--every", type=click.FloatRange(min=0.2), default=2.0, show_default=True,
              metavar="SECONDS", help="How often it is read.")  # fmt: skip
@click.option("--once", is_flag=True, help="Print it once, and stop.")
@asks_server
def watch_command(client: Client, run: str, every: float, once: bool) -> None:
    """Show RUN live until it ends or Ctrl-C: loss, what waits, adaptations, findings.

    While the server does not answer, the last picture stays and says how old it is.
    """
    uid = run_uid(client, run)
    if once:
        console().print(picture(client, uid))
        return
    with Live(picture(client, uid), console=console(), auto_refresh=False) as live:
        read_at = time.monotonic()
        try:
            while client.get(f"runs/{uid}").data["state"] not in ENDED:
                time.sleep(every)
                read_at = _refresh(live, client, uid, read_at)
            live.update(picture(client, uid), refresh=True)
        except KeyboardInterrupt:
            return


def _refresh(live: Live, client: Client, uid: str, read_at: float) -> float:
    """Draws it anew; an old picture says its age."""
    try:
        live.update(picture(client, uid), refresh=True)
        return time.monotonic()
    except RefusedError as error:
        if error.exit_code != Exit.UNAVAILABLE:
            raise
        old = Text(f"No answer. This is {time.monotonic() - read_at:.0f} s old.", style="bold red")
        live.update(Group(old, live.renderable), refresh=True)
        return read_at


def picture(client: Client, uid: str) -> Group:
    """What is known of the run now."""
    run = client.get(f"runs/{uid}").data
    adaptations = list(client.every("adaptations", run=uid, limit=ROWS))
    findings = list(client.every("violations", run=uid, open=True, limit=ROWS))
    points = client.get(f"runs/{uid}/metrics", name="loss", points=POINTS).data
    parts: list[Any] = [
        Panel(Text("\n".join(_lines(run))), title=Text(f"R-{run['number']} {run['name']}")),
        Text(f"loss  {spark(_means(points))}  {shown(run['last_loss'])}"),
    ]
    if adaptations:
        parts.append(table(adaptations, ADAPTATION_COLUMNS))
    if findings:
        parts.append(table(findings, FINDING_COLUMNS))
    return Group(*parts)


def spark(values: Sequence[float]) -> str:
    """The values as one line of bars; empty where there is none."""
    if not values:
        return ""
    low, high = min(values), max(values)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in values)


def _lines(run: Json) -> list[str]:
    target = f" of {run['target_steps']:,}" if run["target_steps"] else ""
    paused = run["adaptation_paused_by"]
    return [
        f"{run['state']}, {run['mode']}, step {run['step']:,}{target}, owner {run['owner']}",
        f"last report {shown(run['last_seen_at'])} UTC",
        *([f"adaptation is paused by {paused}"] if paused else []),
        *([run["quarantined_reason"]] if run["quarantined_reason"] else []),
    ]


def _means(series: Json) -> list[float]:
    return [value for value in series["mean"] if value is not None]
