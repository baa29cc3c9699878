"""The roles of PostgreSQL that web and workers sign in with. None of them owns a table."""

from __future__ import annotations

from collections.abc import Iterable

from django.db import connection, transaction
from psycopg import sql


class RoleError(Exception):
    """There is no such role, or nothing can be kept from it."""


def grant_to_role(role: str, statements: Iterable[sql.Composable]) -> None:
    """Execute the statements, all or none of them.

    Raises:
        RoleError: the database has no roles, or not this one, or it is mightier than its grants.
    """
    if connection.vendor != "postgresql":
        raise RoleError("Only PostgreSQL has roles. DATABASE_URL names another database.")
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SELECT rolsuper FROM pg_roles WHERE rolname = %s", [role])
        found = cursor.fetchone()
        if found is None:
            raise RoleError(f"There is no role {role}. Create it first.")
        cursor.execute("SELECT count(*) FROM pg_tables WHERE tableowner = %s", [role])
        if found[0] or cursor.fetchone()[0]:
            raise RoleError(
                f"{role} is a superuser or owns tables, so nothing can be kept from it. "
                "Let another role own them, and run migrate and this command as that role."
            )
        for statement in statements:
            cursor.execute(statement)
