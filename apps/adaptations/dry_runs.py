"""What would be checked and done if an adaptation were approved now. Nothing is written."""

from __future__ import annotations

from dataclasses import dataclass

from apps.accounts.models import User
from apps.accounts.policy import Permission
from apps.adaptations.acts import permissions, undo_plan
from apps.adaptations.evidence import evidence_drift
from apps.adaptations.models import Adaptation
from apps.adaptations.rechecking import checks_now
from apps.adaptations.votes import votes_missing, votes_needed
from apps.workers.services import compile_queue, queue_is_served
from esper.contracts import Check, SafetyPolicy


@dataclass(frozen=True, slots=True)
class DryRun:
    """An approval that was not made.

    Attributes:
        permission: whether this person could approve it now, and if not, why.
        checks: every gate, with what holds now; only an approval with changed settings is
            refused by one that does not pass.
        steps: what would be done, in sentences, in order.
    """

    permission: Permission
    checks: tuple[Check, ...]
    drift: float | None
    steps: tuple[str, ...]


def dry_run(adaptation: Adaptation, user: User) -> DryRun:
    """Raises ``Problem`` 422 where this server does not know the remedy any more."""
    return DryRun(
        permission=permissions(adaptation, user)["approve"],
        checks=checks_now(adaptation),
        drift=evidence_drift(adaptation),
        steps=tuple(_steps(adaptation, user)),
    )


def _steps(adaptation: Adaptation, user: User) -> list[str]:
    policy = adaptation.safety_policy.safety_policy()
    missing = votes_missing(adaptation, with_vote_of=user)
    if missing:
        needed = votes_needed(adaptation)
        return [
            f"Your approval would be vote {needed - missing} of {needed}. Nothing is changed until "
            f"{missing} more {'person approves' if missing == 1 else 'people approve'} it."
        ]
    made = _remedy_steps(adaptation) if adaptation.remedy else _graft_steps(adaptation)
    return [*made, *_trainer_steps(adaptation, policy), *undo_plan(adaptation)[:2]]


def _remedy_steps(adaptation: Adaptation) -> list[str]:
    return [f"A signed command would be written for {adaptation.run.name}: {adaptation.title}."]


def _graft_steps(adaptation: Adaptation) -> list[str]:
    run = adaptation.run
    layer = run.layer_info(adaptation.layer)
    capability = run.capability_of(layer.device) if layer is not None else run.capability
    served = queue_is_served(compile_queue(capability))
    worker = (
        f"A worker for {capability} is running."
        if served
        else f"No worker for {capability} is running now: without one the job fails after 120 s, "
        "and the run is not changed."
    )
    return [
        f"A kernel of {adaptation.slug} for {adaptation.layer} would be built, or taken from the "
        f"cache, and its cost measured against the limits. {worker}",
        f"A signed command would be written for {run.name}, if all measured limits hold.",
    ]


def _trainer_steps(adaptation: Adaptation, policy: SafetyPolicy) -> list[str]:
    run = adaptation.run
    applied = (
        f"The trainer would have {policy.dispatch_timeout_seconds} s to accept it, and would apply "
        f"it between two steps. {run.name} is at step {run.step:,}."
    )
    if adaptation.remedy:
        return [applied, "It stays while its finding does not come back; else it is ended."]
    return [
        applied,
        f"Probation would last at most {policy.probation_steps:,} steps. The graft stays only if "
        f"it is shown to lower the loss by {policy.min_gain_ratio:.1%} or more.",
    ]
