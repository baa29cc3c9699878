"""``esper delegations``: remedies that a person has approved ahead, with limits and for a time."""

from __future__ import annotations

import click

from launcher.commands.asking import asks_server, json_option
from launcher.commands.finding import run_uid
from launcher.remote.client import Client, segment
from launcher.remote.tables import print_json, print_rows

COLUMNS = ("uid", "in_words", "granted_by", "used", "most_uses", "until", "revoked_at")


@click.group("delegations")
def delegations_group() -> None:
    """Approve a remedy of one run ahead, list what is approved, or revoke it."""


@delegations_group.command("list")
@click.argument("run")
@json_option
@asks_server
def list_command(client: Client, run: str, as_json: bool) -> None:
    """List the delegations of RUN (R-3, its uid or its name), newest first."""
    rows = client.every(f"runs/{run_uid(client, run)}/delegations")
    print_rows(rows, COLUMNS, as_json=as_json, empty="Nothing is approved ahead.")


@delegations_group.command("grant")
@click.argument("run")
@click.argument("remedy")
@click.argument("limits", nargs=-1, metavar="[SETTING=LOW..HIGH]...")
@click.option("--minutes", type=click.IntRange(1, 1440), default=60, show_default=True)
@click.option("--uses", type=click.IntRange(1, 20), default=3, show_default=True)
@click.option("--reason", required=True, help="Why; it is kept in the audit log.")
@json_option
@asks_server
def grant_command(
    client: Client,
    run: str,
    remedy: str,
    limits: tuple[str, ...],
    minutes: int,
    uses: int,
    reason: str,
    as_json: bool,
) -> None:
    """Let REMEDY go without a person in RUN: esper delegations grant digits set_lr factor=0.5..2.

    Of a setting that multiplies, the limits hold for all uses together.
    """
    body = {
        "remedy": remedy,
        "limits": dict(_limit(text) for text in limits),
        "minutes": minutes,
        "most_uses": uses,
        "reason": reason,
    }
    made = client.act(f"runs/{run_uid(client, run)}/delegations", body).data
    if as_json:
        print_json(made)
    else:
        click.echo(f"{made['uid']}: {made['in_words']}, until {made['until']}")


@delegations_group.command("revoke")
@click.argument("delegation")
@click.option("--reason", default="", help="Why; it is kept in the audit log.")
@asks_server
def revoke_command(client: Client, delegation: str, reason: str) -> None:
    """End DELEGATION (dlg_…) now."""
    client.act(f"delegations/{segment(delegation)}/revoke", {"reason": reason})
    click.echo(f"{delegation} is revoked")


def _limit(text: str) -> tuple[str, list[float]]:
    name, _, ends = text.partition("=")
    low, _, high = ends.partition("..")
    try:
        return name, [float(low), float(high)]
    except ValueError:
        raise click.UsageError(f"{text!r} must be written as name=lowest..highest.") from None
