"""What every operation of the OpenAPI document has, added in one place."""

from __future__ import annotations

from typing import Any

from apps.rest.exports import EXPORTS, FORMAT
from apps.rest.idempotency import DRY_RUN
from apps.rest.operations import OPERATIONS
from apps.rest.sparse import FIELDS, MAX_LENGTH, PATTERN
from esper.contracts import codec

_JSON = "application/json"
_LIMITS = {
    "RateLimit-Limit": "Acts that one caller may send in the period.",
    "RateLimit-Remaining": "How many of them are left.",
    "RateLimit-Reset": "The period in seconds.",
}


def describe_operations(result: dict[str, Any], **_: Any) -> dict[str, Any]:
    """Adds to each operation its description, an example, ``fields``, its headers, and exports."""
    for path, methods in result["paths"].items():
        for method, operation in methods.items():
            operation.setdefault("tags", ["index"])  # of the address itself
            known = OPERATIONS.get(operation["operationId"])
            if known is not None:
                operation["description"] = known.text
                _add_example(operation, known.example)
            operation["x-codeSamples"] = [_curl(path, method, operation, known and known.example)]
            if method == "get" and _answers_with_an_object(operation):
                operation.setdefault("parameters", []).append(_fields())
            if method == "get":
                _add_exports(operation)
            else:
                _add_dry_run(operation)
                _add_limits(operation)
    for component in result["components"]["schemas"].values():
        if "oneOf" in component and "discriminator" not in component:
            component["anyOf"] = component.pop("oneOf")  # an empty list is of every kind
    return result


def _answers_with_an_object(operation: dict[str, Any]) -> bool:
    return _JSON in operation["responses"].get("200", {}).get("content", {})


def _fields() -> dict[str, Any]:
    return {
        "in": "query",
        "name": FIELDS,
        "schema": {"type": "string", "pattern": f"^{PATTERN}$", "maxLength": MAX_LENGTH},
        "description": "Names of members, with commas: the answer has these only.",
    }


def _add_example(operation: dict[str, Any], example: dict[str, Any] | None) -> None:
    body = operation.get("requestBody", {}).get("content", {}).get(_JSON)
    if body is not None and example is not None:
        body["examples"] = {"usual": {"value": example}}


def _parameters(operation: dict[str, Any]) -> set[str]:
    return {parameter["name"] for parameter in operation.get("parameters", ())}


def _add_exports(operation: dict[str, Any]) -> None:
    if FORMAT in _parameters(operation):
        for renderer in EXPORTS:
            text = {"schema": {"type": "string", "description": "All rows, streamed."}}
            operation["responses"]["200"]["content"][renderer.media_type] = text


def _add_dry_run(operation: dict[str, Any]) -> None:
    """Nothing was made and nothing waits to be done, so that the status is 200."""
    if DRY_RUN in _parameters(operation):
        answers = operation["responses"]
        (done,) = (answer for status, answer in answers.items() if status != "default")
        if "200" not in answers:
            what_would_be = {**done, "description": f"With `{DRY_RUN}`: what the answer would be."}
            operation["responses"] = {"200": what_would_be, **answers}


def _add_limits(operation: dict[str, Any]) -> None:
    for status, answer in operation["responses"].items():
        if status.startswith("2"):
            answer["headers"] = {
                name: {"schema": {"type": "integer"}, "description": text}
                for name, text in _LIMITS.items()
            }


def _curl(path: str, method: str, operation: dict[str, Any], example: Any) -> dict[str, str]:
    names = _parameters(operation)
    parts = ["curl", f"-X {method.upper()}"] if method != "get" else ["curl"]
    parts.append('-H "Authorization: Bearer $ESPER_TOKEN"')
    if "If-Match" in names:
        parts.append("-H 'If-Match: \"3\"'")
    if "Idempotency-Key" in names:
        parts.append('-H "Idempotency-Key: $(uuidgen)"')
    if example is not None:
        parts.append(f"-H 'Content-Type: application/json' -d '{_text(example)}'")
    parts.append(f'"$ESPER_URL{path}"')
    return {"lang": "Shell", "label": "curl", "source": " ".join(parts)}


def _text(example: Any) -> str:
    return codec.encode(example).decode()
