"""A transformers Trainer with accumulation, bf16, a schedule and a graft in its middle.

python -m tests.esper.sdk.frameworks.trainer_training FOLDER

resumes FOLDER's checkpoint and prints a digest.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging

from esper.grafting import digest
from esper.sdk.frameworks.huggingface import EsperCallback

GRAFT_AT, SAVE_AT, STEPS = 8, 14, 24
logging.set_verbosity_error()
logging.disable_progress_bar()


class Text(Dataset[Any]):
    def __init__(self, rows: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(0, 20, (rows, 12), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[row], "labels": self.ids[row]}


class GraftInTheMiddle(TrainerCallback):
    def __init__(self, esper: EsperCallback) -> None:
        self.esper = esper

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        session = self.esper.session
        assert session is not None
        if state.global_step == GRAFT_AT - 1 and len(session.adaptations) < 2:
            session.graft("transformer.h.1.mlp.c_fc", "proj_lora_64")
            session.graft("transformer.h.0.ln_1", "ln_rms")


class FailAt(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise ZeroDivisionError("the data ended")


def make_trainer(
    folder: Path,
    esper: EsperCallback,
    *others: TrainerCallback,
    kind: type[Trainer] = Trainer,
    compute_loss_func: Any = None,
    **changes: Any,
) -> Trainer:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=20, n_positions=16, n_embd=16, n_layer=2, n_head=2,
                   bos_token_id=None, eos_token_id=None)
    )  # fmt: skip
    given = {
        "max_steps": STEPS,
        "gradient_accumulation_steps": 2,
        "bf16": True,
        "save_steps": SAVE_AT,
        "eval_strategy": "steps",
        "eval_steps": 5,
        **changes,
    }
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **given,
    )
    return kind(
        model=model,
        compute_loss_func=compute_loss_func,
        args=arguments,
        train_dataset=Text(80, 1),
        eval_dataset=Text(16, 2),
        callbacks=[esper, GraftInTheMiddle(esper), *others],
    )


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    callback = EsperCallback(run="fit")
    trainer = make_trainer(folder, callback)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{SAVE_AT}"))
    session = callback.session
    assert session is not None
    names = [entry.blueprint for entry in session.adaptations]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    sys.stdout.write(f"{names} {losses[-5:]} {digest(trainer.model)}\n")
