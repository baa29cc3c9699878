"""The thresholds in force, and their changes by people."""

from __future__ import annotations

from typing import Any

from django.db import transaction

from apps.accounts.actors import Actor
from apps.accounts.models import User
from apps.accounts.policy import ALLOWED, Act, may
from apps.audit.services import record
from apps.notifications.services import SYSTEM_TOPIC, publish
from apps.policies.models import AdaptationSwitch, PolicyVersion
from apps.rest.problems import Problem
from esper.contracts import SafetyPolicy
from esper.exceptions import CodecError


def current_policy() -> PolicyVersion:
    """The newest version; the first one is made from the defaults."""
    newest = PolicyVersion.objects.first()
    if newest is not None:
        return newest
    created, _ = PolicyVersion.objects.get_or_create(
        version=1, defaults={"values": _values(SafetyPolicy()), "reason": "defaults of Esper"}
    )
    return created


@transaction.atomic
def publish_policy(*, changes: dict[str, Any], reason: str, user: User, via: str) -> PolicyVersion:
    """Publish a new version with some thresholds changed; the next decision uses it.

    Raises:
        Problem: not allowed, no reason, an unknown threshold, or invalid values.
    """
    permission = may(user, Act.EDIT_POLICY)
    if not permission.allowed:
        raise Problem(403, permission.code, permission.why)
    if not reason.strip():
        raise Problem(422, "reason-required", "Say why the thresholds change.")
    current = current_policy()
    unknown = sorted(set(changes) - set(_values(SafetyPolicy())))
    if unknown:
        raise Problem(422, "invalid", f"There is no threshold called {', '.join(unknown)}.")
    values = {**current.values, **changes}
    if values == current.values:
        raise Problem(422, "invalid", f"All values are the same as in policy v{current.version}.")
    try:
        policy = SafetyPolicy.from_wire({**values, "version": current.version + 1})
    except CodecError as error:
        raise Problem(422, "invalid", str(error)) from error
    _check_reachable(policy.approvals_for_high_risk)
    created = PolicyVersion.objects.create(
        version=current.version + 1, values=values, reason=reason.strip(), author=user
    )
    before = {name: current.values.get(name) for name in changes}
    record(
        actor=Actor.person(user, via=via),
        act="policy.published",
        object_kind="policy",
        object_uid=f"v{created.version}",
        reason=reason,
        data={"before": before, "after": changes},
    )
    publish(topic=SYSTEM_TOPIC, type="policy.published", data={"version": created.version})
    return created


def _check_reachable(approvals: int) -> None:
    """A policy that no set of people can satisfy would let every such adaptation expire."""
    approvers = User.objects.filter(is_active=True, role__in=ALLOWED[Act.APPROVE]).count()
    if approvals > max(1, approvers):
        raise Problem(
            422,
            "quorum-unreachable",
            f"{approvals} people would have to approve a high risk; there are {approvers} who may.",
        )


def _values(policy: SafetyPolicy) -> dict[str, Any]:
    values = policy.to_wire()
    del values["version"]
    return values


def adaptation_switch() -> AdaptationSwitch:
    switch, _ = AdaptationSwitch.objects.get_or_create(pk=1)
    return switch
