"""Delegations: a person approves one remedy of one run ahead, within limits and for a time.

    granted -> used, at most so many times -> expired
                                           -> revoked

A delegation is never wider than the policy. It answers only the question that the run's mode asks
("supervised: a person decides"), for a remedy that the policy in force would let go alone in an
automatic run. It is looked at in the transaction that writes the remedy, with the policy and with
the rights that hold then.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from django.db import transaction
from django.db.models import Count, QuerySet

from apps.accounts.actors import Actor
from apps.accounts.models import User
from apps.accounts.policy import Act, Permission, may
from apps.adaptations.models import Delegation
from apps.audit.services import record
from apps.blueprints.models import KnownRemedy
from apps.notifications.services import publish, run_topic
from apps.policies.services import current_policy
from apps.rest.clock import now as database_now
from apps.rest.numbers import is_number
from apps.rest.problems import Problem
from apps.runs.models import Run
from apps.runs.services import lock_run
from esper.contracts import Check, Risk, RunMode, SafetyPolicy, ViolationRule, risk_rank

LONGEST = timedelta(hours=24)
MOST_USES = 20
# The only question that a delegation answers; budgets, repeats, risk and evidence stay as they are.
_ANSWERED = frozenset({ViolationRule.RUN_MODE})


def open_delegations(run: Run) -> QuerySet[Delegation]:
    """Those in force by time; whether one is used up is ``used``, which each row has."""
    return (
        Delegation.objects.filter(run=run, revoked_at=None, until__gt=database_now())
        .select_related("granted_by")
        .annotate(used=Count("uses"))
    )


def may_grant(run: Run, user: User) -> Permission:
    return may(user, Act.APPROVE, of=run)


def why_not_delegated(remedy: KnownRemedy, policy: SafetyPolicy) -> str:
    """Why a remedy cannot be delegated under this policy; empty: it can."""
    if remedy.asks:
        return "It may undo what the script wants, so a person decides each time."
    if remedy.changes_nothing:
        return "It changes nothing, so nobody has to approve it."
    if remedy.risk == Risk.HIGH or risk_rank(Risk(remedy.risk)) > risk_rank(policy.auto_max_risk):
        return (
            f"Its risk is {remedy.risk}; the policy lets risk up to {policy.auto_max_risk} go "
            "without a person."
        )
    return ""


@transaction.atomic
def grant_delegation(
    *,
    run: Run,
    user: User,
    via: str,
    remedy: str,
    limits: Mapping[str, Any],
    minutes: int,
    most_uses: int,
    reason: str,
) -> Delegation:
    """Approve ``remedy`` in this run ahead, within ``limits``, for ``minutes``.

    Raises:
        Problem: not allowed (403), the run has ended (409), no reason, an unknown remedy, setting
            or limit, or the policy asks a person for it (422).
    """
    permission = may_grant(run, user)
    if not permission.allowed:
        raise Problem(403, permission.code, permission.why)
    if run.ended:
        raise Problem(409, "run-ended", f"This run has ended: it is {run.state}.", state=run.state)
    if not reason.strip():
        raise Problem(422, "reason-required", "Say why this may be applied without a person.")
    if run.mode == RunMode.OBSERVE:
        raise Problem(422, "invalid", "This run was attached to observe: nothing may be changed.")
    known = KnownRemedy.objects.filter(slug=remedy, present=True).first()
    if known is None:
        raise Problem(422, "unknown-remedy", f"There is no remedy called {remedy!r}.")
    if why := why_not_delegated(known, current_policy(run).safety_policy()):
        raise Problem(422, "not-delegable", f"{remedy} cannot be delegated. {why}")
    bounds = {name: _bounds(known, name, given) for name, given in limits.items()}
    made = Delegation.objects.create(
        run=run,
        granted_by=user,
        remedy=known.slug,
        limits=bounds,
        in_words=_in_words(known, bounds),
        most_uses=most_uses,
        until=database_now() + timedelta(minutes=minutes),
        reason=reason.strip(),
    )
    _tell(made, Actor.person(user, via=via), "delegation.granted", reason)
    return made


@transaction.atomic
def revoke_delegation(
    *, delegation: Delegation, user: User, via: str, reason: str = ""
) -> Delegation:
    """End a delegation now. What was applied under it stays; it can be taken back by itself.

    Raises:
        Problem: not allowed (403), or revoked already (409).
    """
    run = delegation.run
    permission = may(user, Act.REJECT, of=run)  # the safe side: as for a rejection
    if not permission.allowed:
        raise Problem(403, permission.code, permission.why)
    lock_run(run.pk)  # a proposal that is being written is over before it is revoked
    row = Delegation.objects.select_for_update().get(pk=delegation.pk)
    if row.revoked_at is not None:
        raise Problem(409, "decision-not-pending", "The delegation was revoked already.")
    row.revoked_at, row.revoked_by = database_now(), user
    row.save(update_fields=["revoked_at", "revoked_by"])
    _tell(row, Actor.person(user, via=via), "delegation.revoked", reason)
    return row


def covering(
    run: Run,
    remedy: KnownRemedy,
    config: Mapping[str, Any],
    checks: Sequence[Check],
    policy: SafetyPolicy,
) -> Delegation | None:
    """The delegation under which this remedy may go without a person; None: a person decides.

    Args:
        config: every setting of the remedy.
        checks: with the policy in force; whatever else than the run's mode asks is not answered.
    """
    if any(check.asks and check.rule not in _ANSWERED for check in checks):
        return None
    if why_not_delegated(remedy, policy):
        return None
    for delegation in open_delegations(run).filter(remedy=remedy.slug):
        still = may_grant(run, delegation.granted_by).allowed
        left = delegation.most_uses - delegation.uses.count()
        if still and left > 0 and _fits(delegation, remedy, config):
            return delegation
    return None


def sentence(delegation: Delegation) -> str:
    """Who has approved what ahead, for the record of an adaptation."""
    until = delegation.until.strftime("%Y-%m-%d %H:%M UTC")
    return (
        f"delegation {delegation.number} of {delegation.granted_by.get_username()}: "
        f"{delegation.in_words}, until {until}"
    )


def _fits(delegation: Delegation, remedy: KnownRemedy, config: Mapping[str, Any]) -> bool:
    for name, value in config.items():
        if name not in delegation.limits:
            if value != remedy.settings.get(name):
                return False
            continue
        low, high = delegation.limits[name]
        total = float(value)
        if multiplies(remedy, name):
            total *= math.prod(float(one.config[name]) for one in delegation.uses.all())
        # A factor of 2 allowed twice would be 4: all uses together stay inside the limits.
        if not low <= total <= high or not low <= float(value) <= high:
            return False
    return True


def multiplies(remedy: KnownRemedy, name: str) -> bool:
    """Whether a setting multiplies something, so that several uses add up."""
    return name == "factor" or f"{{{name}:rate}}" in remedy.phrase


def _bounds(remedy: KnownRemedy, name: str, given: Any) -> list[float]:
    default = remedy.settings.get(name)
    if not is_number(default):
        names = ", ".join(sorted(n for n, v in remedy.settings.items() if is_number(v))) or "none"
        raise Problem(
            422, "invalid", f"{remedy.slug} has no number {name!r} to limit; it has: {names}."
        )
    pair = list(given) if isinstance(given, list | tuple) else []
    if len(pair) != 2 or not all(is_number(end) and math.isfinite(end) for end in pair):
        raise Problem(422, "invalid", f"The limits of {name} are two numbers: lowest, highest.")
    if pair[0] > pair[1]:
        raise Problem(422, "invalid", f"The lowest {name} is above the highest.")
    return [float(end) for end in pair]


def _in_words(remedy: KnownRemedy, limits: Mapping[str, Sequence[float]]) -> str:
    parts = [
        f"{name.replace('_', ' ')} from {low:g} to {high:g}"
        + (", all uses together" if multiplies(remedy, name) else "")
        for name, (low, high) in limits.items()
    ]
    words = f"{remedy.title} ({'; '.join(parts)})" if parts else f"{remedy.title}, as it is"
    return words[:300]


def _tell(delegation: Delegation, actor: Actor, act: str, reason: str) -> None:
    run = delegation.run
    data = {
        "number": delegation.number,
        "remedy": delegation.remedy,
        "limits": delegation.limits,
        "most_uses": delegation.most_uses,
        "until": delegation.until.isoformat(),
        "in_words": delegation.in_words,
    }
    record(
        actor=actor,
        act=act,
        object_kind="delegation",
        object_uid=delegation.uid,
        run_uid=run.uid,
        reason=reason,
        data=data,
    )
    publish(
        topic=run_topic(run.uid),
        type=act,
        data={"delegation": delegation.uid, "number": delegation.number, "run": run.uid},
    )
