"""One decision, carried out from the pipeline to the graft:

    execute_adaptation_pipeline(decision, model_state, constraints):
        find the layer                         unknown             -> no
        esper.pipeline.consider(decision)      gates, selection    -> no, or "ask a person"
        kernel                                 cached, or built    -> no when it is refused
        measured cost                          above a limit       -> no
        dispatch                               graft at once       -> no when the surgery fails

A "no" is ``(False, details)`` with ``reason`` and ``violations``, and leaves the model unchanged.
For a model of this process the caller is responsible for the evidence: there are no frames.
"""

from __future__ import annotations

import secrets
import statistics
import time
import weakref
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from esper import blueprints
from esper.constraints import check_measured, within
from esper.contracts import (
    AdaptationDecision,
    AdaptationType,
    Check,
    Decision,
    Declined,
    LayerHistory,
    LayerInfo,
    Risk,
    RunMode,
    RunSnapshot,
    SafetyPolicy,
    ViolationRule,
)
from esper.contracts.wire import to_wire
from esper.exceptions import EsperError
from esper.health import extract_features
from esper.pipeline import consider
from esper.selection import BlueprintSelector, SelectableBlueprint
from esper.services.tamiyo.execution import (
    Compiler,
    Dispatcher,
    ExecutionSystemIntegrator,
    ModelState,
    PreparedKernel,
    Store,
)
from esper.services.tamiyo.remote import RemoteAdaptation
from esper.services.tamiyo.urza import Urza

if TYPE_CHECKING:
    from esper.grafting import Receipt, UndoReceipt

__all__ = [
    "BlueprintSelector",
    "ExecutionSystemIntegrator",
    "ModelState",
    "Phase2IntegrationOrchestrator",
]

Details = dict[str, Any]

# Who calls this with a model of their own process has agreed to exact, undoable grafts; whatever
# changes the function by schedule (risk high) still asks.
IN_PROCESS_POLICY = SafetyPolicy(name="in-process", auto_max_risk=Risk.MEDIUM, min_cases_for_auto=0)
_VIOLATIONS_KEPT = 200
_TIMES_KEPT = 200
_COUNTED = ("executed", "succeeded", "refused", "kept", "rolled_back")


class _RefusedError(Exception):
    """A step refuses; ``checks`` are the broken limits, ``more`` is added to the details."""

    def __init__(self, reason: str, checks: Sequence[Check] = (), **more: Any) -> None:
        super().__init__(reason)
        self.reason = reason
        self.checks = tuple(checks)
        self.more = more


@dataclass(slots=True)
class _ModelRecord:
    """What this orchestrator did to one model; ``receipts`` of what can still be undone."""

    receipts: dict[str, Receipt] = field(default_factory=dict)
    history: dict[str, LayerHistory] = field(default_factory=dict)
    last_step: int = -1
    today: int = 0
    added_parameters: int = 0


