"""A stored decision can be made again, and comes out the same."""

from __future__ import annotations

import base64
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from esper.contracts import Decision, SafetyPolicy, codec, protocol, wire
from esper.contracts.protocol import Decline, Proposal, Snapshot
from esper.exceptions import CodecError, ConfigurationError
from esper.pipeline import decide
from esper.policy import HeuristicPolicy
from esper.replay import (
    compare,
    decision_rng,
    message_of,
    pack_snapshot,
    replay,
    run_snapshot,
    unpack_snapshot,
)
from tests.esper.recorded.record import FOLDER, cases, flat_loss

RECORDED = sorted(FOLDER.glob("*.json"))
# What is said about a decision may be reworded, and a new blueprint adds a line to why_not.
NUMBERS = ("step", "layer", "adaptation_type", "confidence", "urgency", "blueprint", "config")
MORE = ("risk", "forecast", "evidence", "policy")


def essence(message: Proposal | Decline) -> dict[str, Any]:
    """The decision without its sentences; numbers to 6 digits, since machines round otherwise."""
    members = wire.to_wire(message)
    kept = {name: members[name] for name in (*NUMBERS, *MORE) if name in members}
    kept["checks"] = [
        (check["rule"], check["passed"], check["hard"]) for check in members["checks"]
    ]
    kept["asks"] = len(members.get("asks", ()))
    return rounded(kept)  # type: ignore[no-any-return]


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_a_recorded_decision_comes_out_the_same(path: Path) -> None:
    recorded = codec.decode(path.read_bytes())
    kind: Any = {"Proposal": Proposal, "Decline": Decline}[recorded["kind"]]
    stored: Proposal | Decline = wire.from_wire(kind, recorded["message"])
    decision = replay(unpack_snapshot(base64.b64decode(recorded["snapshot"])), policy=stored.policy)
    again: Proposal | Decline
    if isinstance(decision, Decision):
        again = Proposal.of(decision, epoch=stored.epoch)
    else:
        again = Decline.of(decision, epoch=stored.epoch, policy=stored.policy)
    assert type(again) is kind
    assert essence(again) == essence(stored), "if meant: python -m tests.esper.recorded.record"


def test_every_case_is_recorded_in_a_small_file() -> None:
    assert {path.stem for path in RECORDED} == {name for name, _, _ in cases()}
    kinds = {codec.decode(path.read_bytes())["kind"] for path in RECORDED}
    assert kinds == {"Proposal", "Decline"}
    assert all(path.stat().st_size < 30_000 for path in RECORDED)


@pytest.mark.parametrize(("name", "snapshot", "limits"), list(cases()))
def test_a_decision_on_the_stored_snapshot_is_the_decision_on_the_real_one(
    name: str, snapshot: Any, limits: SafetyPolicy
) -> None:
    from esper.blueprints import list_blueprints

    decision = decide(
        snapshot, HeuristicPolicy(), list_blueprints(), limits, decision_rng(snapshot)
    )
    packed = pack_snapshot(message_of(snapshot, limits))
    assert repr(replay(unpack_snapshot(packed))) == repr(decision)
    assert packed == pack_snapshot(unpack_snapshot(packed))
    stored = (
        Proposal.of(decision, epoch=1)
        if isinstance(decision, Decision)
        else Decline.of(decision, epoch=1)
    )
    assert compare(stored, replay(unpack_snapshot(packed))).differences == ()
    other = msgspec.structs.replace(stored, confidence=0.123)
    assert compare(other, decision).differences == ("confidence",)


def test_another_outcome_is_a_difference() -> None:
    run = flat_loss()
    limits = SafetyPolicy()
    decision = replay(message_of(run, limits))
    assert isinstance(decision, Decision)
    proposal = Proposal.of(decision, epoch=1)
    frozen = replay(message_of(replace(run, frozen="a person paused it"), limits))
    assert compare(proposal, frozen).differences == ("outcome",)


def test_a_frames_own_loss_fills_in_where_the_metrics_lack_its_step() -> None:
    message = message_of(flat_loss(), SafetyPolicy())
    frames = tuple(
        msgspec.structs.replace(frame, loss=0.5 if frame.step == 1000 else None)
        for frame in message.frames
    )
    seen = run_snapshot(msgspec.structs.replace(message, frames=frames))
    assert (seen.loss_steps[-1], seen.loss[-1]) == (1000, 0.5)
    assert seen.frames[-1].metrics == {"loss": 0.5}
    assert np.array_equal(seen.loss_steps[:-1], flat_loss().loss_steps)
    # What is stored of it is what was decided on: it does not grow when it is read again.
    again = run_snapshot(message_of(seen, SafetyPolicy()))
    assert np.array_equal(again.loss_steps, seen.loss_steps)


@pytest.mark.parametrize(
    "packed",
    [
        b"",
        b"not deflated",
        zlib.compress(b"{}"),
        zlib.compress(b"[NaN]"),
        zlib.compress(b"{}")[:-3],
    ],
)
def test_what_is_no_stored_snapshot_is_refused(packed: bytes) -> None:
    with pytest.raises(CodecError):
        unpack_snapshot(packed)


def test_a_stored_snapshot_cannot_inflate_without_end() -> None:
    with pytest.raises(CodecError, match="too large"):
        unpack_snapshot(zlib.compress(b" " * (64 << 20)))


def test_a_snapshot_that_is_too_large_is_not_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_SNAPSHOT_BYTES", 100)
    with pytest.raises(CodecError, match="at most 100 are stored"):
        pack_snapshot(message_of(flat_loss(), SafetyPolicy()))


def test_an_unknown_policy_cannot_be_replayed() -> None:
    message: Snapshot = message_of(flat_loss(), SafetyPolicy())
    with pytest.raises(ConfigurationError, match="no policy 'oracle-9'"):
        replay(message, policy="oracle-9")
