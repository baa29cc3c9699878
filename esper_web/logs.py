"""Logging: a line for a person or a JSON object for a machine, both without secrets."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
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
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "default"}},
        "root": {"handlers": ["stderr"], "level": level},
        "loggers": {
            "django": {"level": level, "propagate": True, "handlers": []},
            "django.server": {"propagate": True, "handlers": []},
            "httpx": {"level": "WARNING"},
        },
    }
