"""Tamiyo plans several changes at once where the policy allows it, and one change otherwise."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, cast

import pytest

from benchmarks.latency import flat_run
from esper import blueprints
from esper.contracts import RunSnapshot, SafetyPolicy, wire
from esper.contracts.protocol import PlanProposal, Proposal
from esper.exceptions import TransportError
from esper.policy import HeuristicPolicy
from esper.replay import message_of, replay, unpack_snapshot
from esper.services.tamiyo.loop import DecisionLoop
from esper.services.tamiyo.urza import Urza


class Server:
    """Answers with one snapshot, and keeps what is proposed."""

    def __init__(self, snapshot: RunSnapshot, limits: SafetyPolicy) -> None:
        self.message = wire.to_wire(message_of(snapshot, limits))
        self.plans: list[PlanProposal] = []
        self.proposals: list[Proposal] = []
        self.refuses_plans = False

    async def snapshot(self, run: str) -> dict[str, Any]:
        return dict(self.message)

    async def propose_plan(self, run: str, body: PlanProposal) -> None:
        if self.refuses_plans:
            raise TransportError("gate closed", permanent=True, status=409)
        self.plans.append(body)

    async def propose(self, run: str, body: Proposal) -> None:
        self.proposals.append(body)

    async def decline(self, run: str, body: object) -> None:
        raise AssertionError("nothing is declined here")


def snapshot() -> RunSnapshot:
    run = flat_run(8, spans=True)
    frames = tuple(replace(frame, wall_time=time.time()) for frame in run.frames)
    return replace(run, frames=frames)


def loop_of(server: Server) -> DecisionLoop:
    return DecisionLoop(
        cast(Urza, server),
        policy=HeuristicPolicy(),
        catalog=blueprints.list_blueprints(),
        learning=True,
        refresh_seconds=600.0,
        decline_quiet_seconds=600.0,
    )


async def test_a_plan_is_sent_with_the_snapshot_that_it_was_made_on() -> None:
    server = Server(snapshot(), SafetyPolicy(max_plan_changes=3))
    await loop_of(server).attend("benchmark")
    (plan,) = server.plans
    assert len(plan.members) == 3
    assert not server.proposals
    packed = plan.members[0].snapshot
    assert packed is not None
    assert unpack_snapshot(packed).run == "benchmark"
    assert all(member.snapshot is None and member.snapshot_note for member in plan.members[1:])
    assert wire.from_wire(PlanProposal, wire.to_wire(plan)).key("r") == "r:1:2000:plan"


@pytest.mark.parametrize("refused", [False, True], ids=["not allowed", "refused by the server"])
async def test_without_a_plan_one_change_is_proposed(refused: bool) -> None:
    server = Server(snapshot(), SafetyPolicy(max_plan_changes=3 if refused else 1))
    server.refuses_plans = refused
    loop = loop_of(server)
    await loop.attend("benchmark")
    if refused:
        assert loop.counts["proposals_refused"] == 1
        loop.watches["benchmark"].undecided = True  # as when the next frame comes
        await loop.attend("benchmark")
    assert not server.plans
    assert len(server.proposals) == 1
    replayed = replay(unpack_snapshot(cast(bytes, server.proposals[0].snapshot)))
    assert replayed.step == 2000
