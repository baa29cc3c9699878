"""``esper freeze``: spans of time in which nothing is applied."""

from __future__ import annotations

from datetime import datetime

import click

from launcher.commands.asking import asks_server, json_option
from launcher.remote.client import Client, segment
from launcher.remote.tables import print_json, print_rows

COLUMNS = ("uid", "project", "starts_at", "ends_at", "reason", "set_by", "ended_by", "ended_at")
_TIME = "%Y-%m-%dT%H:%M"
moment = click.DateTime([_TIME, "%Y-%m-%d %H:%M", "%Y-%m-%d"])


@click.group("freeze")
def freeze_group() -> None:
    """Let nothing be applied for a time: set a freeze, list freezes, end one."""


@freeze_group.command("list")
@json_option
@asks_server
def list_command(client: Client, as_json: bool) -> None:
    """List the freezes, the latest first."""
    rows = client.every("freezes")
    print_rows(rows, COLUMNS, as_json=as_json, empty="No freeze was ever set.")


@freeze_group.command("set")
@click.option("--from", "begin", type=moment, help="When it begins, local time. Default: now.")
@click.option("--until", "end", type=moment, required=True, help="When it ends, local time.")
@click.option("--project", default="", help="For this project alone (prj_…). Default: everywhere.")
@click.option("--reason", required=True, help="Why; approvers read it.")
@json_option
@asks_server
def set_command(
    client: Client,
    begin: datetime | None,
    end: datetime,
    project: str,
    reason: str,
    as_json: bool,
) -> None:
    """Let nothing be applied: esper freeze set --until "2026-12-27 08:00" --reason "no duty"."""
    body = {"ends_at": _zoned(end), "project": project, "reason": reason}
    if begin is not None:
        body["starts_at"] = _zoned(begin)
    made = client.act("freezes", body).data
    if as_json:
        print_json(made)
    else:
        click.echo(f"{made['uid']}: from {made['starts_at']} until {made['ends_at']}")


@freeze_group.command("end")
@click.argument("freeze")
@click.option("--reason", default="", help="Why; it is kept in the audit log.")
@asks_server
def end_command(client: Client, freeze: str, reason: str) -> None:
    """End FREEZE (frz_…) now, or take it back before it begins."""
    client.act(f"freezes/{segment(freeze)}/end", {"reason": reason})
    click.echo(f"{freeze} is over")


def _zoned(local: datetime) -> str:
    return local.astimezone().isoformat()
