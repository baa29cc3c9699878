"""The conventions of every endpoint: problems, strict JSON, pages, versions, repeats, sessions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from django.core.management import call_command
from django.test import Client
from django.urls import URLPattern, URLResolver
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import esper_web.api_v1 as api_urls
from apps.accounts.models import User
from apps.adaptations.models import Adaptation
from apps.audit.models import AuditEvent
from apps.blueprints.models import Blueprint
from apps.rest.models import IdempotencyRecord
from apps.rest.throttling import ActThrottle
from apps.runs.models import Run
from esper.contracts import AdaptationState, Role, codec, protocol
from tests.apps.callers import Caller, Inbox, Trainer, frame, metrics, proposal, registration, shown

pytestmark = pytest.mark.django_db


def _paths(patterns: list[Any]) -> Iterator[str]:
    for pattern in patterns:
        if isinstance(pattern, URLResolver):
            yield from _paths(pattern.url_patterns)
        elif isinstance(pattern, URLPattern) and not str(pattern.pattern).startswith("^"):
            yield (
                str(pattern.pattern)
                .replace("<str:uid>", "x")
                .replace("<str:seq>", "1")
                .replace("<str:slug>", "x")
                .replace("<str:digest>", "x")
                .replace("<str:file>", "x")
                .replace("<int:version>", "1")
                .replace("<int:number>", "1")
            )


PATHS = sorted(_paths(api_urls.urlpatterns))


def test_a_caller_without_an_account_learns_nothing(anybody: Caller) -> None:
    assert len(PATHS) > 45
    for path in PATHS:
        for answer in (anybody.get(path), anybody.post(path)):
            assert answer.status in {401, 405}, path
            assert answer.code in {"not-signed-in", "method-not-allowed"}, path
        assert anybody.get(path).header("WWW-Authenticate").startswith("Bearer")


@pytest.mark.parametrize("token", ["esp_unknown", "", "a b", "\N{SNOWMAN}"])
def test_a_wrong_token_is_refused_even_beside_a_session(
    token: str, people: dict[Role, User]
) -> None:
    client = Client()
    client.force_login(people[Role.VIEWER])
    caller = Caller("", client)
    header = f"Bearer {token}".encode().decode("latin-1")
    refused = caller.get("me", Authorization=header)
    assert (refused.status, refused.code) == (401, "not-signed-in")


def test_a_path_that_does_not_exist_answers_with_a_problem(viewer: Caller) -> None:
    for path in ("nothing", "runs/x/y/z", "runs/"):
        assert (viewer.get(path).status, viewer.get(path).code) == (404, "not-found")


def test_a_well_formed_request_id_is_kept(viewer: Caller) -> None:
    assert viewer.get("me", **{"X-Request-Id": "trace-17"}).header("X-Request-Id") == "trace-17"
    made = viewer.get("me", **{"X-Request-Id": "a b"}).header("X-Request-Id")
    assert len(made) == 32


BAD_BODIES = [
    b'{"epoch": NaN}',
    b'{"epoch": Infinity}',
    b'{"epoch": 1e999}',
    b'{"epoch": 1, "epoch": 2}',
    b"[" * 100_000,
    b'{"a":' * 40 + b"1" + b"}" * 40,
    b'{"reason": "\\u0000"}',
    b'{"reason": "\\ud800"}',
    b"\xff\xfe",
    b"{",
    b"[]",
    b'"text"',
    b"null",
    b'{"epoch": 99999999999999999999999}',
]


@pytest.mark.parametrize("content", BAD_BODIES, ids=range(len(BAD_BODIES)))
def test_a_body_that_is_not_strict_json_is_refused(trainer: Trainer, content: bytes) -> None:
    for path in ("telemetry", "hello"):
        refused = trainer.post(f"{trainer.path}/{path}", content)
        assert (refused.status, refused.code) == (400, "invalid")


def test_a_body_has_a_limit(trainer: Trainer) -> None:
    content = b'{"a": "' + b"x" * codec.MAX_BYTES + b'"}'
    refused = trainer.post(f"{trainer.path}/telemetry", content)
    assert (refused.status, refused.code) == (413, "too-large")


def test_a_body_of_another_media_type_is_refused(operator: Caller, trainer: Trainer) -> None:
    answer = operator.client.post(
        f"/api/v1/{trainer.path}/stop",
        {"reason": "a form"},
        headers={"Authorization": f"Bearer {operator.token}", "Idempotency-Key": "k"},
    )
    assert answer.status_code == 415
    assert answer.headers["Content-Type"] == "application/problem+json"


@pytest.mark.parametrize(
    "query",
    [
        "runs?colour=red",
        "runs?state=flying",
        "runs?state__in=running,flying",
        "runs?limit=0",
        "runs?limit=201",
        "runs?limit=ten",
        "runs?cursor=%3F%3F",
        "runs?cursor=bm9wZQ==",
        "runs?cursor=ö",
        "audit?at__gte=yesterday",
        "audit?after=" + "9" * 30,
        "blueprints?enabled=maybe",
        "me?fields=all",
        "events",
        "events?topic=inbox&after=-",
    ],
)
def test_a_parameter_that_is_unknown_or_wrong_is_never_ignored(viewer: Caller, query: str) -> None:
    refused = viewer.get(query)
    assert (refused.status, refused.code) == (400, "invalid")


def test_paging_forward_and_back_loses_no_row(viewer: Caller, people: dict[Role, User]) -> None:
    owner = people[Role.OPERATOR]
    Run.objects.bulk_create(Run(name=f"run {i}", owner=owner, mode="observe") for i in range(7))
    pages, url = [], "runs?limit=3"
    while url:
        answer = viewer.get(url)
        pages.append([run["name"] for run in answer.data["results"]])
        back, url = answer.data["previous"], answer.data["next"] or ""
        assert ('rel="next"' in answer.header("Link")) == bool(url)
    names = [f"run {i}" for i in range(6, -1, -1)]
    assert pages == [names[0:3], names[3:6], names[6:7]]
    assert [run["name"] for run in viewer.get(back).data["results"]] == names[3:6]
    Run.objects.create(name="newest", owner=owner, mode="observe")
    first = viewer.get(back)
    newer = viewer.get(viewer.get(first.data["previous"]).data["previous"])
    assert [run["name"] for run in newer.data["results"]] == ["newest"]


def test_a_list_costs_the_same_queries_for_one_row_and_for_many(
    viewer: Caller, people: dict[Role, User], django_assert_max_num_queries: Any
) -> None:
    owner = people[Role.OPERATOR]
    Run.objects.bulk_create(Run(name=f"run {i}", owner=owner, mode="observe") for i in range(60))
    with django_assert_max_num_queries(3):
        assert len(viewer.get("runs?limit=60").data["results"]) == 60


def test_pollers_get_a_304(viewer: Caller, trainer: Trainer) -> None:
    first = viewer.get(trainer.path)
    again = viewer.get(trainer.path, **{"If-None-Match": first.header("ETag")})
    assert (again.status, again.response.content) == (304, b"")
    trainer.send(metrics=[metrics(5, loss=1.0)])
    assert viewer.get(trainer.path, **{"If-None-Match": first.header("ETag")}).status == 200


# --- acts -----------------------------------------------------------------------------------------


def test_an_act_needs_the_version_that_was_read(inbox: Inbox, operator: Caller) -> None:
    adaptation = inbox.waiting()
    path = f"adaptations/{adaptation.uid}/approve"
    body = {"reason": "fine", **shown(adaptation)}
    missing = operator.post(path, body)
    assert (missing.status, missing.code) == (428, "precondition-required")
    strange = operator.post(path, body, **{"If-Match": "latest"})
    assert (strange.status, strange.code) == (400, "invalid")
    stale = operator.act(path, body, version=adaptation.version + 1)
    assert stale.status == 412
    etag = operator.get(f"adaptations/{adaptation.uid}").header("ETag")
    done = operator.post(path, body, **{"If-Match": etag})
    assert (done.status, done.data["state"]) == (200, "compile_queued")
    assert done.data["decided_by"] == "olga"


def test_only_the_evidence_that_was_shown_can_be_approved(inbox: Inbox, operator: Caller) -> None:
    adaptation = inbox.waiting()
    path = f"adaptations/{adaptation.uid}/approve"
    swapped = operator.act(path, {"evidence_hash": "0" * 64}, version=adaptation.version)
    assert (swapped.status, swapped.code) == (412, "payload-changed")
    for idle in ({}, {"evidence_hash": ""}, {"evidence_hash": None}, {"evidence_hash": 0}):
        refused = operator.act(path, idle, version=adaptation.version)
        assert (refused.status, refused.code) == (400, "invalid"), idle


def test_drifted_evidence_has_to_be_accepted(inbox: Inbox, operator: Caller) -> None:
    adaptation = inbox.waiting()
    inbox.trainer.send(metrics=[metrics(1100, loss="nan")])
    path = f"adaptations/{adaptation.uid}/approve"
    stale = operator.act(path, shown(adaptation), version=adaptation.version)
    assert (stale.status, stale.code) == (409, "evidence-stale")
    assert stale.data["drift"] == "inf"
    silent = operator.act(
        path, {"accept_drift": True, **shown(adaptation)}, version=adaptation.version
    )
    assert (silent.status, silent.code) == (422, "reason-required")
    body = {"accept_drift": True, "reason": "the next loss is a number", **shown(adaptation)}
    assert operator.act(path, body, version=adaptation.version).status == 200


def test_pollers_of_adaptations_are_told_that_nothing_changed(
    inbox: Inbox, operator: Caller
) -> None:
    adaptation = inbox.waiting()
    for path in ("adaptations", f"adaptations/{adaptation.uid}"):
        tag = operator.get(path).header("ETag")
        assert operator.get(path, **{"If-None-Match": tag}).status == 304
    inbox.trainer.send(metrics=[metrics(1001, loss=0.9)])
    moved = operator.get(f"adaptations/{adaptation.uid}", **{"If-None-Match": tag})
    assert (moved.status, moved.data["evidence_now"]["loss"]) == (200, 0.9)
    # The new numbers are no new version: the tag that was read still serves for an act.
    assert operator.post(f"adaptations/{adaptation.uid}/claim", **{"If-Match": tag}).status == 200


def test_people_read_all_commands_of_a_run_and_their_answers(
    inbox: Inbox, operator: Caller, trainer: Trainer
) -> None:
    for act in ("pause-adaptation", "resume-adaptation"):
        assert operator.post(f"{trainer.path}/{act}").status == 202
    body = {"epoch": 1, "state": "applied", "step": 7}
    assert trainer.post(f"{trainer.path}/commands/1/ack", body).status == 200
    rows = operator.get(f"{trainer.path}/commands").data["results"]
    assert [(row["seq"], row["kind"], row["state"], row["step"]) for row in rows] == [
        (2, "resume_adaptation", "issued", None),
        (1, "pause_adaptation", "applied", 7),
    ]
    assert [
        row["command"]["seq"] for row in trainer.get(f"{trainer.path}/commands").data["results"]
    ] == [2]


def test_the_loser_of_a_race_is_told_who_won(inbox: Inbox, callers: dict[Role, Caller]) -> None:
    adaptation = inbox.waiting()
    path = f"adaptations/{adaptation.uid}"
    won = callers[Role.OPERATOR].act(f"{path}/reject", {"reason": "no"}, version=adaptation.version)
    lost = callers[Role.ADMIN].act(f"{path}/approve", shown(adaptation), version=adaptation.version)
    assert won.status == 200
    assert (lost.status, lost.code) == (409, "decision-not-pending")
    assert lost.data["decided_by"] == "olga"


def test_a_repeated_act_is_done_once_and_answered_twice(inbox: Inbox, operator: Caller) -> None:
    adaptation = inbox.waiting()
    path, body = f"adaptations/{adaptation.uid}/approve", {"reason": "yes", **shown(adaptation)}
    headers = {"Idempotency-Key": "my key", "If-Match": f'"{adaptation.version}"'}
    first = operator.post(path, body, **dict(headers))
    second = operator.post(path, body, **dict(headers))
    assert (first.status, second.status) == (200, 200)
    assert first.header("Idempotency-Replayed") == ""
    assert second.header("Idempotency-Replayed") == "true"
    assert (second.data, second.header("ETag")) == (first.data, first.header("ETag"))
    assert AuditEvent.objects.filter(act="adaptation.approved").count() == 1
    other = operator.post(path, {**body, "reason": "no"}, **dict(headers))
    assert (other.status, other.code) == (422, "idempotency-mismatch")


def test_an_act_without_a_key_is_not_done(trainer: Trainer, operator: Caller) -> None:
    refused = operator.post(f"{trainer.path}/stop", {"reason": "x"}, **{"Idempotency-Key": ""})
    assert (refused.status, refused.code) == (400, "precondition-required")
    assert trainer.get(f"{trainer.path}/commands").data["results"] == []


def test_keys_belong_to_one_person(trainer: Trainer, callers: dict[Role, Caller]) -> None:
    path, key = f"{trainer.path}/pause-adaptation", {"Idempotency-Key": "same"}
    answers = [callers[role].post(path, **dict(key)) for role in (Role.OPERATOR, Role.ADMIN)]
    assert [answer.status for answer in answers] == [202, 202]
    assert answers[1].header("Idempotency-Replayed") == ""


def test_a_refused_act_is_checked_again_when_it_is_repeated(inbox: Inbox, operator: Caller) -> None:
    adaptation = inbox.waiting()
    path, key = f"adaptations/{adaptation.uid}/claim", {"Idempotency-Key": "once more"}
    stale = operator.post(path, **key, **{"If-Match": '"99"'})
    assert stale.status == 412
    done = operator.post(path, **key, **{"If-Match": f'"{adaptation.version}"'})
    assert done.status == 200


def test_stored_answers_hold_no_secret_in_plain_text(
    people: dict[Role, User], operator: Caller
) -> None:
    key = {"Idempotency-Key": "a new run"}
    first = operator.post("runs", registration(), **dict(key))
    again = operator.post("runs", registration(), **dict(key))
    assert again.data["token"] == first.data["token"]
    record = IdempotencyRecord.objects.get(key="a new run")
    assert first.data["token"].encode() not in bytes(record.body)


def test_a_caller_above_the_rate_limit_is_told_how_long_to_wait(
    trainer: Trainer, operator: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ActThrottle, "rate", "2/min")
    path = f"{trainer.path}/pause-adaptation"
    assert [operator.post(path).status for _ in range(2)] == [202, 202]
    refused = operator.post(path)
    assert (refused.status, refused.code) == (429, "rate-limited")
    assert 1 <= int(refused.header("Retry-After")) <= 61
    assert operator.get(trainer.path).status == 200


def test_a_misspelt_member_of_an_act_is_refused(trainer: Trainer, operator: Caller) -> None:
    refused = operator.post(f"{trainer.path}/stop", {"raeson": "typo"})
    assert (refused.status, refused.code) == (400, "invalid")
    assert refused.data["errors"][0]["pointer"] == "/raeson"


def test_the_kill_switch_blocks_approval_until_it_is_off(inbox: Inbox, operator: Caller) -> None:
    adaptation = inbox.waiting()
    assert operator.post("adaptation-switch", {"on": False, "reason": "smoke"}).status == 200
    assert operator.get("adaptation-switch").data["on"] is False
    path = f"adaptations/{adaptation.uid}/approve"
    refused = operator.act(path, shown(adaptation), version=adaptation.version)
    assert (refused.status, refused.code) == (423, "adaptation-killed")
    assert operator.post("adaptation-switch", {"on": "yes", "reason": ""}).code == "invalid"
    assert operator.post("adaptation-switch", {"on": True, "reason": "ok"}).data["on"] is True


def test_thresholds_are_published_as_a_new_version(callers: dict[Role, Caller]) -> None:
    curator = callers[Role.CURATOR]
    assert curator.get("policies/current").data["version"] == 1
    made = curator.post("policies", {"changes": {"confidence_auto": 0.9}, "reason": "careful"})
    assert (made.status, made.data["version"], made.header("ETag")) == (201, 2, '"2"')
    broken = curator.post("policies", {"changes": {"confidence_auto": 0.01}, "reason": "x"})
    assert (broken.status, broken.code) == (422, "invalid")
    same = curator.post("policies", {"changes": {"confidence_auto": 0.9}, "reason": "x"})
    assert (same.status, same.code) == (422, "invalid")
    versions = [row["version"] for row in curator.get("policies").data["results"]]
    assert versions == [2, 1]


def test_a_blueprint_that_changed_meanwhile_has_to_be_read_again(
    callers: dict[Role, Caller], blueprint: Blueprint
) -> None:
    curator, path = callers[Role.CURATOR], "blueprints/proj_lora_64"
    seen = curator.get(path).header("ETag")
    off = curator.post(f"{path}/disable", {"reason": "bad"}, **{"If-Match": seen})
    assert (off.status, off.data["enabled"], off.data["disabled_reason"]) == (200, False, "bad")
    late = curator.post(f"{path}/disable", {"reason": "also"}, **{"If-Match": seen})
    assert late.status == 412
    assert curator.get("blueprints?enabled=false").data["results"][0]["slug"] == blueprint.slug


def test_the_audit_log_is_read_checked_and_exported(inbox: Inbox, viewer: Caller) -> None:
    inbox.waiting()
    verified = viewer.get("audit/verify").data
    assert (verified["verified"], verified["events"]) == (True, AuditEvent.objects.count())
    mine = viewer.get(f"audit?run={inbox.trainer.run}&act=adaptation.proposed").data["results"]
    assert [event["actor"] for event in mine] == ["tamiyo"]
    export = viewer.get("audit/export").response
    lines = [codec.decode(line) for line in export.getvalue().splitlines()]
    assert [line["id"] for line in lines] == list(range(1, AuditEvent.objects.count() + 1))


# --- browsers -------------------------------------------------------------------------------------


def test_a_session_needs_its_csrf_token_to_write(
    people: dict[Role, User], trainer: Trainer
) -> None:
    browser = Client(enforce_csrf_checks=True)
    browser.force_login(people[Role.OPERATOR])
    page = browser.get("/api/v1/me")
    assert page.json()["role"] == "operator"
    caller = Caller("", browser)
    refused = caller.post(f"{trainer.path}/stop", {"reason": "x"})
    assert (refused.status, refused.code) == (403, "forbidden")
    from django.middleware.csrf import _get_new_csrf_string

    token = _get_new_csrf_string()
    browser.cookies["csrftoken"] = token
    done = caller.post(f"{trainer.path}/stop", {"reason": "x"}, **{"X-CSRFToken": token})
    assert done.status == 202
    event = AuditEvent.objects.get(act="run.stop_run")
    assert (event.actor, event.via) == ("olga", "session")


def test_reading_changes_nothing(viewer: Caller, inbox: Inbox) -> None:
    adaptation = inbox.waiting()
    before = (AuditEvent.objects.count(), Run.objects.count())
    for path in PATHS:
        real = path.replace("/x", f"/{adaptation.uid if 'adapt' in path else inbox.trainer.run}")
        assert viewer.get(real).status < 500
    adaptation.refresh_from_db()
    assert adaptation.state == AdaptationState.AWAITING_APPROVAL
    assert (AuditEvent.objects.count(), Run.objects.count()) == before


# --- bad input is never our error -----------------------------------------------------------------

VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
MEMBERS = {
    "telemetry": {"epoch": 1, "seq_from": 1, "seq_to": 1, "metrics": [metrics(1, loss=1.0)]},
    "hello": {"epoch": 1, "step": 1, "applied": []},
    "commands/1/ack": {"epoch": 1, "state": "applied", "certificate": None},
    "finish": {"epoch": 9, "state": "finished", "step": 1, "reason": ""},
    "adaptations": proposal(epoch=9),
    "runs": registration(),
    "policies": {"changes": {}, "reason": "x"},
}


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_bad_input_is_answered_with_a_problem_document(
    data: st.DataObject,
    trainer: Trainer,
    tamiyo: Caller,
    callers: dict[Role, Caller],
) -> None:
    name = data.draw(st.sampled_from(sorted(MEMBERS)))
    body = dict(MEMBERS[name])
    for member in data.draw(st.lists(st.sampled_from(sorted(body)), max_size=3)):
        body[member] = data.draw(VALUES)
    try:
        content = codec.encode(body)
    except ValueError:
        return
    if name == "runs":
        answer = callers[Role.OPERATOR].post("runs", content)
    elif name == "policies":
        answer = callers[Role.CURATOR].post("policies", content)
    elif name == "adaptations":
        answer = tamiyo.post(f"{trainer.path}/adaptations", content)
    else:
        answer = trainer.post(f"{trainer.path}/{name}", content)
    assert answer.status < 500, (name, body, answer.data)
    if answer.status >= 400:
        assert answer.code


def test_a_frame_may_be_large_but_is_limited(trainer: Trainer) -> None:
    batch = trainer.batch(frames=[frame(step) for step in range(protocol.MAX_FRAMES + 1)])
    refused = trainer.post(f"{trainer.path}/telemetry", batch)
    assert (refused.status, refused.code) == (400, "invalid")


def test_the_openapi_document_is_valid_and_complete(tmp_path: Any) -> None:
    file = tmp_path / "openapi.json"
    call_command(
        "spectacular", "--validate", "--fail-on-warn", "--format", "openapi-json", "--file", file
    )
    document = json.loads(file.read_text())
    assert document["openapi"].startswith("3.1")
    names = [
        operation["operationId"]
        for methods in document["paths"].values()
        for operation in methods.values()
    ]
    assert len(names) == len(set(names))
    described = {path.removeprefix("/api/v1/") for path in document["paths"]}
    assert len(described) == len(PATHS)


def test_adaptations_are_filtered_by_run_and_state(inbox: Inbox, viewer: Caller) -> None:
    adaptation = inbox.waiting()
    query = f"adaptations?run={inbox.trainer.run}&state__in=awaiting_approval,probation"
    assert [row["uid"] for row in viewer.get(query).data["results"]] == [adaptation.uid]
    assert viewer.get("adaptations?run=run_other").data["results"] == []
    assert viewer.get("adaptations?state=kept").data["results"] == []
    assert Adaptation.objects.count() == 1
