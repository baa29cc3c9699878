"""``esper audit``: check and export the audit log, and the signed records of decisions."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import click

from esper.contracts import codec, signing
from esper.contracts.attestation import verify_attestation
from esper.exceptions import AttestationError, CodecError
from launcher.commands.installation import data_dir_option, installation


@click.group("audit")
@data_dir_option
def audit_group() -> None:
    """Verify and export the audit log, and check signed records of decisions."""


_KEY = click.option(
    "--key",
    "keys",
    multiple=True,
    metavar="KEY",
    help="A public audit key that you trust (esper audit key). Default: the installation's.",
)


@audit_group.command("verify")
@click.option(
    "--heads",
    "heads_files",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A file of signed heads, such as a copy. Default: those of the installation.",
)
@_KEY
def verify(heads_files: tuple[Path, ...], keys: tuple[str, ...]) -> None:
    """Check the chain of hashes and its signed heads.

    The exit status is 1 if an event is missing or was changed, also by somebody who computed the
    hashes anew.
    """
    for path in heads_files:
        if not path.is_file():
            raise click.ClickException(f"There is no file {path}.")
    with installation():
        from apps.audit.services import verify_chain

        report = verify_chain(heads_files, keys)
        if not report.verified:
            where = f" (event {report.event_id})" if report.event_id is not None else ""
            raise click.ClickException(f"The audit log is not intact: {report.problem}{where}.")
        click.echo(f"{report.events} events are intact; the last hash is {report.head}")
        if report.signed_at:
            click.echo(
                f"{report.signed_events} of them are covered by the head of {report.signed_at}"
            )
        else:
            click.echo("No head was signed yet: the control worker signs one every few seconds.")


@audit_group.command("key")
def key() -> None:
    """Print the public audit key. Keep it where the server cannot change it."""
    with installation():
        from django.conf import settings

        click.echo(signing.public_key(settings.ESPER_AUDIT_KEY))


@audit_group.command("attestation")
@click.argument("adaptation")
@click.option(
    "-o", "--output", type=click.File("wb"), default="-", help="A file. Default: standard output."
)
def attestation(adaptation: str, output: BinaryIO) -> None:
    """Write the signed record of who decided on ADAPTATION (A-17 or its uid)."""
    with installation():
        from apps.adaptations.services import attestation_of, find_adaptation

        output.write(codec.encode(attestation_of(find_adaptation(adaptation))) + b"\n")


@audit_group.command("check")
@click.argument("file", type=click.Path(path_type=Path))
@_KEY
def check(file: Path, keys: tuple[str, ...]) -> None:
    """Check an attestation. With --key this needs no server and no database.

    The exit status is 1 if the decision was not made as FILE says.
    """
    try:
        content = codec.decode(file.read_bytes())
        verify_attestation(content, keys or _own_keys())
    except OSError as error:
        raise click.ClickException(f"{file} cannot be read: {error.strerror}.") from error
    except (CodecError, AttestationError) as error:
        raise click.ClickException(f"This is no valid attestation: {error}.") from error
    event = content["event"]
    act = str(event["act"]).removeprefix("adaptation.")
    click.echo(
        f"{event['actor']} ({event['via'] or event['actor_kind']}) {act} {event['object_uid']}"
    )
    click.echo(f"at {event['at']}, audit event {event['id']}, reason: {event['reason'] or 'none'}")
    click.echo(codec.encode(content["shown"]).decode())


def _own_keys() -> tuple[str, ...]:
    with installation():
        from apps.audit.services import trusted_keys

        return tuple(trusted_keys())


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
