"""Removes secrets from log lines, and the control characters that could forge a line."""

from __future__ import annotations

import re

_NAMED = r"secret_key|password|command_key|kernel_key|sessionid|csrftoken"
_SECRETS = (
    (re.compile(r"\besp_[A-Za-z0-9_\-]{4,}"), "esp_[redacted]"),
    (
        re.compile(r"(?i)(authorization['\"]?\s*[:=]\s*['\"]?)(?:(?:bearer|basic)\s+)?[^\s'\",}]+"),
        r"\1[redacted]",
    ),
    (re.compile(r"(?i)\b(bearer\s+)[A-Za-z0-9._~+/=\-]{8,}"), r"\1[redacted]"),
    (
        re.compile(r"(?i)\b((?:rediss?|postgres(?:ql)?|https?)://[^\s:/@]*:)[^\s@]+@"),
        r"\1[redacted]@",
    ),
    (re.compile(rf"(?i)\b((?:{_NAMED})['\"]?\s*[:=]\s*['\"]?)[^\s'\",;}}]+"), r"\1[redacted]"),
)
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(0x20), 0x7F) if chr(code) not in "\n\t"}


def redact(message: str) -> str:
    """The message without tokens and passwords, with control characters escaped."""
    for pattern, replacement in _SECRETS:
        message = pattern.sub(replacement, message)
    return message.translate(_CONTROL)
