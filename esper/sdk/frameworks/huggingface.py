"""Esper in a transformers Trainer: ``Trainer(..., callbacks=[EsperCallback(run="my-run")])``.

on_train_begin     attach, after optimizer and scheduler exist; a checkpoint's grafts are rebuilt
on_optimizer_step  one ``session.step``, whatever the gradient accumulation
on_evaluate        the Trainer's own held-out loss is reported
on_save            Esper's state joins the checkpoint folder, whose own files stay plain
on_train_end       the session is closed. The Trainer calls no callback after an exception; use the
                   callback as a context manager around ``trainer.train()`` to report its reason
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial, wraps
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

try:
    from transformers import (
        Trainer,
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )
except ImportError as error:  # the library itself does not need it
    raise ImportError(
        "esper.sdk.frameworks.huggingface needs transformers: pip install transformers accelerate"
    ) from error

from esper.exceptions import ConfigurationError, EsperError
from esper.fail_closed import FailClosed
from esper.sdk import framework_loads
from esper.sdk.attaching import attach
from esper.sdk.ending import patience_for, reason_of
from esper.sdk.frameworks.callbacks import goes_on, inside_the_loop, is_switched_off
from esper.sdk.session import Session

framework_loads.install()

ESPER_FILE = "esper.pt"
_MARK = "esper"  # in trainer_state.json: this checkpoint has a file of ours
_TELLS = "_tells_esper_the_loss"
_HELD_OUT_ROWS = 64


class EsperCallback(TrainerCallback):
    """Attaches Esper to a ``Trainer.train()``.

    The loss is what the Trainer trains by, whether the model, label smoothing, ``compute_loss`` or
    ``compute_loss_func`` computes it. Where a class has a ``training_step`` of its own that does
    not call the Trainer's, it is what the model returns (``outputs.loss``), or what
    :meth:`observe` is given; otherwise the loss of the steps is unknown, which is a finding.

    Args:
        resume_from: the checkpoint folder that training resumes from. Needed only where that is
            not ``<output_dir>/checkpoint-<step>`` and stands in no ``TrainingArguments``.
        options: of :func:`esper.attach`, such as ``run``, ``server``, ``mode``, ``evaluate``. Where
            there is no ``evaluate``, the first rows of the Trainer's evaluation set are used, once
            it has evaluated for the first time.

    Attributes:
        session: None until training has begun.
    """

    def __init__(self, *, resume_from: str | Path | None = None, **options: Any) -> None:
        self.session: Session | None = None
        self._resume_from = resume_from
        self._options = options
        self._losses = _LossCollector()
        self._held_out = _HeldOut()

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle is of a callback before its first training."""
        fresh = {"session": None, "_losses": _LossCollector(), "_held_out": _HeldOut()}
        return {**vars(self), **fresh}

    def observe(self, loss: Tensor) -> None:
        """Call it with the loss of each batch, before it is divided by the accumulation steps.

        Needed in a ``training_step`` that computes a loss and does not call the Trainer's."""
        self._losses.observe(loss)

    @property
    def _follows_steps(self) -> bool:
        """Otherwise nothing would ever take the losses, one number of each batch."""
        return self.session is not None and not is_switched_off(self, "on_optimizer_step")

    @inside_the_loop("The training is not watched.", raises=(EsperError,))
    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._end(reason="trained again")
        model = kwargs["model"]
        self._held_out.watch(model, kwargs.get("eval_dataloader"))
        options = {
            "target_steps": state.max_steps if state.max_steps > 0 else None,
            "evaluate": self._held_out.loss,
            **self._options,
        }
        self.session = attach(
            model, kwargs["optimizer"], scheduler=kwargs["lr_scheduler"], **options
        )
        self.session._parts.surgery.stop.obeyed_by = "the Trainer"
        saved = self._saved_state(args, state)
        if saved is not None:
            self.session.load_state_dict(saved)
        self._losses.follow(model, self.session._parts.fail_closed)

    @inside_the_loop("The session makes no more steps, so nothing is measured.")
    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self.session is None:
            return
        if not goes_on(self.session, self._losses.take()):
            control.should_training_stop = True

    @inside_the_loop("A lost esper.pt is not noticed when training resumes.")
    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        marks: Any = state.stateful_callbacks  # a dict here, though annotated otherwise
        if self.session is not None:
            marks[_MARK] = {"grafts": len(self.session.adaptations)}

    @inside_the_loop("The held-out loss is not reported.")
    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        metrics = kwargs["metrics"]
        self._held_out.watch(kwargs["model"], kwargs.get("eval_dataloader"))
        if self.session is not None and "eval_loss" in metrics:
            self.session.report(eval_loss=metrics["eval_loss"])

    @inside_the_loop("Checkpoints hold no state of Esper: grafts are not rebuilt from them.")
    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        folder = Path(args.output_dir or "") / f"checkpoint-{state.global_step}"
        if self.session is None or not args.should_save or not folder.is_dir():
            return
        _write(self.session.state_dict(), folder / ESPER_FILE)

    @inside_the_loop("The end of the run is not reported.")
    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._end()

    def __enter__(self) -> EsperCallback:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end(reason=reason_of(error), failed=error is not None, timeout=patience_for(error))

    def _end(self, *, reason: str = "", failed: bool = False, timeout: float = 10.0) -> None:
        self._losses.stop()
        if self.session is not None:
            self.session.close(reason=reason, failed=failed, timeout=timeout)

    def _saved_state(self, args: TrainingArguments, state: TrainerState) -> Any:
        """Esper's part of the checkpoint that was loaded; None where training starts afresh."""
        if state.global_step == 0:
            return None
        usual = Path(args.output_dir or "") / f"checkpoint-{state.global_step}"
        named = [self._resume_from, args.resume_from_checkpoint]
        for folder in [*(Path(name) for name in named if name), usual]:
            if (folder / ESPER_FILE).exists():
                return torch.load(folder / ESPER_FILE, map_location="cpu", weights_only=True)
        if _MARK in (state.stateful_callbacks or {}):
            raise ConfigurationError(
                f"the checkpoint of step {state.global_step} was written with Esper, and its "
                f"{ESPER_FILE} is not in {usual}: pass EsperCallback(resume_from=<its folder>)"
            )
        return None


