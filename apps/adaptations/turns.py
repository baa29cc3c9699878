"""Whose turn it is in a plan: its members go into the model one after another."""

from __future__ import annotations

from apps.adaptations.models import Adaptation
from esper.contracts import AdaptationState, PlanState

IN_THE_MODEL = (AdaptationState.PROBATION, AdaptationState.KEPT)


def its_turn(adaptation: Adaptation) -> bool:
    """It is in no plan, or all members before it are in the model and the plan goes on."""
    if adaptation.plan_id is None or adaptation.plan_place is None:
        return True
    before = Adaptation.objects.filter(
        plan=adaptation.plan_id, plan_place__lt=adaptation.plan_place
    )
    applying = Adaptation.objects.filter(pk=adaptation.pk, plan__state=PlanState.APPLYING)
    return applying.exists() and not before.exclude(state__in=IN_THE_MODEL).exists()
