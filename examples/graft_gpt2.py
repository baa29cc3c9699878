"""Grafts into a GPT-2 while it trains, and takes the graft out again to the bit.

    python examples/graft_gpt2.py

Offline: a tiny GPT-2 from its configuration, on the bytes of Python's own help topics.
"""

from __future__ import annotations

from pydoc_data import topics

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import esper

TEXT = torch.frombuffer(bytearray("\n".join(topics.topics.values()).encode()), dtype=torch.uint8)


def batch(step: int) -> Tensor:
    """Token numbers, int64 [8, 64]; the same for a step whenever it is asked for."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(TEXT) - 64, (8, 1), generator=generator)
    return TEXT[starts + torch.arange(64)].long()


def train(model: GPT2LMHeadModel, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        loss = model(input_ids=batch(step), labels=batch(step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"step {steps.stop}: loss {loss.item():.3f}", flush=True)


def main() -> None:
    torch.manual_seed(0)
    # A real checkpoint: model = GPT2LMHeadModel.from_pretrained("gpt2"), and its tokenizer's text.
    config = GPT2Config(vocab_size=256, n_positions=64, n_embd=32, n_layer=2, n_head=2,
                        bos_token_id=None, eos_token_id=None)  # fmt: skip
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    train(model, optimizer, range(30))

    # The five lines: graft, read the certificate, train on, take it out again.
    layer, sample = "transformer.h.0.mlp.c_fc", {"input_ids": batch(0)}
    receipt = esper.graft(model, layer, "proj_lora_64", optimizer=optimizer, sample=sample)
    print(f"changed by {receipt.certificate.max_abs_diff} with {receipt.certificate.parameters}")
    train(model, optimizer, range(30, 60))
    print(f"back to the bit: {receipt.undo().exact}")


if __name__ == "__main__":
    main()
