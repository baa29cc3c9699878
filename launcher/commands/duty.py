"""``esper duty``: who is on duty now and later."""

from __future__ import annotations

import click

from launcher.commands.asking import asks_server, json_option
from launcher.remote.client import Client, segment
from launcher.remote.tables import print_json, print_rows

COLUMNS = ("uid", "who", "begins", "ends")


@click.group("duty", invoke_without_command=True)
@click.pass_context
@json_option
@asks_server
def duty_group(client: Client, context: click.Context, as_json: bool) -> None:
    """List who is on duty; add or remove a shift."""
    if context.invoked_subcommand is None:
        rows = client.every("duty")
        print_rows(rows, COLUMNS, as_json=as_json, empty="Nobody is on duty.")


@duty_group.command("add")
@click.argument("begins")
@click.argument("ends")
@click.option("--who", default="", help="Somebody else; only administrators. Default: you.")
@json_option
@asks_server
def add_command(client: Client, begins: str, ends: str, who: str, as_json: bool) -> None:
    """Be on duty from BEGINS to ENDS: esper duty add 2030-01-01T18:00Z 2030-01-02T06:00Z."""
    made = client.act("duty", {"who": who, "begins": begins, "ends": ends}).data
    if as_json:
        print_json(made)
    else:
        click.echo(f"{made['uid']}: {made['who']} until {made['ends']}")


@duty_group.command("remove")
@click.argument("shift")
@asks_server
def remove_command(client: Client, shift: str) -> None:
    """Remove SHIFT (dty_…)."""
    client.delete(f"duty/{segment(shift)}")
    click.echo(f"{shift} is removed")
