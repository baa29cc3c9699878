"""Deadlines, lost leases and silent trainers. Runs every two seconds, and may run twice at once."""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any

from django.conf import settings
from django.db import transaction
from django.db.models import Exists, OuterRef, QuerySet

from apps.accounts.actors import SYSTEM
from apps.adaptations.compile_jobs import queue_dispatch, take_lost_job_back
from apps.adaptations.dispatch import ask_what_is_held, leave_in_doubt, request_undo
from apps.adaptations.lifecycle import DEADLINES, transition
from apps.adaptations.models import Adaptation
from apps.adaptations.outcomes import close_open_adaptations
from apps.adaptations.selectors import waiting_for_a_person
from apps.notifications.services import SYSTEM_TOPIC, publish
from apps.rest.clock import now as database_now
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
    CommandKind,
    CommandState,
    JobState,
    RunState,
    Severity,
    ViolationRule,
)

log = logging.getLogger(__name__)

S = AdaptationState

_OVERDUE = {
    S.AWAITING_APPROVAL: "nobody decided before the deadline",
    S.COMPILE_QUEUED: "no worker took the compile job before the deadline",
    S.COMPILING: "the compile job did not finish before the deadline",
    S.COMPILED: "the kernel was not sent to the trainer before the deadline",
    S.DISPATCHED: "the trainer did not accept the command before the deadline",
    S.ACCEPTED: "the trainer did not confirm the change before the deadline",
    S.PROBATION: "no verdict before the deadline",
    S.ROLLING_BACK: "the trainer did not confirm the rollback before the deadline",
    S.IN_DOUBT: "the trainer did not report before the deadline",
}
NOTIFY_AGAIN_AFTER = timedelta(seconds=10)
# A trainer that was started again says hello at once, which settles what is in doubt.
DOUBT_WITHOUT_HELLO = timedelta(seconds=60)
_WITH_TRAINER = (S.DISPATCHED, S.ACCEPTED, S.ROLLING_BACK)


def sweep() -> int:
    """Do one round; return how many adaptations were moved."""
    mark_offline_workers()
    for job in jobs_with_lost_lease():
        take_lost_job_back(job)
    note_unserved_jobs()
    _notify_again()
    _tell_everybody()
    _expire_commands()
    moved = sum(_expire(adaptation) for adaptation in _overdue())
    for adaptation in _not_asked():
        _ask(adaptation)
    _watch_runs()
    return moved


def _overdue() -> list[Adaptation]:
    return list(
        Adaptation.objects.filter(deadline_at__lt=database_now(), state__in=list(DEADLINES))
        .select_related("run", "safety_policy", "blueprint", "job")
        .order_by("deadline_at")[:200]
    )


def _expire(adaptation: Adaptation) -> bool:
    try:
        with transaction.atomic():
            lock_run(adaptation.run_id)
            _take_outcome(adaptation)
    except Problem as error:  # a person or a report has moved it meanwhile
        log.info("A-%s: %s", adaptation.number, error)
        return False
    return True


def _not_asked() -> list[Adaptation]:
    """In doubt for longer than a hello takes, and no question is on its way."""
    since = database_now() - DOUBT_WITHOUT_HELLO
    doubtful = Adaptation.objects.filter(state=S.IN_DOUBT, changed_at__lt=since)
    doubtful = doubtful.filter(run__restored_at=None).exclude(run__state__in=RUN_ENDED)
    return list(doubtful.exclude(Exists(_questions())).select_related("run")[:200])


def _questions() -> QuerySet[Command]:
    """Those about an adaptation since it is in doubt, to the trainer's present start."""
    return Command.objects.filter(
        kind=CommandKind.REPORT_HELD,
        adaptation_uid=OuterRef("uid"),
        epoch=OuterRef("run__epoch"),
        issued_at__gte=OuterRef("changed_at"),
    )


def _ask(adaptation: Adaptation) -> None:
    """The trainer said no hello that has settled it."""
    with transaction.atomic():
        run = lock_run(adaptation.run_id)
        doubtful = Adaptation.objects.filter(pk=adaptation.pk, state=S.IN_DOUBT)
        if reported_recently(run) and doubtful.exclude(Exists(_questions())).exists():
            ask_what_is_held(adaptation)


