"""A ReLU RNN whose signal grows along the sequence is told, and trains after the repair."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import esper
from esper.remedies.recurrent import scale_recurrent

STEPS = 40  # of a sequence


class Reader(nn.Module):
    """Reads a sequence, and says one number about it."""

    def __init__(self, make: Callable[..., nn.RNNBase] = nn.RNN, **settings: object) -> None:
        super().__init__()
        self.cells = make(1, 16, batch_first=True, **settings)
        self.head = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.cells(x)[0][:, -1])
        return out


def growing(by: float, **settings: object) -> Reader:
    torch.manual_seed(0)
    model = Reader(nonlinearity="relu", **settings)
    with torch.no_grad():
        model.cells.weight_hh_l0.copy_(by * torch.eye(16))
    return model


def waves(rows: int) -> tuple[Tensor, Tensor]:
    at = torch.rand(rows, 1) * 30 + torch.arange(STEPS + 1) / 3
    wave = torch.sin(at)[:, :, None]
    return wave[:, :-1], wave[:, -1]


@pytest.mark.parametrize("by", [1.3, 2.0, 1e6])
def test_recurrent_weights_that_make_a_signal_grow_are_made_smaller(by: float) -> None:
    model = growing(by)
    x, _ = waves(8)
    with torch.no_grad():
        factor = scale_recurrent(model.cells, (x,), {})
        out, _ = model.cells(x)
    assert factor < 1.0
    assert out[:, -10:].norm() <= 10 * out[:, :10].norm()


@pytest.mark.parametrize(
    "model",
    [growing(1.0), growing(0.5), Reader(), Reader(nn.GRU), Reader(nn.LSTM)],
    ids=["identity", "shrinking", "tanh", "GRU", "LSTM"],
)
def test_sound_recurrent_weights_are_left_as_they_are(model: Reader) -> None:
    before = [p.clone() for p in model.cells.parameters()]
    with torch.no_grad():
        assert scale_recurrent(model.cells, (waves(8)[0],), {}) == 1.0
    assert all(map(torch.equal, before, model.cells.parameters()))


def train(model: Reader, mode: str, steps: int = 120) -> tuple[esper.Session, float]:
    torch.manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    with esper.attach(model, optimizer, mode=mode, server="", verbose=False) as session:
        for _ in range(steps):
            x, y = waves(32)
            loss = F.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            session.step(loss)
            losses.append(loss.item())
    return session, sum(losses[-10:]) / 10


def test_a_run_whose_recurrent_signal_explodes_is_told_and_recovers() -> None:
    _, alone = train(growing(1.6), "observe")
    session, loss = train(growing(1.6), "automatic")
    assert [receipt.remedy for receipt in session.remedies] == ["repair_scale"]
    assert "bad_initialisation" in {f.slug for f in session.findings(resolved=True)}
    assert loss < 0.5 < alone


@pytest.mark.parametrize("model", [growing(1.0), Reader()], ids=["identity", "tanh"])
def test_a_sound_recurrent_run_is_left_alone(model: Reader) -> None:
    session, _ = train(model, "automatic")
    assert session.remedies == ()


def test_the_undo_gives_the_recurrent_weights_back_to_the_bit() -> None:
    model = growing(1.6)
    before = model.cells.weight_hh_l0.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with esper.attach(model, optimizer, mode="supervised", server="", verbose=False) as session:
        receipt = session.remedy("repair_scale", sample=waves(16)[0])
        assert not torch.equal(model.cells.weight_hh_l0, before)
        session.undo(receipt)
    assert torch.equal(model.cells.weight_hh_l0, before)
