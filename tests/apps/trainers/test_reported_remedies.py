"""Remedies that a training script has applied, in the server's records and on the run's page."""

from __future__ import annotations

import uuid
from typing import Any

import msgspec
import pytest
from django.test import Client

from apps.adaptations import services
from apps.adaptations.models import Adaptation, Remedy
from apps.audit.models import AuditEvent
from apps.notifications.services import events_after
from apps.rest.problems import Problem
from apps.trainers import services as trainers
from apps.violations.models import Violation
from esper.contracts import AdaptationState, CommandKind, CommandState, RemedyKind, Verdict
from esper.contracts.protocol import RemedyReport
from tests.apps.cast import TAMIYO, TRAINER
from tests.apps.stage import Stage

S = AdaptationState


def report(remedy: str, **changes: Any) -> RemedyReport:
    given: dict[str, Any] = {
        "epoch": 1,
        "key": str(uuid.uuid4()),
        "layer": "fc",
        "step": 400,
        "details": {"factor": 0.5},
        "pause_ms": 3.0,
        "exact": None,
        "adaptation": "",
        "undoes": "",
        "digest_before": "a" * 64,
        "digest_after": "b" * 64,
        **changes,
    }
    return RemedyReport(remedy=RemedyKind(remedy), **given)


def reported(stage: Stage, given: RemedyReport) -> Remedy:
    stage.run.refresh_from_db()
    given = msgspec.structs.replace(given, epoch=stage.run.epoch)
    return trainers.record_remedy(run=stage.run, report=given, actor=TRAINER)


def kept(stage: Stage) -> Adaptation:
    adaptation = stage.grafted(stage.propose())
    return services.judge_adaptation(
        adaptation=adaptation,
        verdict=Verdict(keep=True, reason="pays"),
        reward_terms={},
        actor=TAMIYO,
    )


def test_a_remedy_is_noted_once_audited_and_shown_on_the_runs_page(
    stage: Stage, client: Client
) -> None:
    given = report("set_lr")
    remedy = reported(stage, given)
    assert reported(stage, given) == remedy
    event = AuditEvent.objects.get(act="remedy.set_lr")
    assert (event.actor_kind, event.run_uid) == ("trainer", stage.run.uid)
    assert event.data["digest_before"] == "a" * 64
    assert event.data["details"] == {"factor": 0.5}
    (published,) = [e for e in events_after(f"run:{stage.run.uid}", 0) if e.type == "remedy.set_lr"]
    assert published.data["step"] == 400
    client.force_login(stage.viewer)
    page = client.get(f"/runs/{stage.run.uid}").content.decode()
    assert remedy.uid in page
    assert "by the training script of rafi" in page
    assert "aaaaaaaa → bbbbbbbb" in page


def test_the_trainer_is_told_that_its_graft_is_kept(stage: Stage) -> None:
    command = stage.command(kept(stage))
    assert (command.kind, command.state) == (CommandKind.KEEP, CommandState.ISSUED)


def test_a_merged_graft_stays_kept_and_is_not_rolled_back_by_anybody(
    stage: Stage, client: Client
) -> None:
    adaptation = kept(stage)
    merge = report("merge", adaptation=adaptation.uid)
    reported(stage, merge)
    client.force_login(stage.operator)
    assert "merged into its layer" in client.get(f"/runs/{stage.run.uid}").content.decode()
    assert "has merged this graft" in client.get(f"/adaptations/{adaptation.uid}").content.decode()
    adaptation.refresh_from_db()
    assert (adaptation.state, adaptation.merged_at is not None) == (S.KEPT, True)
    with pytest.raises(Problem, match="merged this graft") as refusal:
        roll_back(stage, adaptation)
    assert (refusal.value.status, refusal.value.code) == (409, "graft-merged")
    reported(stage, report("undo", undoes=merge.key, exact=True))
    adaptation.refresh_from_db()
    assert adaptation.merged_at is None
    assert roll_back(stage, adaptation).state == S.ROLLING_BACK


def roll_back(stage: Stage, adaptation: Adaptation) -> Adaptation:
    return services.roll_back_adaptation(
        adaptation=adaptation,
        user=stage.operator,
        via="web",
        version=adaptation.version,
        reason="not needed",
    )


def test_an_undo_that_comes_after_the_merge_does_not_quarantine_the_run(stage: Stage) -> None:
    adaptation = roll_back(stage, kept(stage))
    stage.ack(
        stage.command(adaptation), CommandState.REFUSED, code="merged", reason="it was merged"
    )
    adaptation.refresh_from_db()
    stage.run.refresh_from_db()
    assert (adaptation.state, adaptation.merged_at is not None) == (S.KEPT, True)
    assert stage.run.quarantined_reason == ""
    assert Violation.objects.get(adaptation_uid=adaptation.uid).observed == "merged into its host"


@pytest.mark.parametrize(("judged", "end"), [(True, S.REVERTED), (False, S.ROLLED_BACK)])
def test_a_graft_that_the_script_takes_out_has_its_end(
    stage: Stage, judged: bool, end: AdaptationState
) -> None:
    adaptation = kept(stage) if judged else stage.grafted(stage.propose())
    reported(stage, report("prune", adaptation=adaptation.uid, exact=False))
    adaptation.refresh_from_db()
    assert (adaptation.state, adaptation.undo_exact) == (end, False)
    assert "the training script took it out at step 400" in adaptation.end_reason


def test_a_graft_that_went_along_with_an_older_one_says_with_which(stage: Stage) -> None:
    adaptation = kept(stage)
    details = {"blueprint": "mon_act_stats", "along_with": "clamp_grad_norm at conv1"}
    reported(stage, report("undo", adaptation=adaptation.uid, exact=True, details=details))
    adaptation.refresh_from_db()
    assert adaptation.state == S.REVERTED
    assert "went with the hard undo of clamp_grad_norm at conv1" in adaptation.end_reason


def test_a_remedy_names_no_adaptation_of_another_run(stage: Stage) -> None:
    with pytest.raises(Problem) as refusal:
        reported(stage, report("prune", adaptation="adp_of_somebody_else"))
    assert refusal.value.status == 404
    assert not Remedy.objects.exists()
