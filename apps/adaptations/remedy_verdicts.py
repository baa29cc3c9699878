"""The trainer's verdict on a remedy: its finding is over and stays away, or not."""

from __future__ import annotations

from django.db import transaction

from apps.accounts.actors import Actor
from apps.adaptations.dispatch import request_undo, tell_kept
from apps.adaptations.lifecycle import transition
from apps.adaptations.models import Adaptation
from apps.adaptations.outcomes import adaptation_of, inherited
from apps.rest.clock import now as database_now
from apps.rest.problems import Problem
from apps.runs.models import Run
from apps.runs.services import check_epoch, lock_run
from esper.contracts import AdaptationState
from esper.contracts.protocol import RemedyVerdict

S = AdaptationState


@transaction.atomic
def judge_remedy(*, run: Run, verdict: RemedyVerdict, actor: Actor) -> Adaptation:
    """Keep the remedy, or end it. A repeated verdict, or a late one, changes nothing.

    Raises:
        Problem: old epoch, another run's adaptation, or a graft, which Tamiyo judges.
    """
    run = lock_run(run.pk)  # it may have changed since the request arrived
    check_epoch(run, verdict.epoch)
    of_parent = inherited(run, verdict.adaptation)
    if of_parent is not None:
        return of_parent  # judged there, and here nothing can be taken back
    adaptation = adaptation_of(run, verdict.adaptation)
    if not adaptation.remedy:
        raise Problem(422, "invalid", f"A-{adaptation.number} is a graft, which Tamiyo judges.")
    if adaptation.state != S.PROBATION:
        return adaptation
    if verdict.keep:
        transition(
            adaptation,
            S.KEPT,
            actor=actor,
            reason=verdict.reason,
            kept_at=database_now(),
            steps_observed=verdict.steps_observed,
        )
        tell_kept(adaptation, reason=verdict.reason)
        return adaptation
    transition(
        adaptation,
        S.ROLLING_BACK,
        actor=actor,
        reason=verdict.reason,
        steps_observed=verdict.steps_observed,
    )
    request_undo(adaptation, reason=verdict.reason, did_harm=verdict.hard)
    return adaptation
