"""A tiny GPT-2 in the transformers Trainer, on Python's own help topics, watched by Esper.

python examples/huggingface_gpt2.py --steps 200
"""

from __future__ import annotations

import argparse
import tempfile
from pydoc_data import topics

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from esper.sdk.huggingface import EsperCallback

CONTEXT = 64


class Topics(Dataset[dict[str, Tensor]]):
    """Windows of bytes; the last tenth is held out."""

    def __init__(self, *, held_out: bool) -> None:
        text = bytearray("\n".join(topics.topics.values()).encode())
        windows = torch.frombuffer(text, dtype=torch.uint8)[: len(text) // CONTEXT * CONTEXT]
        rows = windows.long().view(-1, CONTEXT)
        cut = len(rows) * 9 // 10
        self.rows = rows[cut:] if held_out else rows[:cut]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[row], "labels": self.rows[row]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()

    config = GPT2Config(vocab_size=256, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=2,
                        bos_token_id=None, eos_token_id=None)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        # The context reports the reason if training ends by an exception.
        with EsperCallback(run="huggingface-gpt2", mode="automatic") as esper:
            trainer = Trainer(
                model=GPT2LMHeadModel(config),
                args=TrainingArguments(
                    output_dir=folder,
                    max_steps=args.steps,
                    per_device_train_batch_size=8,
                    gradient_accumulation_steps=2,
                    learning_rate=3e-3,
                    eval_strategy="steps",
                    eval_steps=50,
                    save_strategy="no",
                    report_to=[],
                ),
                train_dataset=Topics(held_out=False),
                eval_dataset=Topics(held_out=True),
                callbacks=[esper],
            )
            trainer.train()
        for adaptation in esper.session.adaptations if esper.session else ():
            print(f"{adaptation.blueprint} at {adaptation.layer}: {adaptation.state}")


if __name__ == "__main__":
    main()
