from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from psycopg import sql

from apps.audit.models import AuditEvent
from apps.audit.roles import RoleError, grant_to_role

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
        names = {
            "role": sql.Identifier(role),
            "audit": sql.Identifier(AuditEvent._meta.db_table),
        }
        try:
            grant_to_role(role, [sql.SQL(grant).format(**names) for grant in _GRANTS])
        except RoleError as error:
            raise CommandError(str(error)) from error
