"""D6 in Accelerate: ``save_state`` and ``load_state`` across a graft; Esper ends neither."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.nn import functional as F

from esper import Session
from esper.grafting.slot import slots
from esper.sdk.frameworks.accelerate import ESPER_FILE, attach, step
from tests.esper.contract_with_host.saved_models import MODELS, batch_of, computed

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(True)


class Loop:
    def __init__(self, kind: str = "mlp") -> None:
        torch.manual_seed(0)
        self.accelerator = Accelerator(cpu=True)
        self.net = MODELS[kind]()
        optimizer = torch.optim.AdamW(self.net.parameters(), 1e-2)
        self.model, self.optimizer = self.accelerator.prepare(self.net, optimizer)
        self.session: Session = attach(self.accelerator, self.model, self.optimizer, run="loop")

    def train(self, steps: int) -> None:
        for seed in range(steps):
            loss = F.cross_entropy(self.model(batch_of("mlp", seed)), torch.arange(4))
            self.accelerator.backward(loss)
            self.optimizer.step()
            step(self.session, self.accelerator, loss)
            self.optimizer.zero_grad()

    @property
    def grafts(self) -> list[tuple[str, str]]:
        return [(layer, slug) for layer, _, slot in slots(self.net) for slug in slot.grafts()]


@pytest.mark.parametrize("slug", ["mlp_gelu_2048", "proj_lora_64", "proj_ia3"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
def test_states_from_before_and_after_a_graft(tmp_path: Path, safe: bool, slug: str) -> None:
    loop = Loop()
    loop.train(3)
    loop.accelerator.save_state(str(tmp_path / "before"), safe_serialization=safe)
    before = computed(loop.net, "mlp")
    receipt = loop.session.graft("0", slug)
    loop.train(3)
    loop.accelerator.save_state(str(tmp_path / "with"), safe_serialization=safe)
    grafted = computed(loop.net, "mlp")
    loop.train(2)

    loop.accelerator.load_state(str(tmp_path / "with"))
    assert torch.equal(computed(loop.net, "mlp"), grafted)
    assert receipt.present
    loop.accelerator.load_state(str(tmp_path / "before"))
    assert torch.equal(computed(loop.net, "mlp"), before)
    assert loop.grafts == []
    loop.train(2)
    loop.accelerator.load_state(str(tmp_path / "with"))
    assert torch.equal(computed(loop.net, "mlp"), grafted)
    assert loop.grafts == [("0", slug)]
    loop.train(2)
    loop.session.close()


def test_an_error_of_esper_ends_no_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop()
    loop.train(2)
    loop.session.graft("0", "proj_lora_64")
    loop.train(2)
    loop.accelerator.save_state(str(tmp_path))
    assert (tmp_path / ESPER_FILE).exists()
    loop.train(2)
    expected = computed(loop.net, "mlp")

    def fails(*_: Any) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(Session, "state_dict", fails)
    loop.accelerator.save_state(str(tmp_path))
    monkeypatch.undo()

    assert not list(tmp_path.glob("esper.*"))  # an old one would be of other weights
    [found] = [f for f in loop.session.findings() if "save_state" in f.observed]
    assert "no room" in found.observed
    AcceleratorState._reset_state(True)
    later = Loop()
    later.accelerator.load_state(str(tmp_path))
    assert torch.equal(computed(later.net, "mlp"), expected)
    loop.session.close()
    later.session.close()


def test_an_error_of_esper_ends_no_load(tmp_path: Path) -> None:
    loop = Loop()
    loop.train(2)
    loop.session.graft("0", "mlp_gelu_2048")
    loop.train(2)
    loop.session.undo(loop.session.adaptations[0].receipt, hard=False)  # type: ignore[arg-type]
    loop.session.graft("3", "proj_lora_64")
    loop.train(2)
    loop.accelerator.save_state(str(tmp_path))
    expected = computed(loop.net, "mlp")
    (tmp_path / ESPER_FILE).write_bytes(b"half a file")
    AcceleratorState._reset_state(True)
    later = Loop()
    later.accelerator.load_state(str(tmp_path))

    assert torch.equal(computed(later.net, "mlp"), expected)
    assert later.grafts == [("3", "proj_lora_64")]
    assert any("load_state" in found.observed for found in later.session.findings())
    later.train(2)
    loop.session.close()
    later.session.close()


def test_a_state_with_a_graft_is_not_loaded_in_silence_without_esper(tmp_path: Path) -> None:
    loop = Loop()
    loop.train(2)
    loop.session.graft("0", "mlp_gelu_2048")
    loop.accelerator.save_state(str(tmp_path))
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True)
    net: nn.Module = accelerator.prepare(MODELS["mlp"]())

    with pytest.raises(RuntimeError, match="load_with_esper_load_state_dict"):
        accelerator.load_state(str(tmp_path))
    assert net is not None
    loop.session.close()
