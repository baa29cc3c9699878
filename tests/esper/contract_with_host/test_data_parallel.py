"""``nn.DataParallel`` is observed as it is; a graft is refused in words where it copies the model.

There are no two GPUs here, so the copies of each step are made on the CPU, by torch's own method of
a module and in threads, as ``replicate`` and ``parallel_apply`` do.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.exceptions import IncompatibleLayerError


class TwoDevices(nn.DataParallel):
    """Runs each half of a batch on a copy of the model, in a thread."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.device_ids = [0, 1]

    def forward(self, x: Tensor) -> Tensor:
        outputs: dict[int, Tensor] = {}

        def run(place: int, half: Tensor) -> None:
            outputs[place] = copy_of(self.module)(half)

        threads = [threading.Thread(target=run, args=entry) for entry in enumerate(x.chunk(2))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return torch.cat([outputs[0], outputs[1]])


def copy_of(module: nn.Module) -> Any:
    copied: Any = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        copied._modules[name] = None if child is None else copy_of(child)
    for name, parameter in module._parameters.items():
        setattr(copied, name, None if parameter is None else parameter * 1.0)
    return copied


def losses_of(wrapper: type[nn.DataParallel], mode: str | None) -> tuple[list[float], Any]:
    torch.manual_seed(0)
    model = wrapper(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    session = mode and esper.attach(model, optimizer, run="copies", mode=mode, verbose=False)
    losses = []
    for _ in range(60):
        loss = model(torch.randn(16, 8)).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if session:
            session.step(loss)
    return losses, session


@pytest.mark.parametrize("wrapper", [nn.DataParallel, TwoDevices])
@pytest.mark.parametrize("mode", ["observe", "automatic"])
def test_it_is_observed_and_trains_the_same(wrapper: type[nn.DataParallel], mode: str) -> None:
    alone, _ = losses_of(wrapper, None)
    losses, session = losses_of(wrapper, mode)

    assert losses == alone
    assert session.frame() is not None
    assert session.findings() == []
    # Two threads run them, so which one is seen first is chance.
    assert sorted(layer.name for layer in session.layers) == ["0", "2"]


def test_a_graft_is_refused_where_the_model_is_copied() -> None:
    _, session = losses_of(TwoDevices, "supervised")

    assert not any(layer.graftable for layer in session.layers)
    with pytest.raises(IncompatibleLayerError, match="use DistributedDataParallel, or one device"):
        session.graft("2", "proj_lora_64")


def test_on_one_device_it_is_grafted() -> None:
    _, session = losses_of(nn.DataParallel, "supervised")

    assert session.graft("2", "proj_lora_64").certificate.max_abs_diff == 0
