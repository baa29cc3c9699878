"""Copying the whole database: SQLite by its backup API, PostgreSQL by pg_dump and pg_restore."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

BESIDE = ("", "-wal", "-shm")  # SQLite's files
KEPT = ".before-restore"


class CopyError(Exception):
    """The database could not be copied; the message says what to do."""


def vendor() -> str:
    """``sqlite`` or ``postgresql``."""
    from django.db import connection

    return connection.vendor


def dump(file: Path) -> None:
    """A consistent copy of the database, while others write to it.

    Raises:
        CopyError: it could not be made.
    """
    if vendor() == "sqlite":
        with closing(sqlite3.connect(_sqlite_path())) as source:
            source.execute("SELECT 1 FROM django_migrations")  # else an empty file would be copied
            with closing(sqlite3.connect(file)) as target:
                source.backup(target)
    else:
        _run("pg_dump", "--format=custom", "--no-owner", f"--file={file}")


def load(file: Path, *, vendor: str) -> None:
    """Replace the database by the copy, and bring its tables up to this version.

    Raises:
        CopyError: the copy is of the other kind of database, or somebody uses this one.
    """
    from django.core.management import call_command
    from django.db import connection, connections

    if vendor != connection.vendor:
        raise CopyError(
            f"The backup is of {vendor}, and this installation uses {connection.vendor}."
        )
    if vendor == "sqlite":
        connections.close_all()
        _replace_sqlite(file)
    else:
        connection.settings_dict["OPTIONS"].pop("pool", None)  # it holds connections of its own
        _check_nobody_is_connected()
        connections.close_all()
        options = ("--clean", "--if-exists", "--no-owner", "--single-transaction")
        _run("pg_restore", *options, str(file))
    call_command("migrate", interactive=False, verbosity=0)


def _sqlite_path() -> Path:
    from django.db import connection

    return Path(str(connection.settings_dict["NAME"]))


def _replace_sqlite(file: Path) -> None:
    path = _sqlite_path()
    for ending in BESIDE:
        old = path.with_name(path.name + ending)
        if old.exists():
            old.replace(path.with_name(path.name + KEPT + ending))
    fresh = path.with_name(f".{path.name}.restoring")
    shutil.copyfile(file, fresh)
    fresh.replace(path)


def _check_nobody_is_connected() -> None:
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
            "AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )
        others = cursor.fetchone()[0]
    if others:
        raise CopyError(
            f"{others} other connections use this database. Stop web, workers and beat first."
        )


def _run(program: str, *arguments: str) -> None:
    found = shutil.which(program)
    if found is None:
        raise CopyError(f"There is no {program} on PATH. Install the client of PostgreSQL.")
    from django.db import connection

    given: dict[str, Any] = connection.settings_dict
    named = [f"--dbname={given['NAME']}"]
    for option, name in (("--host", "HOST"), ("--port", "PORT"), ("--username", "USER")):
        if given[name]:
            named.append(f"{option}={given[name]}")
    # Not on the command line, which every user can read.
    environment = os.environ | {"PGPASSWORD": str(given["PASSWORD"] or "")}
    if mode := given["OPTIONS"].get("sslmode"):
        environment["PGSSLMODE"] = str(mode)
    answer = subprocess.run(
        [found, *named, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if answer.returncode != 0:
        raise CopyError(f"{program} failed: {answer.stderr.strip() or answer.returncode}")
