"""``esper channels``: where its owner is told of events, and what was sent there."""

from __future__ import annotations

import click

from launcher.commands.asking import asks_server, json_option
from launcher.commands.reading import limit_option
from launcher.remote.client import Client, segment
from launcher.remote.tables import print_json, print_rows

COLUMNS = ("uid", "kind", "target", "events", "quiet_from", "quiet_until", "disabled_reason")
LOG = ("uid", "type", "created_at", "attempts", "status", "error", "delivered_at", "due_at")


@click.group("channels", invoke_without_command=True)
@click.pass_context
@json_option
@asks_server
def channels_group(client: Client, context: click.Context, as_json: bool) -> None:
    """List your webhooks, chats and mails; add or remove one, read its log, send again."""
    if context.invoked_subcommand is None:
        rows = client.every("channels")
        print_rows(rows, COLUMNS, as_json=as_json, empty="You have no channel.")


@channels_group.command("add")
@click.argument("kind", type=click.Choice(["webhook", "slack", "mail"]))
@click.argument("target", required=False, default="")
@click.option("--event", "events", multiple=True, required=True, help="May be given several times.")
@click.option("--quiet", metavar="HH:MM-HH:MM", help="Hours in UTC in which events wait.")
@json_option
@asks_server
def add_command(
    client: Client,
    kind: str,
    target: str,
    events: tuple[str, ...],
    quiet: str | None,
    as_json: bool,
) -> None:
    """Add a channel: esper channels add webhook https://… --event adaptation.awaiting_approval."""
    begin, _, end = (quiet or "").partition("-")
    body = {"kind": kind, "target": target, "events": list(events)}
    body |= {"quiet_from": begin, "quiet_until": end} if quiet else {}
    made = client.act("channels", body).data
    if as_json:
        print_json(made)
    else:
        click.echo(made["uid"])
        if made["secret"]:
            click.echo(f"The secret of its signatures, which is shown once: {made['secret']}")


@channels_group.command("remove")
@click.argument("channel")
@asks_server
def remove_command(client: Client, channel: str) -> None:
    """Remove CHANNEL with its log."""
    client.delete(f"channels/{segment(channel)}")
    click.echo(f"{channel} is removed")


@channels_group.command("log")
@click.argument("channel")
@limit_option
@json_option
@asks_server
def log_command(client: Client, channel: str, limit: int, as_json: bool) -> None:
    """List what was sent to CHANNEL, newest first."""
    rows = client.every(f"channels/{segment(channel)}/deliveries", limit=limit)
    print_rows(rows, LOG, as_json=as_json, empty="Nothing was sent.")


@channels_group.command("replay")
@click.argument("delivery")
@asks_server
def replay_command(client: Client, delivery: str) -> None:
    """Send DELIVERY (msg_…) again."""
    client.act(f"deliveries/{segment(delivery)}/replay")
    click.echo(f"{delivery} is sent again")
