"""What a kept graft goes on to earn, from the looks that its trainer reports after its verdict."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from django.db import transaction

from apps.adaptations.models import Adaptation
from apps.runs.models import Run
from apps.runs.services import lock_run
from apps.telemetry.selectors import metrics_after
from esper.contracts import AdaptationState
from esper.contracts.protocol import StepValues
from esper.reward import after_later_looks, looks_of
from esper.reward.verdict import GAIN, LOSS


def pay_later_looks(run: Run, metrics: Iterable[StepValues]) -> None:
    """Pay those of the run's kept grafts whose gain was measured again and is still there.

    How much is in :mod:`esper.reward.terms`. State, version and audit log stay as they are: the
    number is what policies learn from, and allows nothing.

    Args:
        metrics: what was just stored of the run.
    """
    named = {name for entry in metrics for name in entry.values if name.startswith(GAIN)}
    if named:
        _pay(run, sorted(name.removeprefix(GAIN) for name in named))


@transaction.atomic
def _pay(run: Run, uids: Sequence[str]) -> None:
    lock_run(run.pk)
    kept = Adaptation.objects.filter(run=run, uid__in=uids, state=AdaptationState.KEPT)
    for adaptation in kept.select_related("safety_policy"):
        uid, terms, grafted = adaptation.uid, adaptation.reward_terms, adaptation.graft_step
        if terms is None or grafted is None:
            continue
        ended = grafted + adaptation.safety_policy.safety_policy().probation_steps
        looks = looks_of(metrics_after(run, (GAIN + uid, LOSS + uid), step=ended), uid)
        now = after_later_looks(terms, looks)
        if now != terms:
            Adaptation.objects.filter(pk=adaptation.pk).update(
                reward_terms=now, reward=sum(now.values())
            )
