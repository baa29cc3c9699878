"""The lines that a run writes on the console, in words. What they say is decided elsewhere."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from urllib.parse import quote

from torch import distributed

from esper.console import Console
from esper.contracts import Decision, Finding, RunMode, Severity
from esper.diagnosis import title_of
from esper.grafting import RemedyReceipt, UndoReceipt
from esper.remedies import list_remedies
from esper.sdk.adaptation import Adaptation
from esper.sdk.run_state import RunState
from esper.sdk.tracking import Event, Mirror, Progress

logger = logging.getLogger("esper")


class Announcer:
    """Says what a user must know about one run.

    Args:
        verbose: False: lines go to the logger only.
        decides: this process takes the decisions; the other ranks are silent.
        mirror: the user's trackers, which get the same as events, and the progress.
        target_steps: how many steps are planned.
    """

    def __init__(
        self,
        run: RunState,
        *,
        verbose: bool,
        decides: bool,
        mirror: Mirror | None = None,
        target_steps: int | None = None,
    ) -> None:
        self._run = run
        self._target_steps = target_steps
        self._mirror = mirror or Mirror()
        self._mirror.follow(self._progress)
        self._server = self._page = ""
        self._console = Console(enabled=verbose and decides and _first_rank())
        self._told: set[str] = set()
        self._attached = False
        self._early: list[Finding] = []  # of attach itself, which are said after its own line

    def on_step(self) -> None:
        """A step is over: say how many lines were held back."""
        self._console.fold(self._run.step)

    @property
    def idle_until(self) -> float:
        """The next step whose end the console must see."""
        return self._console.idle_until

    def close(self) -> None:
        """The run has ended."""
        self._console.fold(self._run.step, last=True)
        self._mirror.close()

    # -- the run -------------------------------------------------------------------------------

    def attached(self, *, layers: int, slots: int, server: str) -> None:
        run, self._server = self._run, server
        where = f"reports to {server}" if server else "local, print(session) shows the run"
        changes = "changes nothing" if run.mode is RunMode.OBSERVE else f"{slots} may be grafted"
        self._say(f"attached {run.name!r}: {run.mode} mode, {layers} layers, {changes}; {where}")
        self._attached = True
        for finding in self._early:
            self.finding(finding)
        self._early.clear()
        self._console.fold(run.step)

    def registered(self, address: str) -> None:
        """The server has the run now."""
        self._page = address
        if address not in self._told:
            self._told.add(address)
            self._say(f"the run's page: {address}")

    def attached_twice(self, other: str) -> None:
        self._say(
            f"this model was attached already, as {other!r}: the older session was detached, and "
            "measures and decides nothing any more. Close a session before the next attach, with "
            "session.close() or a with block",
            level=logging.WARNING,
        )

    # -- what a person should look at ----------------------------------------------------------

    def finding(self, finding: Finding) -> None:
        if not self._attached:
            self._early.append(finding)
            return
        self._note("finding", str(finding))
        if finding.severity is Severity.INFO:
            logger.info("%s", finding)
        else:
            self._say(str(finding), kind=f"findings of {finding.rule}", level=logging.WARNING)

    def waits(self, decision: Decision, *, minutes: float, alone: bool, pause: str = "") -> None:
        """A decision waits for a person in this process.

        Args:
            pause: what the graft will make the training wait for; empty: nothing to mention.
        """
        self._note("waits", describe(decision), confidence=decision.adaptation.confidence)
        self._step(
            f"{describe(decision)} waits for you ({'; '.join(_bare(a) for a in decision.asks)}). "
            f"{f'{pause.capitalize()}. ' if pause else ''}"
            f"{how_to_answer(decision, alone=alone)}. It expires in {minutes:.0f} min",
            kind="decisions that wait",
        )

    def expired(self, decision: Decision) -> None:
        """Nobody answered in time."""
        self._step(
            f"nobody answered: {decision.blueprint} at {decision.adaptation.layer_name!r} is not "
            "grafted",
            kind="decisions that expired",
        )

    def waits_at_server(self, layer: str, what: str, address: str) -> None:
        """A decision waits at the server, which tells it again after each reconnect.

        Args:
            layer: empty for the whole run.
            what: slug of the blueprint or the remedy.
        """
        if address not in self._told:
            self._told.add(address)
            self._note("waits", f"{_name(what)} {layer}".rstrip(), link=address)
            place = f" at {layer!r}" if layer else ""
            self._step(
                f"{_name(what)}{place} waits for a person: {address}",
                kind="decisions that wait",
            )

    def would_propose(self, decision: Decision) -> None:
        """Observe mode: what would be proposed. Said once for each layer and blueprint."""
        key = f"{decision.adaptation.layer_name}/{decision.blueprint}"
        if key in self._told:
            return
        self._told.add(key)
        self._note("proposed", describe(decision), confidence=decision.adaptation.confidence)
        self._step(f"{would_propose(decision)}", kind="proposals that observe mode does not make")

    # -- changes -------------------------------------------------------------------------------

    def grafted(self, entry: Adaptation) -> None:
        receipt = entry.receipt
        cost = ""
        if receipt is not None:
            cost = f": {receipt.certificate.parameters:,} parameters, {receipt.pause_ms:.0f} ms"
        self._note("graft", f"{entry.blueprint} into {entry.layer!r}{cost}", entry.uid)
        self._step(
            f"grafted {entry.blueprint} into {entry.layer!r}{cost}; on probation until step "
            f"{entry.guarded_until} at most",
            kind="grafts",
        )

    def compiles_in_training(self, blueprint: str, layer: str, forecast: str) -> None:
        """A graft's code could not be compiled ahead."""
        self._step(f"{blueprint} at {layer!r}: {forecast}", kind="pauses", level=logging.WARNING)

    def not_grafted(self, reason: str) -> None:
        self._step(f"not grafted: {reason}", kind="refused grafts", level=logging.WARNING)

    def kept(self, entry: Adaptation, reason: str = "") -> None:
        why = f": {_bare(reason)}" if reason else ""
        gain = entry.verdict.ablation_gain if entry.verdict is not None else entry.ablation_gain
        reward = math.nan if entry.reward is None else entry.reward.total
        text = f"{entry.blueprint} in {entry.layer!r}{why}"
        self._note("kept", text, entry.uid, gain=gain, reward=reward)
        self._step(f"kept {entry.blueprint} in {entry.layer!r}{why}", kind="kept grafts")

    def taken_out(
        self,
        gone: Sequence[Adaptation],
        report: UndoReceipt,
        reason: str,
        *,
        level: int = logging.INFO,
    ) -> None:
        """Grafts left the model together; the first in ``gone`` is the oldest."""
        if not gone:
            return
        what = _out_of(gone)
        rewound = _afterwards(report, gone[0].step)
        self._note("taken_out", f"{what}: {_bare(reason)}", gone[0].uid)
        self._step(f"took {what}: {_bare(reason)}{rewound}", kind="grafts taken out", level=level)

    def left_by_load(self, gone: Sequence[Adaptation]) -> None:
        self._step(
            f"took {_out_of(gone)}: the script loaded a state that was saved without it",
            kind="grafts taken out",
        )

    def came_back(self, entry: Adaptation) -> None:
        self._step(
            f"grafted {entry.blueprint} into {entry.layer!r} again: the script loaded a state that "
            "was saved with it",
            kind="grafts",
        )

    def remedy(self, receipt: RemedyReceipt, finding: str = "") -> None:
        why = f", because of {title_of(finding)}" if finding else ""
        self._note("remedy", f"{receipt}{why}", receipt.adaptation)
        self._step(f"applied: {receipt}{why}{self._way_back(receipt)}", kind="remedies")

    def _way_back(self, receipt: RemedyReceipt) -> str:
        if receipt.changed_nothing:
            return ""
        if receipt.adaptation:
            return f". To take it back: {self._server}/adaptations/{receipt.adaptation}"
        return ". To take it back: session.undo(session.remedies[-1])"

    def remedy_proposed(self, proposal: str, *, waits: bool, at_server: bool = False) -> None:
        """A remedy for a finding: a person or the server decides, or the run only observes."""
        self._note("waits" if waits else "proposed", _bare(proposal))
        how = "Answer: session.approve(session.proposed_remedies[0])" if waits else ""
        verb = "proposes" if waits or at_server else "would propose"
        answer = f". {how}" if how else ""
        self._step(f"{verb}: {_bare(proposal)}{answer}", kind="proposed remedies")

    def remedy_judged(self, remedy: str, verdict: str) -> None:
        """What became of a remedy, by its slug."""
        told = f"{_name(remedy)}: {verdict}"
        self._note("verdict", told)
        self._step(told, kind="verdicts on remedies")

    def remedy_undone(self, receipt: RemedyReceipt, report: UndoReceipt) -> None:
        self._step(
            f"undid: {receipt}{_afterwards(report, receipt.step)}",
            kind="undone remedies",
        )

    # -- how -----------------------------------------------------------------------------------

    def _note(
        self, kind: str, text: str, uid: str = "", *, link: str = "", **values: float
    ) -> None:
        """To the trackers. ``uid``: of the adaptation at the server, whose page is the link."""
        if uid and self._server and not uid.startswith("local-"):
            link = f"{self._server}/adaptations/{quote(uid, safe='')}"
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._mirror.send(Event(self._run.step, kind, text, link or self._page, finite))

    def _progress(self) -> Progress:
        """Read in the trackers' thread while the run goes on: each value is whole."""
        run = self._run
        try:
            loss: float | None = run.losses[-1][1]
        except IndexError:
            loss = None
        held_out = None if math.isnan(run.held_out) else run.held_out
        return Progress(run.step, self._target_steps, loss, held_out)

    def _step(self, line: str, *, kind: str, level: int = logging.INFO) -> None:
        self._say(f"step {self._run.step}: {line}", kind=kind, level=level)

    def _say(self, line: str, *, kind: str = "", level: int = logging.INFO) -> None:
        self._console.say(line, step=self._run.step, kind=kind, level=level)


