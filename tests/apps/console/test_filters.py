"""A filter shows what it filters by, keeps it, and takes the words that the page uses."""

from __future__ import annotations

import re
from typing import Any

import pytest

from apps.accounts.actors import SYSTEM
from apps.audit.services import record
from apps.console.pages import runs
from apps.runs.models import Run
from apps.violations.services import record_violation
from esper.contracts import RunState, Severity, ViolationRule
from tests.apps.console.world_runs import make_run


def shown_choice(text: str, name: str) -> str:
    """The chosen option of a filter."""
    menu = re.search(rf'<select[^>]*name="{name}".*?</select>', text, re.S)
    assert menu is not None
    chosen = re.findall(r"<option([^>]*) selected[^>]*>([^<]*)", menu[0])
    return chosen[0][1] if chosen else re.findall(r"<option[^>]*>([^<]*)", menu[0])[0]


def rows(text: str) -> list[str]:
    return re.findall(r'<tr data-row id="(?:row-)?(\w+)"', text)


@pytest.mark.parametrize(
    ("address", "name", "word"),
    [
        ("/violations?state=all", "state", "all"),
        ("/violations?state=acknowledged", "state", "acknowledged"),
        ("/violations?severity=serious", "severity", "serious"),
        ("/violations?rule=memory", "rule", "memory"),
        ("/inbox?risk=high", "risk", "high"),
        ("/inbox?run=digits-cnn", "run", "digits-cnn"),
        ("/inbox?run=baseline", "run", "baseline"),
        ("/kernels?blueprint=mlp_gelu_2048", "blueprint", "mlp_gelu_2048"),
        ("/runs?state=finished", "state", "finished"),
        ("/runs?mine=1", "mine", "me"),
    ],
)
def test_a_filter_shows_what_was_chosen(world: Any, address: str, name: str, word: str) -> None:
    text = world.client("olga").get(address).content.decode()
    assert shown_choice(text, name) == word


def test_the_tabs_of_the_inbox_keep_the_other_filters(world: Any) -> None:
    text = world.client("olga").get("/inbox?state=history&risk=low").content.decode()
    assert 'name="state" value="history"' in text
    assert "?state=claimed&amp;risk=low" in text


def test_a_run_is_found_by_its_name(world: Any) -> None:
    client = world.client("olga")
    run = world.runs["digits-cnn"]
    with_name, with_uid = (
        client.get(f"/api/v1/adaptations?run={word}").json()["results"]
        for word in ("digits-cnn", run.uid)
    )
    assert [row["uid"] for row in with_name] == [row["uid"] for row in with_uid] != []
    assert rows(client.get("/inbox?run=digits-cnn").content.decode()) == [
        world.adaptations["waiting"].uid
    ]
    violations = client.get("/api/v1/violations?run=topics-lm").json()["results"]
    assert len(violations) == 1
    listed = client.get("/violations?run=topics-lm").content.decode()
    assert rows(listed) == [violations[0]["uid"]]
    record(
        actor=SYSTEM,
        act="run.registered",
        object_kind="run",
        object_uid=run.uid,
        run_uid=run.uid,
        data={"name": run.name},
    )
    assert client.get("/api/v1/audit?run=digits-cnn&act=run.").json()["results"] != []


def test_the_audit_log_takes_the_beginning_of_an_act_everywhere(world: Any) -> None:
    client = world.client("olga")
    listed = client.get("/api/v1/audit?act=adaptation.comp&actor=sys").json()["results"]
    exported = b"".join(
        client.get("/api/v1/audit/export?act=adaptation.comp&actor=sys").streaming_content
    )
    acts = {row["act"] for row in listed}
    assert acts == {"adaptation.compile_queued", "adaptation.compiling", "adaptation.compiled"}
    assert len(exported.splitlines()) == len(listed)
    number = world.adaptations["kept"].pk
    assert client.get(f"/api/v1/audit?object=A-{number}").json()["results"] != []


def test_the_export_of_the_audit_page_holds_what_the_page_shows(world: Any) -> None:
    text = world.client("olga").get("/audit?act=adaptation.kept&actor=&run=").content.decode()
    assert 'href="/api/v1/audit/export?act=adaptation.kept"' in text
    assert 'href="/api/v1/audit/export"' in world.client("olga").get("/audit").content.decode()


def test_the_list_of_runs_goes_on_after_its_first_page(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "PAGE_LENGTH", 2)
    client = world.client("olga")
    first = client.get("/runs").content.decode()
    assert "page 1 of 2" in first
    second = client.get("/runs?page=2").content.decode()
    assert set(rows(first)) | set(rows(second)) == {run.uid for run in Run.objects.all()}
    named = client.get("/runs?name=digits").content.decode()
    assert rows(named) == [world.runs["digits-cnn"].uid]


def test_critical_findings_come_first_and_those_that_are_over_last(world: Any) -> None:
    run = make_run(world, "mixed", "rafi", steps=3, state=RunState.RUNNING)
    common = {"run": run, "observed": "1", "limit": "0", "action": "-", "layer": "fc"}
    for severity in (Severity.CRITICAL, Severity.SERIOUS, Severity.CAUTION, Severity.INFO):
        record_violation(rule=ViolationRule.COMMAND, severity=severity, text=severity, **common)
    over = record_violation(
        rule=ViolationRule.COMMAND, severity=Severity.CRITICAL, text="over", **common
    )
    type(over).objects.filter(pk=over.pk).update(resolved_step=9)
    client = world.client("olga")
    text = client.get("/violations?run=mixed").content.decode()
    found = re.findall(r'class="status" data-tone="(\w+)"', text[text.index("<tbody>") :])
    assert found[:4] == ["critical", "serious", "caution", "standby"]
    assert over.uid not in rows(text)
    assert rows(client.get("/violations?run=mixed&state=resolved").content.decode()) == [over.uid]
    strip = client.get("/?panel=attention").content.decode()
    assert over.uid not in strip
    assert strip.index("Critical") < strip.index("Waiting for a person") < strip.index("Serious")
    assert re.search(r"V-\d+ critical<", text)  # its own words are the title
