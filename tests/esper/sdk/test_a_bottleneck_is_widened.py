"""Automatic mode widens a hidden layer that is the bottleneck, and no other."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import esper
from esper.constraints.gates import GateInputs, check_parameter_budget
from esper.contracts import SMALLEST_BUDGETED, RunMode, SafetyPolicy
from tests.esper.diagnosis.small_runs import Run, adam, digits

STEPS = 2_800


class Training:
    """A perceptron on digits, in automatic mode with a held-out loss."""

    def __init__(self, units: int) -> None:
        torch.manual_seed(0)
        x, y = digits()
        order = torch.randperm(len(x))
        x, y = x[order], y[order]
        self.model = nn.Sequential(nn.Linear(64, units), nn.ReLU(), nn.Linear(units, 10))

        def evaluate(model: nn.Module) -> float:
            with torch.no_grad():
                return F.cross_entropy(model(x[1200:]), y[1200:]).item()

        self.run = Run(
            self.model,
            (x[:1200], y[:1200]),
            optimizer=lambda model: adam(model, 5e-3),
            evaluate=evaluate,
            steps=STEPS,
            mode="automatic",
            sampling=((0, 10, 50), (640, 5_000, 5_000)),  # as on very short steps
        )
        self.evaluate = lambda: evaluate(self.model)


def test_a_run_that_is_stuck_in_a_bottleneck_recovers() -> None:
    training = Training(units=3)
    before: list[float] = []
    with training.run.start() as session:

        def see(_: Run, step: int) -> None:
            if step % 100 == 0 and not session.adaptations:
                before.append(training.evaluate())

        training.run.before = see
        result = training.run.train(session)
        (entry,) = session.adaptations
        assert (entry.blueprint, entry.since, entry.layer) == ("widen_hidden", "0", "2")
        assert "capacity" in result.steps
        assert entry.receipt is not None
        assert entry.receipt.config == {"hidden": 32, "activation": "relu"}
        # The stuck run needs a thousand steps for a tenth of this.
        assert training.evaluate() < 0.6 * before[-1]
        wide = esper.export(training.model)
    assert wide[0].weight.shape == (35, 64)


def test_a_run_with_enough_units_gets_no_graft() -> None:
    training = Training(units=32)
    with training.run.start() as session:
        assert training.run.train(session).grafted == ()
        assert "capacity" not in [finding.slug for finding in session.findings()]


def test_a_tiny_model_may_grow_as_far_as_one_of_100_000_parameters() -> None:
    policy = SafetyPolicy()
    limit = policy.most_added_parameters(0)
    assert limit == 2 * SMALLEST_BUDGETED
    for parameters, passed in ((limit, True), (limit + 1, False)):
        inputs = GateInputs(
            mode=RunMode.AUTOMATIC, step=0, model_parameters=310, new_parameters=parameters
        )
        assert check_parameter_budget(inputs, policy).passed is passed
