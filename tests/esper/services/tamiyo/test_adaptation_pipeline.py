"""One decision through the orchestrator: what it grafts, what it refuses, what it leaves alone."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from esper import grafting
from esper.contracts import AdaptationDecision, AdaptationType, LayerInfo, SafetyPolicy, codec
from esper.exceptions import KernelBuildError, SignatureError
from esper.services.tamiyo import ModelState, Phase2IntegrationOrchestrator
from esper.services.tamiyo.execution import LocalCompiler, MemoryStore


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(16, 16)
        self.drop = nn.Dropout(0.5)
        self.fc2 = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.fc2(self.drop(torch.relu(self.fc1(x))))
        return y


class Training:
    """A model in the middle of its training, and what it was before anything was done to it."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.model = Net()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.train(3)
        self.state = ModelState(
            model=self.model, optimizer=self.optimizer, sample=torch.randn(8, 16), step=500
        )
        self.before = self.now()

    def train(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            self.optimizer.zero_grad()
            loss = self.model(torch.randn(8, 16)).square().mean()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        return losses

    def now(self) -> tuple[Any, ...]:
        return (
            grafting.digest(self.model),
            [name for name, _ in self.model.named_parameters()],
            len(self.optimizer.param_groups),
            self.model.training,
            torch.get_rng_state().tolist(),
        )

    def is_untouched(self) -> bool:
        return self.now() == self.before


@pytest.fixture
def training() -> Training:
    return Training()


@pytest.fixture
def orchestrator() -> Phase2IntegrationOrchestrator:
    return Phase2IntegrationOrchestrator()


def wish(
    layer: str = "fc1",
    kind: AdaptationType = AdaptationType.ADD_EFFICIENCY,
    confidence: float = 0.9,
) -> AdaptationDecision:
    return AdaptationDecision(layer, kind, confidence)


async def test_a_good_decision_ends_in_a_certified_graft_that_learns(
    orchestrator: Phase2IntegrationOrchestrator, training: Training
) -> None:
    success, details = await orchestrator.execute_adaptation_pipeline(
        decision=wish(), model_state=training.state
    )

    assert success, details
    assert details["certificate"]["passed"]
    assert details["certificate"]["max_abs_diff"] == 0.0
    grafted = {
        name: parameter.clone()
        for name, parameter in training.model.named_parameters()
        if "esper" in name
    }
    training.train(3)
    assert grafted
    assert any(
        not torch.equal(parameter, grafted[name])
        for name, parameter in training.model.named_parameters()
        if name in grafted
    )
    codec.encode(details)  # details are strict JSON


async def test_undo_brings_the_model_back_to_the_bit(
    orchestrator: Phase2IntegrationOrchestrator, training: Training
) -> None:
    _, details = await orchestrator.execute_adaptation_pipeline(
        decision=wish(), model_state=training.state
    )
    training.train(2)

    orchestrator.undo(details["adaptation"])

    assert grafting.digest(training.model) == training.before[0]
    assert len(training.optimizer.param_groups) == 1
    status = orchestrator.get_integration_status()
    assert status["active_adaptations"] == {}
    assert status["execution_metrics"]["rolled_back"] == 1
    with pytest.raises(KeyError):
        orchestrator.undo(details["adaptation"])


@pytest.mark.parametrize(
    ("constraints", "rule"),
    [({"max_memory_mb": 1e-6}, "memory"), ({"max_latency_ms": 1e-9}, "latency")],
)
async def test_a_broken_constraint_is_a_violation_and_touches_nothing(
    orchestrator: Phase2IntegrationOrchestrator,
    training: Training,
    constraints: dict[str, float],
    rule: str,
) -> None:
    success, details = await orchestrator.execute_adaptation_pipeline(
        decision=wish(), model_state=training.state, constraints=constraints
    )

    assert not success
    assert [violation["rule"] for violation in details["violations"]] == [rule]
    assert details["violations"][0]["observed"]
    assert details["violations"][0]["limit"]
    assert training.is_untouched()
    assert orchestrator.get_integration_status()["safety_violations"][0]["rule"] == rule


@pytest.mark.parametrize(
    ("decision", "says"),
    [
        (wish("nowhere"), "no layer 'nowhere'"),
        (wish(kind=AdaptationType.ADD_ATTENTION), "sequence"),
        (wish(confidence=0.02), "below"),
        (wish(confidence=0.6), "A person has to agree"),
        (wish(confidence=float("nan")), "A person has to agree"),
    ],
)
async def test_a_refused_decision_says_why_and_touches_nothing(
    orchestrator: Phase2IntegrationOrchestrator,
    training: Training,
    decision: AdaptationDecision,
    says: str,
) -> None:
    success, details = await orchestrator.execute_adaptation_pipeline(
        decision=decision, model_state=training.state
    )

    assert not success
    assert says in details["reason"]
    assert training.is_untouched()


async def test_an_unknown_constraint_is_refused_by_name(
    orchestrator: Phase2IntegrationOrchestrator, training: Training
) -> None:
    success, details = await orchestrator.execute_adaptation_pipeline(
        decision=wish(), model_state=training.state, constraints={"max_memroy_mb": 4}
    )

    assert not success
    assert "max_memroy_mb" in details["reason"]
    assert training.is_untouched()


async def test_a_layer_rests_after_a_graft_and_steps_end_the_rest(
    orchestrator: Phase2IntegrationOrchestrator, training: Training
) -> None:
    await orchestrator.execute_adaptation_pipeline(decision=wish(), model_state=training.state)
    state = training.state

    too_soon, details = await orchestrator.execute_adaptation_pipeline(
        decision=wish(kind=AdaptationType.ADD_FFN), model_state=state
    )
    later = ModelState(
        model=state.model, optimizer=state.optimizer, sample=state.sample, step=state.step + 400
    )
    in_time, later_details = await orchestrator.execute_adaptation_pipeline(
        decision=wish(kind=AdaptationType.ADD_FFN), model_state=later
    )

    assert not too_soon
    assert {violation["rule"] for violation in details["violations"]} == {"cooldown"}
    assert in_time, later_details


async def test_a_bare_module_is_enough_where_the_weights_tell_the_shapes(
    orchestrator: Phase2IntegrationOrchestrator,
) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    x = torch.randn(4, 8)
    before = model(x)

    success, details = await orchestrator.execute_adaptation_pipeline(
        decision=wish("0"), model_state=model
    )

    assert success, details
    assert torch.equal(model(x), before)


async def test_the_same_kernel_is_built_once(orchestrator: Phase2IntegrationOrchestrator) -> None:
    details = []
    for _ in range(3):
        success, latest = await orchestrator.execute_adaptation_pipeline(
            decision=wish("0"), model_state=nn.Sequential(nn.Linear(8, 8))
        )
        assert success
        details.append(latest)

    assert [item["cached"] for item in details] == [False, True, True]
    assert len({item["kernel"] for item in details}) == 1
    stats = orchestrator.get_integration_status()["blueprint_cache_stats"]
    assert stats == {"kernels": 1, "hits": 2, "misses": 1, "hit_rate": 2 / 3}


async def test_a_kept_adaptation_is_not_active_and_lets_its_model_go(
    orchestrator: Phase2IntegrationOrchestrator,
) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    _, details = await orchestrator.execute_adaptation_pipeline(
        decision=wish("0"), model_state=model
    )
    assert len(orchestrator.get_integration_status()["active_adaptations"]) == 1

    orchestrator.keep(details["adaptation"])
    gone = weakref.ref(model)
    del model
    gc.collect()

    status = orchestrator.get_integration_status()
    assert status["active_adaptations"] == {}
    assert status["execution_metrics"]["kept"] == 1
    assert gone() is None


class TamperingStore(MemoryStore):
    """Gives back a kernel that somebody has written to."""

    def get(self, digest: str) -> dict[str, bytes]:
        files = dict(super().get(digest))
        files["recipe.json"] = files["recipe.json"].replace(b"proj_", b"evil_")
        return files


class ForeignCompiler(LocalCompiler):
    """Signs with a key that nobody was told to trust."""

    def __init__(self) -> None:
        super().__init__()
        self.trusted_key = LocalCompiler().trusted_key


class FailingCompiler(LocalCompiler):
    def build(self, layer: LayerInfo, blueprint: str, config: dict[str, Any]) -> Any:
        raise KernelBuildError("it changes the output at birth by 0.3", permanent=True)


async def test_a_kernel_that_was_tampered_with_never_reaches_the_model(training: Training) -> None:
    orchestrator = Phase2IntegrationOrchestrator(store=TamperingStore())

    success, details = await orchestrator.execute_adaptation_pipeline(
        decision=wish(), model_state=training.state
    )

    assert not success
    assert "recipe.json" in details["reason"]
    assert training.is_untouched()


async def test_a_kernel_by_a_foreign_signer_never_reaches_the_model(training: Training) -> None:
    orchestrator = Phase2IntegrationOrchestrator(compiler=ForeignCompiler())

    success, details = await orchestrator.execute_adaptation_pipeline(
        decision=wish(), model_state=training.state
    )

    assert not success
    assert "signed" in details["reason"]
    assert training.is_untouched()


async def test_a_refused_certificate_ends_the_adaptation(training: Training) -> None:
    orchestrator = Phase2IntegrationOrchestrator(compiler=FailingCompiler())

    success, details = await orchestrator.execute_adaptation_pipeline(
        decision=wish(), model_state=training.state
    )

    assert not success
    assert "output at birth" in details["reason"]
    assert training.is_untouched()


class BreakingDispatcher:
    """Surgery that fails; the real one leaves the model as it was."""

    def graft(self, *arguments: object) -> Any:
        raise SignatureError("the operating theatre is closed")


async def test_surgery_that_fails_is_told_and_counted(training: Training) -> None:
    orchestrator = Phase2IntegrationOrchestrator(dispatcher=BreakingDispatcher())

    success, details = await orchestrator.execute_adaptation_pipeline(
        decision=wish(), model_state=training.state
    )

    assert not success
    assert "theatre" in details["reason"]
    assert training.is_untouched()
    status = orchestrator.get_integration_status()
    assert status["execution_metrics"]["refused"] == 1
    assert status["active_adaptations"] == {}


async def test_a_policy_that_takes_no_medium_risk_asks_a_person(training: Training) -> None:
    orchestrator = Phase2IntegrationOrchestrator(policy=SafetyPolicy())

    success, details = await orchestrator.execute_adaptation_pipeline(
        decision=wish(kind=AdaptationType.ADD_FFN), model_state=training.state
    )

    assert not success
    assert details["asks"]
    assert training.is_untouched()
