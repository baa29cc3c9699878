"""The exact input of a decision, stored so that the decision can be made again.

    pack_snapshot(message_of(snapshot, limits))     what Tamiyo sends with a proposal or a decline
    replay(unpack_snapshot(stored))                 the same decision

The stored form is the strict JSON of :class:`esper.contracts.protocol.Snapshot`, deflated.
:func:`esper.pipeline.decide` is pure, so the snapshot, the policy and the catalogue of this version
of Esper give the same answer again.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from esper.contracts import (
    Decision,
    Declined,
    HealthFrame,
    RunSnapshot,
    SafetyPolicy,
    codec,
    protocol,
    unpack_bytes,
    wire,
)
from esper.contracts.protocol import Decline, Frame, Proposal, Snapshot, StepValues
from esper.exceptions import CodecError, ConfigurationError
from esper.pipeline import Catalog, decide
from esper.policy import BanditPolicy, HeuristicPolicy, Policy

HELD_OUT = ("eval_loss", "val_loss", "valid_loss", "validation_loss")  # as reported
# Inflated: a stored snapshot has at most MAX_SNAPSHOT_BYTES, which could inflate to 600 MB.
MAX_INFLATED_BYTES = 16 * 1024 * 1024
POLICIES: dict[str, type[HeuristicPolicy] | type[BanditPolicy]] = {
    HeuristicPolicy.name: HeuristicPolicy,
    BanditPolicy.name: BanditPolicy,
}
# What is no part of the decision: its input, and what other policies would have done.
_NOT_REPLAYED = frozenset({"snapshot", "snapshot_note", "chances"})


def message_of(
    snapshot: RunSnapshot, limits: SafetyPolicy, *, active: Sequence[protocol.Active] = ()
) -> Snapshot:
    """What ``decide`` looks at, as the protocol's message.

    Raises:
        CodecError: a frame's layers are not the snapshot's.
    """
    return Snapshot(
        run=snapshot.run,
        epoch=snapshot.epoch,
        mode=snapshot.mode,
        step=snapshot.step,
        layers=snapshot.layers,
        frames=tuple(_frame_messages(snapshot)),
        metrics=(*_loss_messages(snapshot), *_held_out_message(snapshot)),
        model_parameters=snapshot.model_parameters,
        added_parameters=snapshot.added_parameters,
        adaptations_today=snapshot.adaptations_today,
        in_flight=snapshot.in_flight,
        last_adaptation_step=snapshot.last_adaptation_step,
        frozen=snapshot.frozen,
        history=snapshot.history,
        experience=snapshot.experience,
        disabled_blueprints=tuple(sorted(snapshot.disabled_blueprints)),
        safety_policy=limits,
        policy_version=limits.version,
        active=tuple(active),
        age_seconds=snapshot.age_seconds,
        findings=snapshot.findings,
        variants=snapshot.variants,
    )


def run_snapshot(message: Snapshot) -> RunSnapshot:
    """Inverse of :func:`message_of`. An age that the message does not tell is unknown.

    Raises:
        CodecError: a frame does not have one row for each layer.
    """
    names = tuple(layer.name for layer in message.layers)
    losses = _losses(message)
    return RunSnapshot(
        run=message.run,
        epoch=message.epoch,
        mode=message.mode,
        step=message.step,
        layers=message.layers,
        frames=tuple(_health_frame(frame, names) for frame in message.frames),
        loss_steps=np.array([step for step, _ in losses], dtype=np.int64),
        loss=np.array([loss for _, loss in losses], dtype=np.float64),
        model_parameters=message.model_parameters,
        added_parameters=message.added_parameters,
        adaptations_today=message.adaptations_today,
        in_flight=message.in_flight,
        last_adaptation_step=message.last_adaptation_step,
        frozen=message.frozen,
        history=dict(message.history),
        experience=dict(message.experience),
        disabled_blueprints=frozenset(message.disabled_blueprints),
        age_seconds=np.nan if message.age_seconds is None else float(message.age_seconds),
        findings=message.findings,
        held_out=_held_out(message),
        variants=message.variants,
    )


def snapshot_to_wire(
    snapshot: RunSnapshot,
    limits: SafetyPolicy = SafetyPolicy(),  # noqa: B008  # frozen
) -> dict[str, Any]:
    """Strict JSON of :func:`message_of`; raises ``CodecError`` likewise."""
    members: dict[str, Any] = wire.to_wire(message_of(snapshot, limits))
    return members


def snapshot_from_wire(data: dict[str, Any]) -> RunSnapshot:
    """Inverse of :func:`snapshot_to_wire`; members that it does not know are left out.

    Raises:
        CodecError: something is missing or malformed.
    """
    return run_snapshot(wire.from_wire(Snapshot, data))


# --- storing --------------------------------------------------------------------------------------


def pack_snapshot(message: Snapshot) -> bytes:
    """The deflated strict JSON.

    Raises:
        CodecError: it is larger than ``MAX_SNAPSHOT_BYTES``, and cannot be stored.
    """
    packed = zlib.compress(codec.encode(wire.to_wire(message)), 6)
    if len(packed) > protocol.MAX_SNAPSHOT_BYTES:
        raise CodecError(
            f"the snapshot has {len(packed)} bytes deflated, "
            f"at most {protocol.MAX_SNAPSHOT_BYTES} are stored"
        )
    return packed


def unpack_snapshot(packed: bytes) -> Snapshot:
    """Inverse of :func:`pack_snapshot`; raises ``CodecError``."""
    inflater = zlib.decompressobj()
    try:
        raw = inflater.decompress(packed, MAX_INFLATED_BYTES)
    except zlib.error as error:
        raise CodecError(f"the snapshot is not deflated JSON: {error}") from error
    if not inflater.eof or inflater.unused_data:
        raise CodecError("the snapshot is cut off, too large, or followed by something else")
    return wire.from_wire(Snapshot, codec.decode(raw, max_bytes=MAX_INFLATED_BYTES))


# --- deciding again -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Replayed:
    """A stored decision, made again.

    Attributes:
        decision: what ``decide`` answers now.
        differences: members of the stored message that are other than now; empty: the same.
    """

    decision: Decision | Declined
    differences: tuple[str, ...]


def decision_rng(snapshot: RunSnapshot) -> np.random.Generator:
    """The same moment of the same run always gets the same stream, so decisions replay."""
    return np.random.default_rng([zlib.crc32(snapshot.run.encode()), snapshot.epoch, snapshot.step])


def replay(
    message: Snapshot,
    *,
    policy: Policy | str = HeuristicPolicy.name,
    catalog: Catalog | None = None,
) -> Decision | Declined:
    """Decide again on a stored snapshot.

    Args:
        message: what was decided on.
        policy: the policy, or its name.
        catalog: default: every blueprint that is installed.

    Raises:
        ConfigurationError: this Esper has no policy of that name.
        CodecError: the snapshot's frames do not fit its layers.
    """
    if catalog is None:
        from esper.blueprints import list_blueprints  # torch, which the web process does not import

        catalog = list_blueprints()
    if isinstance(policy, str):
        policy = _policy(policy)
    snapshot = run_snapshot(message)
    return decide(snapshot, policy, catalog, message.safety_policy, decision_rng(snapshot))


def compare(stored: Proposal | Decline, decision: Decision | Declined) -> Replayed:
    """What a decision that was made again has in common with the message that was sent."""
    if isinstance(decision, Declined) and decision.adaptation is None:
        return Replayed(decision, ("outcome",))
    again: Proposal | Decline
    if isinstance(decision, Decision):
        again = Proposal.of(decision, epoch=stored.epoch)
    else:
        again = Decline.of(decision, epoch=stored.epoch, policy=stored.policy)
    if type(again) is not type(stored):
        return Replayed(decision, ("outcome",))
    old, new = _content(stored), _content(again)
    return Replayed(decision, tuple(name for name in old if old[name] != new[name]))


def _content(message: Proposal | Decline) -> dict[str, Any]:
    members: dict[str, Any] = wire.to_wire(message)
    return {name: value for name, value in members.items() if name not in _NOT_REPLAYED}


def _policy(name: str) -> Policy:
    if name not in POLICIES:
        raise ConfigurationError(
            f"there is no policy {name!r} to decide with; there are: {', '.join(POLICIES)}"
        )
    return POLICIES[name]()


# --- parts ----------------------------------------------------------------------------------------


def _frame_messages(snapshot: RunSnapshot) -> Iterator[Frame]:
    names = tuple(layer.name for layer in snapshot.layers)
    known = set(snapshot.loss_steps.tolist())
    for frame in snapshot.frames:
        if frame.layers != names:
            raise CodecError(f"the frame of step {frame.step} has other layers than its run")
        message = Frame.of(frame)
        # A loss that the decision did not see must not be in what it is replayed from.
        yield message if frame.step in known else msgspec.structs.replace(message, loss=None)


def _loss_messages(snapshot: RunSnapshot) -> Iterator[StepValues]:
    for step, loss in zip(snapshot.loss_steps, snapshot.loss, strict=True):
        yield StepValues(step=int(step), values={"loss": float(loss)})


def _held_out_message(snapshot: RunSnapshot) -> Iterator[StepValues]:
    if not math.isnan(snapshot.held_out):
        yield StepValues(step=snapshot.step, values={HELD_OUT[0]: snapshot.held_out})


def _held_out(message: Snapshot) -> float:
    """The newest held-out loss; NaN: none is in the message."""
    for item in reversed(message.metrics):
        for name in HELD_OUT:
            if name in item.values:
                return float(item.values[name])
    return math.nan


def _health_frame(frame: Frame, names: tuple[str, ...]) -> HealthFrame:
    return HealthFrame(
        step=frame.step,
        wall_time=frame.wall_time,
        layers=names,
        values=unpack_bytes(frame.values, len(names)),
        metrics={} if frame.loss is None else {"loss": float(frame.loss)},
    )


def _losses(message: Snapshot) -> list[tuple[int, float]]:
    """(step, loss), oldest first; a frame's own loss fills in where the metrics lack its step."""
    losses = [(item.step, item.values["loss"]) for item in message.metrics if "loss" in item.values]
    known = {step for step, _ in losses}
    own = [
        (frame.step, frame.loss)
        for frame in message.frames
        if frame.loss is not None and frame.step not in known
    ]
    return sorted(losses + own, key=lambda pair: pair[0]) if own else losses
