"""A loop run by Accelerate, with accumulation, bf16, a schedule and a graft in its middle.

python -m tests.esper.sdk.frameworks.accelerate_training FOLDER   # resumes FOLDER; prints a digest
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import esper
from esper.grafting import digest
from esper.sdk.frameworks.accelerate import attach, step

GRAFT_AT, SAVE_AT, STEPS = 8, 14, 24


def train(folder: Path, *, resume: bool = False) -> tuple[nn.Module, esper.Session]:
    # No dropout: a loader that starts in the middle draws from the random streams once more.
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision="bf16")
    net = nn.Sequential(
        nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 16),
        nn.ReLU(), nn.Linear(16, 4),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.01 * step))
    x = torch.randn(16 * STEPS, 8)
    data = TensorDataset(x, (x @ torch.randn(8, 4)).argmax(1))
    model, optimizer, loader, schedule = accelerator.prepare(
        net, optimizer, DataLoader(data, batch_size=8), schedule
    )
    session = attach(accelerator, model, optimizer, scheduler=schedule, run="loop")
    if resume:
        accelerator.load_state(str(folder))
    done = session.state_dict()["step"]
    for x, y in accelerator.skip_first_batches(loader, 2 * done):
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            step(session, accelerator, loss)
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        done += 1
        if done == GRAFT_AT:
            session.graft("3", "proj_lora_64")
            session.graft("1", "ln_rms")
        if done == SAVE_AT and not resume:
            accelerator.save_state(str(folder))
    return net, session


if __name__ == "__main__":
    net, session = train(Path(sys.argv[1]), resume=True)
    names = [entry.blueprint for entry in session.adaptations]
    sys.stdout.write(f"{names} {digest(net)}\n")
