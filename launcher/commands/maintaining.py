"""``esper workers``, ``kernels``, ``blueprints``, ``variants``, ``policy``: lists, and acts."""

from __future__ import annotations

import click

from launcher.commands.asking import asks_server, json_option
from launcher.commands.deciding import dry_run_option, reason_option, setting
from launcher.commands.reading import limit_option
from launcher.remote.client import Client, segment
from launcher.remote.tables import print_json, print_members, print_rows


def _list(name: str, path: str, columns: tuple[str, ...], text: str, empty: str) -> click.Group:
    """A group that lists a collection when no act of it is named."""

    @click.group(name, help=text, invoke_without_command=True)
    @click.pass_context
    @limit_option
    @json_option
    @asks_server
    def group(client: Client, context: click.Context, limit: int, as_json: bool) -> None:
        if context.invoked_subcommand is None:
            rows = client.every(path, limit=limit)
            print_rows(rows, columns, as_json=as_json, empty=empty)

    return group


def _add_act(
    group: click.Group, name: str, path: str, text: str, *, says: str, needs_reason: bool = False
) -> None:
    """An act on one object of the group; ``path`` has a place for its name."""

    @group.command(name, help=text)
    @click.argument("name")
    @click.option("--reason", default="", required=needs_reason, help="Why; it is kept.")
    @dry_run_option
    @json_option
    @asks_server
    def act(client: Client, name: str, reason: str, dry_run: bool, as_json: bool) -> None:
        done = client.act(path.format(segment(name)), {"reason": reason}, dry_run=dry_run).data
        if as_json:
            print_json(done)
        else:
            click.echo(f"{name} {'would be' if dry_run else 'is'} {says}")


workers_group = _list(
    "workers",
    "workers",
    ("name", "kind", "host", "state", "mode", "mode_reason", "heartbeat_at=last report"),
    "List workers and Tamiyo; take a compile worker out of service.",
    "No worker has reported.",
)
_add_act(
    workers_group,
    "drain",
    "workers/{}/drain",
    "Let worker NAME finish its job, and give it no other.",
    says="draining",
    needs_reason=True,
)
_add_act(
    workers_group,
    "quarantine",
    "workers/{}/quarantine",
    "Refuse what worker NAME builds from now on.",
    says="in quarantine",
    needs_reason=True,
)
_add_act(
    workers_group, "release", "workers/{}/release", "Give worker NAME jobs again.", says="active"
)

kernels_group = _list(
    "kernels",
    "kernels",
    ("digest", "blueprint_slug=blueprint", "layer_kind=layer", "capability", "uses", "build_ms",
     "size_bytes=bytes", "pinned_by", "evicted_at"),
    "List compiled kernels; pin, unpin or evict one by its digest.",
    "There are no kernels.",
)  # fmt: skip
_add_act(kernels_group, "pin", "kernels/{}/pin", "Never evict kernel NAME.", says="pinned")
_add_act(
    kernels_group, "unpin", "kernels/{}/unpin", "Let kernel NAME be evicted.", says="not pinned"
)
_add_act(
    kernels_group, "evict", "kernels/{}/evict", "Remove the files of kernel NAME.", says="evicted"
)


@kernels_group.command("scrub")
@reason_option
@dry_run_option
@asks_server
def scrub_command(client: Client, reason: str, dry_run: bool) -> None:
    """Check digest and signature of every kernel in the cache."""
    client.act("kernels/cache/scrub", {"reason": reason}, dry_run=dry_run)
    click.echo("A check could be requested." if dry_run else "A check of the cache is requested.")


blueprints_group = _list(
    "blueprints",
    "blueprints",
    ("slug", "title", "category", "risk", "adaptation_type", "enabled"),
    "List blueprints; enable or disable one.",
    "There are no blueprints.",
)
_add_act(
    blueprints_group,
    "enable",
    "blueprints/{}/enable",
    "Let blueprint NAME be proposed.",
    says="enabled",
)
_add_act(
    blueprints_group,
    "disable",
    "blueprints/{}/disable",
    "Let nobody propose blueprint NAME.",
    says="disabled",
)

