"""Earlier adaptations in numbers, for gates, Tamiyo and pages."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from django.db.models import Avg, Count, Q, QuerySet, Sum
from django.db.models.functions import Coalesce

from apps.adaptations.models import RECOVERED, Adaptation
from apps.policies.selectors import freeze_over
from apps.policies.services import current_policy, kill_over
from apps.rest.clock import now as database_now
from apps.rest.numbers import is_number
from apps.runs.models import Run
from esper.contracts import (
    ADAPTATION_ENDED,
    ADAPTATION_GRAFTED,
    AdaptationState,
    Experience,
    LayerHistory,
    SafetyPolicy,
)
from esper.policy import BanditPolicy, HeuristicPolicy
from esper.policy.curating import NEWEST, Outcome, Standing, standing
from esper.reward.terms import ROLLBACK_COST

_BAD_ENDS = (AdaptationState.ROLLED_BACK, AdaptationState.REVERTED)
# Nobody wanted it: a person said no, or nobody answered in time.
_REFUSED = (AdaptationState.REJECTED, AdaptationState.EXPIRED)
# After these a layer has a longer cooldown, so that nobody is asked again at once.
_REGRETTED = (*_BAD_ENDS, *_REFUSED)


# It failed a check or could not be grafted; the same proposal would fail again.
_FAILED = (
    AdaptationState.DECLINED,
    AdaptationState.COMPILE_FAILED,
    AdaptationState.NOT_APPLIED,
    AdaptationState.APPLY_FAILED,
)


CASES_READ = 5_000  # each proposal reads them; older ones say little about the present policy

# The step from which a cooldown counts: the end, else the graft, else the decision, else the
# proposal. Training goes on while a person thinks and while a graft is tested, so a cooldown that
# began with the proposal could be over before the end.
_AT = Coalesce("ended_step", "graft_step", "decided_step", "proposed_step")


@dataclass(frozen=True, slots=True)
class RunFacts:
    """A run's numbers for the gates; ``last_step`` is -1 before the first adaptation."""

    in_flight: int
    last_step: int
    last_rolled_back: bool
    added_parameters: int
    today: int
    frozen: str


def run_facts(run: Run, *, besides: int = 0) -> RunFacts:
    """``besides``: key of the adaptation that is judged itself, where it exists already."""
    own = grafts(run).exclude(pk=besides)
    counts = own.filter(Q(graft_step__isnull=False) | Q(state__in=(*_REFUSED, *_FAILED)))
    last = counts.annotate(at=_AT).order_by("-at", "-id").values_list("at", "state").first()
    totals = own.aggregate(
        in_flight=Count("id", filter=~Q(state__in=ADAPTATION_ENDED) & Q(plan=None)),
        # a plan is decided on as a whole, and counts as one
        plans=Count("plan", filter=~Q(state__in=ADAPTATION_ENDED), distinct=True),
        today=Count("id", filter=Q(grafted_at__gt=database_now() - timedelta(days=1))),
        added=Sum("forecast_parameters", filter=Q(state__in=ADAPTATION_GRAFTED)),
    )
    return RunFacts(
        in_flight=totals["in_flight"] + totals["plans"],
        last_step=last[0] if last else -1,
        last_rolled_back=bool(last and last[1] in _REGRETTED),
        added_parameters=totals["added"] or 0,
        today=totals["today"],
        frozen=why_frozen(run),
    )


def grafts(run: Run) -> QuerySet[Adaptation]:
    """A run's adaptations that are grafts."""
    return Adaptation.objects.filter(run=run, remedy="")


def why_frozen(run: Run) -> str:
    """Why nothing may be changed in this run now; empty when changes are allowed."""
    kill = kill_over(run.project_id)
    if kill is not None:
        return kill.in_words
    if run.quarantined_reason:
        return f"the run is quarantined: {run.quarantined_reason}"
    if run.adaptation_paused_by:
        return f"{run.adaptation_paused_by} has paused adaptation of this run"
    if run.ended:
        return f"the run has {run.state}"
    budget = error_budget(run)
    if budget.used_up:
        return (
            f"the run's error budget is used up, and it is only observed: adaptations that were "
            f"taken out have cost {budget.used:.1%} of the loss, at most {budget.limit:.1%}"
        )
    return ""


def freeze_asks(run: Run) -> tuple[str, ...]:
    """Why a proposal waits, though everything else would let it go: a freeze is in effect."""
    freeze = freeze_over(run.project_id)
    return () if freeze is None else (f"Nothing is applied now: {freeze.in_words}",)


def why_not_sent(adaptation: Adaptation, run: Run) -> str:
    """As :func:`why_stopped`, and a freeze: what was approved before it must not reach the run."""
    stopped = why_stopped(adaptation, run)
    freeze = None if stopped else freeze_over(run.project_id)
    return stopped if freeze is None else freeze.in_words


def why_stopped(adaptation: Adaptation, run: Run) -> str:
    """Why this adaptation may not go on now; ``run``: its run, as it is now."""
    frozen = why_frozen(run)
    if frozen or adaptation.blueprint is None or adaptation.blueprint.enabled:
        return frozen
    return f"blueprint {adaptation.slug} is switched off: {adaptation.blueprint.disabled_reason}"


