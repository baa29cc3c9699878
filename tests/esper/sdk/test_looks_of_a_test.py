"""The looks at a graft on probation come at steps that an equal run repeats, and cost a share."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from esper.contracts import AdaptationState, SafetyPolicy
from esper.reward import Look
from esper.sdk import changes as changes_module
from esper.sdk.adaptation import Adaptation
from esper.sdk.changes import FIRM, Changes, pace_looks

POLICY = SafetyPolicy()
SPACING = (POLICY.probation_steps - POLICY.maturity_steps) // POLICY.probation_looks


def probation(
    look_in_steps: float,
    monkeypatch: pytest.MonkeyPatch,
    load: Callable[[], float] = lambda: 1.0,
    restart_at: int = -1,
) -> Adaptation:
    """The whole test of one graft; ``load`` is how many times as long all takes on that machine."""
    clock = 1_000.0
    monkeypatch.setattr(changes_module.time, "time", lambda: clock)
    receipt: Any = SimpleNamespace(present=True)
    entry = Adaptation(
        "local-1", "fc", "proj_lora_64", 0, AdaptationState.PROBATION, receipt=receipt
    )
    entry.grafted_at = clock
    for step in range(1, POLICY.probation_steps + 1):
        clock += 0.01 * load()
        changes = Changes()
        changes.adaptations.append(entry)
        for due in changes.due_for_look(step, POLICY):
            seconds = 0.01 * look_in_steps * load()
            clock += seconds
            due.look_seconds += seconds
            due.looks.append(Look(step=step, gain=0.1, loss=1.0))
            pace_looks(due, step, POLICY)
        if step == restart_at:
            entry = Adaptation.from_state(entry.to_state(), receipt)
    return entry


@pytest.mark.parametrize("look_in_steps", [0.0, 1.5, 4.5, 9.0, 300.0])
def test_a_busy_machine_looks_at_the_steps_of_a_quiet_one(
    look_in_steps: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    dice = random.Random(0)
    quiet = probation(look_in_steps, monkeypatch)
    loaded = probation(look_in_steps, monkeypatch, lambda: dice.uniform(4.0, 6.0))

    assert [look.step for look in loaded.looks] == [look.step for look in quiet.looks]


@pytest.mark.parametrize("look_in_steps", [0.5, 2.9, 3.1, 5.9, 6.1, 50.0])
def test_looks_beside_the_firm_ones_stay_inside_their_share(
    look_in_steps: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = len(probation(look_in_steps, monkeypatch).looks)
    firm = POLICY.probation_looks // FIRM
    allowed = POLICY.probation_cost_ratio * POLICY.probation_steps

    assert firm <= looks <= POLICY.probation_looks
    # What a look costs, the first one told.
    assert (looks - 1) * look_in_steps <= allowed or looks <= firm + 1
    assert looks == POLICY.probation_looks or 2 * (looks - 1) * look_in_steps > 0.9 * allowed


def test_a_run_that_goes_on_looks_where_it_would_have(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = probation(9.0, monkeypatch)
    again = probation(9.0, monkeypatch, restart_at=POLICY.maturity_steps + 3 * SPACING)

    assert [look.step for look in again.looks] == [look.step for look in whole.looks]
