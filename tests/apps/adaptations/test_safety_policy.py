"""The safety policy: scopes, drafts, back-tests, and the error budget of a run."""

from __future__ import annotations

from typing import Any

import pytest

from apps.adaptations.history import error_budget, why_frozen
from apps.adaptations.models import Adaptation
from apps.adaptations.proposals import GateClosedError
from apps.adaptations.rechecking import checks_now
from apps.adaptations.selectors import run_snapshot
from apps.policies.models import PolicyState, PolicyVersion
from apps.policies.services import (
    approve_policy,
    current_policy,
    publish_policy,
    withdraw_policy,
)
from apps.rest.problems import Problem
from esper.constraints.strictness import LESS, MORE, laxer, strictest, thresholds
from esper.contracts import AdaptationState, Risk, Role, SafetyPolicy
from tests.apps.cast import force_state, make_person
from tests.apps.stage import Stage

S = AdaptationState


@pytest.fixture
def carl(stage: Stage) -> Any:
    return make_person("carl")


@pytest.fixture
def cleo(stage: Stage) -> Any:
    return make_person("cleo", Role.CURATOR)


def write(person: Any, **options: Any) -> PolicyVersion:
    changes = {name: options.pop(name) for name in list(options) if name in thresholds()}
    return publish_policy(changes=changes, reason="because", user=person, via="", **options)


def test_every_threshold_has_a_stricter_side() -> None:
    assert thresholds() == MORE | LESS
    assert not MORE & LESS


def test_the_strictest_value_counts_and_says_whose_it_is() -> None:
    wide = SafetyPolicy(confidence_auto=0.8, max_memory_mib=500.0, auto_max_risk=Risk.MEDIUM)
    narrow = SafetyPolicy(confidence_auto=0.9, max_memory_mib=900.0, auto_max_risk=Risk.LOW)
    policy, sources = strictest({"global": wide, "run": narrow})
    assert (policy.confidence_auto, sources["confidence_auto"]) == (0.9, "run")
    assert (policy.max_memory_mib, sources["max_memory_mib"]) == (500.0, "global")
    assert (policy.auto_max_risk, sources["auto_max_risk"]) == (Risk.LOW, "run")
    assert sources["maturity_steps"] == "global"
    assert laxer(wide, narrow) == ("max_memory_mib",)
    assert laxer(policy, policy) == ()


def test_a_refusal_threshold_above_the_other_scopes_automatic_one_stays_in_order() -> None:
    wide = SafetyPolicy(confidence_refuse=0.2, confidence_auto=0.6)
    narrow = SafetyPolicy(confidence_refuse=0.7, confidence_auto=0.7)
    policy, _ = strictest({"global": wide, "run": narrow})
    assert (policy.confidence_refuse, policy.confidence_auto) == (0.7, 0.7)


def test_a_policy_that_allows_more_waits_for_a_second_person(
    stage: Stage, carl: Any, cleo: Any
) -> None:
    draft = write(carl, confidence_auto=0.6)
    assert (draft.state, draft.laxer) == (PolicyState.DRAFT, ["confidence_auto"])
    assert current_policy().version == 1
    with pytest.raises(Problem) as own:
        approve_policy(version=draft, user=carl, via="")
    assert own.value.code == "self-approval"
    with pytest.raises(Problem):
        approve_policy(version=draft, user=stage.operator, via="")
    agreed = approve_policy(version=draft, user=cleo, via="")
    assert (agreed.state, agreed.decided_by) == (PolicyState.IN_FORCE, cleo)
    assert current_policy() == agreed
    assert PolicyVersion.objects.get(version=1).state == PolicyState.REPLACED
    with pytest.raises(Problem):
        approve_policy(version=draft, user=cleo, via="")


def test_a_stricter_policy_is_in_force_at_once_and_ends_older_drafts(
    stage: Stage, carl: Any, cleo: Any
) -> None:
    draft = write(carl, confidence_auto=0.6)
    assert write(cleo, confidence_auto=0.9).state == PolicyState.IN_FORCE
    with pytest.raises(Problem) as late:
        approve_policy(version=draft, user=cleo, via="")
    assert late.value.code == "stale"
    assert withdraw_policy(version=draft, user=carl, via="").state == PolicyState.WITHDRAWN
    assert current_policy().values["confidence_auto"] == 0.9