class _LossCollector:
    """The losses of the batches since the last optimizer step.

    Those that the Trainer tells, or else those that the model returned.
    """

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._shares: list[Tensor] = []  # of the step's loss, as the Trainer told them
        self._summed = False
        self._handle: RemovableHandle | None = None

    def follow(self, model: nn.Module, fail_closed: FailClosed) -> None:
        self._losses.clear()
        self._shares.clear()
        disable: Callable[..., Callable[..., None]] = torch.compiler.disable
        missing = {"part": "loss collector", "unmeasured": "The loss of the steps is unknown."}
        hook = disable(fail_closed.wrap(self._hook, **missing))
        register = partial(model.register_forward_hook, hook, with_kwargs=True)
        self._handle = fail_closed.run(register, **missing)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def observe(self, loss: Tensor) -> None:
        self._losses.append(loss.detach())

    def add_share(self, loss: Any) -> None:
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self.stop()  # the model need not tell: its hook would hinder a pass of an eager copy
            self._shares.append(loss.detach().reshape(()))

    def take(self) -> Tensor | None:
        """The loss of the step; None where neither the Trainer nor the model told one."""
        count = 1 if self._summed or self._shares else len(self._losses)
        losses = self._shares or self._losses
        self._shares, self._losses = [], []
        return torch.stack(losses).sum() / count if losses else None

    def _hook(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any = None
    ) -> None:
        loss = _loss_in(outputs)  # no outputs: in another thread, while the hook is taken out
        if model.training and isinstance(loss, Tensor) and loss.numel() == 1:
            # Given the number of items in the whole step, each batch returns its share of the loss.
            self._summed = kwargs.get("num_items_in_batch") is not None
            self.observe(loss.reshape(()))


class _HeldOut:
    """The model's loss on always the same rows of the Trainer's evaluation set."""

    def __init__(self) -> None:
        self._model: nn.Module | None = None
        self._loader: Any = None

    def watch(self, model: nn.Module, loader: Any) -> None:
        self._model = model
        if loader is not None:
            self._loader = loader

    def loss(self) -> float | None:
        """None before the Trainer has evaluated, for data that cannot be read by row, and without a
        loss in what the model returns."""
        dataset: Any = getattr(self._loader, "dataset", None)
        if self._model is None or not hasattr(dataset, "__getitem__"):
            return None
        # Not through the loader: an unfinished iteration breaks Accelerate's record of which loader
        # is at the end of its data, and with it the next optimizer step.
        rows = min(len(dataset), _HELD_OUT_ROWS)
        size = getattr(self._loader, "batch_size", None) or rows
        device = next(self._model.parameters()).device
        total = 0.0
        for start in range(0, rows, size):
            chosen = [dataset[row] for row in range(start, min(rows, start + size))]
            batch = self._loader.collate_fn(chosen)
            outputs = self._model(**{name: value.to(device) for name, value in batch.items()})
            loss = _loss_in(outputs)
            if loss is None:
                return None
            total += float(loss) * len(chosen)
        return total / rows if rows and math.isfinite(total) else None


def _tell_losses() -> None:
    """A Trainer tells our callbacks the loss that it trains by; no event of it does."""
    step = Trainer.training_step
    if hasattr(step, _TELLS):
        return

    @wraps(step)
    def training_step(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        loss = step(self, *args, **kwargs)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EsperCallback) and callback._follows_steps:
                callback._losses.add_share(loss)
        return loss

    setattr(training_step, _TELLS, True)
    Trainer.training_step = training_step  # type: ignore[method-assign]


_tell_losses()


def _loss_in(outputs: Any) -> Any:
    """As the Trainer takes it from what a model returns: by name, or the first of a tuple."""
    if isinstance(outputs, Mapping):
        return outputs.get("loss")
    first = outputs[0] if isinstance(outputs, tuple | list) and outputs else None
    return first if isinstance(first, Tensor) and not first.ndim else None


def _write(state: Any, path: Path) -> None:
    """A kill leaves either the old file or the new one, complete."""
    fresh = path.with_suffix(".new")
    torch.save(state, fresh)
    fresh.replace(path)
