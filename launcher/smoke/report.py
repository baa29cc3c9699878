"""The JSON report of a smoke run, and what counts as a failure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from esper.contracts import AdaptationState

OPERATOR, AUDITOR = "olga", "ada"
GOOD_ENDS = frozenset({AdaptationState.KEPT, AdaptationState.ROLLED_BACK})
Json = dict[str, Any]


def audit_gaps(adaptations: Sequence[Json], audit: Sequence[Json]) -> list[str]:
    """Adaptations whose transitions are not all in the audit log, linked, from the first one."""
    gaps = []
    for adaptation in adaptations:
        rows = [row for row in audit if row["object_uid"] == adaptation["uid"]]
        moves = [row["data"] for row in rows if "to" in row["data"]]
        if not _is_unbroken(moves) or moves[-1]["to"] != adaptation["state"]:
            trail = " ".join(move["to"] for move in moves) or "nothing"
            gaps.append(f"A-{adaptation['number']} is {adaptation['state']}, its trail is {trail}")
    return gaps


def _is_unbroken(moves: Sequence[Json]) -> bool:
    versions = [move["version"] for move in moves]
    linked = all(after["from"] == before["to"] for before, after in pairwise(moves))
    return versions[:1] == [1] and versions == sorted(set(versions)) and linked


def failures(report: Json, gaps: Sequence[str]) -> list[str]:
    """Why the run is not a success; empty when it is."""
    found = [f"not in the audit log: {gap}" for gap in gaps]
    if not any(_shows_the_loop(adaptation) for adaptation in report["adaptations"]):
        found.append("no adaptation was approved by a person, certified, and kept or rolled back")
    if not report["audit_verified"]:
        found.append("the audit log's chain does not verify")
    if report["processes_left"]:
        found.append(f"{report['processes_left']} processes were still running after the stop")
    return found


def _shows_the_loop(adaptation: Json) -> bool:
    certificate = adaptation["certificate"] or {}
    return (
        adaptation["decided_by"] == OPERATOR
        and adaptation["state"] in GOOD_ENDS
        and adaptation["graft_step"] is not None
        and bool(certificate.get("passed"))
    )


def summary(detail: Json) -> Json:
    """One adaptation as the last line shows it."""
    return {
        "id": detail["uid"],
        "layer": detail["layer"],
        "blueprint": detail["blueprint"],
        "confidence": detail["confidence"],
        "decided_by": detail["decided_by"] or ("rule" if detail["decided_rule"] else None),
        "state": detail["state"],
        "graft_step": detail["graft_step"],
        "pause_ms": detail["pause_ms"],
        "certificate": detail["certificate"],
        "reward": detail["reward"],
    }
