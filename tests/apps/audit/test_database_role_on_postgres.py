"""In production the application's role does not own its tables."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from django.core.management import CommandError, call_command
from django.db import ProgrammingError, connection, transaction

from apps.audit import triggers
from apps.audit.services import verify_chain
from tests.apps.stage import Stage

pytestmark = [pytest.mark.django_db, pytest.mark.postgres]

ROLE = "esper_application"


@pytest.fixture
def as_application(db: None) -> Iterator[None]:
    with connection.cursor() as cursor:
        cursor.execute(f"CREATE ROLE {ROLE}")
        triggers.install(connection)
        call_command("grant_database_role", ROLE)
        cursor.execute(f"SET ROLE {ROLE}")
        yield
        cursor.execute("RESET ROLE")


def test_the_application_can_work(as_application: None, stage: Stage) -> None:
    assert stage.propose().state == "compile_queued"
    assert verify_chain().verified


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit_auditevent SET actor = 'mallory'",
        "DELETE FROM audit_auditevent",
        "TRUNCATE audit_auditevent",
        "DROP TRIGGER audit_no_update ON audit_auditevent",
        "ALTER TABLE audit_auditevent DISABLE TRIGGER ALL",
        "DROP TRIGGER adaptation_transition ON adaptations_adaptation",
        "CREATE OR REPLACE FUNCTION audit_refuse() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RETURN NEW; END $$",
        "DROP TABLE audit_auditevent",
        "SET session_replication_role = replica",
        "DELETE FROM django_migrations",
    ],
)
def test_the_application_cannot_rewrite_its_log(as_application: None, statement: str) -> None:
    with (
        pytest.raises(ProgrammingError, match=r"permission denied|must be owner"),
        transaction.atomic(),
        connection.cursor() as cursor,
    ):
        cursor.execute(statement)


def test_a_role_that_owns_tables_or_does_not_exist_is_refused(db: None) -> None:
    for role, why in (("postgres", "superuser or owns"), ("nobody_at_all", "no role")):
        with pytest.raises(CommandError, match=why):
            call_command("grant_database_role", role)
