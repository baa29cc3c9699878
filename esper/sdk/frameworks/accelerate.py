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
        "esper.sdk.frameworks.accelerate needs Accelerate: pip install accelerate"
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

    Call ``accelerator.load_state`` before the session's first step to resume a run. It rebuilds the
    grafts first, so that Accelerate finds the tensors and groups that it saved. Later on, as early
    stopping calls it, the model gets the grafts of the state that is loaded. An error of Esper ends
    neither a save nor a load; it is a finding.

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
            _write(session, Path(folder) / ESPER_FILE)

    def load(models: list[Any], folder: str) -> None:
        file = Path(folder) / ESPER_FILE
        # In the middle of a run, the grafts follow the model's own state, which comes next.
        if file.exists() and not session._parts.run.step:
            session.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))

    closed = session._parts.fail_closed
    save = closed.wrap(
        save,
        part="part of Accelerate's save_state",
        unmeasured=f"Checkpoints have no {ESPER_FILE}: a resumed run does not know its decisions.",
    )
    load = closed.wrap(
        load,
        part="part of Accelerate's load_state",
        unmeasured="The grafts are built from the model's own state; the rest of the run before "
        "is not known.",
    )
    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
    return session


def _write(session: Session, file: Path) -> None:
    """No old file stays where the new one cannot be written: it is of other weights."""
    file.unlink(missing_ok=True)
    fresh = file.with_suffix(".new")
    try:
        torch.save(session.state_dict(), fresh)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    fresh.replace(file)


def step(session: Session, accelerator: Accelerator, loss: float | Tensor) -> None:
    """``session.step``, where gradients were synchronised and so the optimizer has stepped.

    With accumulation, ``loss`` is the last batch's.

    Raises:
        RunStopped, TypeError: as :meth:`Session.step`.
    """
    if accelerator.sync_gradients:
        session.step(loss)
