"""What the page and the API say of a graft while it is tested."""

from __future__ import annotations

import pytest
from django.test import Client

from apps.accounts.models import User
from esper.contracts import AdaptationState
from tests.apps.callers import Caller, Inbox, metrics
from tests.apps.cast import force_state

pytestmark = pytest.mark.django_db

BORN = 1000


def test_the_running_test_is_shown_with_its_numbers(inbox: Inbox, viewer: Caller) -> None:
    adaptation = inbox.waiting()
    force_state(adaptation, AdaptationState.PROBATION, graft_step=BORN)
    gain, loss = f"ablation_gain:{adaptation.uid}", f"ablation_loss:{adaptation.uid}"
    inbox.trainer.send(
        metrics=[metrics(step, loss=1.0) for step in range(BORN - 90, BORN + 250, 10)]
        + [metrics(BORN + 125 + 25 * n, **{gain: 0.01 + 0.001 * n, loss: 2.0}) for n in range(5)]
    )

    test = viewer.get(f"adaptations/{adaptation.uid}").data["running_test"]

    assert (test["steps"], test["most_steps"], test["looks"]) == (240, 600, 5)
    assert test["gain"] == pytest.approx(0.006)
    assert test["gain_low"] < 0.006 < test["gain_high"]
    assert (test["keep_above"], test["out_below"]) == (0.005, 0.0)


def test_there_is_no_running_test_outside_probation(inbox: Inbox, viewer: Caller) -> None:
    adaptation = inbox.waiting()
    assert viewer.get(f"adaptations/{adaptation.uid}").data["running_test"] is None


def test_the_page_says_in_a_line_where_the_test_stands(inbox: Inbox) -> None:
    adaptation = inbox.waiting()
    force_state(adaptation, AdaptationState.PROBATION, graft_step=BORN)
    client = Client()
    client.force_login(User.objects.get(username="vera"))
    page = client.get(f"/adaptations/{adaptation.uid}").content.decode()
    assert "of at most 600 of its test" in page
