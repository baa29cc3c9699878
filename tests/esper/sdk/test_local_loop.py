"""The whole loop in one process: a net is too small, the diagnosis says so, and it is grafted."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import esper
from esper.contracts import AdaptationState, SafetyPolicy
from tests.esper.sdk.tiny_training import grafts_at, say_capacity

EAGER = SafetyPolicy(
    maturity_steps=10,
    probation_steps=40,
    cooldown_layer_steps=100,
    cooldown_run_steps=20,
    max_added_parameters_ratio=50.0,
    confidence_refuse=0.0,  # acts on what cases of small nets give little chance
    confidence_auto=0.0,
)


class Bottleneck:
    """A student of two units and a teacher of eight: the loss goes flat, well above zero."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.teacher = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 8))
        self.model = nn.Sequential(nn.Linear(16, 2), nn.Tanh(), nn.Linear(2, 8))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.held_out = torch.randn(256, 16)

    def loss(self) -> torch.Tensor:
        return self.loss_on(torch.randn(64, 16))

    def loss_on(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target = self.teacher(x)
        return F.mse_loss(self.model(x), target)

    def evaluate(self) -> float:
        return self.loss_on(self.held_out).item()

    def run(self, steps: int, session: esper.Session) -> None:
        for _ in range(steps):
            loss = self.loss()
            self.optimizer.zero_grad()
            torch.autograd.backward(loss)
            self.optimizer.step()
            session.step(loss)

    def run_until(self, condition: Callable[[], object], session: esper.Session) -> None:
        """How often a frame is due depends on the machine's speed, so steps are not counted."""
        end = time.monotonic() + 100
        while not condition():
            assert time.monotonic() < end, "trained on in vain"
            self.run(10, session)


def attached(host: Bottleneck, mode: str, policy: SafetyPolicy = EAGER) -> esper.Session:
    session = esper.attach(
        host.model,
        host.optimizer,
        run="bottleneck",
        mode=mode,
        evaluate=host.evaluate,
        safety_policy=policy,
    )
    say_capacity(session)
    return session


def test_a_lack_of_capacity_is_adapted_judged_and_rewarded_without_a_server() -> None:
    host = Bottleneck()
    with attached(host, "automatic") as session:
        host.run_until(lambda: any(e.verdict for e in session.adaptations), session)
        closed = [entry for entry in session.adaptations if entry.verdict is not None]
    for entry in closed:
        assert entry.state in (AdaptationState.KEPT, AdaptationState.ROLLED_BACK)
        assert entry.reward is not None
        here = grafts_at(host.model, entry.layer)
        assert (entry.blueprint in here) == (entry.state is AdaptationState.KEPT)


def test_an_observing_session_changes_nothing() -> None:
    host = Bottleneck()
    with attached(host, "observe") as session:
        host.run(800, session)
        assert session.adaptations == ()
        assert session.waiting == ()


def test_a_supervised_session_asks_and_does_what_the_person_says() -> None:
    host = Bottleneck()
    with attached(host, "supervised") as session:
        host.run_until(lambda: session.waiting, session)
        assert session.adaptations == ()
        (first,) = session.waiting[:1]
        assert first.decision.asks
        receipt = session.approve(first)
        assert receipt.present
        assert (receipt.layer, receipt.blueprint) == (first.layer, first.blueprint)
        assert first not in session.waiting
        with pytest.raises(ValueError, match="not waiting"):
            session.approve(first)


def test_a_rejected_layer_is_left_alone_for_its_cooldown() -> None:
    host = Bottleneck()
    with attached(host, "supervised") as session:
        host.run_until(lambda: session.waiting, session)
        first = session.waiting[0]
        session.reject(first)
        host.run(20, session)
        assert session.adaptations == ()
        assert first.layer not in {entry.layer for entry in session.waiting}


def test_a_decision_that_nobody_takes_expires_and_is_never_applied() -> None:
    host = Bottleneck()
    policy = replace(EAGER, approval_timeout_seconds=0)
    with attached(host, "supervised", policy) as session:
        host.run(1000, session)
        assert session.adaptations == ()
        assert session.waiting == ()


def test_observing_never_takes_out_what_a_person_grafted() -> None:
    host = Bottleneck()
    for group in host.optimizer.param_groups:
        group["lr"] = 0.0  # nothing can improve, so the verdict is against the graft
    with attached(host, "observe") as session:
        host.run(30, session)
        receipt = session.graft("0", "mlp_gelu_2048")
        host.run_until(lambda: any(e.verdict for e in session.adaptations), session)
        (entry,) = session.adaptations
        assert entry.verdict is not None
        assert not entry.verdict.keep
        assert entry.state is AdaptationState.KEPT
        assert receipt.present


@pytest.mark.parametrize("hurt", [False, True])
def test_a_graft_that_is_taken_out_leaves_the_host_no_worse_than_before_it(hurt: bool) -> None:
    host = Bottleneck()
    policy = replace(EAGER, cooldown_run_steps=100_000, cooldown_layer_steps=100_000)
    with esper.attach(
        host.model, host.optimizer, mode="automatic", safety_policy=policy
    ) as session:
        host.run(200, session)
        before = host.evaluate()
        receipt = session.graft("0", "proj_ia3")
        host.run(15, session)
        with torch.no_grad():
            host.model.get_parameter("2.weight").mul_(0.8 if hurt else 1.0)
        for group in host.optimizer.param_groups:
            group["lr"] = 0.0  # nothing improves, so the verdict is against the graft
        host.run_until(lambda: not receipt.present, session)
        (entry,) = session.adaptations
        assert entry.state is AdaptationState.ROLLED_BACK
        assert entry.verdict is not None
        assert host.evaluate() <= before * 1.01


@pytest.mark.parametrize("lasts", [True, False])
def test_a_kept_graft_earns_on_while_it_helps_and_loses_all_with_an_undo(lasts: bool) -> None:
    host = Bottleneck()
    with attached(host, "supervised") as session:
        host.run(300, session)
        receipt = session.graft("2", "widen_hidden", since="0", hidden=8)
        host.run_until(lambda: any(e.verdict for e in session.adaptations), session)
        (entry,) = session.adaptations
        assert entry.state is AdaptationState.KEPT
        assert entry.reward is not None
        first = entry.reward
        seen = session._parts.local.memory.experience  # type: ignore[union-attr]
        assert seen["widen_hidden"].mean_reward == pytest.approx(first.total)
        net = first.total / 0.3
        if not lasts:
            for value in entry.receipt.graft.parameters():  # type: ignore[union-attr]
                torch.nn.init.zeros_(value)
            for group in host.optimizer.param_groups:
                group["lr"] = 0.0
        host.run_until(lambda: len(entry.later_looks(EAGER)) == 7, session)
        host.run(40, session)
        assert len(entry.later_looks(EAGER)) == 7
        session._parts.local.settle_rewards()  # type: ignore[union-attr]
        later = entry.reward.total
        assert first.total <= later <= net + 1e-9
        assert (later > 0.5 * net) is lasts
        assert (seen["widen_hidden"].kept, seen["widen_hidden"].rolled_back) == (1, 0)
        assert seen["widen_hidden"].mean_reward == pytest.approx(later)
        session.undo(receipt, hard=False)
        session._parts.local.settle_rewards()  # type: ignore[union-attr]
        assert entry.reward.total < 0
        assert (seen["widen_hidden"].kept, seen["widen_hidden"].rolled_back) == (0, 1)
        assert seen["widen_hidden"].mean_reward == pytest.approx(entry.reward.total)
