"""Which parts of Esper have failed in a session."""

from __future__ import annotations

from esper import Session


def failed_parts(session: Session) -> set[str]:
    """Those that a step calls, and the hooks and callbacks, which are switched off alone."""
    parts = session._parts
    return {*parts.failures.counts, *(part for part, _ in parts.fail_closed._off)}
