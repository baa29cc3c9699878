"""A command that is not answered before the deadline is in doubt; what the trainer says decides.

Each interleaving of the deadline with the answer, its repetition, an answer to an older start of
the trainer, the answer to the question, and a restart of the trainer. Nothing but the database
lives from one step to the next, so that a restart of the server changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from itertools import permutations

import pytest
from django.utils import timezone

from apps.adaptations import services
from apps.adaptations.models import Adaptation
from apps.audit.models import AuditEvent
from apps.audit.services import verify_chain
from apps.rest.problems import Problem
from apps.runs.models import Command, Run
from apps.trainers import services as trainers
from apps.violations.models import Violation
from esper.contracts import (
    AdaptationState,
    CommandAck,
    CommandKind,
    CommandState,
    RefusalCode,
    ViolationRule,
)
from esper.contracts.protocol import Applied, Rollback
from tests.apps.cast import CERTIFICATE, TRAINER
from tests.apps.stage import Stage

S = AdaptationState
ON_BOTH_DATABASES = pytest.mark.parametrize(
    "database", ["default", pytest.param("postgres", marks=pytest.mark.postgres)]
)


class Late:
    """One adaptation, whose trainer has one command; the methods are the events of a life."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.adaptation = stage.propose()
        self.command = stage.dispatched(self.adaptation)
        self.answer_is = CommandState.APPLIED

    @classmethod
    def with_undo(cls, stage: Stage) -> Late:
        late = cls(stage)
        late.answer()
        late.take_back()
        return late

    def take_back(self) -> None:
        services.roll_back_adaptation(
            adaptation=self.row,
            user=self.stage.operator,
            via="test",
            version=self.row.version,
            reason="test",
        )
        self.command = self.stage.command(self.adaptation)

    @property
    def row(self) -> Adaptation:
        return Adaptation.objects.get(pk=self.adaptation.pk)

    @property
    def quarantine(self) -> str:
        return Run.objects.get(pk=self.stage.run.pk).quarantined_reason

    @property
    def question(self) -> Command | None:
        asked = Command.objects.filter(kind=CommandKind.REPORT_HELD, state=CommandState.ISSUED)
        return asked.order_by("seq").last()

    def deadline(self) -> None:
        """The sweep; the trainer reports its measurements all the time."""
        past = timezone.now() - timedelta(seconds=1)
        waiting = (S.DISPATCHED, S.ACCEPTED, S.ROLLING_BACK)
        Adaptation.objects.filter(pk=self.adaptation.pk, state__in=waiting).update(deadline_at=past)
        Run.objects.update(last_seen_at=timezone.now())
        services.sweep()

    def answer(self) -> None:
        code = RefusalCode.EXPIRED if self.answer_is is CommandState.REFUSED else ""
        self.stage.ack(
            self.command, self.answer_is, step=1001, code=code, certificate=CERTIFICATE, reason="so"
        )

    def old_answer(self) -> None:
        """Of a start that was replaced."""
        ack = CommandAck(seq=self.command.seq, state=CommandState.FAILED, reason="old")
        with pytest.raises(Problem):
            trainers.acknowledge_command(run=self.stage.run, epoch=0, ack=ack, actor=TRAINER)

    def say(self, *, holds: bool) -> None:
        """Answer the question that was asked."""
        assert self.question is not None
        if holds:
            details = {"since_step": 1000}
            self.stage.ack(
                self.question, CommandState.APPLIED, certificate=CERTIFICATE, details=details
            )
        else:
            self.stage.ack(self.question, CommandState.REFUSED, code=RefusalCode.NOT_GRAFTED)

    def restart(self, *, holds: bool) -> None:
        self.stage.restart_trainer()
        held = [Applied(adaptation=self.adaptation.uid, layer="fc", blueprint="x", step=1000)]
        run = self.stage.run
        trainers.settle_hello(
            run=run, epoch=run.epoch, step=1010, applied=held if holds else [], actor=TRAINER
        )

    def guard(self) -> None:
        """The trainer's own guard takes it out."""
        report = Rollback(
            epoch=self.stage.run.epoch,
            adaptation=self.adaptation.uid,
            step=1020,
            rule=ViolationRule.NON_FINITE,
            observed="nan",
            limit="finite",
            exact=True,
        )
        trainers.record_local_rollback(run=self.stage.run, report=report, actor=TRAINER)

    def acts(self) -> list[str]:
        events = AuditEvent.objects.filter(object_uid=self.adaptation.uid).order_by("id")
        return [event.act.removeprefix("adaptation.") for event in events]