variants_group = _list(
    "variants",
    "variants",
    ("uid", "blueprint", "change", "state", "expected", "decided_by", "reason"),
    "List sizes of blueprints that were suggested from experience; admit or withdraw one.",
    "No variant was suggested.",
)
_add_act(
    variants_group,
    "admit",
    "variants/{}/admit",
    "Let decisions propose variant NAME, after it was tried in shadow.",
    says="admitted",
)
_add_act(
    variants_group,
    "withdraw",
    "variants/{}/withdraw",
    "Let nobody propose or suggest variant NAME again.",
    says="withdrawn",
    needs_reason=True,
)


@click.group("policy", invoke_without_command=True)
@click.pass_context
@click.option("--history", is_flag=True, help="List all versions, newest first.")
@json_option
@asks_server
def policy_group(client: Client, context: click.Context, history: bool, as_json: bool) -> None:
    """Show the thresholds in force, or their history; publish a new version."""
    if context.invoked_subcommand is not None:
        return
    if history:
        columns = ("version", "author", "reason", "created_at")
        print_rows(client.every("policies"), columns, as_json=as_json, empty="There is none.")
        return
    found = client.get("policies/current").data
    if as_json:
        print_json(found)
    else:
        click.echo(f"Version {found['version']}: {found['reason']}")
        print_members(found["values"], sorted(found["values"]), exact=True)


@policy_group.command("publish")
@click.argument("changes", nargs=-1, required=True, metavar="NAME=VALUE...")
@click.option("--reason", required=True, help="Why the thresholds change.")
@dry_run_option
@asks_server
def publish_command(client: Client, changes: tuple[str, ...], reason: str, dry_run: bool) -> None:
    """Write a version with some thresholds changed; a second person agrees if it allows more."""
    body = {"changes": dict(setting(text) for text in changes), "reason": reason}
    made = client.act("policies", body, dry_run=dry_run).data
    waits = made["state"] == "draft"
    what = "a draft, which another curator or admin has to agree to" if waits else "in force"
    click.echo(f"Version {made['version']} {'would be' if dry_run else 'is'} {what}.")


@policy_group.command("agree")
@click.argument("version", metavar="VERSION")
@dry_run_option
@asks_server
def agree_command(client: Client, version: str, dry_run: bool) -> None:
    """Agree with a draft that another person wrote; it is in force from the next decision."""
    made = client.act(f"policies/{version}/approve", {}, dry_run=dry_run).data
    click.echo(f"Version {made['version']} {'would be' if dry_run else 'is'} in force.")


@policy_group.command("withdraw")
@click.argument("version", metavar="VERSION")
@reason_option
@asks_server
def withdraw_command(client: Client, version: str, reason: str) -> None:
    """Withdraw a draft; it never comes into force."""
    made = client.act(f"policies/{segment(version)}/withdraw", {"reason": reason}).data
    click.echo(f"Version {made['version']} is withdrawn.")


@click.command("log")
@click.option("--run", metavar="RUN", help="Only of this run, by its uid.")
@click.option("--act", help="Only acts that begin with this, such as adaptation.")
@click.option("--actor", help="Only of this account or service.")
@limit_option
@json_option
@asks_server
def audit_log_command(
    client: Client, run: str | None, act: str | None, actor: str | None, limit: int, as_json: bool
) -> None:
    """List events of the audit log as the server shows them, newest first."""
    columns = ("id", "at", "actor", "via", "act", "object_uid=object", "reason")
    rows = client.every("audit", limit=limit, run=run, act=act, actor=actor)
    print_rows(rows, columns, as_json=as_json, empty="There are no such events.")


COMMANDS: tuple[click.Command, ...] = (
    workers_group,
    kernels_group,
    blueprints_group,
    variants_group,
    policy_group,
)
