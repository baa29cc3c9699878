"""``esper audit``: check and export the audit log."""

from __future__ import annotations

from typing import BinaryIO

import click

from launcher.commands.installation import data_dir_option, installation


@click.group("audit")
@data_dir_option
def audit_group() -> None:
    """Verify and export the audit log."""


@audit_group.command("verify")
def verify() -> None:
    """Check the chain of hashes. The exit status is 1 if an event is missing or was changed."""
    with installation():
        from apps.audit.services import verify_chain

        report = verify_chain()
        if not report.verified:
            where = f" (event {report.event_id})" if report.event_id is not None else ""
            raise click.ClickException(f"The audit log is not intact: {report.problem}{where}.")
        click.echo(f"{report.events} events are intact; the last hash is {report.head}")


@audit_group.command("export")
@click.option("--run", help="Only events of this run.")
@click.option("--after", type=click.IntRange(min=0), default=0, help="Only events after this id.")
@click.option(
    "-o", "--output", type=click.File("wb"), default="-", help="A file. Default: standard output."
)
def export(run: str | None, after: int, output: BinaryIO) -> None:
    """Write the events as NDJSON, oldest first."""
    with installation():
        from apps.audit.api import ndjson
        from apps.audit.models import AuditEvent

        events = AuditEvent.objects.filter(id__gt=after)
        for line in ndjson(events.filter(run_uid=run) if run else events):
            output.write(line)
