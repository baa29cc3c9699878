"""Grafts into compiled code: when to compile beside the training, and how long a step will pause.

One process at a time; see :mod:`esper.compilation.ahead`. Whatever goes wrong there, the graft
comes as it would without: it is compiled in the training thread, and the user is told the pause.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import compilation_time_metrics

from esper.compilation.ahead import NotPreparedError, Preparation, Prepared, RegionCall
from esper.contracts import LayerInfo
from esper.fail_closed import contained, short
from esper.grafting.compiled import Compilation, Region, anything_was_compiled
from esper.grafting.slot import slots
from esper.sdk.adaptation import Operation
from esper.sdk.announcing import Announcer

LIMIT_SECONDS = 900.0  # then the graft comes without
REMEMBERED = 50
_STEPS_TO_COMPILE = 20  # after a graft; the layer may not run at each step
_RATIOS = 0.2, 20.0  # a pause beyond is that of something else

logger = logging.getLogger("esper")


@dataclass(frozen=True, slots=True)
class PauseForecast:
    """How long the step after a graft will wait for torch.compile; NaN: nothing was measured.

    Attributes:
        seconds: where the code was compiled ahead: tracing, and loading from the cache.
        unprepared_seconds: where it was not.
        prepared: the code of this very graft is in the cache.
        reason: why it is not, once that is known.
    """

    seconds: float
    unprepared_seconds: float
    prepared: bool = False
    reason: str = ""

    @property
    def expected(self) -> float:
        """In seconds, as things stand."""
        return self.seconds if self.prepared else self.unprepared_seconds

    def __str__(self) -> str:
        how = "its code was compiled ahead" if self.prepared else "compiled in the training thread"
        why = f": {self.reason}" if self.reason and not self.prepared else ""
        seconds = "unknown" if math.isnan(self.expected) else f"about {self.expected:.1f} s"
        return f"expected pause for torch.compile {seconds} ({how}{why})"


@dataclass(slots=True, eq=False)
class _Work:
    """One graft's code."""

    operation: Operation
    region: Region
    since: float
    stop_reading: Callable[[], None] | None = None
    call: RegionCall | None = None
    process: Preparation | None = None
    answer: Prepared | None = None
    told: bool = False


class _Pause:
    """What a forecast must be multiplied by, from the pauses of this run.

    The process measures in its own Python, with a processor to itself or not; the trainer has more
    guards to build, and its other threads beside it.
    """

    def __init__(self) -> None:
        self.ratio = 1.0
        self._measured = 0
        self._forecast = math.nan
        self._before = 0.0
        self._steps_left = 0

    def expect(self, forecast: float) -> None:
        """A graft comes now; its pause was said to be so many seconds, before the ratio."""
        self._forecast, self._before = forecast, _compiling_seconds()
        self._steps_left = _STEPS_TO_COMPILE

    def on_step(self) -> None:
        """After each step: looks whether the code of the graft is there."""
        if not self._steps_left:
            return
        self._steps_left -= 1
        seconds = _compiling_seconds() - self._before
        if seconds <= 0 or not self._forecast > 0:
            return
        self._steps_left = 0
        lowest, highest = _RATIOS
        ratio = min(max(seconds / self._forecast, lowest), highest)
        # The first pause says more than the guess before it; later ones are averaged.
        self.ratio = ratio if not self._measured else math.sqrt(self.ratio * ratio)
        self._measured += 1


