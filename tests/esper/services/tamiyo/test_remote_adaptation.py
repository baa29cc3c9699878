"""The orchestrator through a server: the same call proposes, and follows."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator

import pytest

from esper.contracts import AdaptationDecision, AdaptationType
from esper.services.tamiyo import ModelState, Phase2IntegrationOrchestrator
from esper.services.tamiyo.urza import Urza
from tests.esper.services.tamiyo.fake_urza import FakeUrza

DECISION = AdaptationDecision("fc2", AdaptationType.ADD_EFFICIENCY, 0.9, 0.4)


@pytest.fixture
async def orchestrator(urza: FakeUrza) -> AsyncIterator[Phase2IntegrationOrchestrator]:
    client = Urza(urza.url, "esp_test")
    yield Phase2IntegrationOrchestrator(urza=client, follow_seconds=2.0)
    await client.close()


async def test_a_proposal_is_followed_to_the_graft(
    orchestrator: Phase2IntegrationOrchestrator, urza: FakeUrza
) -> None:
    states = itertools.chain(["approved", "compiling", "dispatched"], itertools.repeat("probation"))
    urza.trouble = lambda method, path: (
        (200, {"state": next(states)}) if path.startswith("adaptations/") else None
    )

    success, details = await orchestrator.execute_adaptation_pipeline(
        decision=DECISION,
        model_state="run_a",
        constraints={"max_memory_mb": 1024, "max_latency_ms": 10.0},
    )

    assert success, details
    assert details["state"] == "probation"
    ((key, body),) = urza.proposals.items()
    assert key.startswith("run_a:1:1000:fc2:")
    assert (body["layer"], body["blueprint"]) == ("fc2", details["blueprint"])
    assert body["confidence"] == 0.9


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ("awaiting_approval", "A person has to agree"),
        ("compile_failed", "ended as compile_failed"),
        ("dispatched", "still dispatched"),
    ],
)
async def test_what_does_not_reach_the_model_is_no_success(
    orchestrator: Phase2IntegrationOrchestrator, urza: FakeUrza, state: str, says: str
) -> None:
    urza.trouble = lambda method, path: (
        (200, {"state": state}) if path.startswith("adaptations/") else None
    )

    success, details = await orchestrator.execute_adaptation_pipeline(
        decision=DECISION, model_state=ModelState(run="run_a")
    )

    assert not success
    assert says in details["reason"]
    assert details["adaptation"] == "adp_1"


async def test_the_servers_no_and_a_broken_constraint_are_told(
    orchestrator: Phase2IntegrationOrchestrator, urza: FakeUrza
) -> None:
    tight, limits = await orchestrator.execute_adaptation_pipeline(
        decision=DECISION, model_state="run_a", constraints={"max_memory_mb": 1e-6}
    )
    urza.trouble = lambda method, path: (
        (409, {"code": "gate-closed", "detail": "The layer rests."})
        if path.endswith("/adaptations")
        else None
    )
    closed, gate = await orchestrator.execute_adaptation_pipeline(
        decision=DECISION, model_state="run_a"
    )

    assert not tight
    assert limits["violations"][0]["rule"] == "memory"
    assert not closed
    assert "The layer rests." in gate["reason"]
    assert urza.proposals == {}
