"""The model's layers, as its first steps show them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from esper.contracts import LayerInfo
from esper.exceptions import UnknownLayerError
from esper.fail_closed import FailClosed
from esper.grafting import LayerRecorder
from esper.grafting.compiled import Compilation, anything_was_compiled
from esper.grafting.layers.graph import NEVER_RAN, why_never_graftable
from esper.grafting.layers.late_layers import LateLayers
from esper.grafting.layers.watching import COPY, CopyRecorder
from esper.grafting.ranks.replicas import RankGroup
from esper.near_names import or_known

_UNSEEN = (
    "Esper does not know the layers' shapes and activations, and grafts nothing. Compile the model "
    "itself, by torch.compile(model) or model.compile(), and not the function around it."
)
LEFT_ALONE = "attach was told to leave it alone"
MOST_STEPS_WITHOUT_A_PASS = 50  # then the run is opened without the layers' shapes


class Layers:
    """Records the layers in the forward passes before the first complete step, then stops.

    Layers that run later are recorded when they do.

    Args:
        slots: names of the layers that may be grafted; the others are only watched.
        replicas: the other ranks; None for a model in one process.
        fail_closed: where a hook is reported that could not be installed, or failed.
        compilation: which parts of the model run compiled; None for a model that is eager.
        takes_no_graft: why none of them does; empty if they do.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: Sequence[str],
        replicas: RankGroup | None = None,
        fail_closed: FailClosed | None = None,
        compilation: Compilation | None = None,
        *,
        takes_no_graft: str = "",
    ) -> None:
        self._model = model
        self._takes_no_graft = takes_no_graft
        self._slots = frozenset(slots)
        self._replicas = replicas
        self._fail_closed = fail_closed or FailClosed()
        self._compilation = compilation or Compilation(model)
        self._recorder = self._record()
        self._fixed: tuple[LayerInfo, ...] | None = None
        # Its hooks are in compiled code, where they do nothing; to remove them would compile again.
        self._left: LayerRecorder | CopyRecorder | None = None
        self._has_searched = False
        self._steps_waited = 0
        self._late: LateLayers | None = None

    @property
    def fixed(self) -> bool:
        """The first complete step is over, so the layers do not change any more."""
        return self._fixed is not None

    @property
    def own(self) -> tuple[LayerInfo, ...]:
        """In the model's order; shapes are known after the first forward pass."""
        if self._fixed is not None:
            return self._fixed
        return tuple(map(self._as_shared, map(_until_it_runs, self._recorder.layers())))

    @property
    def all(self) -> tuple[LayerInfo, ...]:
        """Also, on several ranks, the model that they share: the last one, with an empty name."""
        shared = None if self._replicas is None else self._replicas.whole_model
        return self.own if shared is None else (*self.own, shared)

    def find(self, name: str) -> LayerInfo:
        """Raises ``UnknownLayerError`` where there is none of that name."""
        found = next((layer for layer in self.all if layer.name == name), None)
        if found is None:
            raise UnknownLayerError(self._why_unknown(name), layer=name)
        return found

    def _why_unknown(self, name: str) -> str:
        try:
            reason = why_never_graftable(self._model, name)
        except AttributeError:  # no module of the model has this name
            reason = ""
        if reason:
            return f"{name!r} is not among the layers that are watched: {reason}"
        known = or_known(name, (layer.name for layer in self.all))
        return f"the model has no layer {name!r}{known}"

    def fix(self) -> bool:
        """The first step is complete: all layers have run, where they could be seen.

        Returns:
            False if the next step will show layers: compiled parts have been found only now, or
            no layer has run.
        """
        ranks = self._replicas
        if ranks is not None and ranks.meets_each_step and self._waits_for_ranks(ranks):
            return False
        if self._left is None and self._is_blind() and anything_was_compiled():
            if not self._has_searched:
                self._has_searched = True
                if self._compilation.search() or self._compilation.regions:
                    self._left, self._recorder = self._recorder, self._record()
                return False  # or the session's first step came before the first forward pass
            self._report_unseen()
        elif self._waits():
            return False
        seen = map(self._as_shared, self._recorder.layers())
        self._fixed = tuple(self._compiled(self._limited(layer)) for layer in seen)
        if self._recorder is not self._left:
            self._recorder.retire()
        self._late = self._wait_for_others()
        return True

    def learn(self) -> bool:
        """A step is over: layers that have run for the first time are known from now on.

        Returns:
            True if there are any.
        """
        seen = self._late.on_step() if self._late is not None else {}
        if not seen:
            return False
        known = {layer.name: layer for layer in self.own}
        for name, layer in seen.items():
            old = known[name]
            known[name] = (
                replace(old, order=layer.order, feeds=layer.feeds)
                if old.in_shape
                else self._limited(self._as_shared(layer))
            )
        self._fixed = tuple(known.values())
        return True

    def stop(self) -> None:
        """Remove the recorders' hooks."""
        if self._late is not None:
            self._late.stop()
            self._late = None
        for recorder in (self._recorder, self._left):
            if recorder is not None:
                recorder.stop()

    def _wait_for_others(self) -> LateLayers | None:
        """Not in compiled code, which runs no hooks, nor where all ranks must know the same."""
        names = [layer.name for layer in self.own if layer.reason == NEVER_RAN]
        is_eager = isinstance(self._recorder, LayerRecorder) and self._left is None
        if not names or not is_eager or self._replicas is not None or anything_was_compiled():
            return None
        return LateLayers(self._model, names, self._fail_closed)

    def _record(self) -> LayerRecorder | CopyRecorder:
        if self._compilation.regions:
            return CopyRecorder(self._model, self._compilation, self._fail_closed)
        return LayerRecorder(self._model, fail_closed=self._fail_closed)

    def _is_blind(self) -> bool:
        """The hooks have missed layers, as they do in code that was compiled after they came."""
        is_eager = isinstance(self._recorder, LayerRecorder)
        return is_eager and any(not layer.in_shape for layer in self._recorder.layers())

    def _waits(self) -> bool:
        """No layer has run: the script counts a step in which it has skipped the batch."""
        if self._left is not None or self._replicas is not None or self._has_seen():
            return False
        self._steps_waited += 1
        return self._steps_waited <= MOST_STEPS_WITHOUT_A_PASS

    def _waits_for_ranks(self, replicas: RankGroup) -> bool:
        """As above, on all ranks or on none; they ask one another until one step shows layers."""
        if self._steps_waited > MOST_STEPS_WITHOUT_A_PASS:
            return False
        self._steps_waited += 1
        if replicas.mean(float(self._has_seen() or anything_was_compiled())) < 1.0:
            return self._steps_waited <= MOST_STEPS_WITHOUT_A_PASS
        self._steps_waited = MOST_STEPS_WITHOUT_A_PASS + 1  # from now on each rank for itself
        return False

    def _has_seen(self) -> bool:
        return any(layer.in_shape for layer in self._recorder.layers())

    def _report_unseen(self) -> None:
        if self._has_seen():
            return  # some layers of an eager model do not run
        self._left = self._recorder
        error = LookupError("the model runs inside a function that torch.compile compiled")
        self._fail_closed.switch_off(error, part=COPY, unmeasured=_UNSEEN)

    def _as_shared(self, layer: LayerInfo) -> LayerInfo:
        """As the model on all ranks allows."""
        reason = self._takes_no_graft
        if self._replicas is not None:
            reason = reason or self._replicas.why_not()
        return replace(layer, graftable=False, reason=reason) if reason else layer

    def _compiled(self, layer: LayerInfo) -> LayerInfo:
        return replace(layer, compiled=True) if self._compilation.covers(layer.name) else layer

    def _limited(self, layer: LayerInfo) -> LayerInfo:
        if layer.name in self._slots or not layer.graftable:
            return layer
        return replace(layer, graftable=False, reason=LEFT_ALONE)


def _until_it_runs(layer: LayerInfo) -> LayerInfo:
    """Before the first complete step, a layer that has not run may still do so."""
    if layer.reason != NEVER_RAN:
        return layer
    return replace(layer, reason="it has not run yet; call session.step(loss) after a step")
