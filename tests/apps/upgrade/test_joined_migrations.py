"""A database that has only some of the migrations that are one now is refused in words."""

from __future__ import annotations

import pytest
from django.core.management import call_command
from django.core.management.base import SystemCheckError
from django.db import connection
from django.db.migrations.recorder import MigrationRecorder

pytestmark = pytest.mark.django_db

TOGETHER = ("runs", "0001_tables")
EARLIER = ["0001_initial", "0002_restored_at", "0003_command_kinds", "0004_layer_count"]
LATER = ["0005_shadow_command", "0006_project", "0007_report_held_command"]


def migrated_to(names: list[str]) -> None:
    recorder = MigrationRecorder(connection)
    for name in {TOGETHER[1], *EARLIER, *LATER} - set(names):
        recorder.record_unapplied("runs", name)


def test_a_part_is_refused_and_the_way_out_is_named() -> None:
    migrated_to(EARLIER)
    with pytest.raises(SystemCheckError, match=r"(?s)4 of the 7 migrations of 'runs'.*--data-dir"):
        call_command("migrate", verbosity=0, skip_checks=False)


def test_a_database_that_has_them_all_is_taken() -> None:
    migrated_to(EARLIER + LATER)
    call_command("migrate", verbosity=0, skip_checks=False)
    assert TOGETHER in MigrationRecorder(connection).applied_migrations()
