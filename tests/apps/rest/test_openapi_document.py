"""The OpenAPI document is as strict as the code: a client made from it is refused nothing new."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from apps.rest.throttling import AuditThrottle
from tests.apps.callers import Caller, Trainer

DOCUMENT = json.loads((Path(__file__).parents[3] / "docs/reference/openapi.json").read_text())
LIMITS = {"enum", "maxLength", "pattern", "format", "minimum", "items"}


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in DOCUMENT["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def parameters(place: str, *, method: str = "") -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Of every operation, or of those with one method."""
    for path, found, operation in operations():
        for parameter in operation.get("parameters", []):
            if parameter["in"] == place and method in {"", found}:
                yield path, parameter["name"], parameter["schema"]


def test_errors_are_problem_documents() -> None:
    for path, method, operation in operations():
        content = operation["responses"]["default"]["content"]
        assert list(content) == ["application/problem+json"], (method, path)


@pytest.mark.parametrize("place", ["query", "header"])
def test_every_parameter_names_the_values_that_it_takes(place: str) -> None:
    found = list(parameters(place))
    assert len(found) > 30
    loose = [
        (p, n) for p, n, schema in found if schema["type"] != "boolean" and not LIMITS & set(schema)
    ]
    assert loose == []


def test_peoples_inputs_take_no_unknown_members() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    for name in ("ApproveInput", "ActInput", "TokenInput", "ReasonInput", "SwitchInput"):
        found = schemas.get(f"{name}Request", schemas.get(name))
        assert found["additionalProperties"] is False, name


@pytest.mark.django_db
def test_a_value_outside_of_the_document_is_refused(trainer: Trainer, operator: Caller) -> None:
    """For each query parameter one value that its schema excludes."""
    for path, name, _ in parameters("query", method="post"):
        address = path.removeprefix("/api/v1/").replace("{uid}", trainer.run)
        assert operator.post(f"{address}?{name}=maybe").status in {400, 403}, (path, name)
    for path, name, schema in parameters("query", method="get"):
        path = path.replace("{number}", "1").replace("{version}", "1")
        wrong = {"integer": "x", "boolean": "maybe", "array": "x"}.get(schema["type"])
        if wrong is None:
            wrong = "x" * (schema.get("maxLength", 300) + 1)
        address = path.removeprefix("/api/v1/").replace("{uid}", trainer.run)
        answer = operator.get(f"{address}?{name}={wrong}")
        assert answer.status in {400, 404}, (path, name, answer.data)
        if address == path.removeprefix("/api/v1/"):
            assert answer.code == "invalid", (path, name)


@pytest.mark.django_db
@pytest.mark.parametrize("path", ["audit/verify", "audit/export"])
def test_whole_passes_over_the_audit_log_are_limited(
    path: str, viewer: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AuditThrottle, "rate", "2/min")
    assert [viewer.get(path).status for _ in range(2)] == [200, 200]
    refused = viewer.get(path)
    assert (refused.status, refused.code) == (429, "rate-limited")
    assert refused.header("Retry-After")
    assert viewer.get("audit").status == 200


def test_every_operation_is_described_and_every_act_of_people_has_an_example() -> None:
    """The words are in ``apps/rest/operations.py``; the protocol describes its own bodies."""
    for path, method, operation in operations():
        name = operation["operationId"]
        assert operation["description"].strip(), f"{name} is not in apps/rest/operations.py"
        assert operation["x-codeSamples"][0]["source"].startswith("curl"), path
        body = operation.get("requestBody", {}).get("content", {}).get("application/json")
        from_protocol = body and "$ref" in body["schema"] and not _is_a_form(body["schema"])
        if method != "get" and body and not from_protocol:
            assert "examples" in body, f"{name} has no example in apps/rest/operations.py"


def _is_a_form(schema: dict[str, Any]) -> bool:
    return bool(schema["$ref"].endswith(("InputRequest", "Input")))
