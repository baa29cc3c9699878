"""Requests that are made from the OpenAPI document, right and wrong ones, by everybody.

Each is answered as the document says, never with an error of the server; what is refused changes
nothing, and no act is done by a role that may not do it. Each request is taken back afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from django.core.wsgi import get_wsgi_application
from django.db import transaction
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.config import GenerationConfig, ProjectConfig, ProjectsConfig, SchemathesisConfig
from schemathesis.specs.openapi import checks

from apps.accounts.models import User
from apps.accounts.policy import ALLOWED, NEEDS_A_PERSON, OWNER_MAY, Act
from apps.adaptations.models import Adaptation
from apps.policies.models import PolicyVersion
from apps.runs.models import Run
from apps.violations.models import Violation
from esper.contracts import Role, TokenScope
from tests.apps.callers import Answer, Caller, Inbox
from tests.apps.cast import make_person, token_of
from tests.apps.security import test_object_rights as rights

pytestmark = pytest.mark.django_db

DOCUMENT = json.loads((Path(__file__).parents[3] / "docs/reference/openapi.json").read_text())
PARTS = 4  # tests, so that they share the processors
EXAMPLES = [3, pytest.param(6, marks=pytest.mark.full)]  # of each operation
DESCRIBED = [
    *(checks.status_code_conformance, checks.content_type_conformance),
    *(checks.response_headers_conformance, checks.response_schema_conformance),
]
SERVICE = "service account"

objects = rights.objects
_no_throttle = rights._no_throttle

# Which act each writing operation of people is; the others are about the caller's own things.
ACTS = {
    Act.APPROVE: ("approve_adaptation", "approve_plan", "grant_delegation"),
    Act.CLAIM: (
        *("assign_adaptation", "claim_adaptation", "escalate_adaptation", "release_adaptation"),
        *("snooze_adaptation", "add_duty", "remove_duty"),
    ),
    Act.CANCEL: ("cancel_adaptation",),
    Act.EXTEND: ("extend_adaptation",),
    Act.REJECT: (*("reject_adaptation", "reject_adaptations", "reject_plan", "revoke_delegation"),),
    Act.ROLL_BACK: ("roll_back_adaptation", "undo_plan"),
    Act.SHADOW: ("shadow_adaptation",),
    Act.KILL: ("set_adaptation_switch", "set_project_switch"),
    Act.SWITCH_BLUEPRINT: ("disable_blueprint", "enable_blueprint"),
    Act.ADMIT_VARIANT: ("admit_variant", "withdraw_variant"),
    Act.MANAGE_CACHE: ("evict_kernel", "pin_kernel", "unpin_kernel", "scrub_kernel_cache"),
    Act.START_RECIPE: ("start_recipe", "resume_launch", "branch_run"),
    Act.STOP_LAUNCH: ("stop_launch",),
    Act.EDIT_POLICY: (
        *("publish_policy", "approve_policy", "withdraw_policy"),
        *("set_freeze", "end_freeze"),
    ),
    Act.MANAGE_PEOPLE: (
        *("create_project", "create_service_account", "end_service_account", "set_member"),
        "remove_second_factor",
        "move_run",
    ),
    Act.CREATE_RUN: ("register_run",),
    Act.PROPOSE_REMEDY: ("ask_for_remedy",),
    Act.PAUSE_ADAPTATION: ("pause_adaptation", "resume_adaptation"),
    Act.STOP_RUN: ("stop_run",),
    Act.ACKNOWLEDGE_VIOLATION: ("acknowledge_violation", "acknowledge_violations"),
    Act.MANAGE_WORKERS: ("drain_worker", "quarantine_worker", "release_worker"),
}
# Of several objects each is answered for itself; who may act on none changes nothing.
OF_SEVERAL = {"reject_adaptations", "acknowledge_violations"}
ACT_OF = {name: act for act, names in ACTS.items() for name in names}
OWN = {
    *("add_channel", "remove_channel", "replay_delivery", "end_other_sessions", "issue_token"),
    *("revoke_token", "issue_socket_ticket"),
}
OF_TAMIYO = {
    *("judge_adaptation", "suggest_variant", "propose_adaptation", "record_decline"),
    *("propose_plan", "report_tamiyo_heartbeat", "issue_socket_ticket"),
}
OF_TRAINERS = {
    *("acknowledge_command", "finish_run", "say_hello", "report_remedy", "propose_remedy"),
    *("judge_remedy", "report_rollback", "send_telemetry"),
}


def allowed(caller: str, operation: str) -> bool:
    """By the tables of rights, not by the code of the operation."""
    if caller in {"nobody", "trainer", "tamiyo"}:
        return operation in {"trainer": OF_TRAINERS, "tamiyo": OF_TAMIYO}.get(caller, set())
    act = ACT_OF.get(operation)
    if act is None:
        return operation in OWN
    if caller == SERVICE:
        return act not in NEEDS_A_PERSON
    role = Role(caller)
    return role in ALLOWED[act] or (role is Role.RESEARCHER and act in OWNER_MAY)


@pytest.fixture
def tokens(people: dict[Role, User], inbox: Inbox, objects: dict[str, str]) -> dict[str, str]:
    """One of each kind of caller. The researcher owns the run, the service account is an admin."""
    program = make_person("program", Role.ADMIN)
    User.objects.filter(pk=program.pk).update(is_service=True)
    of_people = {str(role): user for role, user in people.items()} | {SERVICE: program}
    scopes = (TokenScope.READ, TokenScope.ACT)
    return {
        "nobody": "",
        "trainer": inbox.trainer.token,
        "tamiyo": inbox.tamiyo.token,
        **{name: token_of(user, *scopes) for name, user in of_people.items()},
    }


def of_document(part: int) -> Iterator[Any]:
    generation = GenerationConfig(with_security_parameters=False, deterministic=True)
    projects = ProjectsConfig(default=ProjectConfig(generation=generation))
    schema = schemathesis.openapi.from_dict(
        DOCUMENT, config=SchemathesisConfig(seed=0, projects=projects)
    )
    schema.app = get_wsgi_application()
    found = [result.ok() for result in schema.get_all_operations()]
    assert len(found) > 130
    yield from found[part::PARTS]


def cases(operation: Any, objects: dict[str, str]) -> st.SearchStrategy[Case]:
    """Right and wrong requests, most of them about objects that exist."""
    kind = operation.path.removeprefix("/api/v1/").split("/")[0]
    names = [parameter.name for parameter in operation.path_parameters]
    there = {name: objects.get(kind, "none") for name in names}
    there |= {name: "1" for name in ("seq", "file") if name in there}
    more: dict[str, Any] = {"media_type": "application/json"} if operation.body else {}
    right = operation.as_strategy(GenerationMode.POSITIVE, path_parameters=there, **more)
    wrong = operation.as_strategy(GenerationMode.NEGATIVE, path_parameters=there, **more)
    elsewhere = operation.as_strategy(GenerationMode.POSITIVE, **more)
    return st.one_of(right, right.map(true_to_life), wrong, *([elsewhere] if there else []))


def true_to_life(case: Case) -> Case:
    """With the version and the hash of what waits, so that more than the first check is reached."""
    if "If-Match" in case.headers:
        case.headers["If-Match"] = '"2"'
    if isinstance(case.body, dict) and "evidence_hash" in case.body:
        case.body["evidence_hash"] = Adaptation.objects.get().evidence_hash
    return case


def content() -> list[Any]:
    """What acts change."""
    return [
        list(Adaptation.objects.values_list("state", "version")),
        list(Run.objects.order_by("pk").values_list("state", "epoch", "adaptation_paused_at")),
        list(PolicyVersion.objects.order_by("pk").values_list("state")),
        list(Violation.objects.order_by("pk").values_list("acknowledged_at")),
    ]


def faults(case: Case, caller: str, token: str, before: list[Any]) -> Iterator[str]:
    """What is wrong with the answer, one text each."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with transaction.atomic():
        response = case.call(headers=headers)
        after = content()
        transaction.set_rollback(True)
    if response.status_code >= 500:
        yield "an error of the server"
    name = case.operation.definition.raw["operationId"]
    done = response.status_code < 300
    if not done and after != before:
        yield "refused, but something has changed"
    if done and case.method == "GET" and caller == "nobody":
        yield "read without a token"
    nothing_done = name in OF_SEVERAL and after == before
    if done and case.method != "GET" and not allowed(caller, name) and not nothing_done:
        yield "done by one who may not"
    needs_key = "dry_run" not in (case.query or {})  # without it a wrong key is not looked at
    expected = [*DESCRIBED, *([checks.negative_data_rejection] if needs_key else [])]
    try:
        case.validate_response(response, checks=expected)
    except BaseExceptionGroup as found:
        yield from (f"{type(one).__name__}: {str(one)[:400]}" for one in found.exceptions)


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("part", range(PARTS))
def test_every_answer_is_described_and_every_act_allowed(
    part: int, examples: int, objects: dict[str, str], tokens: dict[str, str]
) -> None:
    before, wrong = content(), []
    for operation in of_document(part):
        wanted = cases(operation, objects)

        @settings(
            max_examples=examples,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(caller=st.sampled_from(sorted(tokens)), case=wanted)
        def send(caller: str, case: Case) -> None:
            try:
                found = list(faults(case, caller, tokens[caller], before))
            except Exception as error:  # in the midst of a stream
                found = [f"not answered: {error!r}"]
            request = f"{case.method} {case.formatted_path} {case.query} {case.body!r}"[:600]
            wrong.extend(f"{request} by {caller}: {one}" for one in found)

        send()
    assert wrong == []


def test_every_writing_operation_is_in_a_table_of_rights() -> None:
    writing = {
        operation["operationId"]
        for methods in DOCUMENT["paths"].values()
        for method, operation in methods.items()
        if method != "get"
    }
    assert writing == {*ACT_OF, *OWN, *OF_TAMIYO, *OF_TRAINERS}


HOSTILE = (
    *(b"", b"\xff\xfe{", b"[" * 100_000, b'{"a":' * 20_000, b"1" * 20_000, b'{"reason": 1'),
    *(b"null", b'"text"', b"[{}]", b'{"reason": NaN}', b'{"version": 1e999, "step": 1e999}'),
    *(b'{"reason": "\\u0000"}', b'{"reason": "\\ud800"}', b'{"reason": "a", "reason": "b"}'),
    b'{"__proto__": {"state": "kept"}, "state": "kept", "project": 1}',
    b"<?xml version='1.0'?><!DOCTYPE a [<!ENTITY b SYSTEM 'file:///etc/passwd'>]><a>&b;</a>",
)
KINDS = (
    *("application/json", "application/json; charset=utf-16", "text/plain", "application/xml"),
    *("application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/json;"),
    "application/vnd.esper.telemetry",
)
PATHS = (
    "%00",
    "%ff",
    "..%2f..%2fetc%2fpasswd",
    "%E2%80%AEx",
    "a" * 3000,
    "'%20OR%201=1--",
    "{uid}",
)


def test_hostile_bodies_and_paths_are_refused_with_a_problem(
    objects: dict[str, str], tokens: dict[str, str]
) -> None:
    callers = {name: Caller(token) for name, token in tokens.items()}
    before = content()
    for number, route in enumerate(rights.ROUTES):
        by_trainer = str(route) in rights.OF_TRAINERS
        caller = callers["trainer" if by_trainer else str(Role.ADMIN)]
        address = route.address(objects)
        answers: list[tuple[Any, Answer]] = []
        with transaction.atomic():
            if "<" in route.pattern:
                for path in PATHS:
                    other = route.address(dict.fromkeys(objects, path))
                    answers.append(
                        (path, rights.ask(caller, rights.Route(route.method, other), {}))
                    )
                assert all(answer.status >= 400 for _, answer in answers), route
            if route.method == "post":
                for place, body in enumerate(HOSTILE):
                    kind = KINDS[(number + place) % len(KINDS)]
                    headers = {
                        "Authorization": f"Bearer {caller.token}",
                        "Idempotency-Key": "hostile",
                        "If-Match": '"2"',
                    }
                    answer = caller.client.generic(  # which encodes nothing anew
                        "POST", f"/api/v1/{address}", body, content_type=kind, headers=headers
                    )
                    answers.append(((body, kind), Answer(answer)))
            transaction.set_rollback(True)
        for sent, answer in answers:
            assert answer.status < 500, (route, sent)
            if answer.status >= 400:
                assert answer.code, (route, sent)
        assert content() == before, route
