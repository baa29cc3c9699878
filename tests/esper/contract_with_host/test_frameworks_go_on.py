"""D1 in a framework's loop: no loss, manual optimization, a callback that fails."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer as HuggingFace

import esper
from esper.exceptions import ConfigurationError
from esper.sdk.frameworks import huggingface
from esper.sdk.frameworks.huggingface import EsperCallback as TrainerCallback
from esper.sdk.frameworks.lightning import EsperCallback
from tests.esper.sdk.frameworks.trainer_training import GraftInTheMiddle, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
BATCHES = 12


class Skips(LightningModule):
    """Skips one batch, as a script does whose loss is not finite."""

    def __init__(self, answer: str = "tensor") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        self.answer = answer

    def training_step(self, batch: Any, number: int) -> Any:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        if number == 3:
            return None
        return {"loss": loss, "more": x} if self.answer == "dict" else loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


class ByHand(Skips):
    """Two optimizers and no loss, as in a GAN."""

    def __init__(self, answer: str = "nothing") -> None:
        super().__init__(answer)
        self.automatic_optimization = False

    def training_step(self, batch: Any, number: int) -> Any:
        x, y = batch
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            loss = F.cross_entropy(self.net(x), y)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return {"more": x} if self.answer == "dict" else None

    def configure_optimizers(self) -> Any:
        first, last = self.net[0], self.net[2]
        return [torch.optim.SGD(part.parameters(), 0.1) for part in (first, last)], []


def fit(module: LightningModule, *callbacks: Any) -> Trainer:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8 * BATCHES, 4, generator=generator)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=1, callbacks=list(callbacks), logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=8))
    return trainer


def weights(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


@pytest.mark.parametrize("answer", ["tensor", "dict"])
@pytest.mark.parametrize("kind", [Skips, ByHand])
def test_a_fit_without_a_loss_ends_as_without_esper(kind: type[Skips], answer: str) -> None:
    alone, watched, callback = kind(answer), kind(answer), EsperCallback(run="fit")
    fit(alone)
    trainer = fit(watched, callback)
    assert all(map(torch.equal, weights(alone), weights(watched)))
    session = callback.session
    assert session is not None
    assert session._parts.run.step == trainer.global_step // len(trainer.optimizers)
    if kind is ByHand:
        assert [f for f in session.findings() if "without a loss" in f.observed]


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_save_checkpoint", "on_fit_end"])
def test_a_callback_that_fails_is_switched_off_once(
    hook: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    alone, watched, callback = Skips(), Skips(), EsperCallback(run="fit")
    fit(alone)
    failing = {"on_train_batch_end": "step", "on_save_checkpoint": "state_dict"}.get(hook, "close")
    calls: list[str] = []

    def fails(self: Any, *_: Any, **__: Any) -> None:
        calls.append(failing)
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(f"esper.sdk.session.Session.{failing}", fails)
    trainer = fit(watched, callback)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    trainer.save_checkpoint(tmp_path / "b.ckpt")
    assert all(map(torch.equal, weights(alone), weights(watched)))
    session = callback.session
    assert session is not None
    assert len(calls) == 1
    assert [f.observed for f in session._parts.findings.all() if hook in f.observed] == [
        f"Esper's {hook} failed: ZeroDivisionError: by zero"
    ]


def test_a_wrong_argument_of_a_callback_is_still_told() -> None:
    with pytest.raises(ConfigurationError, match="unknown mode"):
        fit(Skips(), EsperCallback(run="fit", mode="watch"))


class OwnLoss(HuggingFace):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **_: Any) -> Any:
        return _cross_entropy(model(input_ids=inputs["input_ids"]), inputs["labels"])


class OwnStep(HuggingFace):
    """It does not call the Trainer's, so it has to tell."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **_: Any) -> Tensor:
        loss = model.train()(**inputs).loss
        self.accelerator.backward(loss / 2)
        return loss.detach() / 2


def _cross_entropy(outputs: Any, labels: Tensor, **_: Any) -> Tensor:
    return F.cross_entropy(outputs["logits"].float().flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("how", ["the model", "smoothing", "function", "method", "step"])
def test_the_losses_are_those_that_a_trainer_trains_by(how: str, tmp_path: Path) -> None:
    callback = TrainerCallback(run="fit")
    kinds: dict[str, type[HuggingFace]] = {"method": OwnLoss, "step": OwnStep}
    options = {"label_smoothing_factor": 0.2} if how == "smoothing" else {}
    if how == "function":
        options["compute_loss_func"] = lambda *args, **kwargs: _cross_entropy(*args, **kwargs) / 2
    trainer = make_trainer(
        tmp_path, callback, kind=kinds.get(how, HuggingFace), max_steps=6, save_strategy="no",
        eval_strategy="no", **options,
    )  # fmt: skip
    trainer.train()
    session = callback.session
    assert session is not None
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seen = session.state_dict()["losses"]["loss"].tolist()
    assert seen == pytest.approx(logged, rel=1e-5)
    assert not [f for f in session._parts.findings.all() if "without a loss" in f.observed]


@pytest.mark.parametrize("part", ["attach", "goes_on"])
def test_no_losses_are_kept_of_a_trainer_that_is_not_followed(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing would ever take them: one number of each batch, on the device of the model."""

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("a part of Esper fails")

    monkeypatch.setattr(huggingface, part, fails)
    callback = TrainerCallback(run="fit")
    trainer = make_trainer(tmp_path, callback, save_strategy="no", eval_strategy="no")
    trainer.remove_callback(GraftInTheMiddle)
    trainer.train()
    assert trainer.state.global_step == trainer.args.max_steps
    assert len(callback._losses._shares) <= trainer.args.gradient_accumulation_steps


def test_a_compiled_trainer_is_read_by_an_eager_copy(tmp_path: Path) -> None:
    callback = TrainerCallback(run="fit")
    make_trainer(
        tmp_path, callback, max_steps=3, save_strategy="no", eval_strategy="no", bf16=False,
        torch_compile=True, torch_compile_backend="eager",
    ).train()  # fmt: skip
    session = callback.session
    assert session is not None
    assert [f.observed for f in session._parts.findings.all()] == []


def test_a_step_of_a_trainer_that_tells_no_loss_is_a_finding(tmp_path: Path) -> None:
    class Silent(HuggingFace):
        def training_step(self, model: Any, inputs: Any, *args: Any, **_: Any) -> Tensor:
            outputs = model.train()(input_ids=inputs["input_ids"])
            loss = _cross_entropy(outputs, inputs["labels"]) / 2
            self.accelerator.backward(loss)
            return loss.detach()

    callback = TrainerCallback(run="fit")
    make_trainer(
        tmp_path, callback, kind=Silent, max_steps=4, save_strategy="no", eval_strategy="no"
    ).train()
    session = callback.session
    assert session is not None
    assert session._parts.run.step == 4
    assert [f for f in session._parts.findings.all() if "without a loss" in f.observed]


def test_a_graft_imports_nothing_of_a_framework(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers imports its models when they are asked for: seconds, or an error."""

    def imports(name: str) -> None:
        raise ModuleNotFoundError(f"could not import {name}")

    lazy = ModuleType("transformers")
    lazy.__getattr__ = imports  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "transformers", lazy)
    monkeypatch.delitem(sys.modules, "transformers.modeling_utils", raising=False)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with esper.attach(model, optimizer, run="lazy", server="", verbose=False) as session:
        loss = model(torch.randn(4, 8)).square().mean()
        loss.backward()
        optimizer.step()
        session.step(loss)
        session.graft("0", "proj_lora_64")

    assert not caplog.records
