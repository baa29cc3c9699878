"""How a service refuses; the API answers with ``application/problem+json``."""

from __future__ import annotations

from typing import Any

from esper.exceptions import EsperError


class Problem(EsperError):
    """A refusal that a caller can act on.

    Attributes:
        status: HTTP status.
        code: stable identifier, e.g. ``decision-not-pending``.
        detail: one sentence for a person: what is wrong, where, what to do.
        extra: further members of the problem document (who won, until when, which checks).
    """

    def __init__(self, status: int, code: str, detail: str, **extra: Any) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.extra = extra


def not_found(what: str) -> Problem:
    """One text for "does not exist" and "you may not see it", so that it reveals neither."""
    return Problem(404, "not-found", f"There is no such {what}, or you may not see it.")
