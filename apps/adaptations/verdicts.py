"""Tamiyo's verdict at the end of probation."""

from __future__ import annotations

import math
from typing import Any

from django.db import transaction

from apps.accounts.actors import Actor
from apps.adaptations.dispatch import request_undo, tell_kept
from apps.adaptations.lifecycle import StaleAdaptationError, transition
from apps.adaptations.models import Adaptation
from apps.rest.clock import now as database_now
from apps.rest.numbers import finite_or_none
from apps.rest.problems import Problem
from apps.runs.services import lock_run
from esper.contracts import AdaptationState, Verdict


@transaction.atomic
def judge_adaptation(
    *, adaptation: Adaptation, verdict: Verdict, reward_terms: dict[str, float], actor: Actor
) -> Adaptation:
    """Keep the graft or roll it back, and store the numbers of the verdict.

    Raises:
        StaleAdaptationError: it is not in probation (any more).
        Problem: a term of the reward is not finite.
    """
    lock_run(adaptation.run_id)
    adaptation = Adaptation.objects.select_for_update().get(pk=adaptation.pk)
    if adaptation.state != AdaptationState.PROBATION:
        raise StaleAdaptationError(adaptation)
    if not all(math.isfinite(value) for value in reward_terms.values()):
        raise Problem(422, "invalid", "Every term of a reward is a finite number.")
    numbers: dict[str, Any] = {
        "ablation_gain": finite_or_none(verdict.ablation_gain),
        "ablation_low": finite_or_none(verdict.ablation_low),
        "ablation_high": finite_or_none(verdict.ablation_high),
        "forecast_gain": finite_or_none(verdict.forecast_gain),
        "forecast_interval": finite_or_none(verdict.forecast_interval),
        "steps_observed": verdict.steps_observed,
        "reward_terms": reward_terms,
        "reward": sum(reward_terms.values()),
    }
    if verdict.keep:
        transition(
            adaptation,
            AdaptationState.KEPT,
            actor=actor,
            reason=verdict.reason,
            kept_at=database_now(),
            **numbers,
        )
        tell_kept(adaptation, reason=verdict.reason)
        return adaptation
    transition(
        adaptation, AdaptationState.ROLLING_BACK, actor=actor, reason=verdict.reason, **numbers
    )
    request_undo(adaptation, reason=verdict.reason)
    return adaptation
