"""``esper backup``, ``esper restore``, ``esper restored``: the database and this machine's keys.

A backup is one tar file: ``manifest.json``, the database, and ``secrets.json`` with ``kernel.key``
where the installation keeps its keys in files. Kernels are left out: they are built again.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

import esper
from hosts.keyring import KERNEL_KEY_FILE, SECRETS_FILE
from hosts.paths import ROOT
from hosts.runtime import DataDirectoryBusyError, data_directory_lock
from launcher.commands import databases
from launcher.commands.installation import VIA, data_dir_option, installation

MANIFEST = "manifest.json"
DATABASE = "database"
KEYS = (SECRETS_FILE, KERNEL_KEY_FILE)
FORMAT = 1


@click.command("backup")
@data_dir_option
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
def backup_command(file: Path) -> None:
    """Write the database and the keys to FILE. Esper may run meanwhile.

    FILE holds every key of this installation: keep it where only its operators can read it.
    """
    with installation(), _sentences(), tempfile.TemporaryDirectory() as folder:
        dump = Path(folder) / DATABASE
        databases.dump(dump)
        write_archive(file, dump, _data_dir())
    click.echo(f"{file}: {file.stat().st_size / 2**20:.1f} MiB")


@click.command("restore")
@data_dir_option
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
def restore_command(file: Path) -> None:
    """Replace the database and the keys by those of FILE. Stop Esper first.

    The former ones are kept beside them, with the ending .before-restore, where they are files.
    Trainers may train on: each registers again, and reports what its model holds.
    """
    with installation(), _sentences(), _nothing_runs(), tempfile.TemporaryDirectory() as folder:
        manifest = read_archive(file, Path(folder))
        databases.load(Path(folder) / DATABASE, vendor=str(manifest["vendor"]))
        for name in KEYS:
            if (Path(folder) / name).exists():
                _replace_key(_data_dir() / name, (Path(folder) / name).read_text())
        click.echo(f"Restored what was written on {manifest['at']} by Esper {manifest['version']}.")
        # Another process: this one has read the keys that were replaced.
        command = [sys.executable, "-m", "launcher", "restored"]
        if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
            raise click.ClickException("Run esper restored when the cause is gone.")


@click.command("restored")
@data_dir_option
def restored_command() -> None:
    """Say that the database was restored by other means, such as pg_restore or a disk snapshot."""
    with installation():
        from apps.accounts.actors import Actor, ActorKind
        from apps.adaptations.services import note_restored
        from apps.audit.services import set_heads_aside, sign_head, verify_chain

        aside = [str(path) for path in set_heads_aside()]
        restored = note_restored(actor=Actor(ActorKind.SYSTEM, "system", VIA), former_heads=aside)
        sign_head()
        report = verify_chain()
    for path in aside:
        click.echo(f"The signed heads of the former audit log are kept in {path}.")
    click.echo(
        f"{restored.live_runs} live runs register again when their trainers report; "
        f"{restored.in_doubt} adaptations are in doubt until then, and {restored.cancelled} that "
        "waited are cancelled."
    )
    if not report.verified:
        raise click.ClickException(f"The audit log is not intact: {report.problem}.")
    click.echo(f"The audit log is intact: {report.events} events.")


def write_archive(file: Path, dump: Path, data_dir: Path) -> None:
    """One tar file that only its owner can read, complete or not there at all."""
    manifest = {
        "format": FORMAT,
        "version": esper.__version__,
        "vendor": databases.vendor(),
        "at": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
    }
    part = file.with_name(f".{file.name}.{os.getpid()}")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as stream, tarfile.open(fileobj=stream, mode="w") as tar:
            _add_text(tar, MANIFEST, json.dumps(manifest, indent=2) + "\n")
            tar.add(dump, DATABASE)
            for name in KEYS:
                if (data_dir / name).exists():
                    tar.add(data_dir / name, name)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def read_archive(file: Path, folder: Path) -> dict[str, Any]:
    """Its manifest; the database and the keys are written into ``folder``.

    Raises:
        click.ClickException: the file is no backup, or one of a newer Esper.
    """
    try:
        with tarfile.open(file) as tar:
            for name in (MANIFEST, DATABASE, *KEYS):
                if name in tar.getnames():
                    tar.extract(name, folder, filter="data")
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    except (tarfile.TarError, OSError, ValueError) as error:
        raise click.ClickException(f"{file} is no backup of Esper: {error}") from error
    if manifest.get("format") != FORMAT:
        raise click.ClickException(
            f"{file} has the format {manifest.get('format')}; this Esper reads {FORMAT}."
        )
    return manifest


def _add_text(tar: tarfile.TarFile, name: str, text: str) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(text.encode()), 0o600
    tar.addfile(entry, io.BytesIO(text.encode()))


def _replace_key(path: Path, content: str) -> None:
    from hosts.keyring import write_private

    if path.exists() and path.read_text() != content:
        path.replace(path.with_name(f"{path.name}.before-restore"))
    write_private(path, content)


def _data_dir() -> Path:
    from django.conf import settings

    return Path(settings.ESPER_DATA_DIR)


@contextmanager
def _nothing_runs() -> Iterator[None]:
    try:
        with data_directory_lock(_data_dir()):
            yield
    except DataDirectoryBusyError as error:
        raise click.ClickException(str(error)) from error


@contextmanager
def _sentences() -> Iterator[None]:
    try:
        yield
    except databases.CopyError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise click.ClickException(f"{where}{error.strerror}") from error
