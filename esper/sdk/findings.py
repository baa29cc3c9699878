"""What a person should know about a run. Each finding is logged and sent once."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
from torch import nn

from esper import grafting
from esper.contracts import Finding, HealthFrame, Severity, Signal, ViolationRule
from esper.diagnosis import Change, get_rule
from esper.fail_closed import Failure
from esper.grafting import HiddenLayers, MovementWatch, Surroundings, UndoReceipt
from esper.grafting.optimizers import unwrap_optimizer
from esper.grafting.slot import left_out_grafts
from esper.grafting.trained_tensors.ledger import FrozenInTurns
from esper.grafting.trained_tensors.orphans import ReplacedOptimizer
from esper.sdk.adaptation import Adaptation
from esper.sharding import Kind

logger = logging.getLogger("esper")

RESOLVED_KEPT = 500
FRAMES_WITHOUT_GRADIENTS = 3
_RANK = {severity: rank for rank, severity in enumerate(Severity)}
AUDIT_EVERY_STEPS = 100  # what the script regroups is found this late; what it freezes, one later


class Findings:
    """The open findings of a run.

    Args:
        send: called with each new one; None where there is no server.
        announce: says a new one to the user; None: it is only logged.
    """

    def __init__(
        self,
        send: Callable[[Finding], None] | None = None,
        announce: Callable[[Finding], None] | None = None,
    ) -> None:
        self._send = send
        self._announce = announce or _log
        self._open: dict[Finding, None] = {}  # a set that keeps its order
        self._resolved: deque[Finding] = deque(maxlen=RESOLVED_KEPT)

    def all(self) -> list[Finding]:
        return list(self._open)

    def add(self, finding: Finding) -> None:
        if finding in self._open:
            return
        self._open[finding] = None
        self._announce(finding)
        if self._send is not None:
            self._send(finding)

    @property
    def resolved(self) -> list[Finding]:
        """Findings of the diagnosis that are over, oldest first."""
        return list(self._resolved)

    def report(self, change: Change, finding: Finding) -> None:
        """A finding of the diagnosis has opened, has new evidence, or is over."""
        same = [f for f in self._open if f.slug and f.slug == finding.slug]
        for old in same:
            del self._open[old]
        if change is Change.OPENED:
            self.add(finding)
        elif change is Change.UPDATED:
            self._open[finding] = None
            if same and finding.severity is not same[0].severity:
                self._report_severity(finding, same[0])
        else:
            self._resolved.append(finding)
            if self._send is not None:
                self._send(finding)
            logger.info("step %d: %s is over", finding.resolved_step, finding.slug)

    def _report_severity(self, finding: Finding, old: Finding) -> None:
        """What was only worth a note may have become worth a warning."""
        if _RANK[finding.severity] > _RANK[old.severity]:
            self._announce(finding)
        if self._send is not None:
            self._send(finding)

    def replace_ledger(self, found: Iterable[Finding]) -> None:
        """Takes the newest audit of the optimizer, and closes findings that it does not repeat."""
        found = [_with_remedies(finding) for finding in found]
        for old in list(self._open):
            if old.rule == ViolationRule.OPTIMIZER_LEDGER and old not in found:
                del self._open[old]
        for finding in found:
            self.add(finding)


def _log(finding: Finding) -> None:
    logger.warning("%s", finding)


def _with_remedies(finding: Finding) -> Finding:
    """A finding of the ledger under a rule of the diagnosis has the remedies of that rule."""
    if not finding.slug:
        return finding
    return replace(finding, remedies=tuple(map(str, get_rule(finding.slug).remedies)))


class LedgerWatch:
    """Checks that the optimizer trains what it should: its parameter groups, and what moves."""

    def __init__(self, model: nn.Module, surroundings: Surroundings, findings: Findings) -> None:
        self._model = model
        self._optimizers = () if _has_own_weights(surroundings) else surroundings.optimizers
        self._findings = findings
        self._movement = MovementWatch(model, self._optimizers)
        known = [unwrap_optimizer(optimizer) for optimizer in self._optimizers]
        self._replaced = ReplacedOptimizer(model, known)
        self._hidden = HiddenLayers(model)
        self._frozen = FrozenInTurns(AUDIT_EVERY_STEPS)
        self.audit()

    @property
    def replaced(self) -> str:
        """How the script trains without the optimizer that it has attached; empty: it does not."""
        return self._replaced.problem

    def on_step(self, step: int) -> None:
        """An optimizer step is over."""
        looked = self._movement.step()
        if step == 1 and self._movement.unheld.search_again():
            looked = True  # the script may have made another optimizer after attach
        looked |= self._replaced.on_step(step, self._movement.updates)
        if looked or step % AUDIT_EVERY_STEPS == 0:
            self.audit()

    def idle_until(self, step: int) -> int:
        """The next step, after ``step``, for which :meth:`on_step` must be called."""
        audit = (step // AUDIT_EVERY_STEPS + 1) * AUDIT_EVERY_STEPS
        return min(audit, step + 1 + self._movement.idle_steps)

    def skip(self, steps: int) -> None:
        """So many idle steps are over; see :meth:`idle_until`."""
        self._movement.skip(steps)

    def on_change(self, *, restored: bool = False) -> None:
        """Parameters were added or removed.

        Args:
            restored: values were put back or loaded, so their movement so far is no evidence.
        """
        if restored:
            self._movement.restart()
        self._movement.include_new()
        self.audit()

    def audit(self) -> None:
        """Compare the parameter groups and the copies with the model now."""
        is_frozen = partial(self._frozen.for_good, update=self._movement.updates)
        unheld = self._movement.unheld
        groups = grafting.audit(self._model, self._optimizers, unheld, is_frozen)
        copies = grafting.audit_copies(self._model)
        moves = [*self._movement.findings, *self._replacement()]
        if self._movement.updates <= AUDIT_EVERY_STEPS:  # layers are rarely made later
            self._hidden.search()
        hidden = self._hidden.findings(self._optimizers)
        self._findings.replace_ledger([*groups, *copies, *moves, *hidden])
        for layer, error in left_out_grafts(self._model):
            self._findings.add(left_out(layer, error))

    def _replacement(self) -> Iterator[Finding]:
        if self.replaced:
            yield Finding(
                rule=ViolationRule.OPTIMIZER_LEDGER,
                layer="",
                severity=Severity.SERIOUS,
                observed=self.replaced,
                limit="the attached optimizer trains the model: its steps are what is measured",
                remedy="Attach again with the new optimizer: session.close(), then "
                "esper.attach(model, optimizer).",
            )

    def close(self) -> None:
        self._movement.close()


def _has_own_weights(surroundings: Surroundings) -> bool:
    """DeepSpeed's optimizers train copies of the weights, which the model does not have."""
    layout = surroundings.replicas.layout if surroundings.replicas is not None else None
    return layout is not None and layout.kind is Kind.ZERO