# The answer is repeated until it is confirmed.
EVENTS: dict[str, Callable[[Late], None]] = {
    "deadline": Late.deadline,
    "answer": Late.answer,
    "old": Late.old_answer,
}
ORDERS = sorted(set(permutations(("answer", *EVENTS))))


@ON_BOTH_DATABASES
@pytest.mark.parametrize("order", ORDERS, ids=" ".join)
def test_an_undo_that_was_done_ends_rolled_back_whenever_its_answer_comes(
    stage: Stage, order: tuple[str, ...], database: str
) -> None:
    late = Late.with_undo(stage)
    for place, event in enumerate(order):
        EVENTS[event](late)
        answered = "answer" in order[: place + 1]
        doubtful = not answered and "deadline" in order[: place + 1]
        expected = S.ROLLED_BACK if answered else S.IN_DOUBT if doubtful else S.ROLLING_BACK
        assert (late.row.state, bool(late.quarantine)) == (expected, doubtful), event
        assert (late.question is not None) >= doubtful
    assert late.acts().count("rolled_back") == 1
    assert ("in_doubt" in late.acts()) == (order.index("deadline") < order.index("answer"))
    assert not Violation.objects.exists()
    assert verify_chain().verified


@ON_BOTH_DATABASES
@pytest.mark.parametrize("order", ORDERS, ids=" ".join)
def test_a_graft_that_was_done_is_on_probation_whenever_its_answer_comes(
    stage: Stage, order: tuple[str, ...], database: str
) -> None:
    late = Late(stage)
    for event in order:
        EVENTS[event](late)
    assert (late.row.state, late.row.graft_step) == (S.PROBATION, 1001)
    assert late.acts().count("probation") == 1
    assert ("in_doubt" in late.acts()) == (order.index("deadline") < order.index("answer"))
    assert late.quarantine == ""
    assert verify_chain().verified


@pytest.mark.parametrize("answer_later", [False, True])
@pytest.mark.parametrize("holds", [False, True])
def test_the_question_decides_where_the_answer_to_a_graft_is_lost(
    stage: Stage, holds: bool, answer_later: bool
) -> None:
    late = Late(stage)
    late.deadline()
    late.say(holds=holds)
    expected = S.PROBATION if holds else S.NOT_APPLIED
    assert late.row.state == expected
    assert late.row.graft_step == (1000 if holds else None)
    if answer_later:
        late.answer_is = CommandState.APPLIED if holds else CommandState.REFUSED
        late.answer()
        assert late.row.state == expected


def test_the_question_decides_where_the_answer_to_an_undo_is_lost(stage: Stage) -> None:
    late = Late.with_undo(stage)
    late.deadline()
    late.say(holds=True)  # the undo has not reached it
    assert late.row.state == S.ROLLING_BACK
    assert late.quarantine, "it goes on until the change is gone"
    undo = stage.command(late.adaptation)
    assert undo.kind == CommandKind.UNDO
    assert undo.seq > late.command.seq
    late.deadline()
    late.say(holds=False)
    assert (late.row.state, late.quarantine) == (S.ROLLED_BACK, "")
    late.answer()  # of the first undo
    assert late.row.state == S.ROLLED_BACK


@pytest.mark.parametrize("holds", [False, True])
@pytest.mark.parametrize("with_undo", [False, True])
def test_a_restarted_trainer_decides_what_was_in_doubt(
    stage: Stage, with_undo: bool, holds: bool
) -> None:
    late = Late.with_undo(stage) if with_undo else Late(stage)
    late.deadline()
    late.restart(holds=holds)
    if with_undo and holds:
        assert (late.row.state, bool(late.quarantine)) == (S.ROLLING_BACK, True)
        late.command = stage.command(late.adaptation)
        late.answer()
        holds = False
    gone = S.ROLLED_BACK if with_undo else S.NOT_APPLIED
    assert (late.row.state, late.quarantine) == (S.PROBATION if holds else gone, "")


