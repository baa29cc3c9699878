"""D8: in a step, Esper reads nothing from a GPU at once; what it measures is read a step later.

There is no GPU in most places where this runs. So the CPU is treated as a device whose numbers come
late, and every call that would wait for a GPU is caught, with the line of Esper that made it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import esper
from esper import Session
from esper.contracts import Signal
from esper.health import transfers
from esper.health.transfers import HostCopy, HostTransfer
from esper.sdk.findings import AUDIT_EVERY_STEPS

ESPER = str(Path(esper.__file__).parent)
TRANSFERS = str(Path(transfers.__file__))
TORCH = str(Path(torch.__file__).parent)
OF_ARRIVED = {"_model_pass"}  # works on tensors that are in the host's memory
# What waits for a device: its result is a Python number, or its shape depends on the numbers.
WAITS = {
    "item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__",
    "nonzero", "equal", "allclose", "unique", "unique_consecutive", "masked_select", "is_nonzero",
    "__array__", "__contains__", "bincount", "argwhere", "histc", "coalesce",
}  # fmt: skip


class LateEvent:
    """Done only when it is asked again, so that a reader that does not wait is found."""

    def __init__(self) -> None:
        self.is_done = False

    def query(self) -> bool:
        return self.is_done

    def synchronize(self) -> None:
        self.is_done = True


class LateNumbers:
    """Copies to the host that arrive one step later; before that, they hold rubbish."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Tensor, Tensor, LateEvent]] = []

    def copy(self, tensor: Tensor, used: HostCopy | None = None) -> HostCopy:
        host = torch.full_like(tensor, -12345.0)
        event = LateEvent()
        self.waiting.append((host, tensor.clone(), event))
        return HostCopy(host, event)

    def arrive(self) -> None:
        """The step is over on the device."""
        for host, tensor, event in self.waiting:
            host.copy_(tensor)
            event.is_done = True
        self.waiting.clear()


class Synchronisations(TorchFunctionMode):
    """Lists the lines of Esper that call what would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in WAITS or self._copies_to_the_host(name, args, kwargs or {}):
            self._note(name)
        return func(*args, **(kwargs or {}))

    def _copies_to_the_host(self, name: str, args: Any, kwargs: Any) -> bool:
        if name == "__getitem__":
            return _has_mask(args[1])
        if name != "to" or kwargs.get("non_blocking", False):
            return False
        places = [a for a in (*args[1:], *kwargs.values()) if isinstance(a, (str, torch.device))]
        return "cpu" in map(str, places)

    def _note(self, name: str) -> None:
        lines, frame = [], sys._getframe(2)
        while frame is not None:
            file, function = frame.f_code.co_filename, frame.f_code.co_name
            if (
                file == TRANSFERS
                or function in OF_ARRIVED
                or (file.startswith(TORCH) and not lines)
            ):
                return  # numbers that have arrived, or an optimizer's own reading
            if file.startswith(ESPER):
                lines.append(f"{name} at {Path(file).name}:{frame.f_lineno}")
            frame = frame.f_back  # type: ignore[assignment]
        self.found += lines[:1]


def _has_mask(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, Tensor) and part.dtype == torch.bool for part in parts)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> LateNumbers:
    """The CPU counts as a device whose numbers come late."""
    numbers, is_late = LateNumbers(), transfers.is_late
    for module in [m for name, m in sys.modules.items() if name.startswith("esper.")]:
        if getattr(module, "is_late", None) is is_late:
            monkeypatch.setattr(module, "is_late", lambda tensor: True)
    monkeypatch.setattr(transfers, "_copy_behind", numbers.copy)
    return numbers


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Transformer(nn.Module):
    """A block of a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.block(self.tokens(tokens)))
        return logits.flatten(0, 1)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (2, 2, 2)),
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


def frozen() -> nn.Module:
    model = perceptron()
    next(model.children()).requires_grad_(False)
    return model


def dead() -> nn.Module:
    """A layer whose gradient is zero, so its weights never move."""
    model = perceptron()
    with torch.no_grad():
        next(model.parameters()).zero_()
        model[0].bias.fill_(-9.0)  # type: ignore[index, union-attr, operator]
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "perceptron": perceptron,
    "transformer": Transformer,
    "convolutions": convolutions,
    "frozen": frozen,
    "dead": dead,
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-3),
    "adamw, tensor rate": lambda p: torch.optim.AdamW(p, torch.tensor(1e-3), foreach=False),
    "adamw fused": lambda p: torch.optim.AdamW(p, 1e-3, fused=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, 1e-3),
}


class Loop:
    """A training loop whose loss is never read by its script."""

    def __init__(self, model: str = "perceptron", optimizer: str = "adamw") -> None:
        torch.manual_seed(0)
        self.model = MODELS[model]()
        self.optimizer = OPTIMIZERS[optimizer](
            [p for p in self.model.parameters() if p.requires_grad]
        )
        self.data = torch.Generator().manual_seed(0)
        self.losses: list[Tensor] = []
        self.spoil = 1.0

    def loss(self) -> Tensor:
        if isinstance(self.model, Transformer):
            x = torch.randint(11, (4, 6), generator=self.data)
            return F.cross_entropy(self.model(x), x.flatten())
        x = torch.randn(16, 8, generator=self.data)
        return F.cross_entropy(self.model(x), x[:, :4].argmax(1))

    def train(self, session: Session, late: LateNumbers, steps: int) -> list[str]:
        """What waited in these steps."""
        with Synchronisations() as caught:
            for _ in range(steps):
                loss = self.loss() * self.spoil
                self.optimizer.zero_grad()
                torch.autograd.backward(loss)
                late.arrive()  # the step before is done on the device
                self.optimizer.step()
                session.step(loss)
                self.losses.append(loss.detach())
        return caught.found


