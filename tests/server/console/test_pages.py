"""Every page, for every role."""

from __future__ import annotations

import pytest
from django.urls import reverse

PLAIN = [
    "overview",
    "inbox",
    "runs",
    "blueprints",
    "violations",
    "policy",
    "kernels",
    "audit",
    "me",
]
PEOPLE = ["vera", "rosa", "anna", "cora", "adam"]
FAILED_PANEL = "This part could not be shown"


def page_addresses(world) -> list[str]:
    return [
        *(reverse(f"console:{name}") for name in PLAIN),
        *(reverse("console:run", args=[run.uid]) for run in world.runs.values()),
        *(reverse("console:adaptation", args=[a.uid]) for a in world.adaptations.values()),
        reverse("console:blueprint", args=["proj_lora_64"]),
        "/inbox?state=history",
        "/inbox?state=claimed",
        "/inbox?state=mine",
        "/audit?verify=1",
        "/audit?act=adaptation.",
        "/violations?state=all&severity=serious",
        "/runs?state=running&mine=1",
        "/bar?section=inbox",
    ]


@pytest.mark.parametrize("who", PEOPLE)
def test_every_page_is_shown_whole_to_every_role(world, who: str) -> None:
    client = world.client(who)
    for address in page_addresses(world):
        answer = client.get(address)
        assert answer.status_code == 200, address
        assert FAILED_PANEL not in answer.content.decode(), address
