"""What was proposed and done about the findings of one run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from esper.remedies import get_remedy
from esper.sdk.treatments import RemedyProposal, Treatment

PAUSE_STEPS = 20  # between two remedies for one finding; doubles each time
EARLY_STEPS = 50  # to begin anew costs little before
IN_VAIN = "did not help"  # how the verdict on a remedy in vain begins


@dataclass(slots=True)
class Case:
    """What was done about one kind of finding.

    Attributes:
        given: remedy -> how often.
        failed: remedies that were given and did not help, or could not be applied.
        refused: remedy -> why it does not fit here.
        rejected: remedies, by a person.
        level: of the loss, when the first remedy was given.
        came_of_data: such a finding was the doing of other data, not of the weights.
        went_back: to the state of then, because no remedy helped, or that state is not kept.
        compared: the step of the last remedy whose losses were compared with those before the
            first one.
        not_before: the first step in which the next remedy may be given; not_before_time: by the
            monotonic clock, for the server's sake.
        pause: steps until the next remedy, after one in vain.
    """

    given: dict[str, int] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)
    rejected: set[str] = field(default_factory=set)
    level: float = math.nan
    came_of_data: bool = False
    went_back: bool = False
    compared: int = -1
    not_before: int = 0
    not_before_time: float = -math.inf
    pause: int = PAUSE_STEPS


class History:
    """Of one run.

    Attributes:
        cases: slug of a rule -> what was done about its finding.
        proposals: they wait for a person, or say what Esper would do.
        treatments: every remedy that was applied for a finding, oldest first.
    """

    def __init__(self) -> None:
        self.cases: dict[str, Case] = {}
        self.proposals: list[RemedyProposal] = []
        self.treatments: list[Treatment] = []

    def case_of(self, slug: str) -> Case:
        return self.cases.setdefault(slug, Case())

    @property
    def running(self) -> list[Treatment]:
        """Those in their window."""
        return [treatment for treatment in self.treatments if not treatment.ended]

    @property
    def latest_change(self) -> int:
        """The step in which a remedy changed weights the last time."""
        changes = (t.step for t in self.treatments if get_remedy(t.remedy).changes_weights)
        return max(changes, default=-EARLY_STEPS)

    def is_proposed(self, slug: str) -> bool:
        """A remedy for this kind of finding waits."""
        return any(slug in entry.findings for entry in self.proposals)

    def answers_also(self, proposal: RemedyProposal) -> bool:
        """A remedy that waits for another finding does as much; then it answers this one too."""
        waits = (entry for entry in self.proposals if entry.does_as_much_as(proposal))
        entry = next(waits, None)
        if entry is not None:
            entry.also_for.append(proposal.finding)
        return entry is not None

    def lowered_in_vain(self, finding: str) -> list[Treatment]:
        """Lower rates that did not help against a finding, and were right all the same."""
        return [
            t
            for t in self.treatments
            if t.finding == finding and t.measured and t.ended.startswith(IN_VAIN)
            if t.receipt is not None and t.receipt.in_force
        ]

    def in_force(self, finding: str) -> list[Treatment]:
        """Those that still do something in each step."""
        given = (t for t in self.treatments if t.finding == finding)
        return [t for t in given if t.receipt is not None and t.receipt.in_force]

    def note(self, treatment: Treatment) -> None:
        """A remedy was applied."""
        given = self.case_of(treatment.finding).given
        given[treatment.remedy] = given.get(treatment.remedy, 0) + 1
        self.treatments.append(treatment)

    def drop(self, proposal: RemedyProposal) -> None:
        """It does not wait any more."""
        self.proposals = [entry for entry in self.proposals if entry is not proposal]
