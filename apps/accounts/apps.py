from typing import Any

from django.apps import AppConfig
from django.core.checks import Tags, register
from django.db import connections
from django.db.models.signals import post_migrate

from apps.accounts.joined_migrations import check_joined_migrations


class AccountsConfig(AppConfig):
    name = "apps.accounts"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        register(check_joined_migrations, Tags.database)
        post_migrate.connect(_make_default_project, sender=self)


def _make_default_project(*, using: str, **_: Any) -> None:
    """After every migration, and after a flush, which empties the table."""
    from apps.accounts.models import DEFAULT_PROJECT, Project

    if Project._meta.db_table in connections[using].introspection.table_names():
        Project.objects.using(using).get_or_create(pk=DEFAULT_PROJECT, defaults={"name": "default"})
