"""``esper remedy``: the catalogue, a remedy by its name, and what it says."""

from __future__ import annotations

import json
from typing import Any

import pytest

from apps.adaptations.models import Adaptation
from launcher.commands import remedying
from launcher.remote.client import Client, Exit
from tests.apps.callers import Inbox
from tests.apps.cast import make_remedies
from tests.apps.commands.terminal import Terminal

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def _catalogue(db: None) -> None:
    make_remedies()


def test_a_rate_is_asked_for_by_its_value(inbox: Inbox, terminal: Terminal) -> None:
    words = ("remedy", "digits", "hold_lr", "value=3e-4", "--reason", "too fast")
    assert "would be dispatched" in terminal.run(*words, "--dry-run").output
    assert not Adaptation.objects.filter(remedy="hold_lr").exists()
    asked = terminal.run(*words)
    assert asked.exit_code == 0, asked.output
    assert "is dispatched: Set the learning rate to 0.0003" in asked.output
    row = Adaptation.objects.get(remedy="hold_lr")
    assert (row.config, row.decision_reason) == ({"value": 3e-4}, "too fast")
    assert json.loads(terminal.requests[-1].content)["layer"] == ""


def test_what_was_measured_is_printed(
    inbox: Inbox, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def applied(client: Client, uid: str, *_: object, **__: object) -> dict[str, Any]:
        found = client.get(f"adaptations/{uid}").data
        return {**found, "state": "kept", "details": {"held_out_loss": 0.25}}

    monkeypatch.setattr(remedying, "wait_for_adaptation", applied)
    measured = terminal.run("remedy", "digits", "evaluate_now", "--wait")
    assert "is kept: Evaluate now\nheld out loss: 0.25\n" in measured.output


def test_the_catalogue_is_listed_and_what_cannot_be_is_refused(
    inbox: Inbox, terminal: Terminal
) -> None:
    assert {"rewind", "hold_lr", "checkpoint_now"} <= {
        row["slug"] for row in terminal.read("remedy")
    }
    unknown = terminal.run("remedy", "digits", "prayer")
    assert (unknown.exit_code, "no remedy called 'prayer'" in unknown.output) == (
        Exit.FAILED,
        True,
    )
    assert terminal.run("remedy", "digits", "hold_lr", "fast").exit_code == 2
