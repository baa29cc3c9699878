"""Tensors that should learn and do not are found; those that need not are no finding."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import esper
from esper.contracts import Finding, ViolationRule
from esper.grafting.trained_tensors.movement import SILENT_STEPS, STEPS, MovementWatch

SIZE = 8


@pytest.fixture(autouse=True)
def _same_weights() -> None:
    """Whether a step rounds away depends on the weights that a model was born with."""
    torch.manual_seed(0)


class Model(nn.Module):
    """A layer that trains, one that is never called, and a table of which one row is used."""

    def __init__(self, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.used = nn.Linear(SIZE, SIZE, dtype=dtype)
        self.table = nn.Embedding(100, SIZE, dtype=dtype)
        self.gain = nn.Parameter(torch.ones(SIZE, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x * self.gain) + self.table.weight[99]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int = 2 * STEPS,
    before: Callable[[Any, int], None] = lambda session, step: None,
    every: int = 1,
    scaler: Any = None,
    sampling: Any = None,
) -> list[Finding]:
    """The findings of a watched training; ``every`` is how many batches make an optimizer step."""
    session = esper.attach(model, optimizer, scaler=scaler, sampling=sampling)
    generator = torch.Generator().manual_seed(0)
    dtype = next(model.parameters()).dtype
    for step in range(steps):
        before(session, step)
        x = torch.randn(4, SIZE, generator=generator).to(dtype)
        loss = F.mse_loss(model(x), torch.zeros(4, SIZE, dtype=dtype))
        (loss if scaler is None else scaler.scale(loss)).backward()
        if (step + 1) % every == 0:
            optimizer.step() if scaler is None else (scaler.step(optimizer), scaler.update())
        session.step(loss)
        if (step + 1) % every == 0:
            optimizer.zero_grad()
    session.close()
    return session.findings()


def adam(model: nn.Module, **more: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), **{"lr": 1e-2, "weight_decay": 0.0, **more})


def test_a_training_that_works_has_no_findings() -> None:
    model = Model()
    assert train(model, adam(model)) == []


def test_a_layer_that_no_loss_reaches_is_named_without_alarm() -> None:
    model = Model()
    model.forgotten = nn.Linear(SIZE, SIZE)
    findings = train(model, adam(model))
    assert [(f.layer, f.severity, f.observed.split(":")[0]) for f in findings] == [
        ("forgotten", "info", "weight"),
        ("forgotten", "info", "bias"),
    ]


def test_steps_that_are_too_small_for_the_dtype_are_found() -> None:
    model = Model(dtype=torch.bfloat16)
    findings = train(model, adam(model, lr=1e-4))
    (finding,) = [f for f in findings if f.rule == ViolationRule.OPTIMIZER_LEDGER]
    assert (
        finding.observed
        == f"gain: has a gradient, but has not changed in {STEPS} steps of its optimizer"
    )
    assert finding.severity == "serious"
    assert "bfloat16" in finding.remedy


def test_a_graft_that_is_cut_off_from_the_loss_is_found() -> None:
    model = Model()

    def cut_off(session: Any, step: int) -> None:
        if step == 3:
            receipt = session.graft("used", "proj_ia3")
            receipt.graft.combine = lambda x, y: y

    (finding,) = train(model, adam(model), steps=3 * STEPS, before=cut_off)
    assert (finding.layer, finding.severity) == ("used.esper.proj_ia3", "serious")
    assert "does not depend on its layer's output" in finding.observed


def test_a_finding_goes_when_its_graft_goes() -> None:
    model = Model()

    def cut_off(session: Any, step: int) -> None:
        if step == 3:
            receipt = session.graft("used", "proj_ia3")
            receipt.graft.combine = lambda x, y: y
        if step == 2 * STEPS + 5:
            assert session.findings()
            session.undo(session.adaptations[0].receipt, hard=False)

    assert train(model, adam(model), steps=3 * STEPS, before=cut_off) == []


@pytest.mark.parametrize("slug", [b.slug for b in esper.blueprints.list_blueprints()])
def test_a_graft_that_learns_gives_no_finding(slug: str) -> None:
    model = Model()

    def graft(session: Any, step: int) -> None:
        if step == 3:
            layer = next(layer for layer in session.layers if layer.name == "used")
            blueprint = esper.blueprints.get_blueprint(slug)
            if not blueprint.supports(layer):
                for needed in sorted(blueprint.requires)[-1:]:
                    session.graft("used", needed)
                session.graft("used", slug)

    assert train(model, adam(model), steps=3 * STEPS, before=graft) == []


def test_after_a_hard_undo_no_tensor_counts_as_unchanged() -> None:
    model = Model()

    def graft(session: Any, step: int) -> None:
        if step == 1:
            session.graft("used", "mlp_gelu_2048")
        if step == STEPS - 1:
            session.undo(session.adaptations[0].receipt)

    assert train(model, adam(model), steps=3 * STEPS, before=graft) == []


def rate_of_zero(model: Model) -> list[Finding]:
    found = train(model, adam(model, lr=0.0))
    return [one for one in found if "the learning rate has been 0" not in one.observed]


def late_rate(model: Model) -> list[Finding]:
    optimizer = adam(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step > STEPS + 5))
    return train(model, optimizer, before=lambda session, step: schedule.step() if step else None)


def frozen_part(model: Model) -> list[Finding]:
    model.used.requires_grad_(False)
    return train(model, adam(model))


def accumulated(model: Model) -> list[Finding]:
    return train(model, adam(model), every=STEPS + 5, steps=4 * STEPS)


def skipping_scaler(model: Model) -> list[Finding]:
    scaler = torch.amp.GradScaler("cpu", init_scale=float("inf"))
    return train(model, adam(model), scaler=scaler)


def gradient_that_is_zero(model: Model) -> list[Finding]:
    model.used.weight.register_hook(torch.zeros_like)
    return train(model, adam(model))


def rounded_away(model: Model) -> list[Finding]:
    model.gain.register_hook(lambda gradient: gradient.clamp(-1e-6, 1e-6))
    return train(model, torch.optim.SGD(model.parameters(), lr=1e-3))


@pytest.mark.parametrize(
    "run",
    [
        rate_of_zero,
        late_rate,
        frozen_part,
        accumulated,
        skipping_scaler,
        gradient_that_is_zero,
        rounded_away,
    ],
    ids=lambda run: run.__name__,
)
def test_an_unchanged_tensor_with_a_reason_is_no_finding(
    run: Callable[[Model], list[Finding]],
) -> None:
    assert run(Model()) == []


@pytest.mark.parametrize("sampling", [None, 1, 10])
def test_an_optimizer_that_is_never_stepped_is_found(sampling: int | None) -> None:
    model = Model()
    steps = SILENT_STEPS + 1
    (finding,) = train(model, adam(model), every=10**6, steps=steps, sampling=sampling)
    assert "AdamW made no step" in finding.observed


def test_freezing_a_trained_layer_is_reported_within_two_hundred_steps() -> None:
    model = Model()

    def freeze(session: Any, step: int) -> None:
        if step == 10:
            model.used.bias.requires_grad_(False)

    (finding,) = train(model, adam(model), steps=201, before=freeze)
    assert finding.observed == "bias: frozen, after an optimizer has trained it"


@pytest.mark.parametrize("turn", [1, 2, 5, 50])
def test_what_is_frozen_in_turns_is_no_finding(turn: int) -> None:
    """As the two networks of a GAN are, or a critic while its actor trains."""
    model = Model()

    def alternate(session: Any, step: int) -> None:
        model.used.bias.requires_grad_(step // turn % 2 == 0)

    assert train(model, adam(model), steps=410, before=alternate) == []


class LastState(nn.Module):
    """Goes on with the last state alone; what the steps gave is left where it is."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(SIZE, SIZE, batch_first=True)
        self.head = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        _, (state, _) = self.rnn(x.unsqueeze(1))
        return self.head(state[-1])


