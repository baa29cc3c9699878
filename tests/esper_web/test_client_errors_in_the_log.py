"""Callers who send wrong requests cannot fill the log."""

from __future__ import annotations

import logging

import pytest

from esper_web.logs import ClientErrorFilter


def record(status: int, message: str = "Not Found: %s") -> logging.LogRecord:
    entry = logging.LogRecord("django.request", 30, "", 0, message, ("/x",), None)
    entry.status_code = status
    return entry


def test_many_refused_requests_are_one_line_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("esper_web.logs.monotonic", lambda: now[0])
    only_some = ClientErrorFilter()
    first = record(404)
    assert only_some.filter(first)
    assert (
        first.getMessage() == "refused since the last such line: 1 x 404; the last: Not Found: /x"
    )
    assert not any(only_some.filter(record(status)) for status in [404] * 500 + [401] * 20)
    now[0] = 61.0
    last = record(429)
    assert only_some.filter(last)
    assert "500 x 404" in last.getMessage()
    assert "20 x 401" in last.getMessage()


def test_errors_of_the_server_and_other_lines_are_all_written() -> None:
    only_some = ClientErrorFilter()
    plain = logging.LogRecord("django.request", 30, "", 0, "anything", (), None)
    assert all(only_some.filter(entry) for entry in (record(500), record(503), record(500), plain))