def test_of_run_project_and_all_runs_the_strictest_counts(stage: Stage, carl: Any) -> None:
    write(carl, confidence_auto=0.8)
    write(carl, scope="project", run=stage.run, confidence_auto=0.85, max_latency_ms=5.0)
    own = write(carl, scope="run", run=stage.run, max_memory_mib=64.0)
    assert current_policy(stage.run) == own
    assert own.values["confidence_auto"] == 0.85
    assert own.sources["confidence_auto"] == "project"
    assert own.sources["max_memory_mib"] == "run"
    assert own.sources["evidence_max_age_seconds"] == "global"
    assert run_snapshot(stage.run).safety_policy.max_memory_mib == 64.0
    assert current_policy().values["max_memory_mib"] == 1024.0
    assert stage.propose().safety_policy == own


def test_a_narrower_policy_follows_when_the_wider_one_becomes_stricter(
    stage: Stage, carl: Any
) -> None:
    first = write(carl, scope="run", run=stage.run, max_memory_mib=64.0)
    write(carl, confidence_auto=0.95)
    now = current_policy(stage.run)
    assert now.version > first.version
    assert (now.values["confidence_auto"], now.values["max_memory_mib"]) == (0.95, 64.0)
    assert now.sources["confidence_auto"] == "global"


def test_a_narrower_policy_allows_no_more_than_the_wider_one(stage: Stage, carl: Any) -> None:
    found = write(carl, scope="run", run=stage.run, confidence_auto=0.6, max_latency_ms=1.0)
    assert found.values["confidence_auto"] == SafetyPolicy().confidence_auto
    assert (found.laxer, found.state) == ([], PolicyState.IN_FORCE)


def test_a_draft_is_tested_on_past_decisions(stage: Stage, carl: Any) -> None:
    force_state(stage.propose(), S.KEPT, confidence=0.7, graft_step=1)
    draft = write(carl, confidence_auto=0.65)
    assert draft.backtest["cases"] == 1
    assert (draft.backtest["before"], draft.backtest["after"]) == ({"asks": 1}, {"alone": 1})
    assert draft.backtest["newly"] == {"alone": {"kept": 1}}
    refusing = write(carl, confidence_refuse=0.72)
    assert refusing.backtest["newly"] == {"refused": {"kept": 1}}


def taken_out(stage: Stage, gain: float | None, loss: float = 2.0) -> None:
    row = stage.propose()
    force_state(row, S.ROLLED_BACK, graft_step=1, forecast_gain=gain, evidence={"loss": loss})


def test_harm_uses_the_error_budget_up_and_the_run_is_only_observed(stage: Stage) -> None:
    taken_out(stage, -0.1)
    assert error_budget(stage.run).used == pytest.approx(0.05)
    assert why_frozen(stage.run) == ""
    Adaptation.objects.update(forecast_gain=-0.3)
    assert "error budget is used up" in why_frozen(stage.run)
    with pytest.raises(GateClosedError, match="error budget"):
        stage.propose(layer="head")
    assert run_snapshot(stage.run).frozen


def test_a_graft_that_was_taken_out_costs_something_even_where_nothing_was_measured(
    stage: Stage,
) -> None:
    taken_out(stage, None)
    assert error_budget(stage.run).used == pytest.approx(0.005)
    Adaptation.objects.update(forecast_gain=0.5)
    assert error_budget(stage.run).used == pytest.approx(0.005)


def test_a_change_of_settings_is_checked_against_the_policy_of_the_run(
    stage: Stage, carl: Any
) -> None:
    adaptation = stage.waiting(config={"rank": 8})
    before = {check.rule: check for check in checks_now(adaptation)}
    write(carl, scope="run", run=adaptation.run, max_memory_mib=1e-6)
    now = {check.rule: check for check in checks_now(adaptation)}
    assert (before["memory"].passed, now["memory"].passed) == (True, False)
