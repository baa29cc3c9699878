"""A plan in local mode: several grafts at one step boundary, all of them or none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper.contracts import Declined, Plan, SafetyPolicy
from esper.diagnosis import weights_digest
from esper.exceptions import EsperError, PlanError, UndoError
from esper.sdk.session import Session
from tests.esper.sdk.tiny_training import grafts_at, say_capacity

POLICY = SafetyPolicy(confidence_refuse=0.0, max_added_parameters_ratio=50.0, cooldown_run_steps=0)


class Host:
    """Six layers in three narrow pairs, so that several spans fit that do not meet."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        parts: list[nn.Module] = []
        for _ in range(3):
            parts += [nn.Linear(8, 2), nn.Tanh(), nn.Linear(2, 8), nn.LayerNorm(8)]
        self.model = nn.Sequential(*parts)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def train(self, session: Session, steps: int) -> None:
        for _ in range(steps):
            x = torch.randn(16, 8)
            self.optimizer.zero_grad()
            loss = (self.model(x) - torch.sin(3 * x)).square().mean()
            torch.autograd.backward(loss)
            self.optimizer.step()
            session.step(loss)


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def session(host: Host) -> Iterator[Session]:
    with esper.attach(
        host.model, host.optimizer, mode="supervised", server="", verbose=False, sampling=2,
        safety_policy=POLICY,
    ) as session:  # fmt: skip
        say_capacity(session)
        host.train(session, 40)
        yield session


def planned(session: Session) -> Plan:
    plan = session.plan(changes=3)
    assert isinstance(plan, Plan), plan
    return plan


def test_it_is_applied_as_a_whole_and_undone_to_the_bit(host: Host, session: Session) -> None:
    plan = planned(session)
    assert len(plan) > 1
    assert any(member.adaptation.since for member in plan.members)
    before = weights_digest(host.model)

    receipt = session.approve(plan)
    places = [member.adaptation.layer_name for member in plan.members]
    assert [entry.layer for entry in session.adaptations] == places
    assert all(grafts_at(host.model, place) for place in places)
    host.train(session, 5)

    undone = session.undo(receipt)
    assert undone.exact
    assert weights_digest(host.model) == before
    assert not any(grafts_at(host.model, place) for place in places)
    with pytest.raises(PlanError, match="in the model any more"):
        session.undo(receipt)


def test_a_failed_member_takes_back_those_before_it(
    host: Host, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, before = planned(session), weights_digest(host.model)
    fail_at(session, monkeypatch, place=1)
    with pytest.raises(PlanError, match="the 1 before it were taken out again") as caught:
        session.approve(plan)
    assert caught.value.stays == ()
    assert weights_digest(host.model) == before
    host.train(session, 3)


def test_what_cannot_be_taken_back_is_named(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(session)
    fail_at(session, monkeypatch, place=1)

    def refuse(*_: Any, **__: Any) -> None:
        raise UndoError("the snapshot is gone", layer="")

    monkeypatch.setattr(session._parts.surgery.removals, "take_out", refuse)
    first = plan.members[0].adaptation.layer_name
    with pytest.raises(PlanError, match=f"stay: {first}") as caught:
        session.approve(plan)
    assert caught.value.stays == (first,)


def test_a_plan_whose_place_is_taken_by_now_changes_nothing(host: Host, session: Session) -> None:
    plan = planned(session)
    session.approve(plan)
    held = weights_digest(host.model)
    with pytest.raises(PlanError, match="cannot be applied now"):
        session.approve(plan)
    assert weights_digest(host.model) == held


def test_a_run_without_a_finding_gets_no_plan(host: Host) -> None:
    with esper.attach(host.model, host.optimizer, server="", verbose=False) as session:
        host.train(session, 5)
        assert isinstance(session.plan(), Declined)


def fail_at(session: Session, monkeypatch: pytest.MonkeyPatch, *, place: int) -> None:
    real, calls = session._parts.surgery.apply, []

    def apply(operation: Any) -> Any:
        calls.append(operation)
        if len(calls) > place:
            raise EsperError("it does not fit")
        return real(operation)

    monkeypatch.setattr(session._parts.surgery, "apply", apply)
