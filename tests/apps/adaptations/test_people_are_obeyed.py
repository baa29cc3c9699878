"""What a person decides stays: their pause, their words, what they saw, and their no."""

from __future__ import annotations

import re
from datetime import timedelta

import pytest
from django.test import Client
from django.utils import timezone

from apps.adaptations import services
from apps.adaptations.deadlines import sweep
from apps.adaptations.history import layer_histories, run_facts
from apps.adaptations.models import Adaptation
from apps.audit.models import AuditEvent
from apps.blueprints.models import Blueprint
from apps.rest.problems import Problem
from apps.runs.models import Command, Run
from esper.contracts import AdaptationState, CommandKind, CommandState
from tests.apps.cast import make_run
from tests.apps.stage import Stage

S = AdaptationState


def _commands(run: Run) -> list[str]:
    return list(Command.objects.filter(run=run).order_by("seq").values_list("kind", flat=True))


def test_kill_and_on_keep_the_pauses_that_people_set(stage: Stage) -> None:
    other = make_run(stage.second, name="other")
    services.request_adaptation_pause(
        run=stage.run, paused=True, user=stage.owner, via="", reason="mine"
    )
    services.set_adaptation_switch(on=False, user=stage.operator, via="")
    services.set_adaptation_switch(on=True, user=stage.operator, via="")
    stage.run.refresh_from_db()
    other.refresh_from_db()
    assert (stage.run.adaptation_paused_by, other.adaptation_paused_by) == ("rafi", "")
    pause, resume = CommandKind.PAUSE_ADAPTATION, CommandKind.RESUME_ADAPTATION
    assert _commands(stage.run) == [pause, pause]
    assert _commands(other) == [pause, resume]


def test_a_killed_run_cannot_be_resumed(stage: Stage) -> None:
    services.set_adaptation_switch(on=False, user=stage.operator, via="")
    with pytest.raises(Problem) as refused:
        services.request_adaptation_pause(
            run=stage.run, paused=False, user=stage.operator, via="", reason=""
        )
    assert (refused.value.status, refused.value.code) == (423, "adaptation-killed")
    assert CommandKind.RESUME_ADAPTATION not in _commands(stage.run)


def _approve(stage: Stage, adaptation: Adaptation, **changes: object) -> Adaptation:
    wanted = {
        "user": stage.operator,
        "via": "",
        "version": adaptation.version,
        "evidence_hash": adaptation.evidence_hash,
        **changes,
    }
    return services.approve_adaptation(adaptation=adaptation, **wanted)  # type: ignore[arg-type]


def test_what_the_approver_saw_is_kept(stage: Stage) -> None:
    adaptation = stage.waiting()
    Run.objects.filter(pk=stage.run.pk).update(step=1010, last_loss=1.2)
    adaptation.run.refresh_from_db()
    _approve(stage, adaptation)
    Run.objects.filter(pk=stage.run.pk).update(step=9000, last_loss=5.0)
    after = Adaptation.objects.get(pk=adaptation.pk)
    now, drift = services.evidence_now(after), services.evidence_drift(after)
    assert (now["step"], now["loss"], after.decided_step) == (1010, 1.2, 1010)
    assert drift == pytest.approx(0.4)  # (1.2 / 1.0 - 1) / 0.5
    row = AuditEvent.objects.get(act="adaptation.approved", object_uid=adaptation.uid)
    assert row.data["evidence"] == adaptation.evidence
    assert row.data["evidence_now"]["loss"] == 1.2
    assert row.data["evidence_hash"] == adaptation.evidence_hash
    assert row.data["evidence_drift"] == pytest.approx(0.4)


def test_a_graft_of_high_risk_is_approved_with_a_reason(stage: Stage) -> None:
    Blueprint.objects.update(risk="high")
    adaptation = stage.waiting()
    with pytest.raises(Problem) as refused:
        _approve(stage, adaptation)
    assert refused.value.code == "reason-required"
    assert _approve(stage, adaptation, reason="the layer is dead").state == S.COMPILE_QUEUED


@pytest.mark.parametrize("end", [S.REJECTED, S.EXPIRED])
def test_the_cooldown_begins_when_nobody_wanted_it(stage: Stage, end: AdaptationState) -> None:
    adaptation = stage.waiting()  # proposed at step 1,000
    Run.objects.filter(pk=stage.run.pk).update(step=50_000)
    if end == S.REJECTED:
        services.reject_adaptation(
            adaptation=adaptation,
            user=stage.operator,
            via="",
            version=adaptation.version,
            reason="no",
        )
    else:
        Adaptation.objects.filter(pk=adaptation.pk).update(deadline_at="2020-01-01T00:00:00Z")
        assert sweep() == 1
    stage.run.refresh_from_db()
    history = layer_histories(stage.run)["fc"]
    assert (history.last_adaptation_step, history.last_rolled_back) == (50_000, True)
    assert run_facts(stage.run).last_step == 50_000


def test_a_refused_proposal_does_not_come_back_at_once_in_a_fast_run(stage: Stage) -> None:
    adaptation = stage.waiting()
    services.reject_adaptation(
        adaptation=adaptation, user=stage.operator, via="", version=adaptation.version, reason="no"
    )
    Run.objects.filter(pk=stage.run.pk).update(step=900_000)  # a second later
    stage.run.refresh_from_db()
    with pytest.raises(services.GateClosedError) as closed:
        stage.waiting(step=900_000)
    assert [check.limit for check in closed.value.checks] == [">= 1800 s"]
    assert re.search(r"was rejected or expired \d+ s ago", closed.value.detail)
    earlier = timezone.now() - timedelta(seconds=1801)
    Adaptation.objects.filter(pk=adaptation.pk).update(ended_at=earlier)
    assert stage.waiting(step=900_001).state == S.AWAITING_APPROVAL


def test_a_rollback_is_credited_to_the_person_in_their_own_words(stage: Stage) -> None:
    adaptation = stage.grafted(_approve(stage, stage.waiting(), user=stage.second))
    services.roll_back_adaptation(
        adaptation=adaptation,
        user=stage.operator,
        via="",
        version=adaptation.version,
        reason="iOS users lose accuracy",
    )
    assert services.adaptation_of(stage.run, adaptation.uid).taken_back_by == stage.operator
    stage.ack(stage.command(adaptation), CommandState.APPLIED, step=130, digest_after="a" * 64)
    adaptation.refresh_from_db()
    assert adaptation.state == S.ROLLED_BACK
    assert adaptation.taken_back_reason == adaptation.end_reason == "iOS users lose accuracy"
    client = Client()
    client.force_login(stage.viewer)
    text = client.get(f"/adaptations/{adaptation.uid}?panel=head").content.decode()
    assert "<strong>olga</strong> asked for its rollback: “iOS users lose accuracy”" in text
    with pytest.raises(Problem, match="decided by olga"):
        _approve(stage, adaptation)


def test_a_page_without_rights_is_told_so_before_the_version(stage: Stage) -> None:
    with pytest.raises(Problem) as refused:
        _approve(stage, stage.waiting(), user=stage.viewer, version=None)
    assert (refused.value.status, refused.value.code) == (403, "not-eligible")
