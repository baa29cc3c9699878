"""Two at once. SQLite has one writer and proves nothing here, so these run on a real PostgreSQL."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from typing import Any

import pytest
from django.db import DatabaseError, connection, transaction
from django.utils import timezone

from apps.accounts.actors import SYSTEM
from apps.accounts.models import User
from apps.adaptations import services
from apps.adaptations.models import Adaptation
from apps.audit.models import AuditEvent
from apps.audit.services import record, verify_chain
from apps.blueprints.models import Blueprint
from apps.notifications.models import FeedEvent
from apps.notifications.services import publish
from apps.policies.freezing import end_freeze, set_freeze
from apps.policies.models import Freeze
from apps.runs.models import Command, Run
from apps.runs.services import issue_command
from apps.workers import services as workers
from apps.workers.models import CompileJob
from esper.contracts import (
    AdaptationState,
    AdaptationType,
    CommandKind,
    CostForecast,
    Risk,
    Role,
)
from esper.contracts.protocol import Proposal
from tests.apps.cast import (
    TAMIYO,
    force_state,
    make_blueprint,
    make_layer,
    make_person,
    make_run,
)
from tests.apps.concurrency.at_once import THREADS, count_at_once

pytestmark = [pytest.mark.postgres, pytest.mark.django_db(transaction=True)]

ROUNDS = 10


def a_run(name: str = "digits") -> Run:
    owner = User.objects.filter(username="rafi").first() or make_person("rafi")
    if not Blueprint.objects.exists():
        make_blueprint()
    return make_run(owner, name=name, layers=tuple(make_layer(f"fc{i}") for i in range(THREADS)))


def propose(run: Run, layer: str, key: str, confidence: float = 0.6) -> Adaptation:
    proposal = Proposal(
        epoch=run.epoch,
        step=1000,
        layer=layer,
        adaptation_type=AdaptationType.ADD_EFFICIENCY,
        confidence=confidence,
        urgency=0.1,
        blueprint="proj_lora_64",
        config={},
        risk=Risk.LOW,
        forecast=CostForecast(100, 100, 0.1, 0.1),
        reasons=(),
        checks=(),
        why_not=(),
        asks=(),
        evidence={"loss": 1.0, "grad_norm": 1.0, "weight_norm": 1.0},
        policy="heuristic-1",
    )
    return services.propose_adaptation(
        run=run, proposal=proposal, idempotency_key=key, actor=TAMIYO
    )


def test_it_really_is_postgresql() -> None:
    assert connection.vendor == "postgresql"


def test_the_database_refuses_a_transition_that_the_lifecycle_does_not_have() -> None:
    adaptation = propose(a_run(), "fc0", "key")
    with pytest.raises(DatabaseError, match="awaiting_approval to kept"), transaction.atomic():
        Adaptation.objects.filter(pk=adaptation.pk).update(state=AdaptationState.KEPT)


def test_of_many_approvals_and_rejections_exactly_one_wins() -> None:
    people = [make_person(f"operator{i}", Role.OPERATOR) for i in range(THREADS)]
    for round_ in range(ROUNDS):
        adaptation = propose(a_run(f"run{round_}"), "fc0", f"key{round_}")
        version = adaptation.version

        def decide(
            index: int,
            pk: int = adaptation.pk,
            version: int = version,
            shown: str = adaptation.evidence_hash,
        ) -> str:
            act = (services.approve_adaptation, services.reject_adaptation)[index % 2]
            act(
                adaptation=Adaptation.objects.get(pk=pk),
                user=people[index],
                via="",
                version=version,
                reason="now",
                evidence_hash=shown,
            )
            return "won"

        answers = count_at_once(decide)
        assert answers["won"] == 1, answers
        assert set(answers) <= {"won", "409 decision-not-pending", "412 version-changed"}
        decided = AuditEvent.objects.filter(
            object_uid=adaptation.uid, act__in=["adaptation.approved", "adaptation.rejected"]
        )
        assert decided.count() == 1


def test_one_proposal_sent_many_times_at_once_is_one_adaptation() -> None:
    run = a_run()
    answers = count_at_once(lambda _: str(propose(run, "fc0", "the same key").pk))
    assert Adaptation.objects.count() == 1
    assert sum(answers.values()) == THREADS


def test_a_run_never_has_more_in_flight_than_its_policy_allows() -> None:
    run = a_run()
    answers = count_at_once(lambda i: "in" if propose(run, f"fc{i}", f"key{i}") else "")
    assert answers == Counter({"in": 2, "409 gate-closed": THREADS - 2})


def test_one_job_has_one_owner() -> None:
    propose(a_run(), "fc0", "key", confidence=0.9)
    pk = CompileJob.objects.get().pk
    answers = count_at_once(
        lambda i: str(workers.claim_job(CompileJob.objects.get(pk=pk), worker=f"w{i}"))
    )
    assert answers["True"] == 1


def test_commands_events_and_audit_rows_are_numbered_without_gaps_or_doubles() -> None:
    run = a_run()

    def write(index: int) -> str:
        for _ in range(10):
            with transaction.atomic():
                publish(topic="system", type="test", data={"by": index})
                record(actor=SYSTEM, act="test", object_kind="test", object_uid=str(index))
            issue_command(run=Run.objects.get(pk=run.pk), kind=CommandKind.STOP_RUN)
        return "done"

    count_at_once(write)
    seqs: list[Any] = list(Command.objects.values_list("seq", flat=True))
    assert seqs == list(range(1, 10 * THREADS + 1))
    events = list(FeedEvent.objects.filter(topic="system").values_list("seq", flat=True))
    assert events == list(range(1, len(events) + 1))
    assert verify_chain().verified


def test_the_kill_switch_lets_nothing_through_after_it_was_committed() -> None:
    run, operator = a_run(), make_person("olga")
    adaptation = propose(run, "fc0", "key", confidence=0.9)
    force_state(adaptation, AdaptationState.COMPILED)

    def work(index: int) -> str:
        if index == 0:
            services.set_adaptation_switch(on=False, user=operator, via="")
        else:
            services.dispatch_adaptation(adaptation.uid, worker=f"w{index}")
        return "done"

    count_at_once(work)
    adaptation.refresh_from_db()
    killed_at = AuditEvent.objects.get(act="switch.killed").pk
    dispatched = AuditEvent.objects.filter(act="adaptation.dispatched").first()
    assert dispatched is None or dispatched.pk < killed_at


@pytest.mark.parametrize("kind", ["approval", "dispatch"])
def test_a_freeze_that_begins_lets_nothing_through_after_it_was_committed(kind: str) -> None:
    curator, operator = make_person("carl"), make_person("olga")
    for round_ in range(ROUNDS):
        run = a_run(f"run{round_}")
        adaptation = propose(run, "fc0", f"key{round_}", 0.6 if kind == "approval" else 0.9)
        if kind == "dispatch":
            force_state(adaptation, AdaptationState.COMPILED)
        pk, version, shown = adaptation.pk, adaptation.version, adaptation.evidence_hash

        def work(index: int, pk: int = pk, version: int = version, shown: str = shown) -> str:
            row = Adaptation.objects.get(pk=pk)
            if index == 0:
                ends = timezone.now() + timedelta(hours=1)
                set_freeze(ends_at=ends, reason="holidays", user=curator, via="")
            elif kind == "approval":
                services.approve_adaptation(
                    adaptation=row, user=operator, via="", version=version, evidence_hash=shown
                )
            else:
                services.dispatch_adaptation(row.uid, worker=f"w{index}")
            return "done"

        answers = count_at_once(work)
        allowed = {"done", "409 freeze", "409 decision-not-pending", "412 version-changed"}
        assert set(answers) <= allowed, answers
        frozen_at = AuditEvent.objects.filter(act="freeze.set").latest("pk").pk
        went = ["adaptation.approved", "adaptation.dispatched"]
        rows = AuditEvent.objects.filter(object_uid=adaptation.uid, act=went[kind == "dispatch"])
        assert all(row.pk < frozen_at for row in rows)
        end_freeze(freeze=Freeze.objects.get(ended_at=None), user=curator, via="")
