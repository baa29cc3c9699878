"""Remedies: applied on all ranks or on none, ended, and undone."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from esper.contracts import AdaptationState
from esper.exceptions import ConfigurationError, GraftError, UndoError
from esper.grafting import Receipt, RemedyReceipt, UndoReceipt, remedies
from esper.grafting.ranks.replicas import Call, jointly
from esper.remedies import (
    Batch,
    GoodStates,
    Remedy,
    Stop,
    Target,
    apply_remedy,
    get_remedy,
    refusal,
)
from esper.sdk.adaptation import Adaptation
from esper.sdk.ranks import Order
from esper.sdk.surgery.after_change import AfterChange
from esper.sdk.surgery.subject import Subject


@dataclass(frozen=True, slots=True, kw_only=True)
class _Act:
    """A remedy that is about to be applied.

    Attributes:
        do: changes the model; gets ``surroundings`` and ``step``.
        merged: the adaptation that it folds into its host.
        catalogue: it is one of the catalogue, and says itself what it cannot change.
        finding: slug of the rule whose finding it answers; empty: somebody asked for it.
    """

    do: Callable[..., RemedyReceipt]
    layer: str
    merged: Adaptation | None = None
    changes_nothing: bool = False
    catalogue: bool = False
    finding: str = ""


class Remedies:
    """Applies them to one model, and takes them back.

    Args:
        states: earlier good states to rewind to; None in a run that only observes.
        stop: whether the loop is asked to stop.
        checkpoint: the script's own function that saves the run; None: there is none.

    Attributes:
        evaluate: measures the held-out loss on all ranks; None: the script cannot.
    """

    def __init__(
        self,
        subject: Subject,
        after: AfterChange,
        *,
        states: GoodStates | None,
        stop: Stop,
        checkpoint: Callable[[], object] | None,
    ) -> None:
        self._subject = subject
        # A remedy leaves averages alone.
        self._without_copies = replace(subject.surroundings, copies=())
        self._run = subject.run
        self._ranks = subject.ranks
        self._changes = subject.changes
        self._after = after
        self._states = states
        self._stop = stop
        self._checkpoint = checkpoint
        self.evaluate: Callable[[], float] | None = None

    # -- applying ------------------------------------------------------------------------------

    def apply(
        self, slug: str, layer: str, sample: Any, config: dict[str, Any], finding: str = ""
    ) -> RemedyReceipt:
        """See :meth:`Session.remedy`; on several ranks the script calls it on each.

        Args:
            finding: slug of the rule whose finding it answers; empty: somebody asked for it.
        """
        found = get_remedy(slug)
        self._subject.meet(Call.REMEDY, slug, layer, config)
        return self._of_catalogue(found, layer, sample, config, finding=finding)

    def apply_for_server(
        self,
        adaptation: str,
        slug: str,
        layer: str,
        sample: Any,
        config: dict[str, Any],
        finding: str = "",
    ) -> RemedyReceipt:
        """As the server ordered; rank 0 tells the other ranks.

        Args:
            adaptation: its uid at the server.
            finding: as for :meth:`apply`.

        Raises:
            The errors of :meth:`Session.remedy`.
        """
        found = get_remedy(slug)
        if found.needs_sample and not self._ranks.alone:
            raise GraftError(
                f"{slug} needs a batch of inputs, which must be the same on all ranks: call "
                "session.remedy(…, sample=…) on each of them",
                layer=layer,
            )
        self._ranks.order(Order.of_remedy(slug, layer, config, adaptation))
        return self._of_catalogue(found, layer, sample, config, adaptation, finding)

    def _of_catalogue(
        self,
        found: Remedy,
        layer: str,
        sample: Any,
        config: dict[str, Any],
        adaptation: str = "",
        finding: str = "",
    ) -> RemedyReceipt:
        def do(**_: Any) -> RemedyReceipt:
            receipt = apply_remedy(found, self._target(layer, sample), config)
            receipt.adaptation = adaptation
            return receipt

        receipt = self._perform(
            _Act(
                do=do,
                layer=layer,
                changes_nothing=found.changes_nothing,
                catalogue=True,
                finding=finding,
            )
        )
        self._follow_weights(found, receipt)
        found.on_agreed(self._target(layer, None))
        if found.begins_anew and self._states is not None:
            self._states.begin_anew()
        return receipt

    def _follow_weights(self, found: Remedy, receipt: RemedyReceipt) -> None:
        """Losses of weights that are gone say nothing of those that are here now."""
        if found.changes_weights:
            back_to = receipt.details.get("to_step", 0 if found.begins_anew else None)
            if back_to is not None:
                self._run.give_up(back_to)

    def refusal(self, slug: str, layer: str, sample: Any, config: dict[str, Any]) -> str:
        """Why a remedy cannot be applied now, a sentence; empty: it can."""
        remedy = get_remedy(slug)
        return refusal(remedy, self._target(layer, sample), remedy.config_for(config))

    def _target(self, layer: str, sample: Any) -> Target:
        return Target(
            self._subject.model,
            self._without_copies,
            layer,
            self._run.step,
            Batch.of(sample),
            self._states,
            self._stop,
            self.evaluate,
            self._checkpoint,
        )

    def freeze(self, layer: str) -> RemedyReceipt:
        """See :meth:`Session.freeze`."""
        self._subject.meet(Call.REMEDY, "freeze", layer)
        do = partial(remedies.freeze, self._subject.model, layer)
        return self._perform(_Act(do=do, layer=layer))

    def merge(self, receipt: Receipt) -> RemedyReceipt:
        """See :meth:`Session.merge`."""
        adaptation = self._changes.of_receipt(receipt)

        def do(**around: Any) -> RemedyReceipt:
            # Only the process that decides knows the verdict.
            if self._ranks.decides and adaptation.state is not AdaptationState.KEPT:
                raise ConfigurationError("only a kept graft is merged; this one is on probation")
            return remedies.merge(self._subject.model, receipt, **around)

        self._subject.meet(Call.REMEDY, "merge", adaptation.uid)
        return self._perform(_Act(do=do, layer=adaptation.layer, merged=adaptation))

    def _perform(self, act: _Act) -> RemedyReceipt:
        """On all ranks, or on none."""
        around = self._subject.surroundings
        reason = around.why_unchangeable() if act.catalogue else around.why_no_remedy()
        if reason and not act.changes_nothing:
            raise GraftError(reason, layer=act.layer)
        if not act.changes_nothing:
            self._after.settle_snapshots(wait=True)
        started = time.perf_counter()
        receipt = self._agreed(act)
        if receipt.changed_nothing:
            self._changes.observed |= {receipt.adaptation} - {""}
        else:
            self._changes.add_remedy(receipt, act.merged)
            self._after.say_what_can_be_undone()
            self._after.follow_up()
        receipt.pause_ms = (time.perf_counter() - started) * 1e3  # all that the loop waited for
        self._subject.reports.remedy(receipt, act.merged, act.finding)
        return receipt

    def _agreed(self, act: _Act) -> RemedyReceipt:
        """Done here, and seen to be done on the other ranks; otherwise undone here too."""
        with jointly(self._subject.surroundings.replicas) as joint:
            receipt = act.do(surroundings=self._without_copies, step=self._run.step)
            try:
                # A rank that has failed is known before DDP's reducer is rebuilt on the others.
                joint.same(_state_of(receipt), last=receipt.changed_nothing)
                if not receipt.changed_nothing:
                    joint.commit()
            except BaseException:
                if not joint.done:
                    receipt.undo_here()
                    receipt.end()
                raise
        return receipt

    # -- taking back ---------------------------------------------------------------------------

    def undo(self, receipt: RemedyReceipt, *, hard: bool) -> UndoReceipt:
        """A script undoes a remedy; see :meth:`Session.undo`."""
        if receipt.changed_nothing:
            return receipt.undo(hard)
        place = self._changes.place_of(receipt)
        if hard:
            self._subject.meet(Call.UNDO, place)
            return self._restore(receipt)
        self._subject.meet(Call.UNDO, place, "soft")
        return self._end(receipt)

    def take_back_for_server(self, receipt: RemedyReceipt, *, hard: bool) -> UndoReceipt:
        """As the server ordered: to the state before it, or only what it does in each step.

        A remedy that has changed the run once has nothing to end, and what stays of a new start
        fits its weights: it ends with them alone.
        """
        self._ranks.order(Order.take_back(receipt.adaptation, hard=hard))
        if hard:
            return self._restore(receipt, ordered=receipt)
        if receipt.in_force and not get_remedy(receipt.remedy).begins_anew:
            return self._end(receipt, ordered=receipt)
        if receipt.in_force:
            receipt.adaptation = ""  # from now on it is the run's own
            return UndoReceipt(hard=False, exact=False, pause_ms=0.0)
        self._changes.forget(receipt)
        receipt.forget_snapshot()
        return UndoReceipt(hard=False, exact=False, pause_ms=0.0)

    def _restore(
        self, receipt: RemedyReceipt, *, ordered: RemedyReceipt | None = None
    ) -> UndoReceipt:
        """Brings back the state before it; remedies that came later go with it."""
        before = tuple(self._changes.remedies)
        self._refuse_gone(receipt)
        report = receipt.undo()
        self._run.take_back(receipt.step)
        self._changes.drop_since(receipt)
        self._after.follow_up()
        self._after.say_what_was_kept(receipt.remedy, receipt.layer, report)
        self._after.report_undone(before, report, ordered=ordered)
        return report

    def _end(self, receipt: RemedyReceipt, *, ordered: RemedyReceipt | None = None) -> UndoReceipt:
        """Ends what it does in each step; everything that came later stays."""
        before = tuple(self._changes.remedies)
        self._refuse_gone(receipt)
        report = receipt.undo(hard=False)
        self._changes.forget(receipt)
        self._after.report_undone(before, report, ordered=ordered)
        return report

    def _refuse_gone(self, receipt: RemedyReceipt) -> None:
        if receipt not in self._changes.remedies:
            raise UndoError("this remedy is not in effect any more", layer=receipt.layer)


def _state_of(receipt: RemedyReceipt) -> str:
    """Which state of the run it has brought back: the same on all ranks."""
    return repr([receipt.details.get(name) for name in ("to_step", "restored_step")])
