"""Writing to the audit log, and verifying that it was not changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from django.db import transaction

from apps.accounts.actors import Actor
from apps.audit.heads import (
    FILE,
    HeadFileError,
    SignedHead,
    directories,
    read_heads,
    trusted_keys,
)
from apps.audit.models import AuditEvent, AuditHead
from apps.rest.clock import now as database_now
from esper.contracts.attestation import content_hash

GENESIS = "0" * 64
# The first head is signed within seconds of the first event. Later, a log without heads is suspect.
FIRST_HEAD_WITHIN = timedelta(minutes=1)
NO_HEAD = "no signed head is in"


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
        at=database_now(),
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
    return content_hash(event_content(event))


def event_content(event: AuditEvent) -> dict[str, Any]:
    """What the hash of an event covers."""
    return {
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


@dataclass(frozen=True, slots=True)
class ChainReport:
    """``signed_events``: so many events are covered by a signed head, that of ``signed_at``."""

    verified: bool
    events: int
    head: str
    problem: str = ""
    event_id: int | None = None
    signed_events: int = 0
    signed_at: str | None = None

    @property
    def lacks_a_head(self) -> bool:
        """The chain itself is whole; but nothing outside of the database vouches for it."""
        return self.problem.startswith(NO_HEAD)


def verify_chain(heads_files: Sequence[Path] = (), keys: Sequence[str] = ()) -> ChainReport:
    """Verify the whole chain and its signed heads, and name the first thing that is wrong.

    Args:
        heads_files: files of signed heads. Default: those of this installation.
        keys: the public keys that may have signed them. Default: the installation's.
    """
    files = heads_files or [directory / FILE for directory in directories()]
    try:
        signed = [head for path in files for head in read_heads(path, keys or trusted_keys())]
    except HeadFileError as error:
        return ChainReport(False, 0, "", str(error))
    return _verified(sorted(signed, key=lambda head: head.events))


def _verified(signed: list[SignedHead]) -> ChainReport:
    newest = signed[-1] if signed else None
    signed_by_id: dict[int, set[str]] = {}
    for head in signed:
        signed_by_id.setdefault(head.events, set()).add(head.hash)
    # Before the events: those that are written meanwhile come after this end.
    end = AuditHead.objects.filter(pk=1).first()
    previous, count, at_the_end = GENESIS, 0, GENESIS
    for event in AuditEvent.chain.order_by("id").iterator(chunk_size=1000):
        problem = _problem(event, previous, count + 1)
        if not problem and not signed_by_id.get(event.id, set()) <= {event.hash}:
            problem = "the log up to this event was rewritten: another hash was signed"
        if problem:
            return ChainReport(False, count, previous, problem, event.id)
        previous, count = event.hash, count + 1
        if end is not None and count == end.last_id:
            at_the_end = previous
    problem = _problem_at_the_end(count, newest)
    written = AuditHead.objects.filter(pk=1).first()
    if not problem and end is not None and written is not None:
        kept = at_the_end == end.last_hash or not end.last_id
        if not kept or written.last_id < count:
            problem = f"the log ends at {count}, but {written.last_id} events were written"
    problem = problem or _problem_without_heads(newest)
    return ChainReport(
        not problem,
        count,
        previous,
        problem,
        signed_events=newest.events if newest else 0,
        signed_at=newest.at if newest else None,
    )


def _problem_at_the_end(count: int, newest: SignedHead | None) -> str:
    if newest is not None and newest.events > count:
        return (
            f"the log ends at {count}, but {newest.events} events were signed at {newest.at}: its "
            "end was cut, or an older state was restored"
        )
    return ""


def _problem_without_heads(newest: SignedHead | None) -> str:
    first = AuditEvent.chain.filter(pk=1).first()
    if newest is None and first is not None and first.at < database_now() - FIRST_HEAD_WITHIN:
        places = " and ".join(str(directory / FILE) for directory in directories())
        return f"{NO_HEAD} {places}: it was deleted, or no control worker has run"
    return ""


def _problem(event: AuditEvent, previous: str, expected_id: int) -> str:
    if event.id != expected_id:
        return f"event {expected_id} is missing"
    if event.previous_hash != previous:
        return "the hash of the previous event does not match"
    if event_hash(event) != event.hash:
        return "the event was changed after it was written"
    return ""