@dataclass(frozen=True, slots=True)
class ErrorBudget:
    """Harm of a run's adaptations, and how much the policy allows; shares of the run's loss."""

    used: float
    limit: float

    @property
    def used_up(self) -> bool:
        return self.used > self.limit


def error_budget(run: Run, policy: SafetyPolicy | None = None) -> ErrorBudget:
    """What the adaptations that were taken out have cost.

    Each costs what the forecast of the untouched run was better, at least
    :data:`~esper.reward.terms.ROLLBACK_COST`: it was there for nothing.

    Args:
        policy: that holds for the run; None: it is looked up.
    """
    rows = Adaptation.objects.filter(
        run=run, state=AdaptationState.ROLLED_BACK, graft_step__isnull=False
    ).values_list("forecast_gain", "evidence")
    used = sum(_harm(gain, evidence.get("loss")) for gain, evidence in rows)
    policy = policy or current_policy(run).safety_policy()
    return ErrorBudget(used, policy.error_budget_ratio)


def _harm(gain: float | None, loss: float | None) -> float:
    """A share of the loss; ``gain`` and ``loss`` are in its units, None unknown."""
    if gain is None or not loss:
        return ROLLBACK_COST
    return max(ROLLBACK_COST, -gain / abs(loss))


def layer_histories(run: Run, *, besides: int = 0) -> dict[str, LayerHistory]:
    """By layer name, for the layers that have a history; ``besides`` as in ``run_facts``."""
    rows = (
        grafts(run)
        .exclude(pk=besides)
        .annotate(at=_AT)
        .order_by("id")
        .values_list("layer", "state", "at", "blueprint__slug", "ended_at")
    )
    now = database_now()
    histories: dict[str, LayerHistory] = {}
    for layer, state, at, slug, ended_at in rows:
        before = histories.get(layer, LayerHistory())
        histories[layer] = LayerHistory(
            grafts=(*before.grafts, slug) if state in ADAPTATION_GRAFTED else before.grafts,
            in_flight=before.in_flight or state not in ADAPTATION_ENDED,
            last_adaptation_step=at,
            last_rolled_back=state in _REGRETTED,
            refused_seconds=(now - ended_at).total_seconds()
            if state in _REFUSED and ended_at is not None
            else before.refused_seconds,
        )
    return histories


def experience() -> dict[str, Experience]:
    """Closed cases by blueprint slug; what was undone later counts as not kept."""
    rows = (
        Adaptation.objects.filter(remedy="", state__in=(AdaptationState.KEPT, *_BAD_ENDS))
        .exclude(graft_step=None)
        .exclude(policy=RECOVERED)  # nobody here has seen how it came about
        .values("blueprint__slug")
        .annotate(
            kept=Count("id", filter=Q(state=AdaptationState.KEPT)),
            lost=Count("id", filter=Q(state__in=_BAD_ENDS)),
            mean=Avg("reward"),
        )
    )
    return {
        row["blueprint__slug"]: Experience(
            kept=row["kept"],
            rolled_back=row["lost"],
            mean_reward=math.nan if row["mean"] is None else row["mean"],
        )
        for row in rows
    }


def closed_confidences() -> list[tuple[str, float, bool]]:
    """(blueprint, the confidence it was proposed with, it was kept) of closed cases, oldest first.

    The newest ``CASES_READ``. A confidence that was not known is left out.
    """
    rows = (
        Adaptation.objects.filter(remedy="", state__in=(AdaptationState.KEPT, *_BAD_ENDS))
        .exclude(graft_step=None)
        .exclude(confidence=None)
        .exclude(policy=RECOVERED)
        .order_by("-id")
        .values_list("blueprint__slug", "confidence", "state")[:CASES_READ]
    )
    newest_first = [
        (slug, said, state == AdaptationState.KEPT)
        for slug, said, state in rows
        if said is not None
    ]
    return newest_first[::-1]


def policy_outcomes() -> list[Outcome]:
    """Closed decisions with the chances that each policy gave them, oldest first."""
    rows = (
        Adaptation.objects.filter(
            remedy="", plan=None, state__in=(AdaptationState.KEPT, *_BAD_ENDS)
        )
        .exclude(reward=None)
        .exclude(decision=None)
        .order_by("-id")
        .values_list("policy", "decision__message__chances", "reward")[:NEWEST]
    )
    found = [
        Outcome(policy, _chances(logged), reward)
        for policy, logged, reward in rows
        if reward is not None
    ]
    return found[::-1]


def _chances(logged: Any) -> dict[str, float]:
    """As Tamiyo has logged them; a number that is no probability is left out."""
    return {
        str(name): float(value)
        for name, value in (logged or {}).items()
        if is_number(value) and 0.0 <= value <= 1.0
    }


def policy_standing() -> Standing:
    """Which policy decides, by the newest closed decisions; nothing of it is stored."""
    return standing(policy_outcomes(), incumbent=HeuristicPolicy.name, challenger=BanditPolicy.name)


def category_cases(category: str) -> int:
    """Closed cases of all blueprints of one category."""
    closed = Adaptation.objects.filter(
        blueprint__category=category,
        state__in=(AdaptationState.KEPT, *_BAD_ENDS),
        graft_step__isnull=False,
    )
    return closed.exclude(policy=RECOVERED).count()
