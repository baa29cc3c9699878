"""Refuses a database that has only some of the migrations that were joined into one.

Django would leave it as it is, or end with a traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django.core.checks import Error
from django.db import connections
from django.db.migrations.loader import MigrationLoader
from django.db.migrations.recorder import MigrationRecorder


def check_joined_migrations(databases: Sequence[str] | None = None, **_: Any) -> list[Error]:
    """A check of the databases, which ``migrate`` makes before it begins."""
    found = []
    for database in databases or ():
        applied = set(MigrationRecorder(connections[database]).applied_migrations())
        found += _parts(applied)
    return found[:1]  # one says it all


def _parts(applied: set[tuple[str, str]]) -> list[Error]:
    on_disk = MigrationLoader(None).disk_migrations
    return [
        Error(
            f"This database is from an early state of Esper: it has {len(joined & applied)} of the "
            f"{len(joined)} migrations of {app!r} that are one now.",
            hint="No release had it, so nothing brings it up to date. Start with another data "
            "directory (--data-dir) or database.",
            id="accounts.E001",
        )
        for (app, name), migration in on_disk.items()
        if (joined := set(migration.replaces)) and not joined <= set(on_disk)
        if joined & applied and not joined <= applied and (app, name) not in applied
    ]
