"""``esper mcp``: an assistant reads runs and evidence, and proposes; a person decides."""

from __future__ import annotations

import click

from launcher.commands.asking import asks_server
from launcher.remote.agent import check_token, make_server
from launcher.remote.client import Client


@click.command("mcp")
@asks_server
def mcp_command(client: Client) -> None:
    """Serve the Model Context Protocol on standard input and output, for an assistant.

    It reads runs, findings and evidence, and proposes remedies. It cannot approve: its token must
    have the scopes read and propose only, and what it proposes waits for a person. Needs the
    package mcp: pip install "mcp>=2,<3".
    """
    check_token(client)
    try:
        server = make_server(client)
    except ImportError as error:
        raise click.ClickException(
            'The package mcp is missing: pip install "mcp>=2,<3".'
        ) from error
    server.run()
