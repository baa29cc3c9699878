"""A real training of a tiny model that Esper may change, with checkpoints and a ledger."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import torch
from torch import nn

import esper
from tests.nemesis.ledger import Ledger

STEP_SECONDS = 0.05
CHECKPOINT_STEPS = 40
LAYERS = 8
WIDTH = 16


@dataclass(frozen=True, kw_only=True)
class Options:
    """Of one real trainer."""

    name: str
    server: str
    token: str
    folder: str


def run_real_trainer(options: Options) -> None:
    """The whole life of a process; it ends when it is killed."""
    os.environ |= {
        "ESPER_SERVER": options.server,
        "ESPER_TOKEN": options.token,
        "ESPER_STATE_DIR": str(Path(options.folder) / "journals" / options.name),
    }
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = [part for _ in range(LAYERS) for part in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    _train(options, nn.Sequential(*layers))


def _train(options: Options, model: nn.Module) -> None:
    path = Path(options.folder) / f"{options.name}.pt"
    ledger = Ledger(path.with_suffix(".ledger.jsonl"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    session = esper.attach(model, optimizer, run=options.name, mode="automatic", verbose=False)
    step, held = 0, set[str]()
    if path.exists():
        saved = torch.load(path, weights_only=True)
        session.load_state_dict(saved["session"])
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step, held = saved["step"], _held(session)
    ledger.write("start", held=sorted(held), step=step)
    harness = parent_process()  # not the server that forked this process
    while harness is None or harness.is_alive():
        step += 1
        x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(step))
        loss = nn.functional.mse_loss(model(x), x.roll(1, dims=1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        session.step(loss)
        held = _note(ledger, held, _held(session))
        if step % CHECKPOINT_STEPS == 0:
            _save(path, step, model, optimizer, session)
            ledger.write("checkpoint", held=sorted(held), step=step)
        time.sleep(STEP_SECONDS)


def _held(session: esper.Session) -> set[str]:
    """The server's changes in the model."""
    in_model = ("probation", "kept")
    grafts = {entry.uid for entry in session.adaptations if str(entry.state) in in_model}
    remedies = {receipt.adaptation for receipt in session.remedies if receipt.adaptation}
    return {uid for uid in grafts | remedies if not uid.startswith("local-")}


def _note(ledger: Ledger, before: set[str], now: set[str]) -> set[str]:
    for uid in sorted(now - before):
        ledger.write("applied", adaptation=uid)
    for uid in sorted(before - now):
        ledger.write("removed", adaptation=uid)
    return now


def _save(path: Path, step: int, model: nn.Module, optimizer: Any, session: esper.Session) -> None:
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "session": session.state_dict(),
    }
    fresh = path.with_suffix(".new")
    torch.save(state, fresh)
    os.replace(fresh, path)
