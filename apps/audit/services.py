"""Writing to the audit log, and verifying that it was not changed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from django.db import transaction
from django.utils import timezone

from apps.accounts.actors import Actor
from apps.audit.models import AuditEvent, AuditHead
from esper.contracts import codec

GENESIS = "0" * 64


def record(
    *,
    actor: Actor,
    act: str,
    object_kind: str,
    object_uid: str,
    run_uid: str = "",
    reason: str = "",
    data: dict[str, Any] | None = None,
) -> AuditEvent:
    """Append one event. Call it inside the transaction of the change that it records."""
    if not transaction.get_connection().in_atomic_block:
        raise RuntimeError(
            "audit.record must be called in the transaction of the change that it records"
        )
    head = take_turn()
    event = AuditEvent(
        id=head.last_id + 1,
        at=timezone.now(),
        actor_kind=actor.kind,
        actor=actor.name,
        via=actor.via,
        act=act,
        object_kind=object_kind,
        object_uid=object_uid,
        run_uid=run_uid,
        reason=reason,
        data=data or {},
        previous_hash=head.last_hash,
    )
    event.hash = event_hash(event)
    event.save(force_insert=True)
    AuditHead.objects.filter(pk=1).update(last_id=event.id, last_hash=event.hash)
    return event


def take_turn() -> AuditHead:
    """The lock that writers of the chain and of the feeds share, so that they cannot deadlock."""
    head, _ = AuditHead.objects.select_for_update().get_or_create(pk=1)
    return head


def event_hash(event: AuditEvent) -> str:
    """Hex SHA-256 over the row's canonical JSON and the hash before it."""
    content = {
        "id": event.id,
        "at": event.at.isoformat(),
        "actor_kind": str(event.actor_kind),
        "actor": event.actor,
        "via": event.via,
        "act": event.act,
        "object_kind": event.object_kind,
        "object_uid": event.object_uid,
        "run_uid": event.run_uid,
        "reason": event.reason,
        "data": event.data,
        "previous_hash": event.previous_hash,
    }
    return hashlib.sha256(codec.encode(content)).hexdigest()


@dataclass(frozen=True, slots=True)
class ChainReport:
    verified: bool
    events: int
    head: str
    problem: str = ""
    event_id: int | None = None


def verify_chain() -> ChainReport:
    """Verify the whole chain, and name the first thing that is wrong."""
    previous, expected_id = GENESIS, 1
    for event in AuditEvent.objects.order_by("id").iterator(chunk_size=1000):
        problem = _problem(event, previous, expected_id)
        if problem:
            return ChainReport(False, expected_id - 1, previous, problem, event.id)
        previous, expected_id = event.hash, expected_id + 1
    head = AuditHead.objects.filter(pk=1).first()
    if head is not None and (head.last_id, head.last_hash) != (expected_id - 1, previous):
        problem = f"the log ends at {expected_id - 1}, but {head.last_id} events were written"
        return ChainReport(False, expected_id - 1, previous, problem)
    return ChainReport(True, expected_id - 1, previous)


def _problem(event: AuditEvent, previous: str, expected_id: int) -> str:
    if event.id != expected_id:
        return f"event {expected_id} is missing"
    if event.previous_hash != previous:
        return "the hash of the previous event does not match"
    if event_hash(event) != event.hash:
        return "the event was changed after it was written"
    return ""