def test_a_graft_on_unused_outputs_is_a_finding() -> None:
    model = LastState()

    def graft(session: Any, step: int) -> None:
        if step == 1:
            session.graft("rnn", "mlp_gelu_2048", hidden=16)

    found = train(model, adam(model), before=graft, steps=3 * STEPS)
    assert {finding.severity for finding in found} == {"serious"}
    assert {finding.layer for finding in found} == {"rnn.esper.mlp_gelu_2048"}
    for finding in found:
        assert "the graft learns nothing" in finding.observed
        assert "it does not change the last state (h_n)" in finding.observed
        assert "remove it" in finding.remedy


class BorderPixels(nn.Module):
    """The first inputs are zero in all rows, so that most of the first weights learn nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, SIZE)
        self.last = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.zeros(len(x), 64)
        wide[:, 1:SIZE] = x[:, 1:]
        return self.last(torch.tanh(self.first(wide)))


def test_weights_of_which_most_never_learn_are_soon_known_to_move() -> None:
    model = BorderPixels()
    seen: list[int] = []
    train(
        model,
        adam(model),
        steps=100,
        before=lambda session, _: seen.append(len(session._parts.ledger._movement._waiting)),
    )
    assert seen[5] == 4
    assert seen[-1] == 0


def test_weights_of_which_most_never_learn_are_told_where_the_steps_leave_them_out() -> None:
    model = BorderPixels()

    class LeavesOut(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            gradient, model.first.weight.grad = model.first.weight.grad, None
            found = super().step(closure)
            model.first.weight.grad = gradient
            return found

    findings = train(model, LeavesOut(model.parameters(), lr=0.1), steps=5 * STEPS)
    (finding,) = [f for f in findings if f.rule == ViolationRule.OPTIMIZER_LEDGER]
    assert (finding.layer, finding.severity) == ("first", "serious")


def test_what_never_learns_is_looked_at_ever_more_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    model = BorderPixels()
    model.last.weight.requires_grad_(False).zero_()  # no gradient reaches the first layer
    looks, look = [], MovementWatch._look

    def counted(watch: MovementWatch) -> None:
        looks.append(watch._steps)
        look(watch)

    monkeypatch.setattr(MovementWatch, "_look", counted)
    assert train(model, adam(model), steps=1_000) is not None
    assert len(looks) <= 12  # of 50
    assert max(after - before for before, after in pairwise(looks)) <= 160
