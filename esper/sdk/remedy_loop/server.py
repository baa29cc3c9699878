"""The remedies of a run with a server: proposals to it, its answers, and its commands."""

from __future__ import annotations

import logging
import time
from typing import Any

from esper.contracts import ADAPTATION_ENDED, AdaptationState, Severity
from esper.diagnosis import Diagnosed
from esper.grafting import RemedyReceipt
from esper.remedies import list_remedies
from esper.sdk.announcing import Announcer
from esper.sdk.diagnosing import DiagnosisWatch
from esper.sdk.proposing import ASK_AGAIN_SECONDS, RemedyProposer
from esper.sdk.remedy_loop.applying import Applier
from esper.sdk.remedy_loop.history import History
from esper.sdk.remedy_loop.input_sample import InputSample
from esper.sdk.run_state import RunState
from esper.sdk.surgery import Surgery
from esper.sdk.treatments import RemedyProposal, Treatment

logger = logging.getLogger("esper")


class ServerSide:
    """Of the remedies of one run.

    Args:
        proposer: to the server; None in local mode.
        alone: there are no other ranks.
    """

    def __init__(
        self,
        run: RunState,
        surgery: Surgery,
        diagnosis: DiagnosisWatch,
        announcer: Announcer,
        history: History,
        applier: Applier,
        sample: InputSample,
        proposer: RemedyProposer | None,
        *,
        alone: bool,
    ) -> None:
        self._run = run
        self._surgery = surgery
        self._diagnosis = diagnosis
        self._announcer = announcer
        self._history = history
        self._applier = applier
        self._sample = sample
        self._proposer = proposer
        self._alone = alone

    def propose(self, found: Diagnosed, proposal: RemedyProposal) -> None:
        assert self._proposer is not None
        self._history.proposals.append(proposal)
        self._proposer.propose(
            proposal.key,
            step=proposal.step,
            remedy=proposal.remedy,
            layer=proposal.layer,
            config=proposal.config,
            finding=found.finding(),
        )
        self._announcer.remedy_proposed(str(proposal), waits=False, at_server=True)

    def forget(self, proposal: RemedyProposal) -> None:
        """It does not wait any more, here or at the server."""
        self._history.drop(proposal)
        if self._proposer is not None:
            self._proposer.forget(proposal.key)

    def take_answers(self) -> None:
        """The states of the proposals; one that was applied is known from its command."""
        if self._proposer is None:
            return
        for answer in self._proposer.answers():
            entry = next((e for e in self._history.proposals if e.key == answer.key), None)
            if entry is None:
                self._proposer.forget(answer.key)
            elif answer.answer is None:
                self._on_refusal(entry, answer.code, answer.refusal)
            elif answer.answer.state in ADAPTATION_ENDED:
                self._on_end(entry, answer.answer.state, answer.answer.reason)

    def has_inputs_for(self, slug: str) -> bool:
        """False: it needs a batch of the model's inputs, taken in the next forward pass."""
        known = {remedy.slug: remedy for remedy in list_remedies()}
        if slug not in known or not known[slug].needs_sample or not self._alone:
            return True
        return self._sample.ready()

    def apply(
        self, adaptation: str, *, remedy: str, layer: str, config: dict[str, Any], finding: str
    ) -> RemedyReceipt:
        """The server ordered it; it is judged as one that was applied here.

        Args:
            adaptation: its uid at the server.
            finding: empty: a person asked for it.

        Raises:
            ConfigurationError, UnknownLayerError, GraftError: the model is as before.
        """
        for entry in [e for e in self._history.proposals if finding in e.findings]:
            self.forget(entry)
        receipt = self._surgery.remedies.apply_for_server(
            adaptation, remedy, layer, self._sample.batch, config, finding
        )
        found = next((f for f in self._diagnosis.diagnosis.open if f.rule.slug == finding), None)
        self._applier.note(
            Treatment(
                finding,
                remedy,
                self._run.step,
                receipt,
                None if found is None else found.evidence,
                found is not None and found.severity is Severity.CRITICAL,
                adaptation=adaptation,
            )
        )
        return receipt

    def result_of(self, adaptation: str) -> tuple[str, bool]:
        """(slug of the rule whose finding a remedy of the server answers, it is kept)."""
        known = [entry for entry in self._history.treatments if entry.adaptation == adaptation]
        if not known:  # of a checkpoint, which has those that are not judged yet
            return "", True
        return known[-1].finding, known[-1].ended.startswith("kept")

    def state_dict(self) -> list[dict[str, Any]]:
        """The server's remedies whose result is not known yet, for a checkpoint."""
        return [
            {
                "adaptation": entry.adaptation,
                "finding": entry.finding,
                "remedy": entry.remedy,
                "step": entry.step,
                "urgent": entry.urgent,
            }
            for entry in self._history.running
            if entry.adaptation
        ]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """They are judged on."""
        receipts = {receipt.adaptation: receipt for receipt in self._surgery.changes.remedies}
        self._history.treatments += [
            Treatment(
                str(entry["finding"]),
                str(entry["remedy"]),
                int(entry["step"]),
                receipts.get(str(entry["adaptation"])),
                None,
                bool(entry["urgent"]),
                adaptation=str(entry["adaptation"]),
            )
            for entry in state
        ]

    def _on_refusal(self, entry: RemedyProposal, code: str, reason: str) -> None:
        self.forget(entry)
        for case in map(self._history.case_of, entry.findings):
            case.not_before_time = time.monotonic() + ASK_AGAIN_SECONDS
            if code != "gate-closed":  # a gate opens again; this server does not know the remedy
                case.refused[entry.remedy] = reason
                case.rejected.add(entry.remedy)

    def _on_end(self, entry: RemedyProposal, state: AdaptationState, reason: str) -> None:
        self.forget(entry)
        for case in map(self._history.case_of, entry.findings):
            if state in (AdaptationState.REJECTED, AdaptationState.CANCELLED):
                case.rejected.add(entry.remedy)
            else:  # the server has a cooldown of its own
                case.not_before_time = time.monotonic() + ASK_AGAIN_SECONDS
        logger.info("step %d: %s: %s %s", self._run.step, entry.remedy, state, reason)
