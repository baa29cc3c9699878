"""Esper in a real Lightning Trainer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader, TensorDataset

from esper.exceptions import ConfigurationError
from esper.grafting import audit, digest
from esper.sdk.frameworks.lightning import EsperCallback
from tests.another_python import python
from tests.esper.sdk.frameworks.lightning_training import GRAFT_AT, SAVE_AT, STEPS, Net, fit

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def test_a_fit_is_stepped_grafted_saved_and_goes_on_in_a_new_process(tmp_path: Path) -> None:
    net, callback, trainer = fit(tmp_path)
    session = callback.session
    assert session is not None
    assert trainer.global_step == STEPS
    assert [entry.step for entry in session.adaptations] == [GRAFT_AT, GRAFT_AT]
    assert session.state_dict()["step"] == STEPS  # not one for each of the 48 batches
    assert audit(net, trainer.optimizers) == []
    module = "tests.esper.sdk.frameworks.lightning_training"
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    answer = python("-m", module, str(tmp_path), environment=one_thread)
    expected = f"['proj_lora_64', 'ln_rms'] {digest(net)}"
    assert answer.stdout.strip() == expected, answer.stderr


def test_the_optimizers_of_its_checkpoint_are_plain_and_its_model_is_whole(tmp_path: Path) -> None:
    """Without its grafts it would be another model, which loads without an error."""
    fit(tmp_path)
    saved = torch.load(tmp_path / f"step={SAVE_AT}.ckpt", weights_only=True)
    grafts = {name.split(".esper.")[0] for name in saved["state_dict"] if ".esper." in name}
    assert grafts == {"body.1", "body.3"}
    (optimizer,) = saved["optimizer_states"]
    assert len(optimizer["param_groups"]) == 1
    assert not any(key.startswith("esper") for key in optimizer["param_groups"][0])
    assert len(optimizer["state"]) == len(optimizer["param_groups"][0]["params"])
    assert len(saved["lr_schedulers"][0]["base_lrs"]) == 1


def test_an_exception_closes_the_session(tmp_path: Path) -> None:
    callback = EsperCallback(run="fit")
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, esper=callback, fail_at=5)
    assert callback.session is not None
    with pytest.raises(ConfigurationError, match="closed"):
        callback.session.step(0.1)


class AskToStop(Callback):
    def __init__(self, esper: EsperCallback) -> None:
        self.esper = esper

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        session = self.esper.session
        if trainer.global_step == 3 and session is not None and not session.should_stop:
            receipt = session.remedy("stop_early", restore_best=False)
            assert receipt.details["told"] == "Lightning's Trainer stops"


def test_the_trainer_stops_when_the_remedy_asks_for_it() -> None:
    esper = EsperCallback(run="fit")
    trainer = Trainer(
        accelerator="cpu", callbacks=[AskToStop(esper), esper], max_steps=STEPS, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    data = TensorDataset(torch.randn(96, 8), torch.randint(0, 4, (96,)))
    trainer.fit(Net(), DataLoader(data, batch_size=4), DataLoader(data, batch_size=96))
    assert trainer.global_step == 4
