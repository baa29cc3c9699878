from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import connection, transaction
from psycopg import sql

from apps.audit.models import AuditEvent

# The owner of a table can drop its triggers, so the application's role owns none.
_GRANTS = (
    "GRANT USAGE ON SCHEMA public TO {role}",
    "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role}",
    "GRANT USAGE, SELECT ON ALL SEQUENCES IN SCHEMA public TO {role}",
    "REVOKE UPDATE, DELETE, TRUNCATE ON {audit} FROM {role}",
    "REVOKE INSERT, UPDATE, DELETE, TRUNCATE ON django_migrations FROM {role}",
)


class Command(BaseCommand):
    """To be run by the role that owns the tables, after each ``migrate``."""

    help = "PostgreSQL: let ROLE use the tables without owning them; its audit log is append-only."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("role", help="the role of web and workers, such as esper")

    def handle(self, *args: Any, role: str, **options: Any) -> None:
        if connection.vendor != "postgresql":
            raise CommandError("Only PostgreSQL has roles. DATABASE_URL names another database.")
        names = {
            "role": sql.Identifier(role),
            "audit": sql.Identifier(AuditEvent._meta.db_table),
        }
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute("SELECT rolsuper FROM pg_roles WHERE rolname = %s", [role])
            found = cursor.fetchone()
            if found is None:
                raise CommandError(f"There is no role {role}. Create it first.")
            cursor.execute("SELECT count(*) FROM pg_tables WHERE tableowner = %s", [role])
            if found[0] or cursor.fetchone()[0]:
                raise CommandError(
                    f"{role} is a superuser or owns tables, so nothing can be kept from it. "
                    "Let another role own them, and run migrate and this command as that role."
                )
            for statement in _GRANTS:
                cursor.execute(sql.SQL(statement).format(**names))
