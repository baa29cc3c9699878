"""A trainer proposes a remedy for what it has found, and judges it by that."""

from __future__ import annotations

from apps.accounts.actors import Actor
from apps.adaptations import services as adaptations
from apps.runs.models import Run
from esper.contracts import ADAPTATION_ENDED, AdaptationState
from esper.contracts.protocol import RemedyAnswer, RemedyProposal


def take_proposal(*, run: Run, proposal: RemedyProposal, actor: Actor) -> RemedyAnswer:
    """The adaptation that answers the finding, new or known.

    Raises:
        GateClosedError: a hard gate did not pass.
        Problem: old epoch, or unknown remedy, setting or layer.
    """
    adaptation = adaptations.propose_remedy(run=run, proposal=proposal, actor=actor)
    ended = adaptation.state in ADAPTATION_ENDED
    return RemedyAnswer(
        adaptation=adaptation.uid,
        state=AdaptationState(adaptation.state),
        reason=adaptation.end_reason if ended else "",
    )
