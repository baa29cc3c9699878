"""Esper in a loop that Accelerate runs.

    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    session = attach(accelerator, model, optimizer, scheduler=scheduler, run="my-run")
    ...
    with accelerator.accumulate(model):
        ...
        optimizer.step()
        scheduler.step()
        step(session, accelerator, loss)   # does nothing between two optimizer steps
        optimizer.zero_grad()

``accelerator.save_state`` and ``load_state`` then carry Esper's state too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    from accelerate import Accelerator
except ImportError as error:  # the library itself does not need it
    raise ImportError(
        "esper.sdk.frameworks.accelerate needs Accelerate: pip install 'esper-control[accelerate]'"
    ) from error

from esper.sdk.attaching import attach as attach_plain
from esper.sdk.session import Session

ESPER_FILE = "esper.pt"


def attach(
    accelerator: Accelerator,
    model: Any,
    optimizer: Any,
    *,
    scheduler: Any = None,
    **options: Any,
) -> Session:
    """Attaches to what ``accelerator.prepare`` returned, and joins its checkpoints.

    Call ``accelerator.load_state`` before the session's first step. It rebuilds the grafts first,
    so that Accelerate finds the tensors and groups that it saved.

    Args:
        scheduler: one or several, prepared.
        options: of :func:`esper.attach`, such as ``run``, ``server``, ``mode``, ``evaluate``.

    Raises:
        ConfigurationError, UnknownLayerError: as :func:`esper.attach`.
    """
    session = attach_plain(
        model,
        optimizer,
        scheduler=scheduler,
        scaler=accelerator.scaler,
        **options,
    )

    def save(models: list[Any], weights: list[Any], folder: str) -> None:
        if accelerator.is_main_process:
            torch.save(session.state_dict(), Path(folder) / ESPER_FILE)

    def load(models: list[Any], folder: str) -> None:
        file = Path(folder) / ESPER_FILE
        if file.exists():  # else the checkpoint is from before Esper
            session.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
    return session


def step(session: Session, accelerator: Accelerator, loss: float | Tensor) -> None:
    """``session.step``, where gradients were synchronised and so the optimizer has stepped.

    With accumulation, ``loss`` is the last batch's.

    Raises:
        RunStopped, TypeError: as :meth:`Session.step`.
    """
    if accelerator.sync_gradients:
        session.step(loss)
