"""What would be checked and done if an adaptation were approved now. Nothing is written."""

from __future__ import annotations

from dataclasses import dataclass

from django.utils.formats import number_format
from django.utils.translation import gettext as _
from django.utils.translation import ngettext

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
            ngettext(
                "Your approval would be vote %(vote)s of %(needed)s. Nothing is changed until "
                "%(missing)s more person approves it.",
                "Your approval would be vote %(vote)s of %(needed)s. Nothing is changed until "
                "%(missing)s more people approve it.",
                missing,
            )
            % {"vote": needed - missing, "needed": needed, "missing": missing}
        ]
    made = _remedy_steps(adaptation) if adaptation.remedy else _graft_steps(adaptation)
    return [*made, *_trainer_steps(adaptation, policy), *undo_plan(adaptation)[:2]]


def _remedy_steps(adaptation: Adaptation) -> list[str]:
    return [
        _("A signed command would be written for %(run)s: %(title)s.")
        % {"run": adaptation.run.name, "title": adaptation.title}
    ]


def _graft_steps(adaptation: Adaptation) -> list[str]:
    run = adaptation.run
    layer = run.layer_info(adaptation.layer)
    capability = run.capability_of(layer.device) if layer is not None else run.capability
    served = queue_is_served(compile_queue(capability))
    worker = (
        _("A worker for %(capability)s is running.")
        if served
        else _(
            "No worker for %(capability)s is running now: without one the job fails after 120 s, "
            "and the run is not changed."
        )
    )
    kernel = _(
        "A kernel of %(slug)s for %(layer)s would be built, or taken from the cache, and its cost "
        "measured against the limits."
    )
    return [
        f"{kernel} {worker}"
        % {"slug": adaptation.slug, "layer": adaptation.layer, "capability": capability},
        _("A signed command would be written for %(run)s, if all measured limits hold.")
        % {"run": run.name},
    ]


def _trainer_steps(adaptation: Adaptation, policy: SafetyPolicy) -> list[str]:
    run = adaptation.run
    applied = _(
        "The trainer would have %(seconds)s s to accept it, and would apply it between two steps. "
        "%(run)s is at step %(step)s."
    ) % {
        "seconds": policy.dispatch_timeout_seconds,
        "run": run.name,
        "step": _grouped(run.step),
    }
    if adaptation.remedy:
        return [applied, _("It stays while its finding does not come back; else it is ended.")]
    probation = _(
        "Probation would last at most %(steps)s steps. The graft stays only if it is shown to "
        "lower the loss by %(gain)s or more."
    ) % {
        "steps": _grouped(policy.probation_steps),
        "gain": f"{number_format(100 * policy.min_gain_ratio, decimal_pos=1)}%",
    }
    return [applied, probation]


def _grouped(steps: int) -> str:
    return number_format(steps, force_grouping=True)