class GradientWatch:
    """Says once that no gradient can be measured, since nothing is then proposed."""

    def __init__(self, findings: Findings, model: nn.Module) -> None:
        self._findings = findings
        self._model = model
        self._blind = 0

    def on_frame(self, frame: HealthFrame) -> None:
        known = not bool(np.isnan(frame.column(Signal.GRAD_NORM)).all())
        self._blind = 0 if known else self._blind + 1
        if self._blind == FRAMES_WITHOUT_GRADIENTS and self._has_learning(frame.layers):
            self._findings.add(_no_gradients())

    def _has_learning(self, layers: Iterable[str]) -> bool:
        """The parameters that learn may be in none of them, as the vectors of an adapter."""
        seen = frozenset(layers)
        owners = (
            n.rpartition(".")[0] for n, p in self._model.named_parameters() if p.requires_grad
        )
        return any(owner.partition(".parametrizations")[0] in seen for owner in owners)


def _no_gradients() -> Finding:
    return Finding(
        rule=ViolationRule.MISSING_TELEMETRY,
        layer="",
        severity=Severity.CAUTION,
        observed=f"no parameter had a gradient in {FRAMES_WITHOUT_GRADIENTS} health frames",
        limit="gradients of the layers that train",
        remedy="Attach the optimizer that makes the steps, or call session.step() while the "
        "gradients exist. Where torch.func computes the loss from other tensors than the model's "
        "parameters, these get no gradient, and are not measured.",
    )


def left_by_load(adaptation: Adaptation) -> Finding:
    """A state that the script loaded lacks a graft."""
    return Finding(
        rule=ViolationRule.COMPATIBILITY,
        layer=adaptation.layer,
        severity=Severity.INFO,
        observed=f"the loaded state was saved without {adaptation.blueprint}, grafted at step "
        f"{adaptation.step}, so this graft was taken out",
        limit="the model computes what the state's model computed",
        remedy="Nothing to do: the model is the one that was saved.",
    )


