"""Reading adaptations: lists, the snapshot of a run for Tamiyo, and the overall status."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from django.db.models import Avg, Count, F, Max, Q, QuerySet

from apps.accounts.models import User
from apps.adaptations.history import closed_confidences as closed_confidences
from apps.adaptations.history import error_budget as error_budget  # for other apps
from apps.adaptations.history import experience, grafts, layer_histories, run_facts
from apps.adaptations.history import policy_standing as policy_standing  # for other apps
from apps.adaptations.models import Adaptation, DecisionRecord, Plan, Snooze
from apps.adaptations.variants import admitted
from apps.blueprints.models import Blueprint
from apps.kernels.selectors import cache_stats
from apps.policies.services import current_policy
from apps.rest.clock import now as database_now
from apps.runs.models import Run
from apps.runs.selectors import HUGE_COLUMNS_OF_RUN
from apps.telemetry.selectors import newest_frames, newest_metrics
from apps.violations.models import Violation
from apps.violations.selectors import open_findings
from apps.workers.models import CompileJob
from esper.contracts import (
    ADAPTATION_ENDED,
    RUN_ENDED,
    AdaptationState,
    Experience,
    GraftKind,
    JobState,
    LayerInfo,
    Risk,
    RunMode,
    RunningTest,
    codec,
    wire,
)
from esper.contracts.protocol import Active, Snapshot
from esper.reward import LossWindow, judge, looks_of

RECENT_VIOLATIONS = 50


def adaptations() -> QuerySet[Adaptation]:
    """Adaptations with the related rows that a list shows."""
    return Adaptation.objects.select_related(
        "run",
        "blueprint",
        "decided_by",
        "claimed_by",
        "taken_back_by",
        "assigned_to",
        "escalated_by",
        "plan",
        "delegation__granted_by",
    ).defer(*HUGE_COLUMNS_OF_RUN)


def waiting_for_a_person() -> QuerySet[Adaptation]:
    """Those that have not expired; the next to expire comes first."""
    return Adaptation.objects.filter(
        Q(deadline_at__isnull=True) | Q(deadline_at__gt=database_now()),
        state=AdaptationState.AWAITING_APPROVAL,
    ).order_by(F("deadline_at").asc(nulls_last=True), "id")


def in_inbox_of(user: User) -> QuerySet[Adaptation]:
    """Those that wait for a person, without what this one has snoozed.

    Members of a plan are in it, too: a list shows the plan in their place.
    """
    asleep = Snooze.objects.filter(user=user, until__gt=database_now()).values("adaptation")
    return waiting_for_a_person().exclude(pk__in=asleep)


def plans() -> QuerySet[Plan]:
    """Plans with the related rows that a list shows."""
    return Plan.objects.select_related("run", "decided_by", "taken_back_by", "safety_policy")


def snoozed_by(user: User) -> QuerySet[Adaptation]:
    asleep = Snooze.objects.filter(user=user, until__gt=database_now()).values("adaptation")
    return waiting_for_a_person().filter(pk__in=asleep)


def run_snapshot(run: Run) -> Snapshot:
    """Everything that ``decide`` reads."""
    facts = run_facts(run)
    policy = current_policy(run)
    return Snapshot(
        run=run.uid,
        epoch=run.epoch,
        mode=RunMode(run.mode),
        step=run.step,
        layers=wire.from_wire(tuple[LayerInfo, ...], run.layers),
        frames=tuple(newest_frames(run)),
        metrics=tuple(newest_metrics(run)),
        model_parameters=run.model_parameters,
        added_parameters=facts.added_parameters,
        adaptations_today=facts.today,
        in_flight=facts.in_flight,
        last_adaptation_step=facts.last_step,
        frozen=facts.frozen,
        history=layer_histories(run),
        experience=experience(),
        disabled_blueprints=tuple(
            Blueprint.objects.filter(Q(enabled=False) | Q(present=False))
            .order_by("slug")
            .values_list("slug", flat=True)
        ),
        safety_policy=policy.safety_policy(),
        policy_version=policy.version,
        champion=policy_standing().champion,
        active=tuple(_active_message(graft) for graft in _active_grafts(run)),
        findings=open_findings(run),
        variants=admitted(),
    )


def running_test(adaptation: Adaptation) -> RunningTest | None:
    """Where a graft's test stands, by what its trainer has reported; None outside probation."""
    step, blueprint = adaptation.graft_step, adaptation.blueprint
    if adaptation.state != AdaptationState.PROBATION or step is None or blueprint is None:
        return None
    metrics = newest_metrics(adaptation.run)
    losses = [(item.step, item.values["loss"]) for item in metrics if "loss" in item.values]
    window = LossWindow(
        np.array([at for at, _ in losses], dtype=np.int64),
        np.array([loss for _, loss in losses], dtype=np.float64),
    )
    before, after = window.split(step)
    return judge(
        before,
        after,
        graft_step=step,
        policy=current_policy(adaptation.run).safety_policy(),
        kind=GraftKind(blueprint.kind),
        looks=looks_of(metrics, adaptation.uid),
        serves_loss=not blueprint.requires,
    ).test


