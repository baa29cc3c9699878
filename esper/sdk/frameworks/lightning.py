"""Esper in a Lightning training: ``Trainer(callbacks=[EsperCallback(run="my-run")])``.

setup, checkpoint   Lightning restores the module, the optimizers and the schedulers. To fit, the
                    grafts of the module wait until the optimizers exist
on_train_start      attach; what a checkpoint held of Esper is rebuilt
on_train_batch_end  one ``session.step`` for each optimizer step, however many batches it took
on_save_checkpoint  Esper's state joins Lightning's checkpoint, whose optimizers stay plain
on_fit_end, on_exception   the session is closed, with the reason
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:  # the library itself does not need it
    raise ImportError(
        "esper.sdk.frameworks.lightning needs Lightning: pip install lightning"
    ) from error

from esper.exceptions import EsperError
from esper.grafting.state_dicts import LoadHooks, pop_grafts
from esper.sdk import framework_loads
from esper.sdk.attaching import attach
from esper.sdk.ending import patience_for, reason_of
from esper.sdk.frameworks.callbacks import goes_on, inside_the_loop
from esper.sdk.session import Session

framework_loads.install()

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
        self._loads: LoadHooks | None = None
        self._grafts: dict[str, Any] = {}  # their entries in the module's state, still to be loaded

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle is of a callback before its first fit."""
        return {**vars(self), "session": None, "_loads": None, "_losses": [], "_grafts": {}}

    @inside_the_loop("A fit cannot go on from a checkpoint with grafts.")
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lightning may load a checkpoint next, and makes the optimizers then."""
        self._end_loads()
        self._grafts.clear()
        if stage == "fit":
            self._loads = LoadHooks(pl_module, self._put_aside, lambda: None)

    @inside_the_loop("A load hook stays in the module.")
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._end_loads()

    @inside_the_loop("The fit is not watched.", raises=(EsperError,))
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attaches: optimizers and schedulers exist, and hold what a checkpoint held."""
        self._end_loads()
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
        self.session._parts.surgery.stop.obeyed_by = "Lightning's Trainer"
        saved, self._saved = self._saved, None
        if saved is not None:
            self.session.load_state_dict(saved)
        elif self._grafts:  # saved by Lightning alone, as with save_weights_only
            pl_module.load_state_dict({**pl_module.state_dict(), **self._grafts})
        self._grafts.clear()
        self._losses.clear()
        self._steps = trainer.global_step

    @inside_the_loop("The session makes no more steps, so nothing is measured.")
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """One step of the session for each step of the optimizer."""
        loss = _loss_of(outputs)
        if loss is not None:
            self._losses.append(loss)
        if self.session is None or trainer.global_step == self._steps:
            return
        self._steps = trainer.global_step
        mean = math.fsum(self._losses) / len(self._losses) if self._losses else None
        self._losses.clear()
        if not goes_on(self.session, mean):
            trainer.should_stop = True

    @inside_the_loop("The held-out loss is not reported.")
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The loop's own held-out loss, where it logs one."""
        loss = trainer.callback_metrics.get(self._monitor)
        if self.session is not None and loss is not None and not trainer.sanity_checking:
            self.session.report(eval_loss=float(loss))

    @inside_the_loop("Checkpoints hold no state of Esper: grafts are not rebuilt from them.")
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds Esper's state; optimizers and schedulers have none of it."""
        if self.session is not None:
            checkpoint[CHECKPOINT_KEY] = self.session.state_dict()

    def _put_aside(self, state: dict[str, Any], prefix: str) -> None:
        """The optimizers are made next, and must not find the grafts in the module."""
        self._grafts = pop_grafts(state, prefix)

    def _end_loads(self) -> None:
        if self._loads is not None:
            self._loads.close()
            self._loads = None

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keeps Esper's state until the fit begins."""
        self._saved = checkpoint.get(CHECKPOINT_KEY)

    @inside_the_loop("The end of the run is not reported.")
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.session is not None:
            self.session.close()

    @inside_the_loop("The end of the run is not reported.")
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if self.session is not None:
            self.session.close(
                reason=reason_of(exception), failed=True, timeout=patience_for(exception)
            )


def _planned(trainer: Trainer) -> int | None:
    steps = trainer.estimated_stepping_batches
    return int(steps) if 0 < steps < math.inf else None


def _loss_of(outputs: Any) -> float | None:
    """None for a skipped batch, and with manual optimization, where a step need return nothing."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return None if loss is None else float(loss)
