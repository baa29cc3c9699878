"""Why nothing happens in a run, or at one layer, in sentences for a person."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import overload

from esper.blueprints.fitting import fits_of
from esper.console import printable
from esper.contracts import Decision, HealthFrame, LayerInfo, RunMode, Signal, ViolationRule
from esper.sdk.announcing import describe, would_propose
from esper.sdk.findings import Findings
from esper.sdk.layers import Layers
from esper.sdk.local import LocalLoop
from esper.sdk.remedy_loop import RemedyLoop
from esper.sdk.run_state import RunState
from esper.sdk.server_link import ServerLink
from esper.sdk.surgery import Surgery
from esper.tables import html_list

MOST_REASONS = 12
_USUAL_FIRST_FRAME = 30  # steps; later than that, something keeps it from coming
_TOLD = (Signal.HEALTH, Signal.GRAD_NORM, Signal.UPDATE_RATIO, Signal.DEAD_FRACTION)


class Reasons(Sequence[str]):
    """Sentences with a title; prints as a list.

    Attributes:
        title: what they are reasons for.
    """

    def __init__(self, title: str, reasons: Iterable[str]) -> None:
        self.title = title
        self._reasons = tuple(dict.fromkeys(reasons))

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        return self._reasons[index]

    def __len__(self) -> int:
        return len(self._reasons)

    def lines(self) -> list[str]:
        """The first reasons, and how many are left."""
        rest = len(self) - MOST_REASONS
        more = [f"... and {rest} more"] if rest > 0 else []
        return [*self._reasons[:MOST_REASONS], *more]

    def __str__(self) -> str:
        return printable("\n".join([self.title, *(f"  - {line}" for line in self.lines())]))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_list(self.title, self.lines())


class Explainer:
    """Collects reasons from the parts of a session; changes nothing.

    Args:
        local: the loop of local mode, None on other ranks and with a server.
        server: None in local mode.
        remedies: None where the process does not decide.
    """

    def __init__(
        self,
        run: RunState,
        layers: Layers,
        surgery: Surgery,
        findings: Findings,
        *,
        local: LocalLoop | None,
        server: ServerLink | None,
        remedies: RemedyLoop | None = None,
    ) -> None:
        self._run = run
        self._layers = layers
        self._surgery = surgery
        self._findings = findings
        self._local = local
        self._server = server
        self._remedies = remedies

    def of_run(self, frame: HealthFrame | None, *, closed: bool) -> Reasons:
        """Why nothing happens now.

        Args:
            frame: the latest one, None before the first.
            closed: the session has ended.
        """
        title = f"Why nothing happens in {self._run.name!r} (step {self._run.step:,})"
        if closed:
            return Reasons(title, ["The session is closed."])
        reasons = [*self._not_ready(frame), *self._of_remedies(), *self._decisions()]
        return Reasons(title, [*reasons, *self._unmeasured()])

    def of_layer(self, name: str, frame: HealthFrame | None) -> Reasons:
        """Why nothing happens at one layer; raises ``UnknownLayerError``."""
        layer = self._layers.find(name)
        title = f"Why nothing happens at {layer.name!r} (step {self._run.step:,})"
        reasons = [f"{str(layer).partition(': ')[2]}.", *_measured(layer, frame)]
        reasons += [f"{entry}." for entry in self._surgery.changes.grafted if entry.layer == name]
        if not self._layers.fixed:
            return Reasons(title, [*reasons, *self._not_ready(frame)])
        if layer.graftable:
            reasons += [*self._decisions_for(layer), _fitting(layer)]
        return Reasons(title, reasons)

    def _not_ready(self, frame: HealthFrame | None) -> list[str]:
        if not self._layers.fixed:
            return ["No step is complete yet: call session.step(loss) after each optimizer step."]
        if self._surgery.sampler is None and (self._local or self._server):
            return ["The session is detached, so nothing is measured and nothing is proposed."]
        if frame is None and self._run.step < _USUAL_FIRST_FRAME:
            return ["There is no health frame yet; the first comes within some 10 steps."]
        if frame is None:
            return [
                f"No layer was measured in {self._run.step:,} steps: no optimizer that attach was "
                "given makes the steps, or no parameter gets a gradient."
            ]
        return []

    def _of_remedies(self) -> list[str]:
        """What is proposed for open findings, what is tried now, and what does not fit."""
        if self._remedies is None:
            return []
        answer = " Answer with session.approve or session.reject." if self._remedies.waits else ""
        proposed = [f"Proposed: {entry}.{answer}" for entry in self._remedies.proposals]
        return [*proposed, *self._remedies.reasons()]

    def _decisions(self) -> list[str]:
        if self._server is not None:
            return self._of_server(self._server)
        if self._local is None:
            return ["Rank 0 decides; ask the session of its process."]
        if not self._layers.fixed:
            return []
        waiting = [str(entry) for entry in self._local.waiting]
        tested = [f"{e}." for e in self._surgery.changes.grafted if e.on_probation]
        return [*waiting, *tested, *self._graftable(), *self._local_reasons(self._local)]

    def _local_reasons(self, local: LocalLoop) -> Iterable[str]:
        outcome = local.decide_now()
        if isinstance(outcome, Decision):
            if self._run.mode is RunMode.OBSERVE:
                return [f"Esper {would_propose(outcome)}."]
            asks = "graft" if outcome.automatic else "ask for"
            return [f"At the next health frame Esper will {asks} {describe(outcome)}."]
        mode = ["Observe mode changes nothing."] if self._run.mode is RunMode.OBSERVE else []
        return [*mode, *outcome.reasons]

    def _of_server(self, server: ServerLink) -> list[str]:
        reasons = [f"The server decides; its reasons are on {server.page}."]
        if self._run.registration is None:
            reasons.append(
                "The run is not registered there yet: the server has not accepted it so far. "
                "The trainer tries again by itself."
            )
        if self._run.mode is RunMode.OBSERVE:
            reasons.append("Observe mode changes nothing; this trainer refuses each graft.")
        if server.paused:
            reasons.append("A person has paused adaptation of this run.")
        return reasons

    def _graftable(self) -> list[str]:
        """Where no layer may be grafted, the most frequent reason."""
        layers = self._layers.own
        if any(layer.graftable for layer in layers):
            return []
        reasons = Counter(layer.reason for layer in layers if layer.reason)
        why = f": {reasons.most_common(1)[0][0].rstrip('.')}" if reasons else ""
        return [f"None of {len(layers)} layers may be grafted{why}."]

    def _decisions_for(self, layer: LayerInfo) -> list[str]:
        if self._local is None or not layer.name:
            return self._decisions()
        waiting = [str(entry) for entry in self._local.waiting if entry.layer == layer.name]
        return [*waiting, *self._local.reasons_for(layer)]

    def _unmeasured(self) -> list[str]:
        return [
            f"Not measured: {finding.observed.rstrip('. ')}. {finding.remedy}"
            for finding in self._findings.all()
            if finding.rule is ViolationRule.MISSING_TELEMETRY
        ]


def _measured(layer: LayerInfo, frame: HealthFrame | None) -> list[str]:
    if frame is None or layer.name not in frame.layers:
        return []
    values = {signal: frame.value(layer.name, signal) for signal in _TOLD}
    known = [f"{signal!s} {value:.3g}" for signal, value in values.items() if value == value]
    lacking = [str(signal) for signal, value in values.items() if math.isnan(value)]
    missing = f"; not measured: {', '.join(lacking)}" if lacking else ""
    return [f"At step {frame.step:,}: {', '.join(known) or 'nothing is known'}{missing}."]


def _fitting(layer: LayerInfo) -> str:
    fits = fits_of(layer).fitting
    named = f" ({', '.join(fits[:6])}{', ...' if len(fits) > 6 else ''})" if fits else ""
    return (
        f"{len(fits)} blueprints fit{named}; esper.blueprints.for_layer(session, {layer.name!r}) "
        "shows all."
    )
