"""The loss on its way from a GPU: the code that runs there, with a stream and events of a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from esper.health import transfers
from esper.health.transfers import HostCopy
from esper.sdk.loss import LossReader


class Event:
    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...

    def record(self, stream: Any = None) -> None: ...


class Stream:
    def record_event(self) -> Event:
        return Event()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Host memory that was allocated."""
    found: list[Tensor] = []
    empty: Callable[..., Tensor] = torch.empty

    def unpinned(*args: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        found.append(empty(*args, **options))
        return found[-1]

    monkeypatch.setattr(transfers.torch, "empty", unpinned)
    monkeypatch.setattr(transfers.torch.cuda, "current_stream", lambda _: Stream())
    for module in ("esper.health.transfers", "esper.sdk.loss"):
        monkeypatch.setattr(f"{module}.is_late", lambda _: True)
    return found


def test_each_loss_is_read_a_step_later_from_two_places_in_turns(made: list[Tensor]) -> None:
    reader = LossReader()
    loss = torch.tensor(0.0, requires_grad=True)
    read = [reader.read(loss + step, step) for step in range(1, 9)]

    assert read == [None, *((step, float(step)) for step in range(1, 8))]
    assert len(made) == 2
    assert not any(host.requires_grad for host in made)


@pytest.mark.parametrize("first_inside", [True, False])
def test_a_loop_may_log_its_losses_inside_inference_mode_or_not(
    first_inside: bool, made: list[Tensor]
) -> None:
    reader = LossReader()
    read = []
    for step in range(1, 9):
        with torch.inference_mode((step % 4 < 2) is first_inside):
            read.append(reader.read(torch.tensor(float(step)), step))

    assert read[1:] == [(step, float(step)) for step in range(1, 8)]
    assert not any(host.is_inference() for host in made)


def test_a_change_of_dtype_takes_other_memory(made: list[Tensor]) -> None:
    reader = LossReader()
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    losses = [torch.tensor(float(step), dtype=dtypes[step % 3]) for step in range(1, 9)]
    read = [reader.read(loss, step) for step, loss in enumerate(losses, 1)]

    assert read[1:] == [(step, float(step)) for step in range(1, 8)]
    assert isinstance(transfers.copy_to_host(losses[0]), HostCopy)
