"""``esper remedy``: ask for a remedy of the catalogue."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click

from launcher.commands.asking import asks_server, json_option
from launcher.commands.deciding import APPLIED, dry_run_option, reason_option
from launcher.commands.finding import run_uid
from launcher.commands.waiting import timeout_option, wait_for_adaptation, wait_option
from launcher.remote.client import Client
from launcher.remote.tables import print_json, print_rows

COLUMNS = ("slug", "title", "risk", "settings")


@click.command("remedy")
@click.argument("run", required=False)
@click.argument("name", required=False)
@click.argument("settings", nargs=-1, metavar="[SETTING=VALUE]...")
@click.option("--layer", default="", help="Only for this layer. Default: the whole run.")
@reason_option
@dry_run_option
@wait_option
@timeout_option
@json_option
@asks_server
def remedy_command(
    client: Client,
    run: str | None,
    name: str | None,
    settings: tuple[str, ...],
    layer: str,
    reason: str,
    dry_run: bool,
    wait: bool,
    timeout: float,
    as_json: bool,
) -> None:
    """Ask for the remedy NAME in RUN (R-3, its uid or its name), at its next step.

    Such as: esper remedy digits evaluate_now --wait; esper remedy digits hold_lr value=0.001.
    Without NAME, list the remedies. With --wait until the trainer has applied it; what it has
    measured is printed then.
    """
    if run is None or name is None:
        known = client.get("remedies").data["results"]
        print_rows(known, COLUMNS, as_json=as_json, empty="There are none.")
        return
    body = {"remedy": name, "layer": layer, "config": _config(settings), "reason": reason}
    path = f"runs/{run_uid(client, run)}/ask-for-remedy"
    asked = client.act(path, body, dry_run=dry_run).data
    if wait and not dry_run:
        asked = wait_for_adaptation(client, asked["uid"], APPLIED, timeout=timeout)
    if as_json:
        print_json(asked)
        return
    state = str(asked["state"]).replace("_", " ")
    would = "would be" if dry_run else "is"
    click.echo(f"A-{asked['number']} {would} {state}: {asked['title']}")
    for key, value in (asked["details"] or {}).items():
        click.echo(f"{key.replace('_', ' ')}: {value}")


def _config(settings: Sequence[str]) -> dict[str, Any]:
    """``value=0.001`` -> ``{"value": 0.001}``; what is no JSON is text."""
    config: dict[str, Any] = {}
    for setting in settings:
        key, given, value = setting.partition("=")
        if not given or not key:
            raise click.UsageError(f"{setting!r} must be written as name=value.")
        try:
            config[key] = json.loads(value)
        except json.JSONDecodeError:
            config[key] = value
    return config


COMMANDS: tuple[click.Command, ...] = (remedy_command,)
