"""What a person should know about a run, each said once."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable

from esper.contracts import Finding, Severity, ViolationRule
from esper.grafting import GuardVerdict

logger = logging.getLogger("esper")


class Findings:
    """The open findings of a run.

    Args:
        tell: called with each new one.
    """

    def __init__(self, tell: Callable[[Finding], None]) -> None:
        self._tell = tell
        self._open: dict[Finding, None] = {}  # a set that keeps its order

    def all(self) -> list[Finding]:
        return list(self._open)

    def add(self, finding: Finding) -> None:
        if finding in self._open:
            return
        self._open[finding] = None
        place = finding.layer or "the run"
        logger.warning("%s: %s: %s. %s", place, finding.rule, finding.observed, finding.remedy)
        self._tell(finding)

    def replace_ledger(self, found: Iterable[Finding]) -> None:
        """What the newest audit of the optimizer says; older findings of that kind are closed."""
        found = list(found)
        for old in list(self._open):
            if old.rule == ViolationRule.OPTIMIZER_LEDGER and old not in found:
                del self._open[old]
        for finding in found:
            self.add(finding)


def divergence(verdict: GuardVerdict) -> Finding:
    """A run that diverges, with no graft that could be blamed."""
    return Finding(
        rule=verdict.rule,
        layer="",
        severity=Severity.CRITICAL,
        observed=verdict.text,
        limit="finite" if math.isnan(verdict.limit) else f"{verdict.limit:.4g}",
        remedy="No graft is on probation, so nothing was undone: look at learning rate and data.",
    )


def switched_off(part: str, failures: int, error: Exception) -> Finding:
    """A part of Esper that failed too often to go on."""
    return Finding(
        rule=ViolationRule.MISSING_TELEMETRY,
        layer="",
        severity=Severity.SERIOUS,
        observed=f"Esper's {part} failed {failures} times: {type(error).__name__}",
        limit="no failures",
        remedy="It is switched off for this run; the training log has the traceback.",
    )
