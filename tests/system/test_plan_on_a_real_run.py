"""A plan on a real run: approved once through the API, applied in order, and undone as a whole."""

from __future__ import annotations

from typing import Any

import pytest

from .conftest import TEST_SECONDS, Plant, until

pytestmark = [pytest.mark.process, pytest.mark.timeout(TEST_SECONDS)]
LAYERS = ("conv1", "head")
# No verdict comes before the undo, so that it restores the snapshots.
PLANS = {"max_plan_changes": 2, "probation_steps": 1_000_000, "maturity_steps": 900_000}


def member(step: int, layer: str) -> dict[str, Any]:
    return {
        "epoch": 1, "step": step, "layer": layer, "adaptation_type": "add_diagnostic",
        "confidence": 0.9, "urgency": 0.1, "reasons": [], "blueprint": "mon_act_stats",
        "config": {}, "risk": "none", "checks": [], "why_not": [], "asks": [], "policy": "test",
        "forecast": {"parameters": 0, "flops": 0, "memory_mib": 0.01, "latency_ms": 0.01},
        "evidence": {"loss": 1.0, "grad_norm": 1.0, "weight_norm": 1.0},
    }  # fmt: skip


def planned(plant: Plant) -> str:
    """The uid of a plan with a change at each of the layers."""
    found: list[str] = []

    def is_proposed() -> bool:
        plant.reject_others()
        step = plant.step()
        body = {
            "epoch": 1, "step": step, "members": [member(step, one) for one in LAYERS],
            "value": 1.0, "parameters": 1000, "memory_mib": 100.0, "latency_ms": 10.0,
            "reasons": ["both"], "asks": [], "policy": "test",
        }  # fmt: skip
        answer = plant.call("tamiyo", "POST", f"runs/{plant.run}/plans", json=body)
        if answer.status_code == 409:
            return False  # the real Tamiyo has something under way
        assert answer.status_code == 201, answer.text
        found.append(answer.json()["uid"])
        return True

    until(is_proposed, "the plan is proposed")
    return found[0]


def act(plant: Plant, uid: str, name: str, **body: Any) -> None:
    shown = plant.call("olga", "GET", f"plans/{uid}")
    if name == "approve":
        body["evidence_hash"] = shown.json()["evidence_hash"]
    headers = {"If-Match": shown.headers["ETag"]}
    done = plant.call("olga", "POST", f"plans/{uid}/{name}", json=body, headers=headers)
    assert done.status_code == 200, done.text


def shown_as(plant: Plant, uid: str, state: str) -> dict[str, Any]:
    def found() -> dict[str, Any]:
        plan: dict[str, Any] = plant.call("olga", "GET", f"plans/{uid}").json()
        return plan

    until(lambda: found()["state"] == state, f"the plan is {state}")
    return found()


def test_one_approval_applies_a_plan_and_one_undo_takes_all_of_it_out(plant: Plant) -> None:
    plant.publish(PLANS)
    until(lambda: plant.step() > 0, "the run reports")
    uid = planned(plant)
    # The run is young, so its evidence drifts quickly.
    act(plant, uid, "approve", accept_drift=True, reason="both")
    applied = shown_as(plant, uid, "applied")
    members = [plant.call("olga", "GET", f"adaptations/{one['uid']}").json()
               for one in applied["members"]]  # fmt: skip
    assert [one["layer"] for one in members] == list(LAYERS)
    assert {one["state"] for one in members} == {"probation"}
    assert members[0]["graft_step"] < members[1]["graft_step"]

    act(plant, uid, "undo", reason="seen")
    ended = shown_as(plant, uid, "taken_back")
    assert "olga undid it: seen" in ended["outcome"]
    undone = plant.rows(
        "SELECT adaptation_uid FROM runs_command c JOIN runs_run r ON r.id = c.run_id "
        "WHERE c.kind='undo' AND r.uid=? ORDER BY c.seq",
        plant.run,
    )
    assert [row[0] for row in undone] == [one["uid"] for one in reversed(members)]
    for one in members:
        detail = plant.call("olga", "GET", f"adaptations/{one['uid']}").json()
        assert (detail["state"], detail["undo_exact"]) == ("rolled_back", True)
    before = plant.step()
    until(lambda: plant.step() > before, "the run trains on")
    assert plant.call("ada", "GET", "audit/verify").json()["verified"]
