"""What a script changes through its session, and how it answers what waits for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar, overload

import torch
from torch import Tensor, nn

from esper.contracts import Declined, Plan
from esper.exceptions import ConfigurationError
from esper.grafting import Receipt, RemedyReceipt, UndoReceipt
from esper.grafting.ranks.replicas import Call
from esper.remedies import get_remedy
from esper.sdk.compiling_ahead import PauseForecast
from esper.sdk.local import LocalLoop, Waiting
from esper.sdk.parts import Parts
from esper.sdk.plans import PlanReceipt, undo_plan
from esper.sdk.stepping import Steps
from esper.sdk.treatments import RemedyProposal
from esper.sdk.twin import Twin, train_twin

P = ParamSpec("P")
R = TypeVar("R")


def _outside_inference(act: Callable[P, R]) -> Callable[P, R]:
    """Tensors that are made in ``torch.inference_mode`` cannot be trained or restored."""

    @wraps(act)
    def outside(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False):
            return act(*args, **kwargs)

    return outside


class Acts:
    """The methods of a session that change the model, try a change or answer a decision."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._steps = Steps(parts)

    @_outside_inference
    def graft(self, layer: str, blueprint: str, *, since: str = "", **config: Any) -> Receipt:
        """Graft now, between two steps, without a decision of the policy.

        On several ranks each of them must call it, with the same arguments.

        Args:
            layer: a layer that has been seen to run.
            blueprint: slug or id.
            since: an earlier layer, whose input the graft reads, for a graft that spans layers.
            config: the blueprint's settings; what is missing takes its default.

        Raises:
            UnknownBlueprintError, UnknownLayerError, IncompatibleLayerError, ConfigurationError:
                before anything is touched.
            CertificateError: it would change what the model computes; the model is as before.
            ReplicaError: another rank could not do it, or was asked for something else.
        """
        self._steps.catch_up()
        operation = self._parts.surgery.planned(layer, blueprint, since, config)
        self._parts.failures.contain("compiling ahead", partial(self._parts.ahead.tell, operation))
        return self._parts.surgery.graft(operation)

    def prepare(self, layer: str, blueprint: str, *, since: str = "", **config: Any) -> bool:
        """Compile a graft's code beside the training, before :meth:`graft` with these arguments.

        A graft into a model that torch.compile has compiled means one recompilation. A process at
        the lowest priority fills the compiler's cache on disk; train on meanwhile, and call this
        again after later steps. On several ranks each of them must call it, with the same
        arguments; the answer is the same on all.

        Returns:
            True: graft now, the code is there, or none is needed, or it cannot be prepared, which
            is said on the console with the pause to expect. False: it is being compiled.

        Raises:
            UnknownBlueprintError, UnknownLayerError, IncompatibleLayerError
            ReplicaError: another rank asked for something else.
        """
        parts = self._parts
        operation = parts.surgery.planned(layer, blueprint, since, config)
        is_ready = not parts.ahead.waits(operation, comes_then=False)
        asked = layer, operation.blueprint.slug, since, config
        return parts.ranks.all_agree(Call.PREPARE, parts.run.step, is_ready, *asked)

    def forecast_pause(
        self, layer: str, blueprint: str, *, since: str = "", **config: Any
    ) -> PauseForecast | None:
        """How long :meth:`graft` would make the next step wait for torch.compile; None: not at all.

        Raises:
            UnknownBlueprintError, UnknownLayerError, IncompatibleLayerError
        """
        return self._parts.ahead.forecast(
            self._parts.surgery.planned(layer, blueprint, since, config)
        )

    def twin(
        self,
        layer: str | Waiting,
        blueprint: str = "",
        *,
        batches: Sequence[Any],
        loss: Callable[[nn.Module, Any], Tensor],
        evaluate: Callable[[nn.Module], float],
        steps: int = 200,
        seconds: float = 60.0,
        since: str = "",
        **config: Any,
    ) -> Twin:
        """Try a graft in shadow: train a copy of the run with it and one without it.

        It happens here, between two steps, and costs at most ``seconds``. The run stays as it is:
        its weights, its optimizer and its random streams. In local mode a result that is shown
        counts as a closed case of the blueprint.

        Args:
            layer: where, or a decision of :attr:`waiting`, which brings blueprint and settings.
            batches: recorded ones, used in this order, again from the first where they are few.
            loss: the training loss of a model for a batch.
            evaluate: the held-out loss of a model, always on the same data.
            steps: of both copies, at most.
            since, config: as for :meth:`graft`.

        Raises:
            ConfigurationError: on several ranks, with several optimizers, or without a batch.
            The errors of :meth:`graft`.
        """
        if isinstance(layer, Waiting):
            adaptation = layer.decision.adaptation
            blueprint, since = layer.decision.blueprint, adaptation.since
            config, layer = dict(layer.decision.config), adaptation.layer_name
        found = train_twin(
            self._parts.setup.model,
            self._only_optimizer(),
            partial(self._parts.surgery.graft_copy, layer, blueprint, since, config),
            batches=batches,
            loss=loss,
            evaluate=evaluate,
            steps=steps,
            seconds=seconds,
        )
        if self._parts.local is not None:
            self._parts.local.note_twin(found)
        return found

    def plan(self, *, changes: int = 3) -> Plan | Declined:
        """The best set of grafts for this run within its limits, to approve as a whole.

        They are chosen together by a mixed-integer program; ``plan.reasons`` says why these.
        Nothing is done before :meth:`approve`, and :meth:`undo` takes out all that it has done.

        Args:
            changes: at most.

        Returns:
            The plan, or why there is none.

        Raises:
            ConfigurationError: with a server, or on several ranks.
        """
        return self._plans("made").plan(changes)

    def _plans(self, verb: str) -> LocalLoop:
        if self._parts.local is None:
            raise ConfigurationError(f"with a server, plans are {verb} there")
        if not self._parts.ranks.alone:
            raise ConfigurationError("a plan needs one process")
        return self._parts.local

    def _only_optimizer(self) -> Any:
        optimizers = self._parts.setup.surroundings.optimizers
        if not self._parts.ranks.alone or len(optimizers) != 1:
            raise ConfigurationError("a twin needs one process with one optimizer")
        return optimizers[0]

    @_outside_inference
    def undo(
        self, receipt: Receipt | RemedyReceipt | PlanReceipt, hard: bool = True
    ) -> UndoReceipt:
        """Take a graft or all of a plan out, or undo a remedy. On several ranks each calls it.

        Args:
            hard: restore the whole model as it was before the graft or remedy, equal to the bit.
                Otherwise only the graft, or what the remedy does in each step, goes, and the host
                keeps what it has learned since.

        Raises:
            UndoError: it could not be taken out.
            PlanError: nothing of the plan is in the model.
        """
        if not isinstance(receipt, Receipt | RemedyReceipt | PlanReceipt):
            raise TypeError(
                "undo takes the receipt that graft, remedy or approve returned, "
                f"got {type(receipt).__name__}"
            )
        self._steps.catch_up()
        if isinstance(receipt, PlanReceipt):
            return undo_plan(receipt, self._parts.surgery, hard=hard)
        return self._parts.surgery.undo(receipt, hard=hard)

    @_outside_inference
    def remedy(
        self, name: str, layer: str = "", *, sample: Any = None, **config: Any
    ) -> RemedyReceipt:
        """Apply a remedy of the catalogue now, between two steps; see ``esper.remedies``.

        On several ranks each of them must call it, with the same arguments.

        Args:
            name: such as ``"set_lr"`` or ``"rewind"``.
            layer: where; empty: the whole run.
            sample: a batch of the model's inputs, for remedies that need one.
            config: the remedy's settings; what is missing takes its default.

        Raises:
            UnknownLayerError, ConfigurationError, GraftError: the model is as before.
        """
        self._steps.catch_up()
        receipt = self._parts.surgery.remedies.apply(name, layer, sample, config)
        if self._parts.diagnosis is not None:
            self._parts.diagnosis.follow(get_remedy(name))
        return receipt

    def recycle(
        self, layer: str, next_layer: str, sample: Any, *, seed: int | None = None
    ) -> RemedyReceipt:
        """Give dead units a new start, now and when more of them die; the remedy ``recycle``.

        Args:
            next_layer: the only layer that reads the units, apart from a nonlinearity.
            sample: a batch of the model's inputs.
            seed: of the new weights; None: another one at each step.

        Raises:
            UnknownLayerError, GraftError: the model is as before.
        """
        seed = self._parts.run.step + 1 if seed is None else seed
        return self.remedy("recycle", layer, sample=sample, next_layer=next_layer, seed=seed)

    def set_lr(self, layer: str, factor: float) -> RemedyReceipt:
        """Let one layer learn ``factor`` times as fast, whatever schedulers do. Calls multiply.

        Raises:
            UnknownLayerError, ConfigurationError, GraftError: the model is as before.
        """
        return self.remedy("set_lr", layer, factor=factor)

    def freeze(self, layer: str) -> RemedyReceipt:
        """Stop a layer from learning. Raises as :meth:`set_lr`."""
        self._steps.catch_up()
        return self._parts.surgery.remedies.freeze(layer)

    def unfreeze(self, layer: str) -> RemedyReceipt:
        """Let a frozen layer learn; the remedy ``thaw``. Raises as :meth:`set_lr`."""
        return self.remedy("thaw", layer)

    def merge(self, receipt: Receipt) -> RemedyReceipt:
        """Fold a kept graft into its host's weights, so that it costs nothing any more.

        Raises:
            ConfigurationError: the graft is still on probation.
            UndoError, GraftError: it is not in the model, or cannot be merged; nothing changed.
        """
        self._steps.catch_up()
        return self._parts.surgery.remedies.merge(receipt)

    def prune(self, receipt: Receipt) -> UndoReceipt:
        """Take a graft out for good; the host keeps what it has learned since.

        Raises:
            UndoError: it is not in the model any more.
        """
        self._steps.catch_up()
        return self._parts.surgery.removals.prune(receipt)

    @overload
    def approve(self, waiting: Waiting | str) -> Receipt: ...

    @overload
    def approve(self, waiting: RemedyProposal) -> RemedyReceipt: ...

    @overload
    def approve(self, waiting: Plan) -> PlanReceipt: ...

    @_outside_inference
    def approve(
        self, waiting: Waiting | RemedyProposal | Plan | str
    ) -> Receipt | RemedyReceipt | PlanReceipt:
        """Say yes to a waiting decision, to a proposed remedy, or to a plan.

        Args:
            waiting: an entry of :attr:`waiting` or of :attr:`proposed_remedies`, the name of the
                layer that a decision is for, or what :meth:`plan` has returned.

        Raises:
            ValueError: it expired, or was taken already.
            PlanError: the plan could not be applied as a whole.
            The errors of :meth:`graft`.
        """
        self._steps.catch_up()
        if isinstance(waiting, Plan):
            return self._plans("approved").approve_plan(waiting)
        if isinstance(waiting, RemedyProposal):
            if self._parts.remedies is None or not self._parts.ranks.alone:
                raise ConfigurationError("on several ranks, call session.remedy on each of them")
            return self._parts.remedies.approve(waiting)
        if self._parts.local is None:
            raise ConfigurationError("with a server, decisions are approved there")
        if not self._parts.ranks.alone:
            raise ConfigurationError(
                "on several ranks, call session.graft(layer, blueprint) on each of them"
            )
        if isinstance(waiting, str):
            waiting = self._parts.local.waiting_for(waiting)
        receipt = self._parts.local.approve(waiting).receipt
        assert receipt is not None
        return receipt

    def reject(self, waiting: Waiting | RemedyProposal | str) -> None:
        """Say no to a waiting decision, or to a proposed remedy; see :meth:`approve`.

        Raises:
            ValueError: no decision waits for a layer of that name.
        """
        if isinstance(waiting, RemedyProposal):
            if self._parts.remedies is not None:
                self._parts.remedies.reject(waiting)
            return
        if self._parts.local is None:
            return
        if isinstance(waiting, str):
            waiting = self._parts.local.waiting_for(waiting)
        self._parts.local.reject(waiting)
