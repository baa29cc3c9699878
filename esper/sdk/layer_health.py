"""The health of a layer: the one number for "does this layer do what it usually does".

    health = the lowest of
        limits     esper.health.score: are its measurements within the usual limits
        deviation  esper.health.deviation: are they as in its own past, and as its peers' are
        findings   an open finding that names the layer: 0.7 caution, 0.4 serious, 0.1 critical

1 is as usual. NaN where nothing of the layer is measured and no finding names it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from esper.contracts import SIGNAL_INDEX, HealthFrame, Severity, Signal
from esper.health.deviation import Deviation
from esper.sdk.findings import Findings

MOST_WITH: dict[Severity, float] = {
    Severity.INFO: 1.0,
    Severity.CAUTION: 0.7,
    Severity.SERIOUS: 0.4,
    Severity.CRITICAL: 0.1,
}


class LayerHealth:
    """Writes the health into the frames of one run, oldest first."""

    def __init__(self, findings: Findings) -> None:
        self._findings = findings
        self._deviation = Deviation()

    def judge(self, frame: HealthFrame) -> HealthFrame:
        """The frame with its health; its other values stay as they are."""
        values = frame.values.copy()
        column = SIGNAL_INDEX[Signal.HEALTH]
        # NaN stays: a layer of which nothing is measured is not as usual.
        values[:, column] = np.minimum(values[:, column], self._deviation.score(values))
        rows = {name: row for row, name in enumerate(frame.layers)}
        for finding in self._findings.all():
            row = rows.get(finding.layer) if finding.slug else None
            if row is not None and MOST_WITH[finding.severity] < 1:
                most = np.float32(MOST_WITH[finding.severity])
                values[row, column] = np.fmin(values[row, column], most)
        return replace(frame, values=values)
