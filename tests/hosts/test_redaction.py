"""What may not stand in a log."""

from __future__ import annotations

import json
import logging
import sys

import pytest

from esper_web.logs import JSONFormatter, LineFormatter
from hosts.redaction import redact

SECRET = "Xq7canary42zzz"


@pytest.mark.parametrize(
    "line",
    [
        f"token esp_{SECRET}",
        f"Authorization: Bearer {SECRET}",
        f"{{'authorization': 'Bearer {SECRET}'}}",
        f"headers Bearer {SECRET}",
        f"connecting to redis://:{SECRET}@127.0.0.1:6379/0",
        f"postgresql://esper:{SECRET}@db/esper refused",
        f"password={SECRET}",
        f'"password": "{SECRET}"',
        f"SECRET_KEY = {SECRET}",
        f"Cookie: sessionid={SECRET}; csrftoken={SECRET}",
    ],
)
def test_a_secret_does_not_reach_the_log(line: str) -> None:
    assert SECRET not in redact(line)


@pytest.mark.parametrize(
    "line",
    ["A-17 approved by olga", "run_01J8ZQ: 3 layers", "http://127.0.0.1:8080/runs", "esper | up"],
)
def test_ordinary_lines_stay_as_they_are(line: str) -> None:
    assert redact(line) == line


def _record(message: str) -> logging.LogRecord:
    return logging.LogRecord("apps.runs", logging.WARNING, __file__, 1, message, (), None)


def test_a_logged_value_cannot_forge_a_second_line() -> None:
    line = LineFormatter("%(levelname)s %(name)s: %(message)s").format(
        _record("layer fc\nERROR audit: forged")
    )
    assert "\n" not in line


def test_json_lines_can_be_read_back_and_hold_no_secret() -> None:
    entry = json.loads(JSONFormatter().format(_record(f'he said "esp_{SECRET}"\nagain')))
    assert entry["level"] == "warning"
    assert entry["logger"] == "apps.runs"
    assert SECRET not in entry["message"]


def test_an_exception_is_logged_without_its_secrets() -> None:
    try:
        raise ConnectionError(f"redis://:{SECRET}@127.0.0.1:6379/0 refused")
    except ConnectionError:
        record = _record("cannot connect")
        record.exc_info = sys.exc_info()
    assert SECRET not in JSONFormatter().format(record)
    assert SECRET not in LineFormatter("%(message)s").format(record)
