"""One decision carried out through a server: propose, then follow to the graft."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from esper.contracts import (
    ADAPTATION_ENDED,
    SIGNALS,
    AdaptationDecision,
    AdaptationState,
    Candidate,
    Check,
    Decision,
    LayerInfo,
    Risk,
    RunSnapshot,
    WhyNot,
    protocol,
)
from esper.services.tamiyo import wire
from esper.services.tamiyo.urza import Urza

_POLL_SECONDS = 0.1
_IN_MODEL = frozenset({AdaptationState.PROBATION, AdaptationState.KEPT})


@dataclass(frozen=True, slots=True)
class Choice:
    """What selection and gates agreed on."""

    candidate: Candidate
    risk: Risk
    checks: tuple[Check, ...]
    why_not: tuple[WhyNot, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How far an adaptation came while it was followed."""

    uid: str
    state: AdaptationState
    grafted: bool
    reason: str


class RemoteAdaptation:
    """A run of a server, as a place for one adaptation."""

    def __init__(self, urza: Urza, run: str, *, follow_seconds: float) -> None:
        self._urza = urza
        self._run = run
        self._follow_seconds = follow_seconds

    async def look(self) -> wire.RunReport:
        """The run's present state; raises ``TransportError`` or ``CodecError``."""
        return wire.report_from_wire(await self._urza.snapshot(self._run))

    async def carry_out(
        self, decision: AdaptationDecision, choice: Choice, report: wire.RunReport
    ) -> Outcome:
        """Propose, and follow until it is grafted, waits for a person, or ended.

        Raises:
            TransportError: the server said no (``code`` gate-closed), or does not answer.
        """
        proposal = _decision(decision, choice, report.snapshot)
        message = protocol.Proposal.of(proposal, epoch=report.snapshot.epoch)
        written = await self._urza.propose(self._run, message)
        return await self._follow(str(written["uid"]))

    async def _follow(self, uid: str) -> Outcome:
        until = time.monotonic() + self._follow_seconds
        while True:
            state = AdaptationState((await self._urza.adaptation(uid))["state"])
            if state in _IN_MODEL:
                return Outcome(uid, state, True, "")
            if state is AdaptationState.AWAITING_APPROVAL:
                return Outcome(uid, state, False, "A person has to agree first.")
            if state in ADAPTATION_ENDED:
                return Outcome(uid, state, False, f"It ended as {state}.")
            if time.monotonic() >= until:
                return Outcome(uid, state, False, f"It is still {state}.")
            await asyncio.sleep(_POLL_SECONDS)


def _decision(decision: AdaptationDecision, choice: Choice, snapshot: RunSnapshot) -> Decision:
    layer = snapshot.layer(decision.layer_name)
    return Decision(
        adaptation=decision,
        blueprint=choice.candidate.blueprint,
        config=choice.candidate.config,
        risk=choice.risk,
        forecast=choice.candidate.forecast,
        checks=choice.checks,
        why_not=choice.why_not,
        evidence=_evidence(snapshot, layer) if layer else {},
        step=snapshot.step,
        policy="caller",
        asks=tuple(check.text for check in choice.checks if check.asks),
    )


def _evidence(snapshot: RunSnapshot, layer: LayerInfo) -> dict[str, float]:
    """The layer's newest signals, and the newest loss."""
    evidence: dict[str, float] = {}
    if snapshot.frames:
        newest = snapshot.frames[-1]
        evidence = {str(signal): newest.value(layer.name, signal) for signal in SIGNALS}
    if snapshot.loss.size:
        evidence["loss"] = float(snapshot.loss[-1])
    return evidence
