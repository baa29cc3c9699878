"""Good states on disk, so that a run can go back to them after a restart.

    <folder>/<id>/step-<step>.pt   the newest good states, as many as are kept in memory
    <folder>/<id>/best.pt          the one with the lowest held-out loss

The id is in the session's state, so a run finds its own states again and no others. A file is
written in a thread of its own, to another name first, so that it is whole or not there. What waits
to be written and is not kept any more is left out. Whatever fails is logged once, and ends the
writing.
"""

from __future__ import annotations

import logging
import os
import threading
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from esper.fail_closed import is_the_scripts
from esper.remedies.good_state import State

logger = logging.getLogger("esper")

CLOSE_SECONDS = 1.0  # for files that are being written
BEST = "best.pt"


class StateFolder:
    """The files of one run.

    Args:
        folder: is made where it is missing; the files of one run have a folder of their own in it.
        writes: this process writes, and not only reads.

    Attributes:
        id: names the run's own folder.
    """

    def __init__(self, folder: Path, *, writes: bool = True) -> None:
        self._folder = folder
        self._writes = writes
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._waiting: dict[str, dict[str, Any]] = {}  # name of a file -> what is written
        self._kept: set[str] = set()  # names of the files of steps that stay
        self._failed = False
        self.id = uuid.uuid4().hex

    @property
    def place(self) -> Path:
        return self._folder / self.id

    def write(self, model: nn.Module, state: State, kept: Iterable[int]) -> None:
        """Writes a state, then removes the files of steps that are not ``kept``."""
        names = {_name(step) for step in kept}
        with self._lock:
            self._kept = names
            for name in [n for n in self._waiting if n != BEST and n not in names]:
                del self._waiting[name]
        self._start(_name(state.step), _saved(model, state))

    def write_best(self, model: nn.Module, state: State, loss: float) -> None:
        self._start(BEST, {**_saved(model, state), "held_out_loss": loss})

    def clear(self) -> None:
        """Removes the files of all steps; the best one stays."""
        with self._lock:
            self._kept = set()
            self._waiting = {n: saved for n, saved in self._waiting.items() if n == BEST}
        self.close()
        for file in self.place.glob("step-*.pt"):
            self._remove(file)

    def read(self, model: nn.Module, until: int) -> tuple[list[State], tuple[float, State] | None]:
        """The good states up to a step, oldest first, and the best one.

        Later ones belong to what the run did after the checkpoint that it goes on from; they are
        removed. A file that cannot be read is left out.
        """
        found = []
        for file in self.place.glob("step-*.pt"):
            saved = self._load(file)
            if saved is not None and saved["step"] <= until:
                found.append(_state(model, saved))
            elif saved is not None:
                self._remove(file)
        best = self._load(self.place / BEST)
        if best is None or best["step"] > until:
            return sorted(found, key=lambda state: state.step), None
        known = float(best["held_out_loss"]), _state(model, best)
        return sorted(found, key=lambda state: state.step), known

    def close(self) -> None:
        """Waits a moment for a file that is being written."""
        thread = self._thread
        if thread is not None:
            thread.join(CLOSE_SECONDS)

    def _start(self, name: str, saved: dict[str, Any]) -> None:
        if not self._writes or self._failed:
            return
        with self._lock:
            self._waiting[name] = saved
            if self._thread is not None:  # takes it too
                return
            self._thread = threading.Thread(
                target=self._write_all, name="esper good states", daemon=True
            )
            self._thread.start()

    def _write_all(self) -> None:
        while True:
            with self._lock:
                if not self._waiting or self._failed:
                    self._waiting.clear()
                    self._thread = None
                    return
                name = next(iter(self._waiting))
                saved, kept = self._waiting.pop(name), set(self._kept)
            self._write(name, saved, kept)

    def _write(self, name: str, saved: dict[str, Any], kept: set[str]) -> None:
        fresh = self.place / f"{name}.new"
        try:
            self.place.mkdir(parents=True, exist_ok=True)
            torch.save(saved, fresh)
            os.replace(fresh, self.place / name)
            for file in self.place.glob("step-*.pt"):
                if name != BEST and file.name not in kept:
                    file.unlink(missing_ok=True)
        except Exception as error:
            if is_the_scripts(error):
                raise
            self._failed = True
            logger.warning(
                "good states are kept in memory only, because %s cannot be written: %s",
                self.place,
                error,
            )
            self._remove(fresh)

    def _remove(self, file: Path) -> None:
        try:
            if self._writes:
                file.unlink(missing_ok=True)
        except OSError as error:
            logger.debug("%s cannot be removed", file, exc_info=error)

    def _load(self, file: Path) -> dict[str, Any] | None:
        if not file.exists():
            return None
        try:
            saved = torch.load(file, map_location="cpu", weights_only=True)
            if saved["format"] == 1 and {"step", "tensors", "moments"} <= saved.keys():
                return dict(saved)
        except Exception as error:
            if is_the_scripts(error):
                raise
            logger.warning("the good state %s cannot be read: %s", file, error)
        return None


def _name(step: int) -> str:
    return f"step-{step}.pt"


def _saved(model: nn.Module, state: State) -> dict[str, Any]:
    names = {id(p): name for name, p in model.named_parameters()}
    moments = {names[key]: value for key, value in state.moments.items() if key in names}
    return {"format": 1, "step": state.step, "tensors": state.tensors, "moments": moments}


def _state(model: nn.Module, saved: dict[str, Any]) -> State:
    ids = {name: id(p) for name, p in model.named_parameters()}
    moments = {ids[name]: value for name, value in saved["moments"].items() if name in ids}
    return State(int(saved["step"]), dict(saved["tensors"]), moments)