def how_to_answer(decision: Decision, *, alone: bool = True) -> str:
    """The line of Python that answers a waiting decision.

    Args:
        alone: there are no other ranks, which a graft by hand would need.
    """
    layer = decision.adaptation.layer_name
    if not alone:
        settings = dict(decision.config)
        if decision.adaptation.since:
            settings["since"] = decision.adaptation.since
        config = "".join(f", {name}={value!r}" for name, value in settings.items())
        return f"On each rank: session.graft({layer!r}, {decision.blueprint!r}{config})"
    return f"Answer: session.approve({layer!r}) or session.reject({layer!r})"


def would_propose(decision: Decision) -> str:
    """What observe mode leaves undone, and how to change that."""
    reasons = "; ".join(reason.text for reason in decision.adaptation.reasons[:2] if reason.text)
    since = f", since {reasons}" if reasons else ""
    return (
        f"would propose {describe(decision)}{since}. Observe mode "
        'changes nothing; attach with mode="supervised" to be asked'
    )


def describe(decision: Decision) -> str:
    """What it would graft where, with cost and confidence."""
    confidence = decision.adaptation.confidence
    sure = f", confidence {confidence:.2f}" if math.isfinite(confidence) else ""
    since, layer = decision.adaptation.since, decision.adaptation.layer_name
    where = f"parallel to {since!r} … {layer!r}" if since else f"at {layer!r}"
    return f"{decision.blueprint} {where} (+{decision.forecast.parameters:,} parameters{sure})"


def _out_of(gone: Sequence[Adaptation]) -> str:
    return ", ".join(f"{entry.blueprint} out of {entry.layer!r}" for entry in gone)


def _afterwards(report: UndoReceipt, step: int) -> str:
    """What the model is after an undo of what was done at ``step``."""
    if report.exact:
        return f"; the model is rewound to step {step}, equal to the bit"
    return "" if report.hard else "; the model keeps what it has learned since"


def _name(slug: str) -> str:
    """As people call it: a remedy by its title, a blueprint by its slug."""
    titles = {remedy.slug: remedy.title for remedy in list_remedies()}
    return f"“{titles[slug]}”" if slug in titles else slug


def _bare(text: str) -> str:
    return text.rstrip(". ")


def _first_rank() -> bool:
    """False in a process of a group whose rank is not 0, also where the model has no wrapper."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return True
    return distributed.get_rank() == 0