class Phase2IntegrationOrchestrator:
    """Takes decisions from selection to graft, in this process or through a server.

    Args:
        compiler, dispatcher, store: ports; default: this process.
        policy: every threshold.
        catalog: default: every blueprint that is installed.
        urza: work through this server instead; ``model_state`` is then a run's uid, or a
            ``ModelState`` with ``run``.
        follow_seconds: how long a proposal to a server is followed.
    """

    def __init__(
        self,
        *,
        compiler: Compiler | None = None,
        dispatcher: Dispatcher | None = None,
        store: Store | None = None,
        policy: SafetyPolicy = IN_PROCESS_POLICY,
        catalog: Sequence[SelectableBlueprint] | None = None,
        urza: Urza | None = None,
        follow_seconds: float = 60.0,
    ) -> None:
        self.execution = ExecutionSystemIntegrator(
            compiler=compiler, dispatcher=dispatcher, store=store
        )
        self.policy = policy
        self.catalog = tuple(catalog if catalog is not None else blueprints.list_blueprints())
        self.selector = BlueprintSelector(self.catalog)
        self._urza = urza
        self._follow_seconds = follow_seconds
        self._models: weakref.WeakKeyDictionary[nn.Module, _ModelRecord] = (
            weakref.WeakKeyDictionary()
        )
        self._active: dict[str, Details] = {}
        self._violations: deque[Details] = deque(maxlen=_VIOLATIONS_KEPT)
        self._counts: Counter[str] = Counter()
        self._times: dict[str, deque[float]] = {}

    async def execute_adaptation_pipeline(
        self,
        *,
        decision: AdaptationDecision,
        model_state: ModelState | nn.Module | str,
        constraints: Mapping[str, float] | None = None,
    ) -> tuple[bool, Details]:
        """Carry out one decision, or return why not.

        Args:
            constraints: ``max_memory_mb``, ``max_latency_ms``, ``max_parameters``; of the graft.

        Returns:
            (success, details). Details are JSON: always ``reason`` and ``violations``; as far as
            it came also ``blueprint``, ``config``, ``forecast``, ``why_not``, ``checks``,
            ``kernel``, ``certificate``, ``adaptation``, ``pause_ms``, ``timings_ms``.
        """
        started = time.perf_counter()
        details: Details = {
            "layer": decision.layer_name,
            "adaptation_type": str(decision.adaptation_type),
            "reason": "",
            "violations": [],
            "timings_ms": {},
        }
        try:
            await self._carry_out(decision, ModelState.of(model_state), constraints or {}, details)
            success = True
        except _RefusedError as refusal:
            self._note(refusal, details)
            success = False
        except EsperError as error:
            details["reason"] = str(error)
            success = False
        details["timings_ms"]["end_to_end"] = _ms_since(started)
        self._times.setdefault("end_to_end", deque(maxlen=_TIMES_KEPT)).append(
            details["timings_ms"]["end_to_end"]
        )
        self._counts["executed"] += 1
        self._counts["succeeded" if success else "refused"] += 1
        return success, details

    def undo(self, adaptation: str, *, hard: bool = True) -> UndoReceipt:
        """Take a graft of this process out again.

        Raises:
            KeyError: no such adaptation is active here.
            UndoError: the model could not be brought back.
        """
        record, receipt = self._receipt(adaptation)
        undone = receipt.undo(hard=hard)
        old = record.history[receipt.layer]
        left = list(old.grafts)
        left.remove(receipt.blueprint)
        record.history[receipt.layer] = replace(old, grafts=tuple(left), last_rolled_back=True)
        record.added_parameters -= receipt.certificate.parameters
        self._forget(record, adaptation)
        self._counts["rolled_back"] += 1
        return undone

    def keep(self, adaptation: str) -> None:
        """Keep the graft and drop its snapshot. It cannot be undone here any more.

        Until then the orchestrator holds the model, because undo needs it.

        Raises:
            KeyError: no such adaptation is active here.
        """
        record, receipt = self._receipt(adaptation)
        receipt.forget_snapshot()
        self._forget(record, adaptation)
        self._counts["kept"] += 1

    def get_integration_status(self) -> Details:
        """The seed's four keys, with what really happened here so far."""
        return {
            "active_adaptations": {uid: dict(item) for uid, item in self._active.items()},
            "blueprint_cache_stats": self.execution.cache_stats(),
            "execution_metrics": {
                **{name: self._counts[name] for name in _COUNTED},
                "median_ms": {
                    stage: round(statistics.median(times), 3)
                    for stage, times in self._times.items()
                },
            },
            "safety_violations": list(self._violations),
        }

    async def _carry_out(
        self,
        decision: AdaptationDecision,
        state: ModelState,
        constraints: Mapping[str, float],
        details: Details,
    ) -> None:
        if self._urza is not None:
            await self._carry_out_remotely(decision, state, constraints, details)
            return
        if state.model is None:
            raise _RefusedError("There is no model in model_state, and no server is configured.")
        record = self._models.setdefault(state.model, _ModelRecord())
        snapshot = _snapshot(state, record)
        layer = _find(snapshot, decision.layer_name)
        with self._timed(details, "selection"):
            chosen = self._decide(decision, layer, snapshot, self.policy, constraints, details)
            _refuse_asking(chosen.checks)
        with self._timed(details, "kernel"):
            kernel = await self.execution.prepare(layer, chosen)
        self._check_measured(kernel, constraints, details)
        with self._timed(details, "dispatch"):
            adaptation = f"adp_{secrets.token_hex(8)}"
            receipt = self.execution.dispatch(state, layer, kernel, adaptation)
        self._remember(record, state, receipt, adaptation, details)

    def _decide(
        self,
        decision: AdaptationDecision,
        layer: LayerInfo,
        snapshot: RunSnapshot,
        limits: SafetyPolicy,
        constraints: Mapping[str, float],
        details: Details,
    ) -> Decision:
        """What the pipeline says; fills in what it looked at."""
        answer = consider(
            decision,
            snapshot,
            self.selector,
            limits,
            policy="caller",
            features=extract_features(snapshot, self.selector.types) if snapshot.frames else None,
            extra_limits=constraints,
        )
        details.update(checks=to_wire(answer.checks), why_not=to_wire(answer.why_not))
        if isinstance(answer, Declined):
            if answer.violations:
                raise _broken(answer.violations)
            raise self._nothing_fits(answer, layer, snapshot, limits, constraints)
        details.update(
            blueprint=answer.blueprint, config=answer.config, forecast=to_wire(answer.forecast)
        )
        return answer

    def _nothing_fits(
        self,
        declined: Declined,
        layer: LayerInfo,
        snapshot: RunSnapshot,
        limits: SafetyPolicy,
        constraints: Mapping[str, float],
    ) -> _RefusedError:
        """Tell a limit of the caller from "no blueprint supports this layer"."""
        assert declined.adaptation is not None  # only a proposal can fit nowhere
        wanted = declined.adaptation.adaptation_type
        free = self.selector.select(layer, wanted, snapshot, limits)
        if free.best is not None:
            checks = [check for check in within(constraints, free.best.forecast) if check.blocks]
            return _RefusedError(
                f"{free.best.blueprint} would fit, but not within the constraints.", checks
            )
        slugs = {
            blueprint.slug for blueprint in self.catalog if blueprint.adaptation_type is wanted
        }
        lines = [line.reason for line in declined.why_not if line.blueprint in slugs]
        reason = "; ".join(lines) or f"No blueprint serves {wanted}."
        return _RefusedError(reason, [_incompatible(layer, wanted, reason)])

    def _check_measured(
        self, kernel: PreparedKernel, constraints: Mapping[str, float], details: Details
    ) -> None:
        certificate = kernel.report.certificate
        details.update(
            kernel=kernel.digest, cached=kernel.cached, certificate=certificate.to_wire()
        )
        measured = replace(
            kernel.report.forecast,
            memory_mib=certificate.memory_mib,
            latency_ms=certificate.latency_ms,
        )
        checks = (
            *check_measured(certificate, self.policy),
            *_firmly(within(constraints, measured)),
        )
        details["checks"] += to_wire(checks)
        _refuse_broken(checks)

    def _remember(
        self,
        record: _ModelRecord,
        state: ModelState,
        receipt: Receipt,
        adaptation: str,
        details: Details,
    ) -> None:
        old = record.history.get(receipt.layer, LayerHistory())
        record.receipts[adaptation] = receipt
        record.history[receipt.layer] = LayerHistory(
            grafts=(*old.grafts, receipt.blueprint), last_adaptation_step=state.step
        )
        record.last_step = state.step
        record.today += 1
        record.added_parameters += receipt.certificate.parameters
        details.update(adaptation=adaptation, pause_ms=receipt.pause_ms)
        self._active[adaptation] = {
            "layer": receipt.layer,
            "blueprint": receipt.blueprint,
            "step": state.step,
            "parameters": receipt.certificate.parameters,
            "kernel": details["kernel"],
        }

    def _receipt(self, adaptation: str) -> tuple[_ModelRecord, Receipt]:
        for record in self._models.values():
            if adaptation in record.receipts:
                return record, record.receipts[adaptation]
        raise KeyError(adaptation)

    def _forget(self, record: _ModelRecord, adaptation: str) -> None:
        del record.receipts[adaptation]
        del self._active[adaptation]

    def _note(self, refusal: _RefusedError, details: Details) -> None:
        rows = [
            {
                "rule": str(check.rule),
                "limit": check.limit,
                "observed": check.observed,
                "text": check.text,
                "layer": details["layer"],
                "action": "not applied",
            }
            for check in refusal.checks
        ]
        details.update(reason=refusal.reason, violations=rows, **refusal.more)
        self._violations.extend({**row, "at": time.time()} for row in rows)

    async def _carry_out_remotely(
        self,
        decision: AdaptationDecision,
        state: ModelState,
        constraints: Mapping[str, float],
        details: Details,
    ) -> None:
        assert self._urza is not None
        if not state.run:
            raise _RefusedError("Through a server, model_state is the uid of a run.")
        remote = RemoteAdaptation(self._urza, state.run, follow_seconds=self._follow_seconds)
        report = await remote.look()
        layer = _find(report.snapshot, decision.layer_name)
        with self._timed(details, "selection"):
            chosen = self._decide(
                decision, layer, report.snapshot, report.limits, constraints, details
            )
        with self._timed(details, "adaptation"):
            outcome = await remote.carry_out(chosen, report)
        details.update(adaptation=outcome.uid, state=outcome.state)
        if not outcome.grafted:
            raise _RefusedError(outcome.reason)

    @contextmanager
    def _timed(self, details: Details, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            elapsed = _ms_since(started)
            details["timings_ms"][stage] = elapsed
            self._times.setdefault(stage, deque(maxlen=_TIMES_KEPT)).append(elapsed)


def _snapshot(state: ModelState, record: _ModelRecord) -> RunSnapshot:
    """What is known of a model that sends no health frames."""
    assert state.model is not None
    total = sum(parameter.numel() for parameter in state.model.parameters())
    return RunSnapshot(
        run="in-process",
        epoch=1,
        mode=RunMode.AUTOMATIC,
        step=state.step,
        layers=state.seen_layers(),
        frames=(),
        loss_steps=np.empty(0, dtype=np.int64),
        loss=np.empty(0, dtype=np.float64),
        model_parameters=total - record.added_parameters,
        added_parameters=record.added_parameters,
        adaptations_today=record.today,
        last_adaptation_step=record.last_step,
        history=dict(record.history),
    )


def _find(snapshot: RunSnapshot, name: str) -> LayerInfo:
    layer = snapshot.layer(name)
    if layer is None:
        known = ", ".join(layer.name for layer in snapshot.layers[:8]) or "none"
        raise _RefusedError(f"The model has no layer {name!r}; it has: {known}.")
    if not layer.in_shape:
        raise _RefusedError(
            f"Layer {name!r} was never seen to run; give a ModelState with a sample input."
        )
    return layer


def _refuse_broken(checks: Sequence[Check]) -> None:
    broken = [check for check in checks if check.blocks]
    if broken:
        raise _broken(broken)


def _broken(checks: Sequence[Check]) -> _RefusedError:
    return _RefusedError(" ".join(check.text for check in checks), checks)


def _refuse_asking(checks: Sequence[Check]) -> None:
    """Soft checks need a person, and there is none here. Latency is measured before it counts."""
    asking = [check for check in checks if check.asks and check.rule is not ViolationRule.LATENCY]
    if asking:
        raise _RefusedError(
            "A person has to agree: " + " ".join(check.text for check in asking),
            asks=[check.text for check in asking],
        )


def _firmly(checks: Sequence[Check]) -> tuple[Check, ...]:
    """After the measurement, a value that is still unknown does not pass."""
    return tuple(replace(check, hard=True) for check in checks)


def _incompatible(layer: LayerInfo, wanted: AdaptationType, reason: str) -> Check:
    return Check(
        rule=ViolationRule.COMPATIBILITY,
        passed=False,
        hard=True,
        observed=layer.kind,
        limit=str(wanted),
        text=reason,
    )


def _ms_since(started: float) -> float:
    return round((time.perf_counter() - started) * 1e3, 3)
