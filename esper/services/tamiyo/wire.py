"""From the protocol's messages to what Tamiyo works with."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from esper.contracts import (
    Decision,
    Declined,
    Plan,
    RunSnapshot,
    SafetyPolicy,
    wire,
)
from esper.contracts.protocol import Active, Decline, PlanProposal, Proposal, Snapshot
from esper.exceptions import CodecError
from esper.replay import message_of, pack_snapshot, run_snapshot
from esper.reward import Look, looks_of


@dataclass(frozen=True, slots=True)
class RunReport:
    """What ``GET runs/{uid}/snapshot`` says: all that ``decide`` and ``judge`` need.

    Attributes:
        champion: name of the policy that decides; empty: the default one.
        looks: by adaptation uid; the held-out loss with the graft and without it, oldest first.
    """

    snapshot: RunSnapshot
    limits: SafetyPolicy
    active: tuple[Active, ...]
    champion: str = ""
    looks: dict[str, tuple[Look, ...]] = field(default_factory=dict)


def report_from_wire(data: Mapping[str, Any]) -> RunReport:
    """Raises ``CodecError`` when it is not a run's snapshot."""
    return report_of(wire.from_wire(Snapshot, data))


def report_of(message: Snapshot) -> RunReport:
    """Raises ``CodecError`` when a frame does not fit the layers."""
    if message.age_seconds is None and message.frames:
        # By the trainer's clock; clocks differ, so never below 0.
        age = max(0.0, time.time() - message.frames[-1].wall_time)
        message = msgspec.structs.replace(message, age_seconds=age)
    return RunReport(
        snapshot=run_snapshot(message),
        limits=message.safety_policy,
        active=message.active,
        champion=message.champion,
        looks={active.uid: looks_of(message.metrics, active.uid) for active in message.active},
    )


def proposal_of(
    decision: Decision,
    snapshot: RunSnapshot,
    limits: SafetyPolicy,
    chances: Mapping[str, float] | None = None,
) -> Proposal:
    """What is sent to the server, with the snapshot that the decision was made on."""
    proposal = Proposal.of(decision, epoch=snapshot.epoch)
    packed, note = _packed(snapshot, limits)
    return msgspec.structs.replace(
        proposal, snapshot=packed, snapshot_note=note, chances=dict(chances or {})
    )


def plan_of(plan: Plan, snapshot: RunSnapshot, limits: SafetyPolicy) -> PlanProposal:
    """Likewise; the snapshot goes with the first member."""
    members = [Proposal.of(member, epoch=snapshot.epoch) for member in plan.members]
    packed, note = _packed(snapshot, limits)
    members[0] = msgspec.structs.replace(members[0], snapshot=packed, snapshot_note=note)
    # Recorded without a snapshot, so that it is not replayed as a decision of its own.
    later = f"Decided in one plan with the change at {members[0].layer}, which has the snapshot."
    members[1:] = [msgspec.structs.replace(one, snapshot_note=later) for one in members[1:]]
    return PlanProposal.of(plan, tuple(members), epoch=snapshot.epoch)


def decline_of(
    declined: Declined, snapshot: RunSnapshot, limits: SafetyPolicy, *, policy: str
) -> Decline:
    """Likewise; raises ``ValueError`` where no adaptation was wanted."""
    decline = Decline.of(declined, epoch=snapshot.epoch, policy=policy)
    packed, note = _packed(snapshot, limits)
    return msgspec.structs.replace(decline, snapshot=packed, snapshot_note=note)


def _packed(snapshot: RunSnapshot, limits: SafetyPolicy) -> tuple[bytes | None, str]:
    try:
        return pack_snapshot(message_of(snapshot, limits)), ""
    except CodecError as error:
        return None, f"This decision cannot be replayed: {error}."
