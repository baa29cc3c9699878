"""Deadlines and lost partners. Runs every two seconds; doing it twice does no harm."""

from __future__ import annotations

import logging
from datetime import timedelta

from django.conf import settings
from django.db import transaction
from django.utils import timezone

from apps.accounts.actors import SYSTEM
from apps.adaptations.compile_jobs import queue_dispatch, take_lost_job_back
from apps.adaptations.dispatch import request_undo
from apps.adaptations.lifecycle import DEADLINES, transition
from apps.adaptations.models import Adaptation
from apps.adaptations.outcomes import close_open_adaptations, quarantine
from apps.rest.problems import Problem
from apps.runs.models import Command, Run
from apps.runs.services import lock_run, set_state
from apps.violations.services import record_violation
from apps.workers.services import (
    cancel_job,
    jobs_with_lost_lease,
    mark_offline_workers,
    note_unserved_jobs,
    notify_worker,
)
from esper.contracts import (
    RUN_ENDED,
    AdaptationState,
    CommandState,
    JobState,
    RunState,
    Severity,
    ViolationRule,
)

log = logging.getLogger(__name__)

S = AdaptationState
HINT_AGAIN_AFTER = timedelta(seconds=10)


def sweep() -> int:
    """One round; returns how many adaptations were moved."""
    mark_offline_workers()
    for job in jobs_with_lost_lease():
        take_lost_job_back(job)
    note_unserved_jobs()
    _hint_again()
    _expire_commands()
    moved = sum(_expire(adaptation) for adaptation in _overdue())
    _watch_runs()
    return moved


def _overdue() -> list[Adaptation]:
    return list(
        Adaptation.objects.filter(deadline_at__lt=timezone.now(), state__in=list(DEADLINES))
        .select_related("run", "safety_policy", "blueprint", "job")
        .order_by("deadline_at")[:200]
    )


def _expire(adaptation: Adaptation) -> bool:
    try:
        with transaction.atomic():
            lock_run(adaptation.run_id)
            _take_outcome(adaptation)
    except Problem as error:  # somebody was quicker, which is fine
        log.info("A-%s: %s", adaptation.number, error)
        return False
    return True


def _take_outcome(adaptation: Adaptation) -> None:
    state = AdaptationState(adaptation.state)
    outcome = DEADLINES[state].outcome
    reason = f"nothing came of {state.replace('_', ' ')} in time"
    if state == S.COMPILE_QUEUED and adaptation.job is not None and adaptation.job.waits_for:
        reason = f"{reason}: {adaptation.job.waits_for}"
    if state in (S.DISPATCHED, S.ACCEPTED, S.ROLLING_BACK) and not heard_lately(adaptation.run):
        # It may have done what it was told, and cannot say so.
        transition(
            adaptation, S.IN_DOUBT, actor=SYSTEM, reason=f"{reason}; the trainer is not heard of"
        )
    elif state == S.PROBATION:
        _end_probation(adaptation)
    elif outcome == S.ROLLBACK_FAILED:
        quarantine(adaptation, SYSTEM, "the trainer did not confirm the undo in time")
    else:
        if adaptation.job is not None and outcome in (S.COMPILE_FAILED, S.CANCELLED):
            cancel_job(adaptation.job)
        if state != S.AWAITING_APPROVAL:
            _note_deadline(adaptation, reason)
        transition(adaptation, outcome, actor=SYSTEM, reason=reason)


def _end_probation(adaptation: Adaptation) -> None:
    """No verdict in time is never a success."""
    if not heard_lately(adaptation.run):
        reason = "the trainer is not heard of"
        transition(adaptation, S.IN_DOUBT, actor=SYSTEM, reason=reason)
        return
    reason = "no verdict before the deadline: too little was measured to keep it"
    _note_deadline(adaptation, reason, ViolationRule.MISSING_TELEMETRY)
    transition(adaptation, S.ROLLING_BACK, actor=SYSTEM, reason=reason)
    request_undo(adaptation, reason=reason)


def _note_deadline(
    adaptation: Adaptation, reason: str, rule: ViolationRule = ViolationRule.DEADLINE
) -> None:
    record_violation(
        run=adaptation.run,
        rule=rule,
        severity=Severity.CAUTION,
        observed=adaptation.state.replace("_", " "),
        limit=f"{adaptation.deadline_at:%H:%M:%S} UTC" if adaptation.deadline_at else "",
        text=f"A-{adaptation.number} of {adaptation.layer}: {reason}.",
        action="It was ended; nothing is applied by the passing of time.",
        layer=adaptation.layer,
        adaptation_uid=adaptation.uid,
    )


def heard_lately(run: Run) -> bool:
    """Has the trainer said anything within the time that makes a run unreachable?"""
    run.refresh_from_db(fields=["last_seen_at"])
    limit = timezone.now() - timedelta(seconds=settings.ESPER_RUN_UNREACHABLE_SECONDS)
    return run.last_seen_at is not None and run.last_seen_at > limit


def _hint_again() -> None:
    """A doorbell that was lost with Redis is rung again; the work is idempotent."""
    late = timezone.now() - HINT_AGAIN_AFTER
    waiting = Adaptation.objects.filter(changed_at__lt=late).select_related("run", "job")
    for adaptation in waiting.filter(state=S.COMPILE_QUEUED, job__state=JobState.QUEUED):
        with transaction.atomic():
            if _first_this_period(adaptation) and adaptation.job is not None:
                notify_worker(adaptation.job)
    for adaptation in waiting.filter(state=S.COMPILED):
        with transaction.atomic():
            if _first_this_period(adaptation):
                queue_dispatch(adaptation)


def _first_this_period(adaptation: Adaptation) -> bool:
    return bool(
        Adaptation.objects.filter(
            pk=adaptation.pk, version=adaptation.version, changed_at=adaptation.changed_at
        ).update(changed_at=timezone.now())
    )


def _expire_commands() -> None:
    Command.objects.filter(state=CommandState.ISSUED, expires_at__lt=timezone.now()).update(
        state=CommandState.EXPIRED, reason="not acknowledged in time"
    )


def _watch_runs() -> None:
    """A silent run is unreachable, after a day it is lost; both are about our knowledge."""
    now = timezone.now()
    silent = now - timedelta(seconds=settings.ESPER_RUN_UNREACHABLE_SECONDS)
    lost = now - timedelta(seconds=settings.ESPER_RUN_LOST_SECONDS)
    for run in Run.objects.exclude(state__in=RUN_ENDED).filter(last_seen_at__lt=silent):
        with transaction.atomic():
            if run.last_seen_at and run.last_seen_at < lost:
                if set_state(run=run, state=RunState.LOST, actor=SYSTEM, reason="silent for a day"):
                    close_open_adaptations(run, SYSTEM, "the run was lost")
            elif run.state != RunState.UNREACHABLE:
                set_state(run=run, state=RunState.UNREACHABLE, actor=SYSTEM, reason="not heard of")
