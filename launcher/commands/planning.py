"""``esper plans``: several changes of one run that are decided on as a whole."""

from __future__ import annotations

from typing import Any

import click

from launcher.commands.asking import asks_server, confirm, json_option
from launcher.commands.deciding import (
    code_option,
    dry_run_option,
    own_words_option,
    reason_option,
    reject_reason,
    yes_option,
)
from launcher.remote.client import Answer, Client, segment
from launcher.remote.tables import print_json, print_rows

COLUMNS = ("number", "title", "state", "proposed_step", "deadline_at", "uid")
MEMBER_COLUMNS = ("number", "title", "risk", "confidence", "state")


@click.group("plans")
def plans_group() -> None:
    """List plans, show one, approve or reject it as a whole, or undo it."""


@plans_group.command("list")
@click.option("--state", default="", help="Such as awaiting_approval; default: all.")
@json_option
@asks_server
def list_command(client: Client, state: str, as_json: bool) -> None:
    """List plans, newest first."""
    rows = client.every("plans", state=state) if state else client.every("plans")
    print_rows(rows, COLUMNS, as_json=as_json, empty="There is no plan.")


@plans_group.command("show")
@click.argument("plan")
@json_option
@asks_server
def show_command(client: Client, plan: str, as_json: bool) -> None:
    """Show PLAN (P-3 or its uid): its changes in order, and why these."""
    found = client.get(f"plans/{segment(plan)}").data
    print_json(found) if as_json else _tell(found)


@plans_group.command("approve")
@click.argument("plan")
@reason_option
@click.option("--accept-drift", is_flag=True, help="Approve in spite of drifted evidence.")
@yes_option
@dry_run_option
@json_option
@asks_server
def approve_command(
    client: Client,
    plan: str,
    reason: str,
    accept_drift: bool,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Show PLAN, ask, and approve exactly that."""
    shown = _shown(client, plan, ask="" if yes or dry_run else "Approve all of it?", quiet=as_json)
    body = {
        "reason": reason,
        "accept_drift": accept_drift,
        "evidence_hash": shown.data["evidence_hash"],
    }
    _act(client, shown, "approve", body, dry_run=dry_run, as_json=as_json)


@plans_group.command("reject")
@click.argument("plan")
@code_option
@own_words_option
@yes_option
@dry_run_option
@json_option
@asks_server
def reject_command(
    client: Client, plan: str, code: str, reason: str, yes: bool, dry_run: bool, as_json: bool
) -> None:
    """Show PLAN, ask, and reject all of it."""
    why = reject_reason(code, reason)
    shown = _shown(client, plan, ask="" if yes or dry_run else "Reject all of it?", quiet=as_json)
    _act(client, shown, "reject", why, dry_run=dry_run, as_json=as_json)


@plans_group.command("undo")
@click.argument("plan")
@click.option("--reason", required=True, help="Why; it is kept in the audit log.")
@dry_run_option
@json_option
@asks_server
def undo_command(client: Client, plan: str, reason: str, dry_run: bool, as_json: bool) -> None:
    """Take all of PLAN out of the model, the last change first."""
    shown = client.get(f"plans/{segment(plan)}")
    _act(client, shown, "undo", {"reason": reason}, dry_run=dry_run, as_json=as_json)


def _shown(client: Client, plan: str, *, ask: str, quiet: bool) -> Answer:
    found = client.get(f"plans/{segment(plan)}")
    if not quiet:
        _tell(found.data)
    if ask:
        confirm(ask)
    return found


def _act(
    client: Client,
    shown: Answer,
    act: str,
    body: dict[str, Any],
    *,
    dry_run: bool,
    as_json: bool,
) -> None:
    path = f"plans/{shown.data['uid']}/{act}"
    done = client.act(path, body, etag=shown.etag, dry_run=dry_run).data
    if as_json:
        print_json(done)
    else:
        click.echo(f"P-{done['number']} is {done['state'].replace('_', ' ')}. {done['outcome']}")


def _tell(plan: dict[str, Any]) -> None:
    click.echo(f"P-{plan['number']} {plan['title']}: {plan['state'].replace('_', ' ')}")
    print_rows(plan["members"], MEMBER_COLUMNS, as_json=False, empty="It has no changes.")
    for line in (*plan["reasons"], *plan["asks"], *plan["undo"]):
        click.echo(f"  {line}")
    if plan["outcome"]:
        click.echo(plan["outcome"])
