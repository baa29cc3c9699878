from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from apps.adaptations.compile_role import statements
from apps.audit.services import RoleError, grant_to_role


class Command(BaseCommand):
    """To be run by the role that owns the tables, after each ``migrate``."""

    help = "PostgreSQL: let ROLE, of compile workers, build kernels of approved jobs and no more."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("role", help="the role of compile workers, such as esper_compile")

    def handle(self, *args: Any, role: str, **options: Any) -> None:
        try:
            grant_to_role(role, statements(role))
        except RoleError as error:
            raise CommandError(str(error)) from error
