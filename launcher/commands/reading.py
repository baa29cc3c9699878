"""``esper runs``, ``adaptations``, ``findings``, ``inbox``, ``show``: what the server knows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import click

from launcher.commands.asking import asks_server, json_option
from launcher.commands.finding import resource_of, run_uid
from launcher.remote.client import Client, Exit, segment
from launcher.remote.tables import Json, print_json, print_members, print_rows

SMALLEST_PART = 0.05  # of the confidence, that is shown
RUN_COLUMNS = ("number", "name", "state", "mode", "step", "last_loss=loss", "owner", "last_seen_at")
ADAPTATION_COLUMNS = (
    "number",
    "title",
    "run_name=run",
    "state",
    "risk",
    "confidence",
    "created_at",
)
INBOX_COLUMNS = (
    "number", "title", "run_name=run", "risk", "confidence", "deadline_at=expires", "claimed_by",
)  # fmt: skip
FINDING_COLUMNS = (
    "number", "severity", "text", "layer", "step", "created_at", "acknowledged_by",
)  # fmt: skip
limit_option = click.option(
    "--limit", type=click.IntRange(min=1), default=50, show_default=True, help="At most so many."
)
run_option = click.option(
    "--run", metavar="RUN", help="Only of this run: R-3, its uid or its name."
)


@click.command("runs")
@click.option("--state", help="Only runs in this state, such as running; several with commas.")
@click.option("--owner", help="Only runs of this account.")
@click.option("--name", help="Only runs of this name.")
@limit_option
@json_option
@asks_server
def runs_command(
    client: Client,
    state: str | None,
    owner: str | None,
    name: str | None,
    limit: int,
    as_json: bool,
) -> None:
    """List runs, newest first."""
    rows = client.every("runs", limit=limit, state__in=state, owner=owner, name=name)
    print_rows(rows, RUN_COLUMNS, as_json=as_json, empty="There are no such runs.", letter="R")


@click.command("adaptations")
@run_option
@click.option("--state", help="Only in this state, such as probation; several with commas.")
@click.option("--layer", help="Only of this layer.")
@click.option("--risk", help="Only of this risk: none, low, medium or high.")
@limit_option
@json_option
@asks_server
def adaptations_command(
    client: Client,
    run: str | None,
    state: str | None,
    layer: str | None,
    risk: str | None,
    limit: int,
    as_json: bool,
) -> None:
    """List grafts and remedies, newest first."""
    rows = client.every(
        "adaptations", limit=limit, run=_uid(client, run), state__in=state, layer=layer, risk=risk
    )
    print_rows(
        rows,
        ADAPTATION_COLUMNS,
        as_json=as_json,
        empty="There are no such adaptations.",
        letter="A",
    )


@click.command("inbox")
@run_option
@json_option
@asks_server
def inbox_command(client: Client, run: str | None, as_json: bool) -> None:
    """List the adaptations that wait for a person; the first to expire comes first."""
    rows = client.every("adaptations", run=_uid(client, run), state="awaiting_approval")
    waiting = sorted(rows, key=lambda row: str(row["deadline_at"] or "9"))
    print_rows(
        waiting, INBOX_COLUMNS, as_json=as_json, empty="Nothing waits for a person.", letter="A"
    )


@click.group("findings", invoke_without_command=True)
@click.pass_context
@run_option
@click.option("--severity", help="Only of this severity.")
@click.option("--open/--all", "only_open", default=True, help="Acknowledged ones too?")
@limit_option
@json_option
@asks_server
def findings_group(
    client: Client,
    context: click.Context,
    run: str | None,
    severity: str | None,
    only_open: bool,
    limit: int,
    as_json: bool,
) -> None:
    """List findings and violations, newest first; acknowledge one."""
    if context.invoked_subcommand is not None:
        return
    given = {"severity": severity} | ({"open": True} if only_open else {})
    rows = client.every("violations", limit=limit, run=_uid(client, run), **given)
    print_rows(
        rows, FINDING_COLUMNS, as_json=as_json, empty="There are no such findings.", letter="V"
    )


@findings_group.command("acknowledge")
@click.argument("findings", nargs=-1, required=True, metavar="FINDING...")
@click.option("--reason", default="", help="A note; it is kept with each finding.")
@asks_server
def acknowledge_command(client: Client, findings: tuple[str, ...], reason: str) -> None:
    """Acknowledge each FINDING (V-88 or its uid): somebody has seen it."""
    shown = [client.get(f"violations/{segment(name)}").data for name in findings]
    body = {"violations": [found["uid"] for found in shown], "reason": reason}
    answers = {
        row["uid"]: row for row in client.act("violations/acknowledge", body).data["results"]
    }
    refused = [(found, answers[found["uid"]]) for found in shown if answers[found["uid"]]["code"]]
    for found, answer in refused:
        click.echo(f"V-{found['number']}: {answer['detail']}", err=True)
    click.echo(f"{len(shown) - len(refused)} of {len(shown)} are acknowledged")
    if refused:
        raise click.exceptions.Exit(Exit.CONFLICT)


@click.command("show")
@click.argument("name")
@click.option("--all", "whole", is_flag=True, help="Every member, not the main ones only.")
@json_option
@asks_server
def show_command(client: Client, name: str, whole: bool, as_json: bool) -> None:
    """Show one object: a run (R-3), an adaptation (A-17), a finding (V-88), or a uid."""
    resource, main = resource_of(client, name)
    found = client.get(resource).data
    if as_json:
        print_json(found)
    else:
        print_members(found, list(found) if whole else main)


def evidence(adaptation: Json) -> None:
    """Print what a person has to see before they decide."""
    reasons = adaptation["reasons"]
    parts = [part for part in reasons if abs(part["weight"]) >= SMALLEST_PART]
    print_members(
        {
            **adaptation,
            "because": _lines(part["text"] for part in reasons if not part["weight"]),
            "confidence from": _lines(f"{part['weight']:+.2f}  {part['text']}" for part in parts),
            "asks a person": _lines(adaptation["asks"]),
            "finding": (adaptation.get("found") or {}).get("text") or adaptation["finding"],
            "then → now": _lines(_moved(adaptation["evidence"], adaptation["evidence_now"])),
            "did not pass": _lines(c["text"] for c in adaptation["checks"] if not c["passed"]),
            "undo": _lines(adaptation["undo_plan"]),
            "hash": str(adaptation["evidence_hash"])[:12],
        },
        (
            *("title", "run_name", "state", "risk", "confidence", "proposed_step", "deadline_at"),
            *("because", "finding", "confidence from", "asks a person", "then → now"),
            *("evidence_drift", "forecast_parameters", "forecast_memory_mib"),
            *("forecast_latency_ms", "did not pass", "undo", "hash"),
        ),
    )


def _lines(texts: Iterable[str]) -> str:
    return "\n".join(texts)


def _moved(then: Json, now: Json) -> Iterator[str]:
    """What was shown to the policy and is measured again now."""
    for name in then:
        if now.get(name) is not None and then[name] != now[name]:
            yield f"{name.replace('_', ' ')}  {_short(then[name])} → {_short(now[name])}"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value if value is not None else "?")


def _uid(client: Client, run: str | None) -> str | None:
    return None if run is None else run_uid(client, run)


COMMANDS: tuple[click.Command, ...] = (
    runs_command,
    adaptations_command,
    inbox_command,
    findings_group,
    show_command,
)
