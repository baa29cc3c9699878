"""The database fails at each statement of an act in turn: the act is done whole, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from django.db import connection, transaction
from django.db.utils import OperationalError

from apps.adaptations import services
from apps.adaptations.models import Adaptation
from apps.audit.models import AuditEvent
from apps.audit.services import verify_chain
from apps.notifications.models import FeedEvent, OutboxMessage
from apps.runs.models import Command, Run
from apps.violations.models import Violation
from apps.workers.models import CompileJob
from esper.contracts import CommandState, Verdict
from tests.apps.cast import CERTIFICATE, TAMIYO
from tests.apps.stage import Stage

pytestmark = pytest.mark.django_db
Act = Callable[[], object]
MOST_STATEMENTS = 500


class FailsAt:
    """A wrapper of all statements of a connection, of which one fails."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __call__(self, execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise OperationalError("the connection was lost")
        return execute(sql, params, many, context)


def picture() -> dict[str, Any]:
    """What an act changes, without times and random identifiers."""
    return {
        "adaptations": sorted(Adaptation.objects.values_list("state", "version")),
        "jobs": sorted(CompileJob.objects.values_list("state", "attempt")),
        "commands": sorted(Command.objects.values_list("seq", "kind", "state")),
        "run": list(Run.objects.values_list("command_seq", "quarantined_reason")),
        "audit": list(AuditEvent.objects.order_by("id").values_list("act", flat=True)),
        "events": FeedEvent.objects.count(),
        "outbox": OutboxMessage.objects.count(),
        "violations": Violation.objects.count(),
    }


def decide(stage: Stage, name: str) -> Act:
    adaptation = stage.waiting()
    shown = {"evidence_hash": adaptation.evidence_hash} if name == "approve" else {}
    return lambda: getattr(services, f"{name}_adaptation")(
        adaptation=Adaptation.objects.get(pk=adaptation.pk),
        user=stage.operator,
        via="session",
        version=adaptation.version,
        reason="because",
        **shown,
    )


def judge(stage: Stage, *, keep: bool) -> Act:
    adaptation = stage.grafted(stage.propose())
    verdict = Verdict(keep=keep, reason="the numbers say so")
    return lambda: services.judge_adaptation(
        adaptation=Adaptation.objects.get(pk=adaptation.pk),
        verdict=verdict,
        reward_terms={},
        actor=TAMIYO,
    )


def answer(stage: Stage) -> Act:
    command = stage.dispatched(stage.propose())
    stage.ack(command, CommandState.ACCEPTED)
    return lambda: stage.ack(command, CommandState.APPLIED, step=120, certificate=CERTIFICATE)


ACTS: dict[str, Callable[[Stage], Act]] = {
    "a proposal": lambda stage: stage.propose,
    "an approval": lambda stage: decide(stage, "approve"),
    "a rejection": lambda stage: decide(stage, "reject"),
    "an answer of the trainer": answer,
    "a verdict that keeps": lambda stage: judge(stage, keep=True),
    "a verdict that takes out": lambda stage: judge(stage, keep=False),
}


@pytest.mark.parametrize("name", ACTS)
def test_an_act_is_done_whole_or_not_at_all(stage: Stage, name: str) -> None:
    act = ACTS[name](stage)
    before = picture()
    start = transaction.savepoint()
    act()
    after = picture()
    assert after != before
    transaction.savepoint_rollback(start)
    for number in range(1, MOST_STATEMENTS):
        start = transaction.savepoint()
        fails = FailsAt(number)
        try:
            with connection.execute_wrapper(fails):
                act()
        except OperationalError:
            assert picture() == before, f"statement {number} has failed"
        else:
            assert picture() == after, f"statement {number} has failed"
        assert verify_chain().verified
        transaction.savepoint_rollback(start)
        if fails.left > 0:  # all statements have had their turn
            return
    raise AssertionError(f"{name} takes more than {MOST_STATEMENTS} statements")
