"""``esper approve``, ``reject`` and the other acts on one adaptation.

Whoever approves or rejects sees the evidence first; the approval carries the hash of exactly that.
"""

from __future__ import annotations

import json
from typing import Any

import click

from esper.contracts import RejectReason
from launcher.commands.asking import asks_server, confirm, json_option
from launcher.commands.reading import evidence
from launcher.commands.waiting import timeout_option, wait_for_adaptation, wait_option
from launcher.remote.client import Answer, Client, segment
from launcher.remote.tables import print_json

APPLIED = frozenset({"probation", "kept"})
TAKEN_BACK = frozenset({"rolled_back", "reverted"})
reason_option = click.option("--reason", default="", help="Why; it is kept in the audit log.")
dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Check whether it could be done; change nothing."
)
yes_option = click.option("--yes", is_flag=True, help="Do not ask after the evidence was shown.")
code_option = click.option(
    "--code", default="", type=click.Choice(["", *RejectReason]), help="Why, as one of these."
)
own_words_option = click.option(
    "--reason", default="", help="Why, in own words; needed without a code."
)


def reject_reason(code: str, reason: str) -> dict[str, str]:
    """Both, as the server takes them; one must be given."""
    if not (code or reason):
        raise click.UsageError("Give --reason, --code or both.")
    return {"reason": reason, "reason_code": code}


@click.command("approve")
@click.argument("adaptation")
@reason_option
@click.option("--accept-drift", is_flag=True, help="Approve in spite of drifted evidence.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="Change a setting first; all gates are checked again.",
)
@yes_option
@dry_run_option
@wait_option
@timeout_option
@json_option
@asks_server
def approve_command(
    client: Client,
    adaptation: str,
    reason: str,
    accept_drift: bool,
    settings: tuple[str, ...],
    yes: bool,
    dry_run: bool,
    wait: bool,
    timeout: float,
    as_json: bool,
) -> None:
    """Show the evidence of ADAPTATION (A-17 or its uid), ask, and approve exactly that.

    With --wait until the trainer has applied it.
    """
    shown = _shown(client, adaptation, ask="" if yes or dry_run else "Approve it?", quiet=as_json)
    body = {
        "reason": reason,
        "accept_drift": accept_drift,
        "evidence_hash": shown.data["evidence_hash"],
        "config": dict(setting(text) for text in settings),
    }
    path = f"adaptations/{shown.data['uid']}/approve"
    done = client.act(path, body, etag=shown.etag, dry_run=dry_run)
    _tell(client, done, APPLIED, wait=wait and not dry_run, timeout=timeout, as_json=as_json)


