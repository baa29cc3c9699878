"""One decision carried out through a server: propose, then follow to the graft."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import msgspec

from esper.contracts import (
    ADAPTATION_ENDED,
    AdaptationState,
    Decision,
    protocol,
)
from esper.services.tamiyo import wire
from esper.services.tamiyo.urza import Urza

_POLL_SECONDS = 0.1
_IN_MODEL = frozenset({AdaptationState.PROBATION, AdaptationState.KEPT})


@dataclass(frozen=True, slots=True)
class Outcome:
    """The state of an adaptation when it was last read."""

    uid: str
    state: AdaptationState
    grafted: bool
    reason: str


class RemoteAdaptation:
    """A run of a server, to which one adaptation is proposed."""

    def __init__(self, urza: Urza, run: str, *, follow_seconds: float) -> None:
        self._urza = urza
        self._run = run
        self._follow_seconds = follow_seconds

    async def look(self) -> wire.RunReport:
        """The run's present state; raises ``TransportError`` or ``CodecError``."""
        return wire.report_from_wire(await self._urza.snapshot(self._run))

    async def carry_out(self, decision: Decision, report: wire.RunReport) -> Outcome:
        """Propose, and follow until it is grafted, waits for a person, or ended.

        Raises:
            TransportError: the server refused (``code`` gate-closed), or does not answer.
        """
        message = msgspec.structs.replace(
            protocol.Proposal.of(decision, epoch=report.snapshot.epoch),
            snapshot_note="A caller made this decision, so it cannot be replayed.",
        )
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
