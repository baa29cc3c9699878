"""What all parts of the surgery share."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from esper.grafting import Surroundings
from esper.grafting.ranks.replicas import Call
from esper.sdk.changes import Changes
from esper.sdk.findings import Findings
from esper.sdk.ranks import Ranks
from esper.sdk.reporting import SurgeryReports
from esper.sdk.run_state import RunState


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The model that is changed, what trains it, and who is told.

    Attributes:
        surroundings: optimizers, schedulers and copies, which must follow each change.
        changes: what is in the model.
        reports: to the server and on the console.
    """

    model: nn.Module
    surroundings: Surroundings
    run: RunState
    ranks: Ranks
    changes: Changes
    reports: SurgeryReports
    findings: Findings

    def meet(self, call: Call, *arguments: object) -> None:
        """All ranks, for a call that the script makes on each of them."""
        self.ranks.meet(call, self.run.step, *arguments)
