"""What a change does while the training loop waits for it."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import pytest
import torch
from torch import nn

import esper
from esper import Session
from esper.exceptions import EsperError
from esper.grafting import Receipt, receipts, remedies
from esper.grafting.changes import apply

CHANGES: dict[str, Callable[[Session, Receipt], object]] = {
    "graft": lambda session, _: session.graft("0", "proj_lora_64"),
    "refused graft": lambda session, _: session.graft("0", "proj_ia3"),
    "undo": lambda session, receipt: session.undo(receipt),
    "remedy": lambda session, _: session.remedy("repair_scale", sample=torch.ones(4, 8)),
}
PAUSES = {
    apply._apply.__code__,
    receipts._undo_with.__code__,
    remedies.apply_change.__wrapped__.__code__,  # type: ignore[attr-defined]
}


@contextmanager
def collecting_at_every_object() -> Iterator[list[str]]:
    """The names of the parts of a pause in which Python collected garbage."""
    found: list[str] = []

    def look(phase: str, _: dict[str, int]) -> None:
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            if frame.f_code in PAUSES:
                found.append(frame.f_code.co_name)
            frame = frame.f_back

    usual = gc.get_threshold()
    gc.callbacks.append(look)
    gc.set_threshold(5, 1, 1)
    try:
        yield found
    finally:
        gc.set_threshold(*usual)
        gc.callbacks.remove(look)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("collects", [True, False])
def test_no_garbage_is_collected_in_a_pause_and_the_script_s_choice_stays(
    collects: bool, change: str
) -> None:
    """A full collection takes longer than the rest of a pause."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    with esper.attach(model, optimizer, mode="supervised", verbose=False) as session:
        for _ in range(3):
            loss = model(torch.ones(4, 8)).square().mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            session.step(loss)
        receipt = session.graft("0", "proj_ia3")
        try:
            if not collects:
                gc.disable()
            with collecting_at_every_object() as found:
                try:
                    CHANGES[change](session, receipt)
                except EsperError:
                    assert change == "refused graft"
            assert gc.isenabled() == collects
        finally:
            gc.enable()
    assert found == []
