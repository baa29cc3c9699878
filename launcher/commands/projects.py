"""``esper projects``: the projects that you see, and their members."""

from __future__ import annotations

import click

from esper.contracts import Role, TokenScope
from launcher.commands.asking import asks_server, json_option
from launcher.commands.deciding import reason_option
from launcher.commands.finding import run_uid
from launcher.remote.client import Client, segment
from launcher.remote.tables import print_json, print_rows

COLUMNS = ("uid", "name", "role", "created_at")
MEMBERS = ("username", "role")


@click.group("projects", invoke_without_command=True)
@click.pass_context
@json_option
@asks_server
def projects_group(client: Client, context: click.Context, as_json: bool) -> None:
    """List your projects; create one, list its members, give a member a role."""
    if context.invoked_subcommand is None:
        print_rows(client.every("projects"), COLUMNS, as_json=as_json, empty="You see no project.")


@projects_group.command("create")
@click.argument("name")
@json_option
@asks_server
def create_command(client: Client, name: str, as_json: bool) -> None:
    """Create the project NAME. Administrators of the server."""
    made = client.act("projects", {"name": name}).data
    if as_json:
        print_json(made)
    else:
        click.echo(made["uid"])


@projects_group.command("members")
@click.argument("project")
@json_option
@asks_server
def members_command(client: Client, project: str, as_json: bool) -> None:
    """List who has a role of their own in PROJECT (prj_…)."""
    rows = client.get(f"projects/{segment(project)}").data["members"]
    print_rows(rows, MEMBERS, as_json=as_json, empty="It has no members.")


@projects_group.command("member")
@click.argument("project")
@click.argument("username")
@click.argument("role", type=click.Choice([*(str(role) for role in Role), "none"]))
@asks_server
def member_command(client: Client, project: str, username: str, role: str) -> None:
    """Give USERNAME a ROLE in PROJECT; none: a member no longer."""
    body = {"username": username, "role": "" if role == "none" else role}
    client.act(f"projects/{segment(project)}/set-member", body)
    click.echo(f"{username} is {'no member' if role == 'none' else role} of {project}")


@projects_group.command("add-service")
@click.argument("project")
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    default=("runs:create",),
    type=click.Choice([str(scope) for scope in TokenScope]),
    help="What its token may do; may be given several times. Default: runs:create.",
)
@click.option(
    "--days", type=click.IntRange(min=1), default=90, help="Its token ends after so many."
)
@asks_server
def add_service_command(
    client: Client, project: str, name: str, scopes: tuple[str, ...], days: int
) -> None:
    """Create the service account NAME in PROJECT, and print its token, which is shown once."""
    body = {"name": name, "scopes": list(scopes), "expires_in_days": days}
    made = client.act(f"projects/{segment(project)}/create-service-account", body).data
    click.echo(made["secret"])


@projects_group.command("end-service")
@click.argument("project")
@click.argument("name")
@asks_server
def end_service_command(client: Client, project: str, name: str) -> None:
    """End the service account NAME of PROJECT; its tokens stop working at once."""
    client.act(f"projects/{segment(project)}/end-service-account", {"name": name})
    click.echo(f"{name} has ended")


@projects_group.command("move")
@click.argument("run")
@click.argument("project")
@reason_option
@asks_server
def move_command(client: Client, run: str, project: str, reason: str) -> None:
    """Move RUN (R-3, its uid or its name), which has ended, to PROJECT (prj_…)."""
    uid = run_uid(client, run)
    client.act(f"runs/{uid}/move", {"project": project, "reason": reason})
    click.echo(f"{run} belongs to {project}")
