"""A graft that is taken out is worth less than nothing, whoever takes it out, and it counts."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest
from django.test import Client
from django.utils import timezone

from apps.adaptations import services
from apps.adaptations.history import experience, policy_outcomes
from apps.adaptations.models import Adaptation
from apps.audit.models import AuditEvent
from apps.runs.models import Run
from apps.trainers import services as trainers
from esper.contracts import AdaptationState, CommandState, RemedyKind, Verdict, ViolationRule
from esper.contracts.protocol import RemedyReport, Rollback
from esper.reward.terms import ROLLBACK_COST
from tests.apps.cast import TAMIYO, TRAINER
from tests.apps.stage import Stage

pytestmark = pytest.mark.django_db
S = AdaptationState
EARNED = {"gain": 0.6, "time": -0.01}


def taken_out_by_the_guard(stage: Stage, adaptation: Adaptation) -> None:
    report = Rollback(
        epoch=stage.run.epoch, adaptation=adaptation.uid, step=150, rule=ViolationRule.NON_FINITE,
        observed="nan", limit="finite", exact=True,
    )  # fmt: skip
    trainers.record_local_rollback(run=stage.run, report=report, actor=TRAINER)


def taken_out_by_a_person(stage: Stage, adaptation: Adaptation) -> None:
    services.roll_back_adaptation(
        adaptation=adaptation, user=stage.operator, via="test", version=adaptation.version,
        reason="the loss is odd",
    )  # fmt: skip
    stage.ack(stage.command(adaptation), CommandState.APPLIED, step=150, digest_after="a" * 64)


def taken_out_by_the_script(stage: Stage, adaptation: Adaptation) -> None:
    report = RemedyReport(
        epoch=stage.run.epoch, key="k", remedy=RemedyKind.UNDO, layer="fc", step=150, exact=True,
        adaptation=adaptation.uid,
    )  # fmt: skip
    trainers.record_remedy(run=stage.run, report=report, actor=TRAINER)


def taken_out_at_the_deadline(stage: Stage, adaptation: Adaptation) -> None:
    past = timezone.now() - timedelta(seconds=1)
    Adaptation.objects.filter(pk=adaptation.pk, state=S.PROBATION).update(deadline_at=past)
    Run.objects.update(last_seen_at=timezone.now())
    services.sweep()
    stage.ack(stage.command(adaptation), CommandState.APPLIED, step=150, digest_after="a" * 64)


def taken_out_by_the_verdict(stage: Stage, adaptation: Adaptation) -> None:
    verdict = Verdict(keep=False, reason="no gain")
    services.judge_adaptation(
        adaptation=adaptation, verdict=verdict, reward_terms=dict(EARNED), actor=TAMIYO
    )
    stage.ack(stage.command(adaptation), CommandState.APPLIED, step=150, digest_after="a" * 64)


def lost_with_a_checkpoint(stage: Stage, adaptation: Adaptation) -> None:
    stage.restart_trainer()
    trainers.settle_hello(
        run=stage.run, epoch=stage.run.epoch, step=100, applied=[], actor=TRAINER
    )  # fmt: skip


Way = Callable[[Stage, Adaptation], None]
ANYTIME: tuple[Way, ...] = (taken_out_by_the_guard, taken_out_by_a_person, taken_out_by_the_script)
ON_PROBATION: tuple[Way, ...] = (*ANYTIME, taken_out_at_the_deadline, taken_out_by_the_verdict)


def grafted(stage: Stage) -> Adaptation:
    return stage.grafted(stage.propose(chances={"heuristic-3": 0.5, "bandit-1": 0.5}))


def kept(stage: Stage) -> Adaptation:
    adaptation = grafted(stage)
    services.judge_adaptation(
        adaptation=adaptation, verdict=Verdict(keep=True, reason="it pays"),
        reward_terms=dict(EARNED), actor=TAMIYO,
    )  # fmt: skip
    adaptation.refresh_from_db()
    assert adaptation.reward == pytest.approx(0.59)
    return adaptation


def page_of(stage: Stage, adaptation: Adaptation) -> str:
    client = Client()
    client.force_login(stage.operator)
    return client.get(f"/adaptations/{adaptation.uid}").content.decode()


def check_that_it_counts(adaptation: Adaptation) -> None:
    adaptation.refresh_from_db()
    terms, reward = adaptation.reward_terms, adaptation.reward
    assert terms is not None
    assert reward is not None
    assert reward == pytest.approx(sum(terms.values()))
    assert reward <= -ROLLBACK_COST
    assert [one.reward for one in policy_outcomes()] == [reward]
    case = experience()[adaptation.slug]
    assert (case.kept, case.rolled_back, case.mean_reward) == (0, 1, reward)


@pytest.mark.parametrize("way", ON_PROBATION)
def test_a_graft_and_its_undo_are_worth_less_than_nothing(stage: Stage, way: Way) -> None:
    adaptation = grafted(stage)
    way(stage, adaptation)
    check_that_it_counts(adaptation)
    assert adaptation.state == S.ROLLED_BACK


@pytest.mark.parametrize("way", [*ANYTIME, lost_with_a_checkpoint])
def test_what_a_kept_graft_has_earned_is_forfeited_with_it(stage: Stage, way: Way) -> None:
    adaptation = kept(stage)
    way(stage, adaptation)
    check_that_it_counts(adaptation)
    assert adaptation.state == S.REVERTED
    assert adaptation.reward_terms == {**EARNED, "forfeited": -0.6, "rollback": -ROLLBACK_COST}
    page = page_of(stage, adaptation)
    assert "Kept, then taken out" in page
    assert ("asked for its rollback" in page) is (way is taken_out_by_a_person)


def test_an_undo_that_succeeds_at_the_second_try_costs_once(stage: Stage) -> None:
    adaptation = kept(stage)
    for answer in (CommandState.FAILED, CommandState.APPLIED):
        adaptation.refresh_from_db()
        services.roll_back_adaptation(
            adaptation=adaptation, user=stage.operator, via="test", version=adaptation.version,
            reason="out",
        )  # fmt: skip
        stage.ack(stage.command(adaptation), answer, step=150, reason="so")
    check_that_it_counts(adaptation)
    assert adaptation.reward == pytest.approx(-0.01 - ROLLBACK_COST)


@pytest.mark.parametrize(
    ("way", "who", "why"),
    [
        (taken_out_by_the_guard, TRAINER.name, "non_finite: nan (limit finite)"),
        (taken_out_by_a_person, "olga", "the loss is odd"),
    ],
)
def test_page_and_audit_say_who_took_it_out_and_why(
    stage: Stage, way: Way, who: str, why: str
) -> None:
    adaptation = grafted(stage)
    way(stage, adaptation)
    began = AuditEvent.objects.get(object_uid=adaptation.uid, act="adaptation.rolling_back")
    assert (began.actor, began.reason) == (who, why)
    ended = AuditEvent.objects.get(object_uid=adaptation.uid, act="adaptation.rolled_back")
    assert ended.reason == why
    page = page_of(stage, adaptation)
    for words in (why, "Rolled back", "undo exact, bit for bit", "rollback", "Reward"):
        assert words.lower() in page.lower(), words