def test_an_undo_that_expired_on_its_way_has_not_failed(stage: Stage) -> None:
    late = Late.with_undo(stage)
    late.answer_is = CommandState.REFUSED
    late.answer()
    assert (late.row.state, bool(late.quarantine)) == (S.IN_DOUBT, True)
    assert late.question is not None


@pytest.mark.parametrize("how", ["late", "older checkpoint", "newer checkpoint", "person", "guard"])
def test_a_failed_undo_quarantines_the_run_until_the_change_is_gone(stage: Stage, how: str) -> None:
    late = Late.with_undo(stage)
    if how == "late":
        late.deadline()
    late.answer_is = CommandState.FAILED
    late.answer()
    assert late.row.state == S.ROLLBACK_FAILED
    assert "could not be taken out" in late.quarantine
    late.answer_is = CommandState.APPLIED
    if how in ("person", "late"):
        late.take_back()
        assert (late.row.state, bool(late.quarantine)) == (S.ROLLING_BACK, True)
    if how == "newer checkpoint":
        late.restart(holds=True)
        late.command = stage.command(late.adaptation)  # a leftover
        assert late.row.state == S.ROLLBACK_FAILED
    if how == "older checkpoint":
        late.restart(holds=False)
    elif how == "guard":
        late.guard()
    else:
        late.answer()
    assert (late.row.state, late.quarantine) == (S.ROLLED_BACK, "")
    events = AuditEvent.objects.filter(act__in=("run.quarantined", "run.released")).order_by("id")
    acts = [event.act for event in events]
    assert (acts[0], acts[-1]) == ("run.quarantined", "run.released")


def test_what_came_back_with_a_checkpoint_and_cannot_be_taken_out_is_known(stage: Stage) -> None:
    late = Late.with_undo(stage)
    late.answer()
    late.restart(holds=True)
    late.command = stage.command(late.adaptation)
    assert late.row.state == S.ROLLED_BACK
    late.answer_is = CommandState.FAILED
    late.answer()
    assert (late.row.state, bool(late.quarantine)) == (S.ROLLBACK_FAILED, True)


def test_a_failure_that_is_told_after_the_success_of_a_later_undo_is_old(stage: Stage) -> None:
    late = Late.with_undo(stage)
    first = late.command
    late.deadline()
    late.say(holds=True)
    late.command = stage.command(late.adaptation)
    late.answer()
    late.command, late.answer_is = first, CommandState.FAILED
    late.answer()
    assert (late.row.state, late.quarantine) == (S.ROLLED_BACK, "")


def test_a_person_may_take_out_what_is_in_doubt(stage: Stage) -> None:
    late = Late(stage)
    late.deadline()
    late.take_back()
    late.answer()
    assert late.row.state == S.ROLLED_BACK


def test_a_trainer_that_does_not_know_the_question_is_told_to_undo(stage: Stage) -> None:
    late = Late(stage)
    late.deadline()
    assert late.question is not None
    stage.ack(late.question, CommandState.REFUSED, code=RefusalCode.MALFORMED)
    assert late.row.state == S.ROLLING_BACK
    assert stage.command(late.adaptation).kind == CommandKind.UNDO


def test_what_nobody_has_asked_about_is_asked_once(stage: Stage) -> None:
    late = Late(stage)
    late.deadline()
    Command.objects.filter(kind=CommandKind.REPORT_HELD).delete()
    for _ in range(2):
        Adaptation.objects.update(changed_at=timezone.now() - timedelta(minutes=2))
        late.deadline()
    assert Command.objects.filter(kind=CommandKind.REPORT_HELD).count() == 1


def undo_commands(adaptation: Adaptation) -> int:
    return Command.objects.filter(adaptation_uid=adaptation.uid, kind=CommandKind.UNDO).count()


def test_a_graft_that_is_reported_a_day_later_is_taken_out_again(stage: Stage) -> None:
    late = Late(stage)
    late.deadline()
    Adaptation.objects.update(deadline_at=timezone.now() - timedelta(seconds=1))
    services.sweep()
    assert late.row.state == S.RUN_LOST
    for _ in range(2):
        late.answer()
    assert undo_commands(late.adaptation) == 1
    event = AuditEvent.objects.get(act="adaptation.leftover_undone")
    assert event.object_uid == late.adaptation.uid
