"""The database itself refuses transitions that the lifecycle does not have.

They are installed after each ``migrate``, so that they always know the transitions of this version.
"""

from __future__ import annotations

from typing import Any

from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper

from apps.adaptations.lifecycle import NEXT
from apps.adaptations.models import Adaptation

_TABLE = Adaptation._meta.db_table
_NAME = "adaptation_transition"
_REFUSAL = "the lifecycle of an adaptation has no such transition"
_CONDITION = "NEW.state <> OLD.state AND (OLD.state || '>' || NEW.state) NOT IN ({legal})"
_SQLITE = """CREATE TRIGGER {name} BEFORE UPDATE OF state ON {table} WHEN {condition}
    BEGIN SELECT RAISE(ABORT, '{refusal}'); END"""
_POSTGRESQL = """
    CREATE OR REPLACE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        RAISE EXCEPTION '{refusal}: % to %', OLD.state, NEW.state;
    END $$;
    CREATE TRIGGER {name} BEFORE UPDATE ON {table}
        FOR EACH ROW WHEN ({condition}) EXECUTE FUNCTION {name}()"""


def install(connection: BaseDatabaseWrapper) -> None:
    """Create the trigger, or replace that of an earlier version."""
    legal = ", ".join(f"'{old}>{new}'" for old, following in NEXT.items() for new in following)
    statement = _SQLITE if connection.vendor == "sqlite" else _POSTGRESQL
    remove(connection)
    with connection.cursor() as cursor:
        cursor.execute(
            statement.format(
                name=_NAME,
                table=_TABLE,
                refusal=_REFUSAL,
                condition=_CONDITION.format(legal=legal),
            )
        )


def remove(connection: BaseDatabaseWrapper) -> None:
    where = "" if connection.vendor == "sqlite" else f" ON {_TABLE}"
    with connection.cursor() as cursor:
        cursor.execute(f"DROP TRIGGER IF EXISTS {_NAME}{where}")


def install_after_migrate(*, using: str, **_: Any) -> None:
    """Receiver of ``post_migrate``."""
    connection = connections[using]
    if _TABLE in connection.introspection.table_names():  # else: migrated back to nothing
        install(connection)
