"""``esper people``: what administrators do with the accounts of others."""

from __future__ import annotations

import click

from launcher.commands.asking import asks_server
from launcher.commands.deciding import reason_option
from launcher.remote.client import Client, segment


@click.group("people")
def people_group() -> None:
    """Help people who cannot sign in."""


@people_group.command("remove-second-factor")
@click.argument("username")
@reason_option
@asks_server
def remove_second_factor_command(client: Client, username: str, reason: str) -> None:
    """Remove the authenticator app of USERNAME, who has lost the phone. Administrators."""
    client.act(f"people/{segment(username)}/remove-second-factor", {"reason": reason})
    click.echo(f"{username} signs in without an app, and is signed out everywhere")
