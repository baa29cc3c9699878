"""A tiny BERT in the transformers Trainer with ``load_best_model_at_end``, and a graft on the way.

The texts are Python's own help topics, and a text's class is the kind of its topic. The Trainer
saves a checkpoint at each evaluation and loads the best one at the end, be it older than the graft
or younger.

python examples/huggingface_best_model.py --steps 120
"""

from __future__ import annotations

import argparse
import tempfile
from pydoc_data import topics

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from esper.sdk.huggingface import EsperCallback

LENGTH = 48


class Passages(Dataset[dict[str, Tensor]]):
    """Passages of bytes; the class says whether the topic is named by letters only."""

    def __init__(self, *, held_out: bool) -> None:
        rows = []
        for place, (name, text) in enumerate(sorted(topics.topics.items())):
            if (place % 4 == 0) is not held_out:
                continue
            data = text.encode()[: LENGTH * 8]
            label = torch.tensor(int(name.isalpha()))
            for start in range(0, len(data) - LENGTH, LENGTH):
                rows.append((torch.tensor(list(data[start : start + LENGTH])), label))
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        tokens, label = self.rows[row]
        return {"input_ids": tokens, "labels": label}


class GraftAt(TrainerCallback):
    """A person who grafts at one step."""

    def __init__(self, step: int, esper: EsperCallback) -> None:
        self.step, self.esper = step, esper

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        if state.global_step == self.step and self.esper.session is not None:
            print(self.esper.session.graft("bert.encoder.layer.0.output.dense", "mlp_gelu_2048"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--graft-at", type=int, default=60, help="step of the graft; 0: none")
    args = parser.parse_args()

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=256, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=LENGTH,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    held_out = Passages(held_out=True)
    esper = EsperCallback(run="best-model")
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=args.steps,
                per_device_train_batch_size=16,
                per_device_eval_batch_size=64,
                learning_rate=2e-3,
                lr_scheduler_type="cosine",
                warmup_steps=10,
                eval_strategy="steps",
                eval_steps=20,
                save_strategy="steps",
                save_steps=20,
                save_total_limit=2,
                load_best_model_at_end=True,
                metric_for_best_model="eval_loss",
                use_cpu=True,
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=Passages(held_out=False),
            eval_dataset=held_out,
            callbacks=[esper, GraftAt(args.graft_at, esper)],
        )
        trainer.train()
        print(f"best checkpoint {str(trainer.state.best_model_checkpoint).rpartition('-')[2]}")
        print(f"best loss {trainer.state.best_metric:.6f}")
        print(f"loaded again: loss {trainer.evaluate()['eval_loss']:.6f}")


if __name__ == "__main__":
    main()
