"""One page before, during and after the decision."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from django.test import Client

from apps.adaptations.models import Adaptation
from apps.telemetry.models import Metric


def page(world: Any, who: str, name: str) -> str:
    uid = world.adaptations[name].uid
    text: str = world.client(who).get(f"/adaptations/{uid}").content.decode()
    return text


def offered(text: str) -> set[str]:
    """Paths of the act buttons on the page."""
    return set(re.findall(r'<button[^>]*data-path="(\w+)"', text))


def act(client: Client, adaptation: Adaptation, word: str, key: str, **body: Any) -> Any:
    return client.post(
        f"/api/v1/adaptations/{adaptation.uid}/{word}",
        json.dumps({"reason": "", **body}),
        content_type="application/json",
        headers={"Idempotency-Key": key, "If-Match": f'"{adaptation.version}"'},
    )


def test_an_approver_sees_the_change_its_reasons_and_its_undo_plan(world: Any) -> None:
    text = page(world, "olga", "waiting")
    for words in (
        "mlp_gelu_2048",
        "Confidence 0.66 is below 0.75.",  # why asked
        "36 % dead",  # signals
        "runs beside classifier.2",  # what will change, in words
        "+3,160",  # forecast cost
        "needs a sequence axis",  # why not another
        "takes a snapshot",  # undo plan
        "soft: asks a person",  # checks
        "will be <strong>refused</strong>",  # what expiry does
        "too few to trust a rate",  # base rate with its n
    ):
        assert words in text, words


@pytest.mark.parametrize(
    ("who", "acts"),
    [
        ("olga", {"approve", "reject", "claim", "extend"}),
        ("ada", {"approve", "reject", "claim", "extend"}),
        ("rafi", {"reject"}),  # his own run: he may make it safer
        ("vera", set()),
        ("carl", set()),
    ],
)
def test_buttons_are_those_that_the_policy_allows(world: Any, who: str, acts: set[str]) -> None:
    assert offered(page(world, who, "waiting")) == acts


def test_a_missing_right_is_explained(world: Any) -> None:
    vera = page(world, "vera", "waiting")
    assert "Only admins or operators may approve, reject, claim, extend." in vera
    own = page(world, "olga", "olgas")
    assert "This is your own run: another operator has to approve." in own
    assert "approve" not in offered(own)
    assert "reject" in offered(own)


def test_the_other_ways_to_decide_are_offered_to_those_who_may(world: Any) -> None:
    uid = world.adaptations["waiting"].uid
    for who, may in (("olga", True), ("vera", False)):
        text = world.client(who).get(f"/adaptations/{uid}?panel=more").content.decode()
        found = {
            act: f"adaptations/{uid}/{act}" in text for act in ("assign", "snooze", "escalate")
        }
        assert found == dict.fromkeys(found, may), who
        assert ("Approve with these settings" in text) is may
        assert "Dry run: what an approval would do now" in text
    assert "Only admins or operators may approve" in text
    head = page(world, "olga", "waiting")
    assert '<option value="too_costly">too costly</option>' in head


def test_the_form_pins_the_version_and_the_evidence_that_were_shown(world: Any) -> None:
    text = page(world, "olga", "waiting")
    assert 'data-if-match="1"' in text
    assert world.adaptations["waiting"].evidence_hash in text


def test_after_the_decision_the_page_is_its_record(world: Any) -> None:
    text = page(world, "olga", "kept")
    assert offered(text) == {"rollback"}
    for words in (
        "<strong>oscar</strong> approved it",
        "stagnant for long",
        "Certificate",
        "passed",
    ):
        assert words in text
    assert "Reward +0.480" in text
    assert "+0.034 ± 0.012" in text


def test_an_ended_decision_has_no_buttons(world: Any) -> None:
    text = page(world, "olga", "rejected")
    assert offered(text) == set()
    assert "This adaptation has ended. This page is its record." in text
    assert "<strong>olga</strong> rejected it" in text


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("in_doubt", "The trainer is asked what it did"),
        ("rollback_failed", "could not take it out"),
    ],
)
def test_a_missing_answer_is_said_plainly_and_may_be_settled_by_a_person(
    world: Any, state: str, words: str
) -> None:
    assert words not in page(world, "olga", "kept")
    for step in ("rolling_back", state):  # the database knows the lifecycle
        Adaptation.objects.filter(pk=world.adaptations["kept"].pk).update(state=step)
    text = page(world, "olga", "kept")
    assert words in text
    assert "rollback" in offered(text)


def test_of_two_operators_at_once_the_loser_reads_who_won(world: Any) -> None:
    olga, oscar = world.client("olga"), world.client("oscar")
    seen = world.adaptations["waiting"]
    body = {"evidence_hash": seen.evidence_hash}
    first = act(olga, seen, "approve", "key-of-olga", **body)
    second = act(oscar, seen, "reject", "key-of-oscar", reason="too risky")
    assert (first.status_code, second.status_code) == (200, 409)
    assert "olga" in second.json()["detail"]
    after = oscar.get(f"/adaptations/{seen.uid}").content.decode()
    assert "<strong>olga</strong> approved it" in after
    assert "reject" not in offered(after)


def test_a_rejection_shows_its_reason(world: Any) -> None:
    seen = world.adaptations["waiting"]
    answer = act(world.client("oscar"), seen, "reject", "a-key", reason="wait for the next epoch")
    assert answer.status_code == 200
    assert "wait for the next epoch" in page(world, "vera", "waiting")


def test_stages_carry_their_times(world: Any) -> None:
    text = page(world, "olga", "kept")
    assert re.findall(r'data-done="(\w*)"', text) == ["yes"] * 6
    waiting = re.findall(r'data-done="(\w*)"', page(world, "olga", "waiting"))
    assert waiting == ["yes", "now", "", "", "", ""]


def test_the_policy_page_compares_confidence_with_what_was_kept(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = world.client("vera")
    address = {"panel": "calibration"}
    assert "Too few to trust" in client.get("/policy", address).content.decode()

    closed = [("proj_ia3", 0.9, place < 15) for place in range(30)] + [("widen_hidden", 0.8, True)]
    monkeypatch.setattr("apps.console.pages.policy.closed_confidences", lambda: closed)
    text = client.get("/policy", address).content.decode()
    assert "31 closed cases" in text
    assert "proj_ia3" in text
    assert "0.50" in text  # kept, of 0.90 said
    assert text.count("too few to trust") == 1  # widen_hidden


def test_a_compiled_run_shows_the_pause_to_expect(world: Any) -> None:
    adaptation = world.adaptations["waiting"]
    run = adaptation.run
    assert "the layer runs eagerly" in page(world, "olga", "waiting")
    for layer in run.layers:
        layer["compiled"] = layer["name"] == adaptation.layer
    run.save()
    measured = {"compile_ahead_s": 1.25, "compile_s": 27.5, "step_ms": 84.0}
    for name, value in measured.items():
        Metric.objects.create(
            run=run, epoch=run.epoch, step=run.step + 1, wall_time=0.0, name=name, value=value
        )
    text = page(world, "olga", "waiting")
    for words in ("Pause for torch.compile, s", "1.25", "27.5 where it cannot", "84.0 ms"):
        assert words in text, words
    address = f"/api/v1/adaptations/{adaptation.uid}"
    answer = world.client("olga").get(address).json()["pause_forecast"]
    assert answer == {
        "step_ms": 84.0,
        "recompiles": True,
        "seconds": 1.25,
        "unprepared_seconds": 27.5,
    }
    for layer in run.layers:
        del layer["compiled"]  # of a trainer that does not say
    run.save()
    assert "Pause for torch.compile" not in page(world, "olga", "waiting")


def test_the_acts_are_asked_for_anew_when_a_freeze_begins_or_ends(world: Any) -> None:
    client = world.client("olga")
    text = client.get(f"/adaptations/{world.adaptations['waiting'].uid}").content.decode()
    panel = re.search(r'<\w+[^>]* id="panel-acts"[^>]*>', text)
    assert panel
    events = re.search(r'data-events="([^"]*)"', panel[0])
    assert events
    assert "freeze" in events[1].split()