def _take_outcome(adaptation: Adaptation) -> None:
    state = AdaptationState(adaptation.state)
    outcome = DEADLINES[state].outcome
    reason = _OVERDUE[state]
    if state == S.COMPILE_QUEUED and adaptation.job is not None and adaptation.job.waits_for:
        reason = f"{reason}: {adaptation.job.waits_for}"
    if state in _WITH_TRAINER:
        _leave_unanswered(adaptation, reason)
    elif state == S.PROBATION:
        _end_probation(adaptation)
    else:
        if adaptation.job is not None and outcome in (S.COMPILE_FAILED, S.CANCELLED):
            cancel_job(adaptation.job)
        if state != S.AWAITING_APPROVAL:
            _note_deadline(adaptation, reason)
        transition(adaptation, outcome, actor=SYSTEM, reason=reason)


def _leave_unanswered(adaptation: Adaptation, reason: str) -> None:
    """A missing answer is no failure: it may come late, or be lost."""
    silent = "" if reported_recently(adaptation.run) else f"{_last_report(adaptation.run)}; "
    reason = f"{reason}; {silent}it is asked whether its model holds the change"
    leave_in_doubt(adaptation, actor=SYSTEM, reason=reason)


def _end_probation(adaptation: Adaptation) -> None:
    """Without a verdict in time it is rolled back, never kept."""
    if not reported_recently(adaptation.run):
        leave_in_doubt(adaptation, actor=SYSTEM, reason=_last_report(adaptation.run))
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
        text=f"A-{adaptation.number} {adaptation.title}: {reason}.",
        action="The adaptation was ended. A deadline never applies anything.",
        layer=adaptation.layer,
        adaptation_uid=adaptation.uid,
    )


def reported_recently(run: Run) -> bool:
    """Whether the trainer has reported within the time that makes a run unreachable."""
    run.refresh_from_db(fields=["last_seen_at"])
    limit = database_now() - timedelta(seconds=settings.ESPER_RUN_UNREACHABLE_SECONDS)
    return run.last_seen_at is not None and run.last_seen_at > limit


def _last_report(run: Run) -> str:
    if run.last_seen_at is None:
        return "the trainer has never reported"
    silent = (database_now() - run.last_seen_at).total_seconds()
    return f"the trainer has not reported for {silent:.0f} s"


def _notify_again() -> None:
    """Send task messages again that may be lost with Redis; the work is idempotent."""
    late = database_now() - NOTIFY_AGAIN_AFTER
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
        ).update(changed_at=database_now())
    )


def _tell_everybody() -> None:
    """Of what nobody has claimed although half of the time to decide is over."""
    now = database_now()
    alone = waiting_for_a_person().filter(unanswered_at=None)
    alone = alone.exclude(claimed_until__gt=now).select_related("run", "safety_policy", "blueprint")
    for adaptation in alone[:200]:
        whole = DEADLINES[S.AWAITING_APPROVAL].length(adaptation.safety_policy.safety_policy())
        if adaptation.deadline_at is None or adaptation.deadline_at - now > whole / 2:
            continue
        with transaction.atomic():
            # Compare and set: of two sweeps, one tells.
            mine = Adaptation.objects.filter(pk=adaptation.pk, unanswered_at=None)
            if mine.update(unanswered_at=now):
                publish(topic=SYSTEM_TOPIC, type="adaptation.unanswered", data=_named(adaptation))


def _named(adaptation: Adaptation) -> dict[str, Any]:
    return {
        "adaptation": adaptation.uid,
        "number": adaptation.number,
        "title": adaptation.title,
        "run": adaptation.run.uid,
    }


def _expire_commands() -> None:
    Command.objects.filter(state=CommandState.ISSUED, expires_at__lt=database_now()).update(
        state=CommandState.EXPIRED, reason="not acknowledged in time"
    )


def _watch_runs() -> None:
    """Mark silent runs unreachable, and lost after a day; such a run may still be training."""
    now = database_now()
    silent = now - timedelta(seconds=settings.ESPER_RUN_UNREACHABLE_SECONDS)
    lost = now - timedelta(seconds=settings.ESPER_RUN_LOST_SECONDS)
    for run in Run.objects.exclude(state__in=RUN_ENDED).filter(last_seen_at__lt=silent):
        with transaction.atomic():
            if run.last_seen_at and run.last_seen_at < lost:
                if set_state(
                    run=run,
                    state=RunState.LOST,
                    actor=SYSTEM,
                    reason="the trainer has not reported for a day",
                ):
                    close_open_adaptations(run, SYSTEM, "the run was lost")
            elif run.state != RunState.UNREACHABLE:
                set_state(
                    run=run,
                    state=RunState.UNREACHABLE,
                    actor=SYSTEM,
                    reason="the trainer has stopped reporting",
                )