class CompilingAhead:
    """Prepares the code of grafts for one session. Only in the training thread.

    Args:
        evaluates: the session measures a held-out loss, whose code a graft changes too.
    """

    def __init__(
        self,
        model: nn.Module,
        compilation: Compilation,
        announcer: Announcer,
        *,
        evaluates: bool,
    ) -> None:
        self._model = model
        self._compilation = compilation
        self._announcer = announcer
        self._evaluates = evaluates
        self._works: dict[str, _Work] = {}
        self._has_searched = False
        self._pause = _Pause()

    def begin(self, operation: Operation) -> None:
        """Has the graft's code compiled beside the training; nothing where the layer is eager."""
        key = self._key(operation)
        region = self._region(operation.layer) if key not in self._works else None
        if region is None:
            return
        while len(self._works) >= REMEMBERED:
            self._end(self._works.pop(next(iter(self._works))))
        work = _Work(operation, region, time.monotonic())
        self._works[key] = work
        self._read_next_call(work)

    def waits(
        self, operation: Operation, *, until: float = math.inf, comes_then: bool = True
    ) -> bool:
        """The graft should come later: its code is being compiled.

        Args:
            until: moment of the monotonic clock from which on it cannot wait.
            comes_then: the caller grafts as soon as this is False.
        """
        # Asked at each step: the key is the cost of a walk through the model.
        running = (w for w in self._works.values() if w.operation is operation and not w.answer)
        work = next(running, None)
        if work is None:
            self.begin(operation)
            work = self._works.get(self._key(operation))
        if work is None:
            return False
        now = time.monotonic()
        if work.answer is None and now >= min(until, work.since + LIMIT_SECONDS):
            self._settle(work, Prepared(f"it takes more than {now - work.since:.0f} s"))
        if work.answer is None:
            return True
        self.tell(operation, comes=comes_then)
        return False

    def tell(self, operation: Operation, *, comes: bool = True) -> None:
        """Says the pause of a graft that comes now, where its code was not compiled ahead."""
        forecast, work = self.forecast(operation), self._works.get(self._key(operation))
        if work is not None and work.answer is None:
            self._settle(work, Prepared("the graft came before that had ended"))
            forecast = self.forecast(operation)
        if comes and work is not None and work.answer is not None and not work.answer.reason:
            self._pause.expect(work.answer.warm_seconds)
        if forecast is None or forecast.prepared or (work is not None and work.told):
            return
        if work is not None:
            work.told = True
        self._announcer.compiles_in_training(
            operation.blueprint.slug, operation.layer.name, str(forecast)
        )

    def on_step(self) -> None:
        """Starts the next process, and looks whether the present one has ended."""
        self._pause.on_step()
        for work in self._works.values():
            if work.answer is None and time.monotonic() > work.since + LIMIT_SECONDS:
                self._settle(work, Prepared(f"it took more than {LIMIT_SECONDS:.0f} s"))
            if work.process is not None and work.answer is None:
                answer = work.process.poll()
                if answer is None:
                    return
                self._settle(work, answer)
        ready = (w for w in self._works.values() if w.answer is None and w.call is not None)
        work_or_none = next(ready, None)
        if work_or_none is not None:
            self._start(work_or_none)

    def forecast(self, operation: Operation) -> PauseForecast | None:
        """The pause of a graft at the next step; None where it compiles nothing."""
        work = self._works.get(self._key(operation))
        if work is None and self._region(operation.layer) is None:
            return None
        usual = usual_pause()
        answer = work.answer if work is not None else None
        if answer is None:
            return usual
        if answer.reason:
            return PauseForecast(usual.seconds, usual.unprepared_seconds, reason=answer.reason)
        seconds = answer.warm_seconds * self._pause.ratio
        return PauseForecast(seconds, usual.unprepared_seconds, prepared=True)

    def close(self) -> None:
        """Ends what still runs."""
        for work in self._works.values():
            self._end(work)
        self._works.clear()

    # -- the parts -----------------------------------------------------------------------------

    def _key(self, operation: Operation) -> str:
        """The graft, and the grafts that are in the model: another one means other code."""
        layer = operation.layer
        present = [(name, *slot.grafts()) for name, _, slot in slots(self._model) if slot.grafts()]
        graft = layer.name, layer.since, operation.blueprint.slug, operation.config
        return json.dumps([graft, present], sort_keys=True, default=str)

    def _region(self, layer: LayerInfo) -> Region | None:
        if not anything_was_compiled():
            return None
        found = self._compilation.region_of(layer.name)
        if found is None and not self._has_searched:
            self._has_searched = True
            self._compilation.search()
            found = self._compilation.region_of(layer.name)
        return found

    def _read_next_call(self, work: _Work) -> None:
        """The form of its arguments decides which code is compiled."""

        @contained("compiling ahead", "A graft is compiled in the training thread.")
        def read(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            trains = work.region.module.training and torch.is_grad_enabled()
            if work.call is not None or work.answer is not None or not trains:
                return
            try:
                work.call = RegionCall.of(work.region, args, kwargs)
            except Exception as error:
                work.answer = Prepared(short(error))

        try:
            work.stop_reading = work.region.before_call(read)
        except Exception as error:
            work.answer = Prepared(short(error))

    def _start(self, work: _Work) -> None:
        assert work.call is not None
        self._stop_reading(work)
        operation = work.operation
        try:
            work.process = Preparation(
                work.region,
                work.call,
                operation.layer,
                operation.blueprint.slug,
                operation.config,
                seed=operation.seed,
                evaluates=self._evaluates,
            )
        except NotPreparedError as error:
            self._settle(work, Prepared(str(error)))
        except Exception as error:
            logger.debug("compiling ahead failed", exc_info=error)
            self._settle(work, Prepared(short(error)))

    def _settle(self, work: _Work, answer: Prepared) -> None:
        work.answer = answer
        self._end(work)
        logger.info(
            "code of %s at %r: %s",
            work.operation.blueprint.slug,
            work.operation.layer.name,
            answer.reason or f"compiled ahead in {answer.cold_seconds:.1f} s",
        )

    def _end(self, work: _Work) -> None:
        self._stop_reading(work)
        process, work.process = work.process, None
        if process is not None:
            process.close()

    @staticmethod
    def _stop_reading(work: _Work) -> None:
        stop, work.stop_reading = work.stop_reading, None
        if stop is not None:
            stop()


def usual_pause() -> PauseForecast:
    """What compiling has taken so far in this process, at most.

    Of the run's own first compilation, the part before the backend is what the cache cannot save.
    """
    whole = _longest("_compile.compile_inner")
    backend = _longest("create_aot_dispatcher_function")
    backward = _longest("backward._backward_impl")
    if not whole:
        return PauseForecast(math.nan, math.nan)
    return PauseForecast(max(0.0, whole - backend), whole + backward)


def _compiling_seconds() -> float:
    """What compiling has taken so far in this process, in all."""
    stages = "_compile.compile_inner", "backward._backward_impl"
    return float(sum(sum(compilation_time_metrics.get(stage, ())) for stage in stages))


def _longest(stage: str) -> float:
    return max((float(s) for s in compilation_time_metrics.get(stage, ())), default=0.0)
