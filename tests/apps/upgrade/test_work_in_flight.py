"""Work in flight is finished by a server that was started anew, for callers of an earlier Esper.

``messages.json`` holds what an earlier trainer and an earlier Tamiyo send, as it was recorded. It
is never written again: what changes in the protocol must still understand it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.utils import timezone

from apps.accounts.models import User
from apps.adaptations import services
from apps.adaptations.dispatch import request_undo
from apps.adaptations.lifecycle import DEADLINES, transition
from apps.adaptations.models import Adaptation
from apps.audit.models import AuditEvent
from apps.audit.services import verify_chain
from apps.workers import services as workers
from apps.workers.models import CompileJob
from esper.contracts import AdaptationState, Role, TokenScope
from tests.apps.callers import Caller, register
from tests.apps.cast import TAMIYO, WORKER, make_blueprint, make_person, make_tamiyo, token_of
from tests.apps.stage import Stage

pytestmark = pytest.mark.django_db

S = AdaptationState
MESSAGES: dict[str, Any] = json.loads((Path(__file__).parent / "messages.json").read_text())


class Work:
    """One adaptation, whose trainer and Tamiyo are of an earlier version."""

    def __init__(self, people: dict[Role, User]) -> None:
        blueprint = make_blueprint()
        self.trainer = register(people[Role.RESEARCHER], **MESSAGES["registration"])
        self.tamiyo = Caller(token_of(make_tamiyo(), TokenScope.DECIDE, TokenScope.READ))
        self.operator = Caller(token_of(people[Role.OPERATOR], TokenScope.READ, TokenScope.ACT))
        self.stage = Stage(
            run=self.trainer.row(),
            operator=people[Role.OPERATOR],
            second=make_person("oscar"),
            owner=people[Role.RESEARCHER],
            viewer=people[Role.VIEWER],
            blueprint=blueprint,
        )
        loss = {"step": 1000, "wall_time": 1795000000.0, "values": {"loss": 1.0}}
        assert self.trainer.send(metrics=[loss]).status == 202
        path = f"{self.trainer.path}/adaptations"
        answer = self.tamiyo.post(path, MESSAGES["proposal"])
        assert answer.status == 201, answer.data
        self.uid = answer.data["uid"]

    @property
    def row(self) -> Adaptation:
        """As the database has it: nothing else outlives a restart."""
        return Adaptation.objects.get(uid=self.uid)

    # --- one step after the other, each by what an earlier version sends

    def approve(self) -> None:
        row = self.row
        body = {"reason": "yes", "evidence_hash": row.evidence_hash}
        answer = self.operator.act(f"adaptations/{self.uid}/approve", body, version=row.version)
        assert answer.status == 200, answer.data

    def take_job(self) -> None:
        assert workers.claim_job(CompileJob.objects.get(), worker="compile@here")
        transition(self.row, S.COMPILING, actor=WORKER)

    def lose_job(self) -> None:
        CompileJob.objects.update(lease_until=timezone.now() - timedelta(seconds=1))
        services.sweep()

    def compile(self) -> None:
        self.stage.compiled(self.row)

    def dispatch(self) -> None:
        services.dispatch_adaptation(self.uid, worker="compile@here")

    def accept(self) -> None:
        self._answer("accepted")

    def apply(self) -> None:
        self._answer("applied")

    def ask_for_undo(self) -> None:
        transition(self.row, S.ROLLING_BACK, actor=TAMIYO, reason="it does not help")
        request_undo(self.row, reason="it does not help")

    def undo(self) -> None:
        self._answer("undone")

    def keep(self) -> None:
        path = f"adaptations/{self.uid}/verdict"
        answer = self.tamiyo.act(path, MESSAGES["verdict"], version=self.row.version)
        assert answer.status == 200, answer.data

    def lose_trainer(self) -> None:
        """It is killed, and started again from its checkpoint."""
        self.trainer = register(self.stage.owner, **MESSAGES["registration"])

    def say_hello(self) -> None:
        held = {**MESSAGES["hello"]["applied"][0], "adaptation": self.uid}
        body = {**MESSAGES["hello"], "applied": [held]}
        answer = self.trainer.post(f"{self.trainer.path}/hello", body)
        assert answer.status == 200, answer.data
        self.trainer.epoch = body["epoch"]

    def _answer(self, name: str) -> None:
        body = {**MESSAGES[name], "epoch": self.trainer.epoch}
        path = f"{self.trainer.path}/commands/{body['seq']}/ack"
        answer = self.trainer.post(path, body)
        assert answer.status == 200, answer.data


TO_PROBATION = ("approve", "compile", "dispatch", "accept", "apply")
# The steps before the upgrade and those after it, for each state in which it can come.
LIVES: dict[AdaptationState, tuple[tuple[str, ...], tuple[str, ...], AdaptationState]] = {
    S.AWAITING_APPROVAL: ((), (*TO_PROBATION, "keep"), S.KEPT),
    S.COMPILE_QUEUED: (("approve",), (*TO_PROBATION[1:], "keep"), S.KEPT),
    S.COMPILING: (("approve", "take_job"), ("lose_job", *TO_PROBATION[1:], "keep"), S.KEPT),
    S.COMPILED: (TO_PROBATION[:2], (*TO_PROBATION[2:], "keep"), S.KEPT),
    S.DISPATCHED: (TO_PROBATION[:3], ("accept", "apply", "keep"), S.KEPT),
    S.ACCEPTED: (TO_PROBATION[:4], ("apply", "keep"), S.KEPT),
    S.PROBATION: (TO_PROBATION, ("keep",), S.KEPT),
    S.ROLLING_BACK: ((*TO_PROBATION, "ask_for_undo"), ("undo",), S.ROLLED_BACK),
    S.IN_DOUBT: ((*TO_PROBATION, "lose_trainer"), ("say_hello", "keep"), S.KEPT),
}


def test_there_is_a_case_for_each_state_in_which_an_adaptation_can_wait() -> None:
    assert set(LIVES) == set(DEADLINES)


@pytest.mark.parametrize("state", LIVES)
def test_it_is_finished_by_what_an_earlier_version_sends(
    state: AdaptationState, people: dict[Role, User]
) -> None:
    before, after, end = LIVES[state]
    work = Work(people)
    for step in before:
        _do(work, step)
    assert work.row.state == state
    for step in after:
        _do(work, step)
    assert work.row.state == end
    applied = AuditEvent.objects.filter(object_uid=work.uid, act="adaptation.probation")
    assert applied.count() == 1 + (state == S.IN_DOUBT)
    assert verify_chain().verified


def _do(work: Work, step: str) -> None:
    act: Callable[[], None] = getattr(work, step)
    act()
