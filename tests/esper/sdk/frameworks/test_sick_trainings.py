"""What a transformers Trainer does wrong is told in words that lead to its own setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer

from esper.sdk.frameworks.huggingface import EsperCallback
from tests.esper.sdk.frameworks.trainer_training import Text, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore")


def run(folder: Path, mode: str, change: Any, **options: Any) -> tuple[Trainer, Any]:
    callback = EsperCallback(run="sick", mode=mode, server="", verbose=False) if mode else None
    given = {"max_steps": 40, "save_strategy": "no", "eval_strategy": "no", "bf16": False}
    trainer = make_trainer(folder, callback or EsperCallback(), **{**given, **options})
    trainer.callback_handler.callbacks = [callback] if callback is not None else []
    change(trainer)
    trainer.train()
    return trainer, callback.session if callback is not None else None


class Ignored(Text):
    """All labels are those that no loss is taken of, from a row on."""

    first = 0

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        found = super().__getitem__(row)
        return {**found, "labels": torch.full_like(found["labels"], -100)}


def of_the_collator(trainer: Trainer) -> None:
    collate = trainer.data_collator

    def masked(rows: Any) -> Any:
        batch = collate(rows)
        batch["labels"][batch["labels"] >= 0] = -100
        return batch

    trainer.data_collator = masked


def of_the_data(trainer: Trainer) -> None:
    trainer.train_dataset = Ignored(80, 1)


@pytest.mark.parametrize("kind", [of_the_data, of_the_collator])
def test_labels_that_are_all_ignored_are_told_and_not_treated(kind: Any, tmp_path: Path) -> None:
    alone, _ = run(tmp_path, "", kind)
    watched, session = run(tmp_path, "automatic", kind)
    found = [f for f in session._parts.findings.all() if f.slug == "non_finite"]
    assert found
    assert "-100" in found[0].remedy
    assert session.remedies == ()
    assert not [f for f in session._parts.findings.all() if f.slug == "no_gradient"]
    weights = [model.parameters() for model in (alone.model, watched.model)]  # type: ignore[union-attr]
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


@pytest.mark.parametrize("zero", [True, False])
def test_a_schedule_of_zeros_is_told(zero: bool, tmp_path: Path) -> None:
    def schedule(trainer: Trainer) -> None:
        optimizer = torch.optim.AdamW(trainer.model.parameters(), 1e-3)  # type: ignore[union-attr]
        trainer.optimizer = optimizer
        # From 0 too, but not for long.
        trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: step // 1000 if zero else step / 1000
        )

    _, session = run(
        tmp_path, "observe", schedule, max_steps=60, gradient_accumulation_steps=1
    )  # fmt: skip
    found = [f for f in session._parts.findings.all() if f.slug == "nothing_moves"]
    assert bool(found) == zero
    assert all("schedule" in f.remedy for f in found)
