"""What the smoke run calls a success. The run itself is ``./up --smoke``."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.smoke.report import audit_gaps, failures, summary

UID = "adp_1"


def adaptation(**changes: Any) -> dict[str, Any]:
    certificate = {"passed": True, "max_abs_diff": 0.0}
    return {
        "uid": UID,
        "number": 17,
        "layer": "fc",
        "blueprint": "proj_lora_64",
        "confidence": 0.7,
        "decided_by": "olga",
        "decided_rule": "",
        "state": "kept",
        "graft_step": 120,
        "pause_ms": 3.0,
        "certificate": certificate,
        "reward": 0.1,
        **changes,
    }


def report(*adaptations: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "run": "run_1",
        "adaptations": [summary(one) for one in adaptations],
        "timings_ms": {"decision": 1.0},
        "audit_verified": True,
        "processes_left": 0,
        **changes,
    }


def trail(*states: str) -> list[dict[str, Any]]:
    came = ["", *states]
    return [
        {"object_uid": UID, "data": {"from": before, "to": state, "version": 1 + index}}
        for index, (before, state) in enumerate(zip(came, states, strict=False))
    ]


def test_a_person_s_graft_with_a_passing_certificate_and_a_good_end_is_a_success() -> None:
    assert failures(report(adaptation()), []) == []
    assert failures(report(adaptation(state="rolled_back")), []) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"decided_by": None, "decided_rule": "confidence 0.80"},
        {"state": "apply_failed"},
        {"state": "probation"},
        {"graft_step": None},
        {"certificate": None},
        {"certificate": {"passed": False, "max_abs_diff": 1.0}},
    ],
)
def test_anything_less_is_a_failure(changes: dict[str, Any]) -> None:
    assert failures(report(adaptation(**changes)), []) != []


def test_a_process_left_a_broken_chain_and_a_gap_are_failures() -> None:
    good = adaptation()
    assert failures(report(good, processes_left=1), []) != []
    assert failures(report(good, audit_verified=False), []) != []
    assert failures(report(good), ["A-17: …"]) != []


def test_who_decided_is_a_user_name_or_the_rule() -> None:
    assert summary(adaptation())["decided_by"] == "olga"
    by_rule = adaptation(decided_by=None, decided_rule="policy v1: confidence 0.80 >= 0.75")
    assert summary(by_rule)["decided_by"] == "rule"
    assert summary(adaptation(decided_by=None, decided_rule=""))["decided_by"] is None


def test_a_complete_trail_has_no_gaps() -> None:
    states = ("proposed", "approved", "compile_queued", "kept")
    assert audit_gaps([adaptation()], trail(*states)) == []


@pytest.mark.parametrize("missing", [0, 1, 2, 3])
def test_a_missing_row_is_a_gap(missing: int) -> None:
    rows = trail("proposed", "approved", "compile_queued", "kept")
    del rows[missing]
    assert audit_gaps([adaptation()], rows) != []


def test_no_rows_at_all_is_a_gap() -> None:
    assert audit_gaps([adaptation()], []) != []
