"""Which policy decides, as the server tells Tamiyo with a run's snapshot."""

from __future__ import annotations

import msgspec
import pytest
from django.test import Client

from apps.adaptations.decisions import record_decision
from apps.adaptations.models import Adaptation
from apps.adaptations.selectors import run_snapshot
from apps.policies.services import current_policy
from tests.apps.stage import Stage


@pytest.mark.django_db
@pytest.mark.parametrize(("reward", "champion"), [(0.3, "bandit-1"), (-0.3, "heuristic-3")])
def test_the_champion_follows_from_closed_decisions_and_their_logged_chances(
    stage: Stage, reward: float, champion: str
) -> None:
    """The bandit would have made the half of them that earned ``reward`` more often."""
    assert run_snapshot(stage.run).champion == "heuristic-3"
    for number in range(120):
        liked = number % 2 == 0
        odds = {"heuristic-3": 0.5, "bandit-1": 0.95 if liked else 0.05}
        proposal = msgspec.structs.replace(stage.proposal(), chances=odds, step=number)
        adaptation = Adaptation.objects.create(
            run=stage.run, run_epoch=1, idempotency_key=str(number), blueprint=stage.blueprint,
            risk="low", policy="heuristic-3", safety_policy=current_policy(), proposed_step=number,
            layer="fc", state="rolled_back", reward=reward * liked,
        )  # fmt: skip
        record_decision(run=stage.run, message=proposal, adaptation=adaptation)
    assert run_snapshot(stage.run).champion == champion
    client = Client()
    client.force_login(stage.operator)
    page = client.get("/policy?panel=standing").content.decode()
    assert f"<strong>{champion}</strong> decides" in page
