"""The database goes back to an older backup while its trainers train on."""

from __future__ import annotations

from typing import Any

import pytest
from django.db import connection, transaction

from apps.accounts.actors import SYSTEM
from apps.accounts.models import ApiToken
from apps.adaptations.dispatch import request_undo
from apps.adaptations.models import Adaptation
from apps.adaptations.services import note_restored
from apps.audit.models import AuditEvent
from apps.runs.models import Command, Run
from apps.runs.services import issue_command
from apps.violations.models import Violation
from esper.contracts import AdaptationState, CommandKind, CommandState
from tests.apps.trainers.lives import Lives, alive, judged, state_of, until
from tests.esper.sdk.tiny_training import grafts_at

S = AdaptationState
pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.postgres]


class Backup:
    """The rows of runs as they are now. ``restore`` puts the database back to them."""

    MODELS: tuple[Any, ...] = (ApiToken, Run, Command, Adaptation)

    def __init__(self) -> None:
        self.rows = {model: list(model.objects.values()) for model in self.MODELS}

    def restore(self) -> None:
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute("SET LOCAL session_replication_role = replica")  # as a restore does
            # Where a trainer's request and this wait for each other, the request is ended: it is
            # sent again.
            cursor.execute("SET LOCAL deadlock_timeout = '30s'")
            for model in reversed(self.MODELS):
                model.objects.all().delete()
            for model in self.MODELS:
                model.objects.bulk_create(model(**row) for row in self.rows[model])


def command(lives: Lives) -> Command:
    with transaction.atomic():
        return issue_command(run=lives.run, kind=CommandKind.PAUSE_ADAPTATION, ttl_seconds=300)


def is_done(command: Command) -> bool:
    return Command.objects.get(pk=command.pk).state == CommandState.APPLIED


def settled(lives: Lives) -> bool:
    run = Run.objects.filter(name="lives").first()
    return run is not None and run.restored_at is None and run.epoch > 1


def test_a_living_trainer_registers_again_gets_commands_and_its_graft_is_recovered(
    lives: Lives,
) -> None:
    training, session = lives.begin()
    backup = Backup()
    adaptation = lives.graft(training, session)
    judged(adaptation, keep=True)  # a command that the backup does not have
    training.until(lambda: session.adaptations[0].state is S.KEPT, session)
    backup.restore()
    with pytest.raises(Adaptation.DoesNotExist):
        adaptation.refresh_from_db()

    assert note_restored(actor=SYSTEM).live_runs == Run.objects.count()
    until(lambda: settled(lives), "the trainer registers again")
    recovered = Adaptation.objects.get(uid=adaptation.uid)
    assert (recovered.state, recovered.layer, recovered.run) == (S.KEPT, "3", lives.run)
    assert lives.run.epoch > 1000
    [violation] = Violation.objects.filter(run=lives.run)
    assert violation.adaptation_uid == recovered.uid
    assert "does not know" in violation.text
    acts = AuditEvent.objects.filter(object_uid=recovered.uid).values_list("act", flat=True)
    assert "adaptation.recovered" in acts

    with transaction.atomic():
        recovered = Adaptation.objects.select_for_update().get(pk=recovered.pk)
        from apps.adaptations.lifecycle import transition

        transition(recovered, S.ROLLING_BACK, actor=SYSTEM, reason="a person wants it out")
        request_undo(recovered, reason="a person wants it out")
    training.until(lambda: not grafts_at(training.model, "3"), session)
    until(lambda: state_of(recovered) == S.REVERTED, "the undo is answered")
    assert alive(session)


def test_what_the_backup_has_is_settled_by_what_the_trainer_holds(lives: Lives) -> None:
    training, session = lives.begin()
    adaptation = lives.graft(training, session)
    backup = Backup()  # in probation
    judged(adaptation, keep=False)
    training.until(lambda: not session.adaptations[0].grafted, session)
    until(lambda: state_of(adaptation) == S.ROLLED_BACK, "the undo is answered")
    backup.restore()
    note_restored(actor=SYSTEM)
    until(lambda: settled(lives), "the trainer registers again")
    assert state_of(adaptation) == S.ROLLED_BACK
    acts = AuditEvent.objects.filter(object_uid=adaptation.uid).values_list("act", flat=True)
    assert list(acts.order_by("id"))[-2:] == ["adaptation.in_doubt", "adaptation.rolled_back"]


def test_a_command_of_the_lost_time_is_never_taken_again(lives: Lives) -> None:
    training, session = lives.begin()
    backup = Backup()
    lost = [command(lives) for _ in range(3)]
    training.until(lambda: is_done(lost[-1]), session)
    backup.restore()
    note_restored(actor=SYSTEM)
    until(lambda: settled(lives), "the trainer registers again")
    new = command(lives)
    assert new.seq > lost[-1].seq
    assert new.epoch > lost[-1].epoch
    training.until(lambda: is_done(new), session)


def test_a_run_that_the_backup_does_not_know_goes_on_as_a_new_one(lives: Lives) -> None:
    backup = Backup()
    training, session = lives.begin()
    backup.rows[ApiToken] = list(ApiToken.objects.filter(run_uid="").values())
    adaptation = lives.graft(training, session)
    backup.restore()
    note_restored(actor=SYSTEM)
    until(lambda: Run.objects.filter(name="lives", restored_at=None).exists(), "it registers again")
    assert Adaptation.objects.get(uid=adaptation.uid).run == lives.run
    new = command(lives)
    training.until(lambda: is_done(new), session)


def test_a_trainer_that_was_replaced_cannot_go_on(lives: Lives) -> None:
    _, session = lives.begin()
    _, second = lives.begin()
    assert alive(second)
    assert not alive(session)
    assert lives.run.epoch == 2


def test_a_restored_database_is_noticed_without_being_told(lives: Lives) -> None:
    """The trainer asks for the commands after one that this database has never issued."""
    training, session = lives.begin()
    backup = Backup()
    lost = [command(lives) for _ in range(3)]
    training.until(lambda: is_done(lost[-1]), session)
    backup.restore()
    until(lambda: settled(lives), "the trainer registers again")


def test_waiting_decisions_are_cancelled_because_they_may_have_been_made(lives: Lives) -> None:
    training, session = lives.begin()
    adaptation = lives.graft(training, session)
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SET LOCAL session_replication_role = replica")
        Adaptation.objects.filter(pk=adaptation.pk).update(
            state=S.AWAITING_APPROVAL, grafted_at=None, graft_step=None
        )
    assert note_restored(actor=SYSTEM).cancelled == 1
    training.until(lambda: not grafts_at(training.model, "3"), session)
    assert state_of(adaptation) == S.CANCELLED