def decisions(run: Run) -> QuerySet[DecisionRecord]:
    """Without the snapshots, which are large."""
    return DecisionRecord.objects.filter(run=run).defer("snapshot").select_related("adaptation")


def _active_grafts(run: Run) -> QuerySet[Adaptation]:
    """Without the remedies, which the trainer judges."""
    return (
        grafts(run).exclude(state__in=ADAPTATION_ENDED).select_related("blueprint").order_by("id")
    )


def _active_message(adaptation: Adaptation) -> Active:
    return Active(
        uid=adaptation.uid,
        state=AdaptationState(adaptation.state),
        layer=adaptation.layer,
        blueprint=adaptation.grafted_blueprint.slug,
        kind=GraftKind(adaptation.grafted_blueprint.kind),
        risk=Risk(adaptation.risk),
        graft_step=adaptation.graft_step,
        deadline_at=adaptation.deadline_at,
    )


def _experience_to_wire(cases: Experience) -> dict[str, Any]:
    return {**asdict(cases), "mean_reward": codec.number_to_wire(cases.mean_reward)}


def experience_rows() -> list[dict[str, Any]]:
    return [
        {"blueprint": slug, **_experience_to_wire(cases)}
        for slug, cases in sorted(experience().items())
    ]


def integration_status() -> dict[str, Any]:
    """The seed's ``get_integration_status``, for all runs of this server."""
    active = Adaptation.objects.filter(remedy="").exclude(state__in=ADAPTATION_ENDED)
    violations = Violation.objects.select_related("run").defer(*HUGE_COLUMNS_OF_RUN)[
        :RECENT_VIOLATIONS
    ]
    return {
        "active_adaptations": {
            adaptation.uid: {"run": adaptation.run.uid, **wire.to_wire(_active_message(adaptation))}
            for adaptation in active.select_related("run", "blueprint").order_by("id")
        },
        "blueprint_cache_stats": cache_stats(),
        "execution_metrics": _execution_metrics(),
        "safety_violations": [
            {
                "uid": violation.uid,
                "run": violation.run.uid if violation.run else None,
                "layer": violation.layer,
                "rule": violation.rule,
                "severity": violation.severity,
                "observed": violation.observed,
                "limit": violation.limit,
                "action": violation.action,
                "created_at": violation.created_at.isoformat(),
            }
            for violation in violations
        ],
    }


def _execution_metrics() -> dict[str, Any]:
    states = dict(
        Adaptation.objects.order_by()
        .values_list("state")
        .annotate(Count("id"))
        .values_list("state", "id__count")
    )
    kept = states.get(AdaptationState.KEPT, 0)
    undone = states.get(AdaptationState.ROLLED_BACK, 0) + states.get(AdaptationState.REVERTED, 0)
    pause = Adaptation.objects.aggregate(mean=Avg("pause_ms"), most=Max("pause_ms"))
    reward = Adaptation.objects.exclude(reward=None).aggregate(mean=Avg("reward"))
    return {
        "adaptations_by_state": states,
        "success_rate": kept / (kept + undone) if kept + undone else None,
        "mean_reward": reward["mean"],
        "mean_pause_ms": pause["mean"],
        "max_pause_ms": pause["most"],
        "live_runs": Run.objects.exclude(state__in=RUN_ENDED).count(),
        "queued_jobs": CompileJob.objects.filter(state=JobState.QUEUED).count(),
        "running_jobs": CompileJob.objects.filter(state=JobState.RUNNING).count(),
    }
