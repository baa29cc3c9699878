"""Esper in a real transformers Trainer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from esper.exceptions import ConfigurationError
from esper.grafting import audit, digest
from esper.sdk.frameworks.huggingface import ESPER_FILE, EsperCallback
from tests.another_python import python
from tests.esper.sdk.frameworks.trainer_training import (
    GRAFT_AT,
    SAVE_AT,
    STEPS,
    FailAt,
    make_trainer,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def test_training_is_stepped_grafted_saved_and_goes_on_in_a_new_process(tmp_path: Path) -> None:
    callback = EsperCallback(run="fit")
    trainer = make_trainer(tmp_path, callback)
    trainer.train()
    session, model = callback.session, trainer.model
    assert session is not None
    assert model is not None
    assert [entry.step for entry in session.adaptations] == [GRAFT_AT, GRAFT_AT]
    state = session.state_dict()
    assert state["step"] == STEPS
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # The Trainer divides by the accumulation steps where the model does not count items itself.
    assert state["losses"]["loss"].tolist() == pytest.approx(logged, rel=2e-3)
    assert audit(model, [trainer.optimizer]) == []
    module = "tests.esper.sdk.frameworks.trainer_training"
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    answer = python("-m", module, str(tmp_path), environment=one_thread)
    expected = f"['proj_lora_64', 'ln_rms'] {logged[-5:]} {digest(model)}"
    assert answer.stdout.splitlines()[-1:] == [expected], answer.stderr


def test_its_checkpoint_loads_where_there_is_no_esper(tmp_path: Path) -> None:
    make_trainer(tmp_path, EsperCallback(run="fit"), max_steps=SAVE_AT, eval_strategy="no").train()
    folder = tmp_path / f"checkpoint-{SAVE_AT}"
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    tensors = sum(len(group["params"]) for group in saved["param_groups"])
    assert len(saved["param_groups"]) == 2  # with weight decay and without
    assert len(saved["state"]) == tensors
    schedule = torch.load(folder / "scheduler.pt", weights_only=True)
    assert len(schedule["base_lrs"]) == 2
    (folder / ESPER_FILE).unlink()
    again = make_trainer(tmp_path, EsperCallback(run="fit"), eval_strategy="no")
    with pytest.raises(ConfigurationError, match="resume_from"):
        again.train(resume_from_checkpoint=str(folder))


def test_an_exception_is_reported_by_the_context(tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        EsperCallback(run="fit") as callback,
    ):
        make_trainer(tmp_path, callback, FailAt(), save_strategy="no").train()
    assert callback.session is not None
    with pytest.raises(ConfigurationError, match="closed"):
        callback.session.step(0.1)


class AskToStop(TrainerCallback):
    def __init__(self, esper: EsperCallback) -> None:
        self.esper = esper

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            assert self.esper.session is not None
            receipt = self.esper.session.remedy("stop_early", restore_best=False)
            assert receipt.details["told"] == "the Trainer stops"


def test_the_trainer_stops_when_the_remedy_asks_for_it(tmp_path: Path) -> None:
    callback = EsperCallback(run="fit")
    trainer = make_trainer(
        tmp_path, callback, AskToStop(callback), eval_strategy="no", save_strategy="no"
    )
    trainer.train()
    assert trainer.state.global_step == 4
