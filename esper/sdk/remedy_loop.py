"""Answers the open findings of one run with remedies.

    finding opens → the first remedy of its rule that fits here
        observe      kept in ``proposals`` as what Esper would do
        supervised   kept in ``proposals`` until a person approves or rejects it
        automatic    applied by rule, because every remedy of the catalogue can be undone
        with a server: proposed to it, in both modes; its command applies it
    remedy applied → its window → the finding is over: kept
                               → it is open still: ended, and the next remedy is tried
        with a server: the verdict is reported to it; its command ends it

Against loops of restoring: by rule, one remedy answers one kind of finding at most twice, the
second time with a stronger dose; the pause between two remedies doubles; and a run has a budget.
Then a person is asked. On several ranks rank 0 proposes: a server's command is applied on all of
them, and without a server the script calls session.remedy on each.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from esper.constraints import RemedyInputs, check_remedy
from esper.contracts import (
    ADAPTATION_ENDED,
    AdaptationState,
    Risk,
    RunMode,
    Severity,
    Signal,
    risk_rank,
)
from esper.contracts.remedies import MARKED
from esper.diagnosis import Diagnosed
from esper.diagnosis.base import Evidence, RemedySlug
from esper.diagnosis.updates import EXCESSIVE, MATCHED, STEADY, follows_gradient
from esper.exceptions import ConfigurationError, EsperError
from esper.grafting import RemedyReceipt
from esper.remedies import Batch, Remedy, get_remedy, list_remedies
from esper.remedies.good_states import START_STEPS
from esper.sdk.announcing import Announcer
from esper.sdk.diagnosing import DiagnosisWatch
from esper.sdk.proposing import ASK_AGAIN_SECONDS, RemedyProposer
from esper.sdk.run_state import RunState
from esper.sdk.settling import Settling
from esper.sdk.surgery import Surgery
from esper.sdk.treatments import RemedyProposal, Treatment

logger = logging.getLogger("esper")

WINDOW_STEPS, URGENT_WINDOW_STEPS = 120, 20  # for so long a remedy is given time
UNMEASURED_WINDOWS = 20  # how much longer, while nothing new was measured
KEPT_AFTER_STEPS = 10  # the finding must be over for so long
PAUSE_STEPS = 20  # between two remedies for one finding
LOCAL_MAX_RISK = Risk.MEDIUM  # each remedy of the catalogue can be undone to the bit
BUDGET, BUDGET_STEPS = 12, 10_000  # so many remedies by rule in so many steps of the run
AFTER_GUARD_STEPS = 5  # in which the loss can come back
EARLY_STEPS = 50  # to begin anew costs little before
LARGEST_RISE = 1e5  # of a rate, in stages
LARGEST_CORRECTION = 3.0  # of a rate that was lowered by one estimate
SETTLED = 0.5  # factor of the rate, where the loss stands still
WORSE = 1.1  # times the loss at the first remedy: the noise of a median of so many losses
LEVEL_LOSSES, NEWEST_LOSSES = 20, 3
WEAKEST, STRONGEST = 0.1, 1e-4  # factors of the learning rate
_AGAIN = frozenset({"rewind", "set_lr"})  # have a stronger dose
_IN_VAIN = "did not help"
_READ = frozenset({"grad", "grad_norm", str(Signal.UPDATE_RATIO)})  # in each planned step
_OBSERVES = "the run only observes, so this is what Esper would do"
_RAISES = frozenset({"update_ratio_low", "slow_convergence", "vanishing_gradient"})


@dataclass(slots=True)
class _Case:
    """What was done about one kind of finding."""

    given: dict[str, int] = field(default_factory=dict)  # remedy -> how often
    failed: set[str] = field(default_factory=set)  # were given, and did not help
    refused: dict[str, str] = field(default_factory=dict)  # remedy -> why it does not fit here
    rejected: set[str] = field(default_factory=set)  # by a person
    level: float = math.nan  # of the loss, when the first remedy was given
    went_back: bool = False  # to the state of then, because no remedy helped
    not_before: int = 0
    not_before_time: float = -math.inf  # by the monotonic clock, for the server's sake
    pause: int = PAUSE_STEPS


class RemedyLoop:
    """See the module's docstring.

    Args:
        diagnosis: its open findings are answered.
        alone: there are no other ranks.
        proposer: to the server; None in local mode.

    Attributes:
        proposals: they wait for a person, or say what Esper would do.
        treatments: every remedy that was applied for a finding, oldest first.
    """

    def __init__(
        self,
        model: nn.Module,
        surgery: Surgery,
        run: RunState,
        diagnosis: DiagnosisWatch,
        announcer: Announcer,
        *,
        alone: bool = True,
        proposer: RemedyProposer | None = None,
    ) -> None:
        self._proposer = proposer
        self._surgery = surgery
        self._alone = alone
        self._run = run
        self._diagnosis = diagnosis
        self._announcer = announcer
        self._cases: dict[str, _Case] = {}
        self._sample = _Sample(model)
        self._settling = Settling()
        self.proposals: list[RemedyProposal] = []
        self.treatments: list[Treatment] = []

    def on_step(self, guard_acted_at: int = -1) -> None:
        """A step of the session is over.

        Args:
            guard_acted_at: when the guard took a graft out: that answers what it has seen.
        """
        open_ = {found.rule.slug: found for found in self._diagnosis.diagnosis.open}
        self._judge(open_)
        self._settle()
        for entry in [entry for entry in self.proposals if entry.finding not in open_]:
            self._forget(entry)
        self._take_answers()
        if guard_acted_at >= 0 and self._run.step < guard_acted_at + AFTER_GUARD_STEPS:
            return
        running = [treatment for treatment in self.treatments if not treatment.ended]
        for found in _worst_first(open_.values()):
            if found.severity is Severity.INFO:
                continue
            # One at a time, so that it is known what helped; but a critical finding cannot wait.
            urgent = found.severity is Severity.CRITICAL
            if any(t.finding == found.rule.slug or not urgent or t.urgent for t in running):
                continue
            if not urgent and self._is_from_before(found):
                continue
            if self._answer(found):
                return

    @property
    def idle_until(self) -> float:
        """The next step for which :meth:`on_step` must be called, while no finding changes."""
        if self._sample.is_awaited or any(not entry.ended for entry in self.treatments):
            return 0
        settles = self._settling.next_step(self.treatments) if self._acts_by_rule else math.inf
        answered = {entry.finding for entry in self.proposals}
        open_ = {found.rule.slug for found in self._diagnosis.diagnosis.open} - answered
        pauses = (self._cases[slug].not_before for slug in open_ if slug in self._cases)
        known: list[float] = [*pauses, self._latest_change + EARLY_STEPS] if open_ else []
        known.append(max(settles, self._run.step + 1))
        return min((step for step in known if step > self._run.step), default=math.inf)

    def _is_from_before(self, found: Diagnosed) -> bool:
        """Weights were put in since it was found, and it has not had the time to resolve."""
        latest = self._latest_change
        return found.opened_step <= latest and self._run.step < latest + EARLY_STEPS

    @property
    def _latest_change(self) -> int:
        """The step in which a remedy changed weights the last time."""
        changes = (t.step for t in self.treatments if get_remedy(t.remedy).changes_weights)
        return max(changes, default=-EARLY_STEPS)

    def approve(self, proposal: RemedyProposal) -> RemedyReceipt:
        """A person approved.

        Raises:
            ValueError: it is not waiting any more.
            ConfigurationError, GraftError: it could not be applied; the model is as before.
        """
        if self._proposer is not None:
            raise ConfigurationError("with a server, remedies are approved there")
        if proposal not in self.proposals:
            raise ValueError("this remedy is not waiting any more")
        self.proposals.remove(proposal)
        receipt = self._apply(proposal).receipt
        assert receipt is not None
        return receipt

    def reject(self, proposal: RemedyProposal) -> None:
        """A person rejected: this remedy is not proposed for this kind of finding again.

        Raises:
            ConfigurationError: with a server, which the person has to tell.
        """
        if self._proposer is not None:
            raise ConfigurationError("with a server, remedies are rejected there")
        self.proposals = [entry for entry in self.proposals if entry is not proposal]
        self._case_of(proposal.finding).rejected.add(proposal.remedy)

    @property
    def _applies(self) -> bool:
        """A remedy is applied here, on all ranks; otherwise the script must do it."""
        return self._alone or self._proposer is not None

    @property
    def waits(self) -> bool:
        """Its proposals can be approved here; otherwise they say what would be done."""
        return self._alone and self._run.mode is not RunMode.OBSERVE

    def reasons(self) -> list[str]:
        """A sentence for each remedy that is being tried, and for each that was not applied."""
        open_ = {found.rule.slug for found in self._diagnosis.diagnosis.open}
        tried = [
            f"{t.receipt} was applied at step {t.step:,} for {t.finding}, and is being tried."
            for t in self.treatments
            if not t.ended
        ]
        refused = [
            f"{remedy} does not fit {finding}: {reason.rstrip('.')}."
            for finding, case in self._cases.items()
            for remedy, reason in case.refused.items()
            if finding in open_
        ]
        return tried + refused

    def close(self) -> None:
        self._sample.forget()

    # -- with a server -------------------------------------------------------------------------

    def has_inputs_for(self, slug: str) -> bool:
        """False: it needs a batch of the model's inputs, taken in the next forward pass."""
        known = {remedy.slug: remedy for remedy in list_remedies()}
        if slug not in known or not known[slug].needs_sample or not self._alone:
            return True
        return self._sample.ready()

    def apply_for_server(
        self, adaptation: str, *, remedy: str, layer: str, config: dict[str, Any], finding: str
    ) -> RemedyReceipt:
        """The server ordered it; it is judged as one that was applied here.

        Args:
            adaptation: its uid at the server.
            finding: empty: a person asked for it.

        Raises:
            ConfigurationError, UnknownLayerError, GraftError: the model is as before.
        """
        for entry in [entry for entry in self.proposals if entry.finding == finding]:
            self._forget(entry)
        receipt = self._surgery.remedy_for_server(
            adaptation, remedy, layer, self._sample.batch, config, finding
        )
        found = next((f for f in self._diagnosis.diagnosis.open if f.rule.slug == finding), None)
        evidence = None if found is None else found.evidence
        urgent = found is not None and found.severity is Severity.CRITICAL
        self._note(
            Treatment(
                finding,
                remedy,
                self._run.step,
                receipt,
                evidence,
                urgent,
                adaptation=adaptation,
            )
        )
        return receipt

    def result_of(self, adaptation: str) -> tuple[str, bool]:
        """(slug of the rule whose finding a remedy of the server answers, it is kept)."""
        known = [entry for entry in self.treatments if entry.adaptation == adaptation]
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
            for entry in self.treatments
            if entry.adaptation and not entry.ended
        ]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """They are judged on."""
        receipts = {receipt.adaptation: receipt for receipt in self._surgery.changes.remedies}
        self.treatments += [
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

    def _propose(self, found: Diagnosed, proposal: RemedyProposal) -> None:
        assert self._proposer is not None
        self.proposals.append(proposal)
        self._proposer.propose(
            proposal.key,
            step=proposal.step,
            remedy=proposal.remedy,
            layer=proposal.layer,
            config=proposal.config,
            finding=found.finding(),
        )
        self._announcer.remedy_proposed(str(proposal), waits=False, at_server=True)

    def _take_answers(self) -> None:
        """The states of the proposals; one that was applied is known from its command."""
        if self._proposer is None:
            return
        for answer in self._proposer.answers():
            entry = next((e for e in self.proposals if e.key == answer.key), None)
            if entry is None:
                self._proposer.forget(answer.key)
            elif answer.answer is None:
                self._on_refusal(entry, answer.code, answer.refusal)
            elif answer.answer.state in ADAPTATION_ENDED:
                self._on_end(entry, answer.answer.state, answer.answer.reason)

    def _on_refusal(self, entry: RemedyProposal, code: str, reason: str) -> None:
        self._forget(entry)
        case = self._case_of(entry.finding)
        case.not_before_time = time.monotonic() + ASK_AGAIN_SECONDS
        if code != "gate-closed":  # a gate opens again; this server does not know the remedy
            case.refused[entry.remedy] = reason
            case.rejected.add(entry.remedy)

    def _on_end(self, entry: RemedyProposal, state: AdaptationState, reason: str) -> None:
        self._forget(entry)
        case = self._case_of(entry.finding)
        if state in (AdaptationState.REJECTED, AdaptationState.CANCELLED):
            case.rejected.add(entry.remedy)
        else:  # the server has a cooldown of its own
            case.not_before_time = time.monotonic() + ASK_AGAIN_SECONDS
        logger.info("step %d: %s: %s %s", self._run.step, entry.remedy, state, reason)

    def _forget(self, proposal: RemedyProposal) -> None:
        self.proposals = [entry for entry in self.proposals if entry is not proposal]
        if self._proposer is not None:
            self._proposer.forget(proposal.key)

    # -- one finding ---------------------------------------------------------------------------

    def _answer(self, found: Diagnosed) -> bool:
        """True where a remedy was applied, or will be in the next step."""
        case = self._case_of(found.rule.slug)
        if any(entry.finding == found.rule.slug for entry in self.proposals):
            return False
        if self._run.step < case.not_before or time.monotonic() < case.not_before_time:
            return False
        proposal = self._next(found, case)
        if proposal is None and not self._sample.is_awaited and self._goes_back(found, case):
            self._go_back(found, case)
            return True
        if proposal is None:
            # The remedy of a worse finding comes first, once it has its sample.
            return self._sample.is_awaited
        if self._proposer is not None and self._run.mode is not RunMode.OBSERVE:
            self._propose(found, proposal)
            return False
        if proposal.asks:
            if self._goes_back(found, case):
                self._go_back(found, case)  # a person may be away
            self.proposals.append(proposal)
            waits = self._run.mode is not RunMode.OBSERVE
            self._announcer.remedy_proposed(str(proposal), waits=waits)
            return False
        try:
            self._apply(proposal, urgent=found.severity is Severity.CRITICAL)
        except EsperError as error:
            case.refused[proposal.remedy] = str(error)
            case.failed.add(proposal.remedy)
            logger.warning("step %d: %s was not applied: %s", self._run.step, proposal, error)
            return False
        self._match_updates(proposal)
        return True

    def _match_updates(self, cause: RemedyProposal) -> None:
        """The rate that was lowered on a guess is brought to where updates have a sound size."""
        lowered = cause.remedy == "rewind" and cause.config.get("factor", 1.0) != 1.0
        # Later, or where the rate jumped, the script's own rate has been a good one.
        if not lowered or self._run.step > START_STEPS or cause.evidence.signal == "learning_rate":
            return
        if not follows_gradient(self._diagnosis.optimizers):
            return
        config = {"share": MATCHED, "most": LARGEST_CORRECTION}
        proposal = replace(cause, remedy="match_updates", layer="", config=config)
        self._apply_also(proposal)

    def _apply_also(self, proposal: RemedyProposal) -> Treatment | None:
        """A low-risk remedy beside another one; None where it does not fit, or a person decides."""
        remedy, case = get_remedy(proposal.remedy), self._case_of(proposal.finding)
        given = case.given.get(remedy.slug, 0)
        if remedy.slug in case.rejected | case.failed or self._asks(remedy, given):
            return None
        if self._surgery.refusal(remedy.slug, "", None, proposal.config):
            return None
        try:
            return self._apply(proposal)
        except EsperError as error:
            logger.warning("step %d: %s was not applied: %s", self._run.step, proposal, error)
            return None

    def _settle(self) -> None:
        """The loss stands still at a rate that was chosen here, so it may be its noise."""
        if not self._acts_by_rule or self._run.step < self._settling.next_step(self.treatments):
            return
        chosen = self._settling.stands_still(self.treatments, self._run)
        if chosen is None:
            return
        proposal = RemedyProposal(
            chosen.finding, "set_lr", "", {"factor": SETTLED}, self._run.step, "",
            chosen.evidence or Evidence("the loss stands still", "a falling loss", "loss"),
        )  # fmt: skip
        if (treatment := self._apply_also(proposal)) is not None:
            self._keep(treatment, "the loss stood still at the rate that was chosen before")

    @property
    def _acts_by_rule(self) -> bool:
        """There is nobody else who decides."""
        return self._run.mode is RunMode.AUTOMATIC and self._alone and self._proposer is None

    def _goes_back(self, found: Diagnosed, case: _Case) -> bool:
        """Its remedies did not help, and the run is worse than when the first one was given."""
        if (
            not self._acts_by_rule
            # The held-out loss is what is wrong: its best weights are the way back, on request.
            or RemedySlug.RESTORE_BEST in found.rule.remedies
            or case.went_back
            or not case.given
            or not math.isfinite(case.level)
        ):
            return False
        return not self._level() <= WORSE * abs(case.level)

    def _go_back(self, found: Diagnosed, case: _Case) -> None:
        """To the weights in which the first remedy was given, with the script's own rate."""
        case.went_back = True
        config: dict[str, Any] = {"step": MARKED, "factor": 1.0}
        if reason := self._surgery.refusal("rewind", "", None, config):
            case.refused["rewind"] = reason
            return
        try:
            receipt = self._surgery.remedy("rewind", "", None, config, found.rule.slug)
        except EsperError as error:
            case.refused["rewind"] = str(error)
            return
        ended = "went back to where the first remedy was given, because none helped"
        step, slug = self._run.step, found.rule.slug
        self._note(Treatment(slug, "rewind", step, receipt, found.evidence, ended=ended))
        self._announcer.remedy_judged("rewind", ended)

    def _level(self, count: int = LEVEL_LOSSES) -> float:
        """Median of the newest losses; infinite where most of them are not finite."""
        newest = [loss for _, loss in list(self._run.losses)[-count:]]
        known = sorted(loss if math.isfinite(loss) else math.inf for loss in newest)
        return known[len(known) // 2] if known else math.nan

    def _mark(self, case: _Case) -> None:
        """Where the first remedy of a fault is given: one state, of the newest of such faults."""
        # The loss may have just jumped.
        level = max(self._level(), self._level(NEWEST_LOSSES))
        if not case.given and self._surgery.states is not None and math.isfinite(level):
            case.level = level
            self._surgery.states.mark(self._run.step)
            for other in self._cases.values():
                other.went_back |= other is not case

    def _next(self, found: Diagnosed, case: _Case) -> RemedyProposal | None:
        """The first remedy of the finding's rule that fits here."""
        # A run that only observes installs nothing in the model.
        observes = self._run.mode is RunMode.OBSERVE or not self._applies
        for slug in self._order(found):
            if slug in case.rejected | case.failed:
                continue
            remedy, given = get_remedy(slug), case.given.get(slug, 0)
            layer = found.evidence.began_at if remedy.scope == "layer" else ""
            config = self._dose(slug, found, given)
            if remedy.needs_sample and self._applies and not self._alone:
                case.refused[slug] = "it needs a batch of inputs, the same on all ranks"
                continue
            if not observes:
                if remedy.needs_sample and not self._sample.ready():
                    return None  # it is taken in the next forward pass
                reason = self._surgery.refusal(slug, layer, self._sample.batch, config)
                if reason:
                    case.refused[slug] = reason
                    continue
            asks = self._asks(remedy, given)
            step, evidence = self._run.step, found.evidence
            return RemedyProposal(found.rule.slug, slug, layer, config, step, asks, evidence)
        return None

    def _order(self, found: Diagnosed) -> list[str]:
        """The remedies of the rule, in the order of the rule, except for a run that has just begun.

        What is wrong from the start lies in the initial weights, or in the first updates, which
        cost nothing to take back.
        """
        known = {remedy.slug for remedy in list_remedies()}
        order = [str(remedy) for remedy in found.rule.remedies if str(remedy) in known]
        if not follows_gradient(self._diagnosis.optimizers):
            # One measured update says enough: a later one is smaller, as its gradients are noise.
            order = [slug for slug in order if slug != "match_updates"]
        if found.rule.slug == "dying_relu" and not self._loss_jumped(found):
            order.sort(key=lambda slug: slug == "rewind")  # going back answers a sudden death
        goes_back = "rewind" in order
        if self._began_anew_in_vain or (goes_back and self._started_badly):
            # The first weights are at fault: they were found to be, or a lower rate from the same
            # ones did not help.
            order = ["repair_scale", *(slug for slug in order if slug != "repair_scale")]
        elif self._was_hurt_at_the_start and found.rule.slug != "bad_initialisation":
            # Whatever has come of it, the first updates were too large.
            order = ["rewind", *(slug for slug in order if slug != "rewind")]
        elif self._run.step <= EARLY_STEPS:
            first = "rewind" if self._was_damaged(found) else "repair_scale"
            order.sort(key=lambda slug: slug != first)
        elif found.severity is Severity.CRITICAL and self._case_of(found.rule.slug).given:
            order.sort(key=lambda slug: slug != "rewind")  # the first remedy left it critical
        return order

    def _loss_jumped(self, found: Diagnosed) -> bool:
        """The loss was much higher after the fault began than before."""
        before = [loss for step, loss in self._run.losses if step < found.since_step][-50:]
        after = [loss for step, loss in self._run.losses if step >= found.since_step]
        if len(before) < 10 or not after:
            return False
        return not statistics.median(after) <= 1.5 * abs(statistics.median(before))

    def _was_damaged(self, found: Diagnosed) -> bool:
        """An update did it, not the initialisation: the loss has grown, or the weights have."""
        losses = [loss for _, loss in self._run.losses]
        grown = bool(losses) and not losses[-1] <= 2 * abs(losses[0])
        return grown

    @property
    def _started_badly(self) -> bool:
        """The first weights of a run that has just begun are at fault, and not repaired yet."""
        if self._run.step > EARLY_STEPS or self._case_of("bad_initialisation").given:
            return False
        slugs = {
            found.rule.slug
            for found in self._diagnosis.diagnosis.open
            if found.severity is not Severity.INFO
        }
        return "bad_initialisation" in slugs

    @property
    def _began_anew_in_vain(self) -> bool:
        """The last remedy that has ended went back to the first weights, and did not help."""
        ended = [entry for entry in self.treatments if entry.ended and entry.receipt is not None]
        if not ended or self._run.step > START_STEPS + WINDOW_STEPS:
            return False
        last = ended[-1]
        assert last.receipt is not None
        in_vain = last.remedy == "rewind" and last.ended.startswith(_IN_VAIN)
        return in_vain and last.receipt.details.get("to_step") == 0

    @property
    def _was_hurt_at_the_start(self) -> bool:
        """One of the first updates, which can still be taken back, moved the weights far."""
        return self._diagnosis.update_excess > EXCESSIVE and self._run.step <= START_STEPS

    def _dose(self, slug: str, found: Diagnosed, given: int) -> dict[str, Any]:
        """The settings for this finding; stronger the second time: the first did not last."""
        if slug == "set_lr":
            if found.rule.slug in _RAISES:
                return {"factor": self._higher(found)}
            return {"factor": self._lower(found) ** (1 + given)}
        if slug == "rewind":
            anew = self._run.step <= EARLY_STEPS or self._was_hurt_at_the_start
            before = self._first_step if anew else found.since_step
            power = given + (0 if self._was_sudden(found) else 1)
            return {"step": before, "factor": max(self._lower(found) ** power, STRONGEST)}
        if slug == "match_updates":
            return {"share": MATCHED, "most": LARGEST_RISE}
        if slug == "repair_scale":
            # Where the data alone is at fault, the layers behind the first are as they should be.
            return {"first_only": found.rule.slug == "abnormal_data"}
        return {}

    @property
    def _first_step(self) -> int:
        """Of the first weights that can be had again: those after a repair, where there was one."""
        states = self._surgery.states
        return states.steps[0] if states is not None and states.steps else 0

    def _higher(self, found: Diagnosed) -> float:
        """A factor that brings the updates up to the usual share of the weights."""
        ratio = found.evidence.value if found.evidence.signal == Signal.UPDATE_RATIO else math.nan
        if not ratio > 0:
            return 1 / WEAKEST
        return min(max(STEADY / ratio, 1 / WEAKEST), 1 / STRONGEST)

    def _lower(self, found: Diagnosed) -> float:
        """The factor back to the earlier rate, or to updates of a sound share, where known."""
        if found.evidence.signal == "learning_rate":
            return max(1 / found.evidence.value, STRONGEST)
        excess = self._diagnosis.update_excess
        if math.isnan(excess) and found.evidence.signal == Signal.UPDATE_RATIO:
            excess = found.evidence.value / STEADY
        if not excess > 0:
            return WEAKEST
        return min(max(1 / excess, STRONGEST), WEAKEST)

    def _was_sudden(self, found: Diagnosed) -> bool:
        """The loss was at its usual level until the fault: bad data, not the learning rate."""
        if found.rule.slug != "non_finite":
            return False
        before = [loss for step, loss in self._run.losses if step < found.since_step]
        recent = [loss for loss in before[-20:] if math.isfinite(loss)]
        return len(recent) >= 10 and recent[-1] <= 1.5 * abs(statistics.median(recent))

    def _asks(self, remedy: Remedy, given: int) -> str:
        if self._run.mode is RunMode.OBSERVE:
            return _OBSERVES
        if not self._applies:
            return "on several ranks, call session.remedy with these settings on each of them"
        if self._proposer is not None:
            return ""  # the server asks
        asks = self._gates(remedy, given)
        if asks:
            return asks
        recent = [t for t in self.treatments if t.step > self._run.step - BUDGET_STEPS]
        if len(recent) >= BUDGET:
            return f"{len(recent)} remedies were applied in the last {BUDGET_STEPS:,} steps"
        return ""

    def _gates(self, remedy: Remedy, given: int) -> str:
        """What the server's gates ask for; empty: they ask for no person."""
        run = self._run
        inputs = RemedyInputs(
            mode=run.mode,
            step=run.step,
            remedy=remedy.slug,
            given=given,
            always_asks=remedy.asks,
            risk=remedy.risk,
            age_seconds=0.0,  # it was found in this step
        )
        # Nobody else watches a local run, so it may do more by rule than most servers allow.
        limit = max(run.policy.auto_max_risk, LOCAL_MAX_RISK, key=risk_rank)
        checks = check_remedy(inputs, replace(run.policy, auto_max_risk=limit))
        return next((check.text.rstrip(".") for check in checks if check.asks), "")

    def _apply(self, proposal: RemedyProposal, *, urgent: bool = False) -> Treatment:
        self._mark(self._case_of(proposal.finding))
        receipt = self._surgery.remedy(
            proposal.remedy,
            proposal.layer,
            self._sample.batch,
            proposal.config,
            proposal.finding,
        )
        return self._note(
            Treatment(
                proposal.finding,
                proposal.remedy,
                self._run.step,
                receipt,
                proposal.evidence,
                urgent,
            )
        )

    def _note(self, treatment: Treatment) -> Treatment:
        """A remedy was applied."""
        self._sample.forget()
        remedy = get_remedy(treatment.remedy)
        self._diagnosis.look_closely()
        if remedy.changes_weights:
            details = treatment.receipt.details if treatment.receipt is not None else {}
            back_to = details.get("to_step", 0 if remedy.begins_anew else None)
            self._diagnosis.forget_readings(back_to=back_to)
        given = self._case_of(treatment.finding).given
        given[treatment.remedy] = given.get(treatment.remedy, 0) + 1
        self.treatments.append(treatment)
        return treatment

    # -- verdicts ------------------------------------------------------------------------------

    def _judge(self, open_: dict[str, Diagnosed]) -> None:
        """Ends windows that are over: a remedy is judged by its finding."""
        for treatment in self.treatments:
            if treatment.ended:
                continue
            age = self._run.step - treatment.step
            if self._was_taken_back(treatment):
                treatment.ended = "taken back"
            elif not treatment.finding:
                self._judge_asked_for(treatment, open_)
            elif treatment.finding not in open_:
                if age >= KEPT_AFTER_STEPS:
                    self._keep(treatment, f"{treatment.finding} is over")
            elif age >= self._window(treatment, open_[treatment.finding]):
                self._fail(treatment, f"{treatment.finding} is still open")

    def _was_taken_back(self, treatment: Treatment) -> bool:
        """By the server, the script or with an older change."""
        receipt = treatment.receipt
        if not treatment.adaptation or receipt is None or receipt.changed_nothing:
            return False
        return receipt not in self._surgery.changes.remedies

    def _judge_asked_for(self, treatment: Treatment, open_: dict[str, Diagnosed]) -> None:
        """A person's own remedy has no finding: it must not be followed by one."""
        if treatment.receipt is not None and treatment.receipt.changed_nothing:
            return self._keep(treatment, "it changes nothing")
        serious = (Severity.SERIOUS, Severity.CRITICAL)
        new = [
            found.rule.slug
            for found in open_.values()
            if found.severity in serious and found.since_step > treatment.step
        ]
        if new:
            self._fail(treatment, f"{', '.join(new)} was found after it")
        elif self._run.step - treatment.step >= WINDOW_STEPS:
            self._keep(treatment, f"nothing new was found in {WINDOW_STEPS} steps")

    def _keep(self, treatment: Treatment, reason: str) -> None:
        treatment.ended = f"kept, because {reason}"
        self._announcer.remedy_judged(treatment.remedy, treatment.ended)
        self._report_verdict(treatment, reason, keep=True)

    def _report_verdict(self, treatment: Treatment, reason: str, *, keep: bool) -> None:
        if treatment.adaptation and self._proposer is not None:
            self._proposer.judge(
                treatment.adaptation,
                keep=keep,
                reason=reason.replace("_", " "),  # for a person
                step=self._run.step,
                steps=max(0, self._run.step - treatment.step),
            )

    def _window(self, treatment: Treatment, found: Diagnosed) -> int:
        """In steps. Longer while nothing new was measured, which says nothing of the remedy."""
        if treatment.urgent:
            return max(URGENT_WINDOW_STEPS, min(WINDOW_STEPS, self._to_learn_again(treatment)))
        # A run that has just begun is looked at closely, and has no steps to lose.
        window = min(WINDOW_STEPS, max(EARLY_STEPS, treatment.step))
        unmeasured = found.evidence == treatment.evidence and found.evidence.signal not in _READ
        return window * (UNMEASURED_WINDOWS if unmeasured else 1)

    def _to_learn_again(self, treatment: Treatment) -> int:
        """The steps that a rewind gave up, where the loss must fall again; not for a NaN."""
        details = treatment.receipt.details if treatment.receipt is not None else {}
        if treatment.finding == "non_finite" or not details.get("to_step"):
            return 0
        return treatment.step - int(details["to_step"])

    def _fail(self, treatment: Treatment, reason: str) -> None:
        """It did not help: what it does in each step ends; what it did once is history."""
        treatment.ended = f"{_IN_VAIN}, because {reason}"
        self._announcer.remedy_judged(treatment.remedy, treatment.ended)
        case = self._case_of(treatment.finding)
        if treatment.remedy not in _AGAIN:
            case.failed.add(treatment.remedy)
        case.not_before = self._run.step + (0 if treatment.urgent else case.pause)
        case.pause *= 2
        if treatment.adaptation:
            self._report_verdict(treatment, reason, keep=False)
            return  # the server commands its end
        receipt = treatment.receipt
        in_force = receipt is not None and receipt.in_force
        # What stays of a new start fits its weights, and ends with them alone.
        anew = get_remedy(treatment.remedy).begins_anew
        if in_force and not anew and receipt in self._surgery.changes.remedies:
            self._surgery.undo(receipt, hard=False)

    def _case_of(self, slug: str) -> _Case:
        return self._cases.setdefault(slug, _Case())


def _worst_first(found: Iterable[Diagnosed]) -> list[Diagnosed]:
    return sorted(found, key=lambda f: (f.severity is not Severity.CRITICAL, f.since_step))


class _Sample:
    """One batch of the model's inputs, taken from a forward pass of the script."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._handle: RemovableHandle | None = None
        self.batch: Batch | None = None

    def ready(self) -> bool:
        """A batch is there; otherwise it is taken in the next forward pass."""
        if self.batch is None and self._handle is None:
            self._handle = self._model.register_forward_pre_hook(self._take, with_kwargs=True)
        return self.batch is not None

    @property
    def is_awaited(self) -> bool:
        return self._handle is not None

    def forget(self) -> None:
        self.batch = None
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _take(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.batch is None:
            self.batch = Batch(args, kwargs)
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
