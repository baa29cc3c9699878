"""A short campaign of the nemesis; ``python -m tests.nemesis`` runs the long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.nemesis.campaign import Plan, run_campaign

pytestmark = [pytest.mark.process, pytest.mark.timeout(1500)]


def test_nothing_is_applied_twice_stuck_or_told_wrongly_whatever_is_killed(tmp_path: Path) -> None:
    plan = Plan(seed=13, seconds=8, adaptations=6, fake=2, real=1, pause=0.3, patience=400)
    result = run_campaign(tmp_path, plan)
    assert result.violations == [], result
    assert result.errors == [], "an answer 500"
    assert sum(result.ends.values()) >= plan.adaptations
    assert len(result.faults) >= 8, result.faults
