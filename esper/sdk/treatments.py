"""What is proposed, and what was given, against the findings of one run."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

from esper.diagnosis import title_of
from esper.diagnosis.base import Evidence
from esper.grafting import RemedyReceipt
from esper.remedies import get_remedy


@dataclass(frozen=True, slots=True, eq=False)
class RemedyProposal:
    """A remedy that answers a finding, and waits for a person.

    Attributes:
        finding: slug of the rule whose finding it answers.
        remedy: slug; layer: empty for the whole run; config: the settings that it needs.
        step: when it was proposed.
        asks: why a person must decide; empty: it is applied by rule.
        evidence: of the finding.
        key: its identity.
        also_for: slugs of further rules whose findings it answers.
    """

    finding: str
    remedy: str
    layer: str
    config: dict[str, Any]
    step: int
    asks: str
    evidence: Evidence
    key: str = field(default_factory=lambda: str(uuid.uuid4()))
    also_for: list[str] = field(default_factory=list)

    @property
    def findings(self) -> tuple[str, ...]:
        """All that it answers; the one for which it was proposed is the first."""
        return (self.finding, *self.also_for)

    def does_as_much_as(self, other: RemedyProposal) -> bool:
        """It is the same remedy, or goes back at least as far."""
        if (self.remedy, self.layer) != (other.remedy, other.layer):
            return False
        if self.remedy == "rewind":
            return 0 <= int(self.config["step"]) <= int(other.config["step"])
        return self.config == other.config

    def __str__(self) -> str:
        words = get_remedy(self.remedy).in_words(self.config)
        place = f" at {self.layer!r}" if self.layer else ""
        asks = f". {self.asks[:1].upper()}{self.asks[1:]}" if self.asks else ""
        return (
            f"{words[:1].lower()}{words[1:]}{place} ({self._call()}), because of "
            f"{' and '.join(map(title_of, self.findings))}{asks}"
        )

    def __repr__(self) -> str:
        return f"<RemedyProposal {self}>"

    def _call(self) -> str:
        """As ``session.remedy`` takes it."""
        settings = "".join(
            f", {name}={value!r}" if isinstance(value, str) else f", {name}={value:g}"
            for name, value in self.config.items()
        )
        return f"{self.remedy}{settings}"


@dataclass(slots=True)
class Treatment:
    """A remedy in its window.

    Attributes:
        finding: slug of the rule whose finding it answers; empty: a person asked for it.
        receipt: None for one that an earlier process applied.
        evidence: of the finding, when the remedy was applied; None where it is not known.
        urgent: it answers a critical finding, which is given less time.
        ended: what became of it; empty while it is in its window.
        adaptation: its uid at the server that ordered it.
        was_compared: of a rewind: its first losses were compared with those of the same weights.
        measured: updates were measured to be far too large, so a lower rate is right whatever
            becomes of the finding.
    """

    finding: str
    remedy: str
    step: int
    receipt: RemedyReceipt | None
    evidence: Evidence | None
    urgent: bool = False
    ended: str = ""
    adaptation: str = ""
    was_compared: bool = False
    measured: bool = False
