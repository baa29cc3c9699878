"""Looks at a kept graft after its verdict cost the run two percent of its time at most."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from esper.contracts import AdaptationState, Reward, SafetyPolicy
from esper.reward import LATER_LOOKS, Look
from esper.reward.terms import NOT_YET
from esper.sdk import changes as changes_module
from esper.sdk.adaptation import Adaptation
from esper.sdk.changes import Changes

POLICY = SafetyPolicy()
STEPS = 20 * POLICY.probation_steps


def kept(now: float, look_seconds: float) -> Adaptation:
    """With the looks of its test, which are paid by another share."""
    receipt: Any = SimpleNamespace(present=True)
    entry = Adaptation("local-1", "fc", "proj_lora_64", 0, AdaptationState.KEPT, receipt=receipt)
    entry.reward = Reward({"gain": 0.1, NOT_YET: -0.07})
    entry.grafted_at = now
    entry.looks = [Look(step=POLICY.probation_steps, gain=0.1, loss=1.0)]
    entry.look_seconds = look_seconds
    return entry


@pytest.mark.parametrize("step_seconds", [0.001, 0.1, 10.0])
@pytest.mark.parametrize("look_in_steps", [0.1, 3.0, 60.0, 3_000.0])
def test_later_looks_take_two_percent_of_the_time_at_most(
    look_in_steps: float, step_seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a step and the script's own evaluation take; the clock is the test's."""
    clock, look_seconds = 1_000.0, look_in_steps * step_seconds
    monkeypatch.setattr(changes_module.time, "time", lambda: clock)
    entry, changes = kept(clock, look_seconds), Changes()
    changes.adaptations.append(entry)
    begun = clock
    clock += POLICY.probation_steps * step_seconds
    taken = 0
    for step in range(POLICY.probation_steps + 1, STEPS):
        clock += step_seconds
        for due in changes.due_for_look(step, POLICY):
            due.looks.append(Look(step=step, gain=0.1, loss=1.0))
            due.look_seconds += look_seconds
            taken += 1
            assert due.look_seconds <= 0.02 * (clock - begun)
            clock += look_seconds

    share = 0.02 * STEPS / look_in_steps - 1  # one of the looks was in the test
    assert taken == LATER_LOOKS if share > LATER_LOOKS else taken <= max(0, share)