@click.command("shadow")
@click.argument("adaptation")
@click.option("--steps", type=click.IntRange(1, 2000), default=200, show_default=True)
@click.option("--seconds", type=click.IntRange(1, 600), default=60, show_default=True)
@click.option("--variant", default="", help="Try this one instead: a uid of esper variants.")
@click.option("--reason", default="", help="Why; it is kept in the audit log.")
@dry_run_option
@json_option
@asks_server
def shadow_command(
    client: Client,
    adaptation: str,
    steps: int,
    seconds: int,
    variant: str,
    reason: str,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Try ADAPTATION on a copy of its run; the run stays as it is. esper show has the result."""
    body = {"steps": steps, "seconds": seconds, "variant": variant, "reason": reason}
    path = f"adaptations/{segment(adaptation)}/shadow"
    done = client.act(path, body, dry_run=dry_run).data
    if as_json:
        print_json(done)
    else:
        click.echo(f"The trainer is told to try A-{done['number']} in shadow.")


@click.command("reject")
@click.argument("adaptation")
@code_option
@own_words_option
@yes_option
@dry_run_option
@json_option
@asks_server
def reject_command(
    client: Client,
    adaptation: str,
    code: str,
    reason: str,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Show the evidence of ADAPTATION, ask, and reject it."""
    why = reject_reason(code, reason)
    shown = _shown(client, adaptation, ask="" if yes or dry_run else "Reject it?", quiet=as_json)
    path = f"adaptations/{shown.data['uid']}/reject"
    done = client.act(path, why, etag=shown.etag, dry_run=dry_run)
    _tell(client, done, frozenset(), wait=False, timeout=0.0, as_json=as_json)


def _shown(client: Client, adaptation: str, *, ask: str, quiet: bool) -> Answer:
    """What was shown; it is printed to standard error where standard output is for a program."""
    found = client.get(f"adaptations/{segment(adaptation)}")
    if not quiet:
        evidence(found.data)
    if ask:
        confirm(ask)
    return found


def _act(
    name: str,
    path: str,
    text: str,
    *,
    needs_reason: bool = False,
    reached: frozenset[str] = frozenset(),
) -> click.Command:
    """The command of an act that needs no look at the evidence."""

    @click.command(name, help=text)
    @click.argument("adaptation")
    @click.option("--reason", default="", required=needs_reason, help="Why; it is kept.")
    @dry_run_option
    @wait_option
    @timeout_option
    @json_option
    @asks_server
    def command(
        client: Client,
        adaptation: str,
        reason: str,
        dry_run: bool,
        wait: bool,
        timeout: float,
        as_json: bool,
    ) -> None:
        resource = f"adaptations/{segment(adaptation)}"
        etag = client.get(resource).etag
        done = client.act(f"{resource}/{path}", {"reason": reason}, etag=etag, dry_run=dry_run)
        waits = wait and bool(reached) and not dry_run
        _tell(client, done, reached, wait=waits, timeout=timeout, as_json=as_json)

    return command


def _tell(
    client: Client,
    done: Answer,
    reached: frozenset[str],
    *,
    wait: bool,
    timeout: float,
    as_json: bool,
) -> None:
    data: dict[str, Any] = done.data
    if wait:
        data = wait_for_adaptation(client, data["uid"], reached, timeout=timeout)
    if as_json:
        print_json(data)
    else:
        would = "would be" if data.get("dry_run") else "is"
        state = str(data["state"]).replace("_", " ")
        click.echo(f"A-{data['number']} {would} {state}: {data['title']}")


rollback_command = _act(
    "rollback",
    "rollback",
    "Take ADAPTATION back: from probation exactly, once it was kept by taking the graft out.",
    needs_reason=True,
    reached=TAKEN_BACK,
)
cancel_command = _act("cancel", "cancel", "Cancel ADAPTATION before it is sent to the trainer.")
claim_command = _act("claim", "claim", "Claim ADAPTATION for ten minutes, so that others see it.")
release_command = _act("release", "release", "Release your claim on ADAPTATION.")
extend_command = _act("extend", "extend", "Extend the deadline of ADAPTATION by five minutes.")
escalate_command = _act(
    "escalate", "escalate", "Let an administrator approve ADAPTATION, because you are unsure."
)


@click.command("assign")
@click.argument("adaptation")
@click.argument("person", required=False, default="")
@reason_option
@asks_server
def assign_command(client: Client, adaptation: str, person: str, reason: str) -> None:
    """Ask PERSON to decide on ADAPTATION; without a PERSON nobody in particular any more."""
    body = {"to": person, "reason": reason}
    done = client.act_on_shown(f"adaptations/{segment(adaptation)}", "assign", body).data
    click.echo(f"A-{done['number']} is assigned to {done['assigned_to'] or 'nobody'}")


@click.command("snooze")
@click.argument("adaptation")
@click.argument("minutes", type=click.IntRange(min=0))
@asks_server
def snooze_command(client: Client, adaptation: str, minutes: int) -> None:
    """Hide ADAPTATION from your own inbox for MINUTES; 0 ends it."""
    client.act(f"adaptations/{segment(adaptation)}/snooze", {"minutes": minutes})
    click.echo(f"{adaptation} is hidden for {minutes} min" if minutes else f"{adaptation} is shown")


def setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE; the value is JSON, or a text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise click.UsageError(f"{text!r} is not NAME=VALUE.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


COMMANDS: tuple[click.Command, ...] = (
    approve_command,
    reject_command,
    shadow_command,
    rollback_command,
    cancel_command,
    claim_command,
    release_command,
    extend_command,
    escalate_command,
    assign_command,
    snooze_command,
)
