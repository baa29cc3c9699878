"""Inbox and decision page show a remedy as what it is."""

from __future__ import annotations

from typing import Any

import pytest

from apps.accounts.models import User
from apps.adaptations.models import Adaptation
from apps.adaptations.services import grant_delegation
from apps.runs.models import Run
from tests.apps.console.test_decision_page import act, offered, page
from tests.apps.console.world import make_remedies_of_run

GRAFTS_OWN = ("blueprint", "Confidence", "Certificate", "parameters", "Graft ", "Compiled", "FLOPs")


@pytest.fixture
def sick(world: Any) -> Any:
    make_remedies_of_run(world)
    return world


def test_the_decision_page_of_a_remedy(sick: Any) -> None:
    text = page(sick, "olga", "rewind")
    for words in (
        "Rewind to step 5,800 and halve the learning rate",
        "answers “The loss jumped up”",
        "the loss was above 1.557 3 times in a row, now 31.4",
        "since step",
        "began at",
        "exactly, during probation",
        "This run is supervised; a person decides.",
        "Approve remedy",
        "there is no track record",
    ):
        assert words in text, words
    main = text[text.index("<main") : text.index("</main>")]
    for words in GRAFTS_OWN:
        assert words not in main, words
    assert "could not be" not in main  # no panel has failed
    assert offered(text) == {"approve", "reject", "claim", "extend"}


def test_the_page_of_a_kept_remedy(sick: Any) -> None:
    text = page(sick, "olga", "slower")
    main = text[text.index("<main") : text.index("</main>")]
    for words in (
        "Halve the learning rate",
        "Take back",
        "“The loss oscillates” is over",
        "Applied",
    ):
        assert words in main, words
    for words in (*GRAFTS_OWN, "It did not reach the run"):
        assert words not in main, words
    assert offered(text) == {"rollback"}


@pytest.mark.parametrize("path", ["/inbox", "/", "/runs"])
def test_lists_name_the_remedy(sick: Any, path: str) -> None:
    text = sick.client("olga").get(path).content.decode()
    assert "halve the learning rate" in text.lower()
    assert "None" not in text


def test_the_run_shows_its_remedies(sick: Any) -> None:
    uid = sick.runs["digits-cnn"].uid
    text = sick.client("olga").get(f"/runs/{uid}").content.decode()
    assert "Rewind to step 5,800 and halve the learning rate" in text
    assert "could not be" not in text


def test_an_approval_sends_the_remedy(sick: Any) -> None:
    waiting = sick.adaptations["rewind"]
    answer = act(sick.client("olga"), waiting, "approve", "k1", evidence_hash=waiting.evidence_hash)
    assert answer.status_code == 200, answer.content
    assert answer.json()["state"] == "dispatched"


def test_people_ask_for_a_remedy_on_the_run_page(sick: Any) -> None:
    uid = sick.runs["digits-cnn"].uid

    def panel(who: str) -> str:
        text: str = sick.client(who).get(f"/runs/{uid}?panel=ask").content.decode()
        return text

    assert f'data-act="/api/v1/runs/{uid}/ask-for-remedy"' in panel("olga")
    assert 'data-parameter="number" required step="any" autocomplete="off" value="0.5"' in panel(
        "olga"
    )
    assert "The trainer applies it at its next step." in panel("olga")
    for slug in ("evaluate_now", "checkpoint_now", "hold_lr"):
        assert f'id="ask-{slug}"' in panel("olga")
    Run.objects.filter(uid=uid).update(mode="observe")
    assert 'id="ask-evaluate_now"' in panel("olga")
    assert 'id="ask-hold_lr"' not in panel("olga")
    Run.objects.filter(uid=uid).update(mode="supervised")
    assert "waits in the inbox" in panel("rafi")  # his own run: another operator approves
    assert "may ask for remedies" in panel("vera")
    assert "<form" not in panel("vera")


def test_the_pages_show_what_is_approved_ahead_and_what_went_alone_by_it(sick: Any) -> None:
    run = sick.runs["digits-cnn"]
    operator = User.objects.get(username="olga")
    delegation = grant_delegation(
        run=run,
        user=operator,
        via="session",
        remedy="set_lr",
        limits={"factor": [0.5, 2.0]},
        minutes=60,
        most_uses=2,
        reason="nobody is on duty",
    )
    client = sick.client("olga")
    text = client.get(f"/runs/{run.uid}?panel=delegations").content.decode()
    for words in (
        "factor from 0.5 to 2",
        "nobody is on duty",
        "0 of 2",
        f"{delegation.uid}/revoke",
    ):
        assert words in text, words
    assert "delegate-set_lr" in text
    assert "delegate-rewind" not in text  # above the risk that the policy lets go alone
    slower = Adaptation.objects.get(in_words="Halve the learning rate")
    slower.delegation, slower.decided_by = delegation, None
    slower.decided_rule = "delegation 1 of olga"
    slower.save()
    text = page(sick, "olga", "slower")
    assert "Approved ahead by <strong>olga</strong>" in text
    assert f"/runs/{slower.run.uid}#panel-delegations" in text
    owner = sick.client(run.owner.get_username())
    text = owner.get(f"/runs/{run.uid}?panel=delegations").content.decode()
    assert "Approve ahead</button>" not in text  # nobody approves for their own run
    assert "/revoke" in text
