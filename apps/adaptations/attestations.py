"""The signed record of who decided on an adaptation, to be kept by whoever has to prove it."""

from __future__ import annotations

from typing import Any

from django.conf import settings

from apps.adaptations.binding import shown, shown_hash
from apps.adaptations.models import Adaptation
from apps.audit.models import AuditEvent
from apps.audit.services import event_content
from apps.rest.problems import Problem, not_found
from esper.contracts import AdaptationState
from esper.contracts.attestation import attest

_DECISIONS = tuple(
    f"adaptation.{state}" for state in (AdaptationState.APPROVED, AdaptationState.REJECTED)
)


def attestation_of(adaptation: Adaptation) -> dict[str, Any]:
    """The audit event of the decision and what it was about, signed with the audit key.

    Raises:
        Problem: nobody has decided on it yet (404), or its row was changed since (409).
    """
    event = (
        AuditEvent.objects.filter(object_uid=adaptation.uid, act__in=_DECISIONS)
        .order_by("-id")
        .first()
    )
    if event is None:
        raise not_found("decision on this adaptation")
    if event.data.get("evidence_hash") != shown_hash(adaptation):
        raise Problem(
            409,
            "payload-changed",
            "The adaptation was changed in the database since the decision, so it is not attested.",
        )
    recorded = {**event_content(event), "hash": event.hash}
    return attest(recorded, shown(adaptation), settings.ESPER_AUDIT_KEY)


def find_adaptation(name: str) -> Adaptation:
    """By its number for people (A-17) or its uid; raises ``Problem`` 404."""
    digits = name.upper().removeprefix("A-")
    number = int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 18 else None
    rows = Adaptation.objects.select_related("run", "blueprint", "safety_policy")
    found = rows.filter(pk=number).first() if number else rows.filter(uid=name).first()
    if found is None:
        raise not_found("adaptation")
    return found
