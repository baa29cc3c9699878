"""Esper in a Lightning training: ``Trainer(callbacks=[EsperCallback(run="my-run")])``.

setup, checkpoint   Lightning restores the module, the optimizers and the schedulers
on_train_start      attach; what a checkpoint held of Esper is rebuilt
on_train_batch_end  one ``session.step`` for each optimizer step, however many batches it took
on_save_checkpoint  Esper's state joins Lightning's checkpoint, whose own parts stay plain
on_fit_end, on_exception   the session is closed, with the reason
"""

from __future__ import annotations

import logging
import math
from typing import Any

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:  # the library itself does not need it
    raise ImportError(
        "esper.sdk.frameworks.lightning needs Lightning: pip install 'esper-control[lightning]'"
    ) from error

from esper.exceptions import ConfigurationError
from esper.grafting.ledger import unwrap_optimizer
from esper.sdk.attaching import attach
from esper.sdk.export.plain_checkpoints import plain_model_state, plain_scheduler_state
from esper.sdk.session import RunStopped, Session, reason_of

logger = logging.getLogger("esper")

CHECKPOINT_KEY = "esper"


class EsperCallback(Callback):
    """Attaches Esper to a fit.

    Args:
        monitor: the logged metric that is the held-out loss; reported after each validation.
        options: of :func:`esper.attach`, such as ``run``, ``server``, ``mode``, ``evaluate``.

    Attributes:
        session: None until the fit has begun.
    """

    def __init__(self, *, monitor: str = "val_loss", **options: Any) -> None:
        self.session: Session | None = None
        self._monitor = monitor
        self._options = options
        self._saved: dict[str, Any] | None = None
        self._losses: list[float] = []  # of the batches since the last optimizer step
        self._steps = 0  # the trainer's, at our last one

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attaches: optimizers and schedulers exist, and hold what a checkpoint held."""
        if self.session is not None:  # fitted once more
            self.session.close()
        configs = trainer.lr_scheduler_configs
        options = {"target_steps": _planned(trainer), **self._options}
        self.session = attach(
            trainer.model,  # type: ignore[arg-type]  # set by now
            list(trainer.optimizers),
            scheduler=[config.scheduler for config in configs],
            scaler=getattr(trainer.precision_plugin, "scaler", None),
            **options,
        )
        saved, self._saved = self._saved, None
        if saved is not None:
            self.session.load_state_dict(saved)
        self._losses.clear()
        self._steps = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """One step of the session for each step of the optimizer."""
        self._losses.append(_loss_of(outputs))
        if self.session is None or trainer.global_step == self._steps:
            return
        self._steps = trainer.global_step
        loss = math.fsum(self._losses) / len(self._losses)
        self._losses.clear()
        try:
            self.session.step(loss)
        except RunStopped as stopped:
            logger.warning("the run was stopped: %s", stopped)
            trainer.should_stop = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The loop's own held-out loss, where it logs one."""
        loss = trainer.callback_metrics.get(self._monitor)
        if self.session is not None and loss is not None and not trainer.sanity_checking:
            self.session.report(eval_loss=float(loss))

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds Esper's state, and leaves what belongs to grafts out of the rest."""
        session = self.session
        if session is None:
            return
        checkpoint[CHECKPOINT_KEY] = session.state_dict()
        checkpoint["state_dict"] = plain_model_state(checkpoint["state_dict"])
        checkpoint["optimizer_states"] = session.plain_optimizer_states()
        checkpoint["lr_schedulers"] = [
            plain_scheduler_state(state, unwrap_optimizer(config.scheduler.optimizer))
            for state, config in zip(
                checkpoint["lr_schedulers"], trainer.lr_scheduler_configs, strict=True
            )
        ]

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keeps Esper's state until the fit begins."""
        self._saved = checkpoint.get(CHECKPOINT_KEY)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.session is not None:
            self.session.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if self.session is not None:
            self.session.close(reason=reason_of(exception), failed=True)


def _planned(trainer: Trainer) -> int | None:
    steps = trainer.estimated_stepping_batches
    return int(steps) if 0 < steps < math.inf else None


def _loss_of(outputs: Any) -> float:
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
    if loss is None:
        raise ConfigurationError(
            "training_step returned no loss; return it also with manual optimization"
        )
    return float(loss)
