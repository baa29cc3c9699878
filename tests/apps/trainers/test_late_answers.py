"""An answer of the trainer that arrives after the deadline of its adaptation."""

from __future__ import annotations

from datetime import timedelta

from django.utils import timezone

from apps.adaptations import services
from apps.adaptations.models import Adaptation
from apps.audit.models import AuditEvent
from apps.runs.models import Command, Run
from esper.contracts import AdaptationState, CommandKind, CommandState
from tests.apps.stage import Stage


def given_up(stage: Stage) -> tuple[Adaptation, Command]:
    """Dispatched, and not answered in time by a trainer that has reported: expired."""
    adaptation = stage.propose()
    command = stage.dispatched(adaptation)
    past = timezone.now() - timedelta(seconds=1)
    Adaptation.objects.filter(pk=adaptation.pk).update(deadline_at=past)
    Command.objects.filter(pk=command.pk).update(expires_at=past)
    Run.objects.filter(pk=stage.run.pk).update(last_seen_at=timezone.now())
    services.sweep()
    adaptation.refresh_from_db()
    assert adaptation.state == AdaptationState.DISPATCH_EXPIRED
    return adaptation, command


def undo_commands(adaptation: Adaptation) -> int:
    return Command.objects.filter(adaptation_uid=adaptation.uid, kind=CommandKind.UNDO).count()


def test_a_graft_that_was_done_after_its_deadline_is_taken_out_again(stage: Stage) -> None:
    adaptation, command = given_up(stage)
    stage.ack(command, CommandState.APPLIED, step=1001)
    assert undo_commands(adaptation) == 1
    stage.ack(command, CommandState.APPLIED, step=1001)  # repeated
    assert undo_commands(adaptation) == 1
    adaptation.refresh_from_db()
    assert adaptation.state == AdaptationState.DISPATCH_EXPIRED
    event = AuditEvent.objects.get(act="adaptation.leftover_undone")
    assert event.object_uid == adaptation.uid


def test_a_graft_that_was_refused_after_its_deadline_needs_no_undo(stage: Stage) -> None:
    adaptation, command = given_up(stage)
    stage.ack(command, CommandState.REFUSED, code="expired", reason="too late")
    assert undo_commands(adaptation) == 0
