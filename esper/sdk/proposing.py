"""Remedies for findings, proposed to the server, and the verdicts on them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from esper.contracts import Finding
from esper.contracts.protocol import RemedyProposal, RemedyVerdict
from esper.sdk.transport import PendingReport, ProposalAnswer, TransportQueues

ASK_AGAIN_SECONDS = 5.0  # for the state of a proposal, and after a gate was closed


class RemedyProposer:
    """Asks the server for remedies, and again for their state.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(
        self, queues: TransportQueues, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._queues = queues
        self._clock = clock
        self._asked: dict[str, Callable[[int], RemedyProposal]] = {}
        self._again_at: dict[str, float] = {}

    def propose(
        self,
        key: str,
        *,
        step: int,
        remedy: str,
        layer: str,
        config: dict[str, Any],
        finding: Finding,
    ) -> None:
        """Sent until it is answered, then now and then until :meth:`forget`."""
        self._asked[key] = partial(
            _proposal,
            key=key,
            step=step,
            remedy=remedy,
            layer=layer,
            config=config,
            finding=finding,
        )
        self._send(key)

    def forget(self, key: str) -> None:
        """Its end is known, or its finding is over."""
        self._asked.pop(key, None)
        self._again_at.pop(key, None)

    def answers(self) -> Iterator[ProposalAnswer]:
        """What the server has said of proposals that are not forgotten; asks again where due."""
        while self._queues.proposal_answers:
            answer = self._queues.proposal_answers.popleft()
            if answer.key in self._asked:
                self._again_at[answer.key] = self._clock() + ASK_AGAIN_SECONDS
                yield answer
        for key in [key for key, at in self._again_at.items() if self._clock() >= at]:
            self._send(key)

    def judge(
        self,
        adaptation: str,
        *,
        keep: bool,
        reason: str,
        step: int,
        steps: int,
        hard: bool = False,
    ) -> None:
        """Tell the server whether the finding is over.

        Args:
            hard: the remedy did harm, so the run goes back to the state before it.
        """
        verdict = partial(
            RemedyVerdict,
            adaptation=adaptation,
            keep=keep,
            reason=reason,
            step=step,
            steps_observed=steps,
            hard=hard,
        )
        self._queues.queue_report(
            PendingReport("remedy-verdicts", lambda epoch: verdict(epoch=epoch))
        )

    def _send(self, key: str) -> None:
        self._again_at.pop(key, None)
        self._queues.queue_report(PendingReport("remedy-proposals", self._asked[key]))


def _proposal(epoch: int, **members: Any) -> RemedyProposal:
    return RemedyProposal(epoch=epoch, **members)
