"""How many people must approve an adaptation, and who has."""

from __future__ import annotations

from typing import Any

from django.db.models import QuerySet

from apps.accounts.models import User
from apps.adaptations.models import Adaptation, Vote
from esper.contracts import Risk


def votes_needed(adaptation: Adaptation) -> int:
    """By the policy that judged it; at least one."""
    if adaptation.risk != Risk.HIGH:
        return 1
    return max(1, adaptation.safety_policy.safety_policy().approvals_for_high_risk)


def votes_on(adaptation: Adaptation) -> QuerySet[Vote]:
    """Those for the adaptation as it is now: a vote for other settings does not count."""
    return Vote.objects.filter(adaptation=adaptation, evidence_hash=adaptation.evidence_hash)


def votes_missing(adaptation: Adaptation, *, with_vote_of: User | None = None) -> int:
    """How many different people must still approve it."""
    needed = votes_needed(adaptation)
    if needed == 1:
        return 0 if with_vote_of is not None else 1
    voters = set(votes_on(adaptation).values_list("user_id", flat=True))
    if with_vote_of is not None:
        voters.add(with_vote_of.pk)
    return max(0, needed - len(voters))


def has_voted(adaptation: Adaptation, user: User) -> bool:
    return votes_needed(adaptation) > 1 and votes_on(adaptation).filter(user=user).exists()


def votes_of(adaptation: Adaptation) -> dict[str, Any]:
    """``needed``, and the names of those who have approved it, where more than one must."""
    needed = votes_needed(adaptation)
    votes = votes_on(adaptation).select_related("user") if needed > 1 else ()
    return {"needed": needed, "by": [vote.user.get_username() for vote in votes]}


def vote(adaptation: Adaptation, user: User, *, reason: str) -> None:
    Vote.objects.create(
        adaptation=adaptation, user=user, evidence_hash=adaptation.evidence_hash, reason=reason
    )
