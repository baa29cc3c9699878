"""Logging: a line for a person or a JSON object for a machine, both without secrets."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from datetime import UTC, datetime
from http.client import BAD_REQUEST, INTERNAL_SERVER_ERROR
from time import monotonic
from typing import Any

from hosts.redaction import redact


class LineFormatter(logging.Formatter):
    """``level logger: message``; the supervisor adds the time and the process."""

    def format(self, record: logging.LogRecord) -> str:
        line = redact(super().format(record))
        # A traceback may have several lines; a logged value may not.
        return line if record.exc_info else line.replace("\n", "\\n")


class JSONFormatter(logging.Formatter):
    """One JSON object for each record."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": redact(record.getMessage()),
        }
        if record.exc_info:
            entry["exception"] = redact(self.formatException(record.exc_info))
        return json.dumps(entry, ensure_ascii=False)


class ClientErrorFilter(logging.Filter):
    """One line a minute about refused requests, not one for each: callers can send any number."""

    period_seconds = 60.0

    def __init__(self) -> None:
        super().__init__()
        self._counts: Counter[int] = Counter()
        self._said_at = -math.inf

    def filter(self, record: logging.LogRecord) -> bool:
        status = getattr(record, "status_code", None)
        if not isinstance(status, int) or not BAD_REQUEST <= status < INTERNAL_SERVER_ERROR:
            return True
        self._counts[status] += 1
        if monotonic() - self._said_at < self.period_seconds:
            return False
        counts = ", ".join(f"{number} x {code}" for code, number in sorted(self._counts.items()))
        record.msg = f"refused since the last such line: {counts}; the last: {record.msg}"
        self._counts.clear()
        self._said_at = monotonic()
        return True


def logging_config(*, json_lines: bool, level: str) -> dict[str, Any]:
    """Django's ``LOGGING``: everything to stderr."""
    formatter = (
        {"()": "esper_web.logs.JSONFormatter"}
        if json_lines
        else {
            "()": "esper_web.logs.LineFormatter",
            "format": "%(levelname)s %(name)s: %(message)s",
        }
    )
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"default": formatter},
        "filters": {"client_errors": {"()": "esper_web.logs.ClientErrorFilter"}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "default"}},
        "root": {"handlers": ["stderr"], "level": level},
        "loggers": {
            "django": {"level": level, "propagate": True, "handlers": []},
            "django.request": {"filters": ["client_errors"]},
            "django.server": {"propagate": True, "handlers": []},
            "httpx": {"level": "WARNING"},
        },
    }
