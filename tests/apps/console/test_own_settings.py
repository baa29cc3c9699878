"""Settings, saved views, search, the password again, and the pages that report on Esper."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest
from django.test import Client
from django.utils import timezone

from apps.accounts.models import ApiToken, User
from apps.accounts.step_up import HOLDS_FOR
from apps.adaptations.models import Adaptation
from apps.audit.models import AuditEvent
from apps.blueprints.services import sync_remedies
from apps.console.pages import search
from apps.console.waiting import inbox_count
from apps.notifications.models import DutyShift
from apps.policies.models import PolicyVersion
from apps.policies.services import adaptation_switch
from apps.runs.models import Run
from apps.violations.models import Violation
from apps.violations.services import record_violation
from apps.workers.models import CompileJob
from esper.contracts import (
    RUN_ENDED,
    AdaptationState,
    JobState,
    RunState,
    Severity,
    ViolationRule,
    codec,
)
from tests.apps.cast import PASSWORD
from tests.apps.console.world import make_remedies_of_run
from tests.apps.console.world_busy import make_plan

SETTINGS = {"zone": "Asia/Tokyo", "theme": "dark", "density": "compact", "notify": "on"}


def text_of(client: Client, address: str) -> str:
    return client.get(address).content.decode()


def head(client: Client) -> str:
    return text_of(client, "/audit").split("<head>")[0]


def test_settings_hold_for_the_account_in_every_browser(world: Any) -> None:
    client = world.client("olga")
    assert client.post("/me/settings", SETTINGS).status_code == 302
    other = world.client("olga")
    for attribute in (
        'data-theme="dark"',
        'data-density="compact"',
        'data-zone="Asia/Tokyo"',
        'data-keys="off"',
        'data-notify="on"',
    ):
        assert attribute in head(other), attribute
    assert "data-" not in head(world.client("vera"))
    other.cookies["theme"] = "light"  # the button of the menu: for this browser alone
    assert 'data-theme="light"' in head(other)


@pytest.mark.parametrize("wrong", [{"zone": "Mars/Base"}, {"theme": "pink"}, {"density": "none"}])
def test_an_unknown_setting_is_refused_and_changes_nothing(world: Any, wrong: Any) -> None:
    client = world.client("olga")
    assert client.post("/me/settings", {**SETTINGS, **wrong}).status_code == 422
    assert User.objects.get(username="olga").preferences == {}


def test_a_view_is_saved_with_its_filters_replaced_and_removed(world: Any) -> None:
    client = world.client("olga")
    view = {"path": "/runs", "name": "mine & live", "query": "state=running&mine=1&page=3&panel=x"}
    answer = client.post("/me/views", view)
    assert (answer.status_code, answer["Location"]) == (302, "/runs?state=running&mine=1")
    assert 'href="/runs?state=running&amp;mine=1"' in text_of(client, "/runs")
    assert "mine &amp; live" in text_of(client, "/runs")
    assert "mine &amp; live" not in text_of(client, "/inbox")  # a view belongs to its list
    assert "mine &amp; live" not in text_of(world.client("vera"), "/runs")
    client.post("/me/views", {**view, "query": "state=failed"})
    text = text_of(client, "/runs")
    assert text.count("mine &amp; live") == 1
    assert 'href="/runs?state=failed"' in text
    client.post("/me/views", {**view, "remove": "1"})
    assert "mine &amp; live" not in text_of(client, "/me")


@pytest.mark.parametrize("path", ["/admin/", "https://evil.example/", "/policy", ""])
def test_a_view_leads_nowhere_else(world: Any, path: str) -> None:
    answer = world.client("olga").post("/me/views", {"path": path, "name": "x", "query": ""})
    assert answer.status_code == 400
    assert User.objects.get(username="olga").preferences == {}


def test_a_person_has_a_limited_number_of_views(world: Any) -> None:
    client = world.client("olga")
    for number in range(41):
        answer = client.post("/me/views", {"path": "/runs", "name": f"v{number}", "query": ""})
    assert answer.status_code == 422
    assert len(User.objects.get(username="olga").preferences["views"]) == 40


def test_search_finds_each_kind_and_escapes_what_it_did_not_find(world: Any) -> None:
    client = world.client("olga")
    client.post("/me/views", {"path": "/runs", "name": "digits at night", "query": "mine=1"})
    adaptation = world.adaptations["waiting"]
    hits = text_of(client, "/search?q=digits&part=list")
    assert f"/runs/{world.runs['digits-cnn'].uid}" in hits
    assert "digits at night" in hits
    for words in (f"A-{adaptation.number}", f"a{adaptation.number}", str(adaptation.number)):
        assert adaptation.uid in text_of(client, f"/search?q={words}&part=list"), words
    assert "/blueprints/proj_lora_64" in text_of(client, "/search?q=lora&part=list")
    assert 'href="/switch"' in text_of(client, "/search?q=kill&part=list")
    assert 'href="/wall"' not in text_of(client, "/search?q=lay&part=list")  # inside a word
    assert adaptation.uid in text_of(client, "/search?part=list")  # what waits comes first
    assert "&lt;script&gt;" in text_of(client, "/search?q=<script>&part=list")


def test_search_looks_through_the_words_of_the_newest_decisions(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = world.client("olga")
    newest, *_, oldest = Adaptation.objects.exclude(blueprint=None)
    monkeypatch.setattr(search, "NEWEST", newest.pk - oldest.pk)
    for words in (newest.layer, newest.grafted_blueprint.slug, oldest.uid, f"A-{oldest.number}"):
        wanted = newest if words in (newest.layer, newest.grafted_blueprint.slug) else oldest
        assert wanted.uid in text_of(client, f"/search?q={words}&part=list"), words
    Adaptation.objects.filter(pk=newest.pk).update(since="first.of.a.span")
    assert newest.uid in text_of(client, "/search?q=first.of&part=list")
    Adaptation.objects.filter(pk=oldest.pk).update(layer="far.away")
    assert oldest.uid not in text_of(client, "/search?q=far.away&part=list")
    monkeypatch.setattr(search, "NEWEST", newest.pk)
    assert oldest.uid in text_of(client, "/search?q=far.away&part=list")


# --- the password again ---------------------------------------------------------------------------


def post(client: Client, path: str, body: Any) -> Any:
    return client.post(
        f"/api/v1/{path}",
        codec.encode(body),
        content_type="application/json",
        headers={"Idempotency-Key": f"key-{time.monotonic_ns()}"},
    )


def forget_password(client: Client, age: timedelta = HOLDS_FOR + timedelta(seconds=1)) -> None:
    session = client.session
    session["password_at"] = time.time() - age.total_seconds()
    session.save()


DANGEROUS = {
    "token": ("olga", "tokens", {"name": "x", "scopes": ["read"], "expires_in_days": 1}),
    "policy": ("carl", "policies", {"changes": {"confidence_auto": 0.9}, "reason": "careful"}),
    "switch on": ("olga", "adaptation-switch", {"on": True, "reason": ""}),
}


@pytest.mark.parametrize("act", DANGEROUS)
def test_a_dangerous_act_needs_the_password_of_the_last_minutes(world: Any, act: str) -> None:
    who, path, body = DANGEROUS[act]
    client = world.client(who)
    for session_age in (HOLDS_FOR + timedelta(seconds=1), timedelta(minutes=-5)):
        forget_password(client, session_age)
        refused = post(client, path, body)
        assert (refused.status_code, refused.json()["code"]) == (403, "password-needed")
    assert not ApiToken.objects.filter(name="x").exists()
    assert not PolicyVersion.objects.filter(reason="careful").exists()
    assert client.post("/step-up", {"password": "wrong"}).status_code == 403
    assert post(client, path, body).status_code == 403
    assert client.post("/step-up", {"password": PASSWORD}).status_code == 200
    assert post(client, path, body).status_code in (200, 201)


def test_the_kill_switch_and_a_rejection_are_never_delayed_by_it(world: Any) -> None:
    client = world.client("olga")
    forget_password(client)
    waits = world.adaptations["waiting"]
    answer = client.post(
        f"/api/v1/adaptations/{waits.uid}/reject",
        codec.encode({"reason": "no"}),
        content_type="application/json",
        headers={"Idempotency-Key": "reject", "If-Match": f'"{waits.version}"'},
    )
    assert answer.status_code == 200
    assert post(client, "adaptation-switch", {"on": False, "reason": ""}).status_code == 200
    assert not adaptation_switch().on


def test_wrong_passwords_are_counted_with_those_of_the_sign_in(world: Any) -> None:
    client = world.client("olga")
    for _ in range(5):
        assert client.post("/step-up", {"password": "wrong"}).status_code == 403
    assert client.post("/step-up", {"password": PASSWORD}).status_code == 429
    assert AuditEvent.objects.filter(act="session.refused").count() == 5
    assert client.get("/step-up").status_code == 405


# --- the pages that report ------------------------------------------------------------------------


def test_the_status_page_says_what_does_not_work(world: Any) -> None:
    client = world.client("vera")
    calm = text_of(client, "/status?panel=parts")
    assert "database" in calm
    CompileJob.objects.filter(state=JobState.QUEUED).update(
        queued_at=timezone.now() - timedelta(minutes=5)
    )
    assert "late" in text_of(client, "/status?panel=queues")
    Run.objects.filter(name="digits-cnn").update(state=RunState.UNREACHABLE)
    assert "still be training" in text_of(client, "/status?panel=runs")


def test_who_is_on_duty_stands_on_the_overview(world: Any) -> None:
    now = timezone.now()
    olga, ada = (User.objects.get(username=name) for name in ("olga", "ada"))
    hour = timedelta(hours=1)
    DutyShift.objects.create(user=olga, begins=now - hour, ends=now + hour)
    DutyShift.objects.create(user=ada, begins=now + hour, ends=now + 2 * hour)
    text = text_of(world.client("vera"), "/?panel=attention")
    assert "on duty: olga (ends" in text
    assert "ada (ends" not in text  # later
    text = text_of(world.client("olga"), "/duty")
    assert text.count("Remove<span") == 1  # her own alone
    assert "new-shift" not in text_of(world.client("vera"), "/duty")


def test_the_wall_shows_every_state_and_no_control(world: Any) -> None:
    text = text_of(world.client("olga"), "/wall?panel=board")
    assert "digits-cnn" in text
    assert f"A-{world.adaptations['waiting'].number}" in text
    for control in ("<form", "<button", "data-act"):
        assert control not in text, control


def test_the_report_says_how_each_run_ended(world: Any) -> None:
    words = {"finished": "finished.", "failed": "its script ended", "lost": "its trainer stopped"}
    assert set(words) == set(RUN_ENDED)
    for state, expected in words.items():
        Run.objects.update(state=state, ended_at=None)
        run = Run.objects.earliest("pk")
        run.ended_at = timezone.now()
        run.save(update_fields=["ended_at"])
        assert expected in text_of(world.client("vera"), "/report?panel=runs")


def _find(run: Run, slug: str, severity: Severity, layer: str) -> Violation:
    record_violation(
        run=run,
        rule=ViolationRule.DIAGNOSIS,
        severity=severity,
        observed="67% is dead",
        limit="less than 50%",
        text="67% is dead",
        action="Nothing was changed.",
        layer=layer,
        step=90,
        finding=slug,
    )
    return Violation.objects.latest("pk")


@pytest.mark.parametrize("address", ["/", "/wall?panel=board", "/runs/{run}?panel=timeline"])
def test_a_finding_has_its_title_on_every_page(world: Any, address: str) -> None:
    run = world.runs["digits-cnn"]
    _find(run, "update_ratio_low", Severity.CRITICAL, layer="classifier.2")
    shown = text_of(world.client("olga"), address.format(run=run.uid))
    assert "Updates are too small" in shown
    assert "diagnosis:" not in shown


def test_the_report_names_remedies_and_severities_as_people_do(world: Any) -> None:
    sync_remedies()
    make_remedies_of_run(world)
    for severity in (Severity.SERIOUS, Severity.CRITICAL):
        _find(world.runs["digits-cnn"], "dying_relu", severity, layer="classifier.2")
    client = world.client("vera")
    changes = text_of(client, "/report?panel=changes")
    assert "Rewind to a good state" in changes
    assert "set_lr" not in changes
    found = text_of(client, "/report?panel=runs")
    assert found.index("of severity “critical”") < found.index("of severity “serious”")


def test_the_wall_and_the_inbox_count_the_same(world: Any) -> None:
    make_plan(world, "topics-lm", ["features.0", "features.6"])
    waits = Adaptation.objects.filter(state=AdaptationState.AWAITING_APPROVAL)
    tile = text_of(world.client("olga"), "/wall?panel=board").split("Wait for a person")[1]
    count = inbox_count(User.objects.get(username="olga"))
    assert count < waits.count()
    assert tile.split("</div>")[0].split("</svg>")[1].startswith(f"{count}<")


def test_the_report_counts_what_was_decided_in_its_week(world: Any) -> None:
    client = world.client("vera")
    olga = User.objects.get(username="olga")
    row = Adaptation.objects.filter(state=AdaptationState.KEPT).first()
    assert row is not None
    row.decided_by, row.decided_at = olga, timezone.now()
    row.save()
    person = '<th scope="row" class="whole">olga</th>'
    assert person in text_of(client, "/report?panel=people")
    assert person not in text_of(client, "/report?panel=people&ago=2")
    assert "Nothing was proposed" in text_of(client, "/report?panel=changes&ago=52")
    assert "proj_lora_64" in text_of(client, "/report?panel=changes")
    for odd in ("-1", "x", "9999"):
        assert client.get(f"/report?ago={odd}").status_code == 200
