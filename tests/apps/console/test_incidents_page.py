"""Incidents: findings and violations of one run with one cause, the most severe first."""

from __future__ import annotations

import re
from typing import Any

import pytest
from django.utils import timezone

from apps.blueprints.services import sync_remedies
from apps.runs.models import Run
from apps.violations.models import Violation
from apps.violations.services import record_findings, record_violation
from esper.contracts import Finding, Severity, ViolationRule
from tests.apps.callers import Caller
from tests.apps.cast import token_of

pytestmark = pytest.mark.django_db


def _finding(slug: str, layer: str, **changes: Any) -> Finding:
    values: dict[str, Any] = {
        "rule": ViolationRule.DIAGNOSIS,
        "layer": layer,
        "severity": Severity.SERIOUS,
        "observed": f"{slug} was seen",
        "limit": "at most 1",
        "remedy": "lower the rate",
        "slug": slug,
        "since_step": 40,
        "remedies": ("set_lr", "rewind"),
        **changes,
    }
    return Finding(**values)


def _record(run: Run, *findings: Finding) -> None:
    record_findings(run=run, findings=findings)


def _broken(run: Run, layer: str) -> None:
    record_violation(
        run=run,
        rule=ViolationRule.LATENCY,
        severity=Severity.CAUTION,
        observed="75 ms",
        limit="10 ms",
        text=f"{layer}: 75 ms, at most 10 ms.",
        action="Nothing was grafted.",
        layer=layer,
        step=90,
    )


@pytest.fixture
def seen(world: Any) -> Any:
    """One critical finding, one limit broken four times, and a finding that is over."""
    sync_remedies()
    run = world.runs["digits-cnn"]
    for number in range(4):
        _broken(run, f"features.{number % 2}")
    _record(run, _finding("loss_spike", "", severity=Severity.CRITICAL))
    _record(run, _finding("dying_relu", "classifier.2"))
    _record(run, _finding("dying_relu", "classifier.2", resolved_step=77))
    return world


def page(world: Any, who: str, query: str = "") -> str:
    return world.client(who).get(f"/incidents?run=digits-cnn{query}").content.decode()


def titles(text: str) -> list[str]:
    found = re.findall(r"apart\"><h3>.*?</svg>(.*?)<span class=\"muted\">in", text, re.S)
    return [" ".join(re.sub(r"<[^>]+>", " ", title).split()) for title in found]


def test_records_with_one_cause_are_one_incident_and_the_worst_is_first(seen: Any) -> None:
    text = page(seen, "olga")
    assert titles(text) == ["Critical The loss jumped up", "Caution Latency"]
    assert "4 records" in text
    assert "and then 1 other layer" in text
    assert "Acknowledge all 4" in text
    assert titles(page(seen, "olga", "&state=resolved")) == ["Serious Dying ReLU"]
    assert "by itself at step 77" in page(seen, "olga", "&state=resolved")
    assert titles(page(seen, "olga", "&severity=caution")) == ["Caution Latency"]


def test_what_would_help_leads_to_its_form_where_the_person_may_ask(seen: Any) -> None:
    run = seen.runs["digits-cnn"]
    link = f"/runs/{run.uid}#ask-rewind"
    assert link in page(seen, "olga")
    assert link in page(seen, "rafi")  # the owner
    assert link not in page(seen, "vera")
    Run.objects.filter(pk=run.pk).update(state="finished", ended_at=timezone.now())
    assert link not in page(seen, "olga")


def test_an_incident_is_acknowledged_with_all_its_records(seen: Any) -> None:
    caller = Caller(token_of(seen.people["olga"], "read", "act"))  # type: ignore[arg-type]
    rows = list(Violation.objects.filter(rule=ViolationRule.LATENCY).values_list("uid", flat=True))
    body = {"violations": [*rows, "vio_none"], "reason": "known"}
    answer = caller.post("violations/acknowledge", body)
    codes = {row["uid"]: row["code"] for row in answer.data["results"]}
    assert codes == {**dict.fromkeys(rows, ""), "vio_none": "not-found"}
    again = caller.post("violations/acknowledge", body)
    assert [row["code"] for row in again.data["results"]][:4] == ["already-acknowledged"] * 4
    assert titles(page(seen, "olga")) == ["Critical The loss jumped up"]
    assert titles(page(seen, "olga", "&state=acknowledged")) == ["Caution Latency"]
    reader = Caller(token_of(seen.people["vera"], "read", "act"))  # type: ignore[arg-type]
    refused = reader.post("violations/acknowledge", {"violations": rows[:1]})
    assert refused.data["results"][0]["code"] == "not-eligible"


def test_an_incident_names_the_adaptation_that_answers_it(seen: Any) -> None:
    from tests.apps.console.world import make_remedies_of_run

    make_remedies_of_run(seen)
    text = page(seen, "olga")
    waiting = seen.adaptations["rewind"]
    assert f"Decide A-{waiting.number}" in text
    assert "#ask-rewind" not in text  # it waits already


@pytest.mark.parametrize(
    ("layer", "observed", "text"),
    [
        ("fc1", "67% of the units of fc1 are silent", "67% of the units of fc1 are silent"),
        ("fc1", "67% of the units of fc1.gate are silent", "Layer fc1: 67% of"),
        ("0", "loss is 0 of late", "Layer 0: loss is 0 of late"),
    ],
)
def test_a_finding_names_its_layer_once(world: Any, layer: str, observed: str, text: str) -> None:
    _record(world.runs["digits-cnn"], _finding("dying_relu", layer, observed=observed))
    assert Violation.objects.latest("pk").text.startswith(text)


@pytest.mark.parametrize("address", ["/", "/wall"])
def test_the_findings_of_an_ended_run_need_no_person_any_more(world: Any, address: str) -> None:
    run, reader = world.runs["digits-cnn"], world.client("olga")
    _record(run, _finding("dying_relu", "features.3", severity=Severity.CRITICAL))
    assert "Dying ReLU" in reader.get(address).content.decode()
    Run.objects.filter(pk=run.pk).update(state="finished", ended_at=timezone.now())
    assert "Dying ReLU" not in reader.get(address).content.decode()
