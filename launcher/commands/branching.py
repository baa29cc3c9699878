"""``esper branch``: start a new run of a recipe from a stored state of one of its runs."""

from __future__ import annotations

from typing import Any

import click

from launcher.commands.asking import asks_server, json_option
from launcher.commands.deciding import dry_run_option, reason_option, setting
from launcher.commands.finding import run_uid
from launcher.remote.client import Client, Json
from launcher.remote.tables import print_json, print_rows

STATES = ("name", "step", "size_bytes", "written_at")
TREE = ("name", "run", "branch_of", "branch_step", "changed", "state", "step", "last_loss")


@click.command("branch")
@click.argument("run")
@click.argument("parameters", nargs=-1, metavar="[NAME=VALUE]...")
@click.option("--state", default="", help="Begin from this stored state. Default: the newest.")
@click.option("--list", "only_list", is_flag=True, help="Print the stored states and the tree.")
@reason_option
@dry_run_option
@json_option
@asks_server
def branch_command(
    client: Client,
    run: str,
    parameters: tuple[str, ...],
    state: str,
    only_list: bool,
    reason: str,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Start a new run from a stored state of RUN (R-3, its uid or its name), a run of a recipe.

    Such as: esper branch digits-cnn-7 seed=1 --state step-4200.pt. What is not named stays as it
    was in RUN.
    """
    path = f"runs/{run_uid(client, run)}/branches"
    if only_list:
        _print(client.get(path).data, as_json=as_json)
        return
    body = {"state": state, "parameters": dict(map(setting, parameters)), "reason": reason}
    launch = client.act(path, body, dry_run=dry_run).data
    if as_json:
        print_json(launch)
        return
    would = "would begin" if dry_run else "begins"
    click.echo(
        f"L-{launch['number']} {would} from {launch['branch_state']}, step {launch['branch_step']}"
    )


def _print(found: Json, *, as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    if found["why_not"]:
        click.echo(found["why_not"])
    print_rows(found["states"], STATES, as_json=False, empty="No state is stored.")
    print_rows([_row(one) for one in found["tree"]], TREE, as_json=False, empty="")


def _row(one: Json) -> dict[str, Any]:
    """Indented by its depth; what it changed, as ``seed: 0 → 1``."""
    changed = ", ".join(f"{name}: {old} → {new}" for name, (old, new) in one["changed"].items())
    name = one["name"] or f"({one['launch_state']})"
    return {**one, "name": f"{'  ' * one['depth']}{name}", "changed": changed}