@pytest.mark.cover(values=1)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_step_waits_for_the_device(model: str, optimizer: str, late: LateNumbers) -> None:
    """Plain steps, frames with and without activations, the guard, the checks of the ledger."""
    loop = Loop(model, optimizer)
    with esper.attach(loop.model, loop.optimizer, sampling=((0, 5, 15),)) as session:
        found = loop.train(session, late, 45)
        frame = session.frame()

    assert found == []
    assert frame is not None
    assert math.isfinite(frame.metrics["loss"])


def test_no_audit_waits_for_the_device(late: LateNumbers) -> None:
    loop = Loop()
    with esper.attach(loop.model, loop.optimizer, mode="automatic") as session:
        assert loop.train(session, late, AUDIT_EVERY_STEPS + 5) == []


@pytest.mark.parametrize("blueprint", ["proj_lora_64", "mlp_gelu_2048", "clamp_grad_norm"])
def test_no_step_waits_while_a_graft_is_on_probation(blueprint: str, late: LateNumbers) -> None:
    loop = Loop()
    with esper.attach(
        loop.model, loop.optimizer, mode="supervised", sampling=((0, 5, 15),)
    ) as session:
        loop.train(session, late, 5)
        session.graft("2", blueprint)
        found = loop.train(session, late, 60)

    assert found == []


def test_a_frame_carries_the_step_and_the_loss_that_it_was_measured_at(late: LateNumbers) -> None:
    loop = Loop()
    plain = Loop()
    seen = {}
    with esper.attach(loop.model, loop.optimizer, sampling=((0, 5, 15),)) as session:
        for step in range(1, 40):
            loop.train(session, late, 1)
            frame = session.frame()
            if frame is not None and frame.step not in seen:
                seen[frame.step] = frame
                assert step == frame.step + 1, "its numbers arrive a step later"
    with esper.attach(plain.model, plain.optimizer, sampling=((0, 5, 15),)) as session:
        session_losses = loop.losses
        assert [*seen] == [5, 10, 15, 20, 25, 30, 35]
        for step, frame in seen.items():
            assert frame.metrics["loss"] == pytest.approx(session_losses[step - 1].item())
            assert frame.value("0", Signal.GRAD_NORM) > 0.0
            assert math.isfinite(frame.value("0", Signal.ACT_STD)) == (step % 15 == 0)
        assert session is not None


def test_late_frames_equal_those_that_come_at_once(late: LateNumbers) -> None:
    frames = []
    for arrives in (True, False):
        loop = Loop()
        with pytest.MonkeyPatch.context() as patch:
            if not arrives:
                patch.setattr(transfers, "is_late", lambda tensor: False)
            with esper.attach(loop.model, loop.optimizer, sampling=((0, 5, 15),)) as session:
                loop.train(session, late, 16)
                frame = session.frame()
        assert frame is not None
        frames.append(frame)

    assert frames[0].step == frames[1].step == 15
    np.testing.assert_allclose(frames[0].values, frames[1].values, rtol=1e-6)


def test_the_guard_sees_a_loss_one_step_later_and_takes_the_graft_out(late: LateNumbers) -> None:
    loop = Loop()
    with esper.attach(loop.model, loop.optimizer, mode="supervised") as session:
        loop.train(session, late, 30)
        session.graft("2", "proj_lora_64")
        loop.train(session, late, 5)
        loop.spoil = math.nan
        loop.train(session, late, 1)
        assert session.adaptations[0].on_probation
        loop.spoil = 1.0
        loop.train(session, late, 1)

        assert not session.adaptations[0].on_probation


def test_a_graft_is_not_blamed_for_a_loss_from_before_it(late: LateNumbers) -> None:
    loop = Loop()
    with esper.attach(loop.model, loop.optimizer, mode="supervised") as session:
        loop.train(session, late, 30)
        kept = {name: value.clone() for name, value in loop.model.state_dict().items()}
        loop.spoil = math.inf
        loop.train(session, late, 1)
        loop.model.load_state_dict(kept)
        loop.spoil = 1.0
        session.graft("2", "proj_lora_64")
        loop.train(session, late, 1)

        assert session.adaptations[0].on_probation
        assert any("loss became" in finding.observed for finding in session.findings())


def test_losses_keep_their_steps(late: LateNumbers) -> None:
    loop = Loop()
    with esper.attach(loop.model, loop.optimizer) as session:
        loop.train(session, late, 6)
        known = dict(session._parts.run.losses)

    assert known == {step: loop.losses[step - 1].item() for step in range(1, 6)}


def test_the_mode_finds_what_would_wait() -> None:
    """The check itself: a reading in Esper is caught, one in the script is not."""
    with Synchronisations() as caught:
        torch.ones(1).item()
        assert caught.found == []
        from esper.sdk.saving import losses_from_state

        losses_from_state({"step": torch.ones(1), "loss": torch.ones(1)})

    assert caught.found
    assert all("saving.py" in line for line in caught.found)
    assert caught._copies_to_the_host("to", (torch.ones(1), torch.device("cpu")), {})
    assert not caught._copies_to_the_host("to", (torch.ones(1), "cpu"), {"non_blocking": True})


def test_a_transfer_keeps_what_is_not_known_apart_from_what_is_not_finite() -> None:
    transfer = HostTransfer()
    transfer.add("norm", [torch.tensor(2.0), None, torch.tensor(math.nan)])
    transfer.add("rows", [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]).double()])
    transfer.add("none", [None, None])
    transfer.start()

    norms = transfer.take("norm")
    assert norms[0] == 2.0
    assert math.isnan(norms[1])
    assert norms[2] == math.inf
    assert transfer.take("rows").tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert not transfer.is_late
    assert [math.isnan(value) for value in transfer.take("none")] == [True, True]