def came_back(adaptation: Adaptation) -> Finding:
    """A state that the script loaded has a graft that the model lacked."""
    return Finding(
        rule=ViolationRule.COMPATIBILITY,
        layer=adaptation.layer,
        severity=Severity.INFO,
        observed=f"the loaded state was saved with {adaptation.blueprint}, so this graft was built "
        "again, and counts as kept",
        limit="the model computes what the state's model computed",
        remedy="Nothing to do: the model is the one that was saved.",
    )


def fewer_snapshots(kept: int, nbytes: int, limit: int, disk_error: str = "") -> Finding:
    """The memory for snapshots holds fewer of them than Esper keeps.

    Args:
        disk_error: why the folder for snapshots could not take them.
    """
    gib = 1 << 30
    what = (
        f"only the last {kept} changes can be undone hard"
        if kept
        else "a hard undo is not possible, and a rollback keeps what the model has learned"
    )
    return Finding(
        rule=ViolationRule.MEMORY,
        layer="",
        severity=Severity.INFO if kept else Severity.CAUTION,
        observed=f"a snapshot takes {nbytes / gib:.3g} GiB, so {what}"
        + (f"; on disk: {disk_error}" if disk_error else ""),
        limit=f"{limit / gib:.3g} GiB for all snapshots",
        remedy="Give snapshots more memory: esper.attach(snapshot_memory=…) in GiB, "
        "ESPER_SNAPSHOT_MEMORY_GIB, or a folder for them: snapshot_folder=….",
    )


def average_found() -> Finding:
    """A running average of the model that attach was not told of."""
    return Finding(
        rule=ViolationRule.COMPATIBILITY,
        layer="",
        severity=Severity.INFO,
        observed="a running average of the model was found, and gets its grafts too",
        limit="an average has the model's tensors, in the model's order",
        remedy="Nothing to do. Pass averages to esper.attach as copies= to name them yourself.",
    )


def undone_in_part(change: str, layer: str, report: UndoReceipt) -> Finding:
    """A hard undo has left something as the script has set it, or could not restore something."""
    parts = [f"kept {text}" for text in report.kept]
    parts += [f"could not restore {text}" for text in report.not_restored]
    parts += [f"took back what the script has written: {text}" for text in report.rewound]
    return Finding(
        rule=ViolationRule.CERTIFICATE,
        layer=layer,
        severity=Severity.CAUTION if report.not_restored or report.rewound else Severity.INFO,
        observed=f"the undo of {change} {'; '.join(parts)}",
        limit="a hard undo restores the state before the change, and keeps what the script has set",
        remedy="Check these settings; an undo takes back the change and the training since.",
    )


def left_out(layer: str, error: str) -> Finding:
    """A graft could not run on an input."""
    return Finding(
        rule=ViolationRule.COMPATIBILITY,
        layer=layer,
        severity=Severity.CRITICAL,
        observed=f"the grafts were left out of a call of the layer, because one failed: {error}",
        limit="a graft runs on every input of its layer",
        remedy="Take the graft out with session.undo, or give the layer inputs as in training.",
    )


def unknown_loss() -> Finding:
    """A step came without a loss."""
    return Finding(
        rule=ViolationRule.MISSING_TELEMETRY,
        layer="",
        severity=Severity.CAUTION,
        observed="a step of the session came without a loss",
        limit="a loss at each step",
        remedy="The guard cannot see the loss diverge, and no graft can be judged by it: pass it "
        "to session.step(loss); in a transformers Trainer whose training_step does not call "
        "super().training_step, call the callback's observe(loss); with Lightning, return it from "
        "training_step.",
    )


def switched_off(failure: Failure) -> Finding:
    """A part of Esper that failed, and is not called any more."""
    place = "for this layer" if failure.layer else "for this run"
    return Finding(
        rule=ViolationRule.MISSING_TELEMETRY,
        layer=failure.layer,
        severity=Severity.CAUTION if failure.layer else Severity.SERIOUS,
        observed=f"Esper's {failure.part} failed: {failure.error}",
        limit="no failures",
        remedy=f"{failure.unmeasured} It is switched off {place}; training goes on.",
    )
