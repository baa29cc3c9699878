"""What Tamiyo decided, kept with the exact input of ``decide`` so that it can be decided again."""

from __future__ import annotations

from typing import Any

import msgspec
from django.db.models import Q

from apps.adaptations.models import Adaptation, DecisionRecord
from apps.rest.problems import Problem, not_found
from apps.runs.models import Run
from esper.contracts import Decision, wire
from esper.contracts.protocol import Decline, Proposal, Snapshot
from esper.exceptions import CodecError, MessageError
from esper.replay import Replayed, compare, replay, unpack_snapshot

# Of one run. A decline that is repeated is reported every few seconds, a proposal some times a day.
DECLINES_KEPT = 200
_NOT_SENT = "Tamiyo sent no snapshot with this decision."


def record_decision(
    *, run: Run, message: Proposal | Decline, adaptation: Adaptation | None = None
) -> DecisionRecord:
    """Store a decision with its snapshot. In a transaction.

    Raises:
        MessageError: the snapshot is none.
    """
    if message.snapshot is not None:
        _check(message.snapshot, run)
    record = DecisionRecord.objects.create(
        run=run,
        run_epoch=message.epoch,
        step=message.step,
        layer=message.layer,
        adaptation=adaptation,
        message=wire.to_wire(msgspec.structs.replace(message, snapshot=None, snapshot_note="")),
        snapshot=message.snapshot,
        note=message.snapshot_note,
    )
    if adaptation is None:
        _forget_old_declines(run)
    return record


def find_decision(name: str) -> DecisionRecord:
    """By the adaptation's number for people (A-17), its uid, or the decision's own uid.

    Raises:
        Problem: 404, there is no such decision.
    """
    digits = name.upper().removeprefix("A-")
    wanted = Q(uid=name) | Q(adaptation__uid=name)
    if digits.isascii() and digits.isdigit() and len(digits) < 19:
        wanted |= Q(adaptation__pk=int(digits))
    record = DecisionRecord.objects.filter(wanted).first()
    if record is None:
        raise not_found("recorded decision")
    return record


def decision_of(adaptation: Adaptation) -> DecisionRecord:
    """Raises ``Problem`` 404 for an adaptation that Tamiyo did not propose."""
    record = DecisionRecord.objects.filter(adaptation=adaptation).first()
    if record is None:
        raise not_found("recorded decision")
    return record


def stored_snapshot(record: DecisionRecord) -> Snapshot:
    """What the decision was made on.

    Raises:
        Problem: 404, no snapshot was stored; the answer says why.
        CodecError: the row holds something else.
    """
    if record.snapshot is None:
        raise Problem(404, "not-found", record.note or _NOT_SENT)
    return unpack_snapshot(bytes(record.snapshot))


def sent_message(record: DecisionRecord) -> Proposal | Decline:
    """The proposal or decline as Tamiyo sent it, without its snapshot."""
    kind: Any = Decline if record.adaptation_id is None else Proposal
    message: Proposal | Decline = wire.from_wire(kind, record.message)
    return message


def replay_decision(record: DecisionRecord) -> Replayed:
    """Decide again on the stored snapshot, and compare with what was sent. Imports torch.

    Raises:
        Problem: 404, no snapshot was stored.
        ConfigurationError: this Esper does not have the policy that decided.
    """
    message = sent_message(record)
    return compare(message, replay(stored_snapshot(record), policy=message.policy))


def describe(replayed: Replayed) -> str:
    """A decision in words, for a terminal."""
    decision = replayed.decision
    lines = _decision_lines(decision) if isinstance(decision, Decision) else ["declined"]
    lines += [f"  {reason}" for reason in getattr(decision, "reasons", ())]
    if replayed.differences:
        lines.append(f"Differs from the recorded decision in: {', '.join(replayed.differences)}.")
    else:
        lines.append("The same as the recorded decision.")
    return "\n".join(lines)


def _decision_lines(decision: Decision) -> list[str]:
    adaptation = decision.adaptation
    forecast = decision.forecast
    return [
        f"{adaptation.adaptation_type} at {adaptation.layer_name}: {decision.blueprint} "
        f"{decision.config}",
        f"  step {decision.step}, confidence {adaptation.confidence:.3f}, risk {decision.risk}, "
        f"{forecast.parameters} parameters, policy {decision.policy}",
        *(f"  {reason.text}" for reason in adaptation.reasons),
        *(f"  asks: {line}" for line in decision.asks),
    ]


def _check(snapshot: bytes, run: Run) -> None:
    try:
        message = unpack_snapshot(snapshot)
    except CodecError as error:
        raise MessageError(str(error), pointer="/snapshot") from error
    if message.run != run.uid:
        raise MessageError("the snapshot is of another run", pointer="/snapshot")


def _forget_old_declines(run: Run) -> None:
    declines = DecisionRecord.objects.filter(run=run, adaptation=None)
    oldest_kept = declines.order_by("-id").values_list("id", flat=True)[
        DECLINES_KEPT - 1 : DECLINES_KEPT
    ]
    for key in oldest_kept:
        declines.filter(id__lt=key).delete()
