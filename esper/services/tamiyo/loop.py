"""Tamiyo's loop over one run, drawn once:

    attend(run, entries):
        snapshot from the server, when ours is old, has a gap, or something happened
        absorb the entries' frames
        for each adaptation in probation:  judge -> POST verdict with its reward
            with learning: what its blueprint's sizes gained -> POST a variant to be tried
        if there is a frame without a decision:
            where the policy allows plans: plan_run() -> POST plan
            without a plan: decide() -> POST proposal | POST decline (hard refusals only) | nothing

Every call may be repeated: proposals and verdicts carry idempotency keys, and a run's state is
read again afterwards. A failure that may pass is raised, so that the caller tries again.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from esper import tracing
from esper.blueprints import Blueprint
from esper.contracts import (
    AdaptationState,
    Decision,
    Declined,
    Plan,
    RunSnapshot,
    Verdict,
    protocol,
)
from esper.contracts.spans import place_of
from esper.exceptions import CodecError, TransportError, UnknownBlueprintError
from esper.pipeline import chances, decide
from esper.planning import plan_run
from esper.policy import BanditPolicy, Policy
from esper.replay import decision_rng
from esper.selection import BlueprintSelector, SelectableBlueprint
from esper.services.tamiyo import wire
from esper.services.tamiyo.learning import suggestion_for
from esper.services.tamiyo.probation import cost_of, judge_probation, reward_of
from esper.services.tamiyo.stream import HealthEntry
from esper.services.tamiyo.urza import Urza
from esper.services.tamiyo.watch import RunWatch

logger = logging.getLogger("esper.tamiyo")


_PLAN = ("", "plan")  # what ``held_until`` knows a plan by


class DecisionLoop:
    """Decides for all runs of one server.

    Args:
        learning: let earlier cases change what is proposed.
        refresh_seconds: no run's snapshot gets older than this.
        decline_quiet_seconds: the same refusal is not noted again for this long.
    """

    def __init__(
        self,
        urza: Urza,
        *,
        policy: Policy,
        catalog: Sequence[SelectableBlueprint],
        learning: bool,
        refresh_seconds: float,
        decline_quiet_seconds: float,
    ) -> None:
        self._urza = urza
        self._policy = policy
        self._selector = BlueprintSelector(catalog)
        self._challenger = BanditPolicy(self._selector.types)
        self._learning = learning
        self._refresh_seconds = refresh_seconds
        self._decline_quiet_seconds = decline_quiet_seconds
        self.watches: dict[str, RunWatch] = {}
        self.counts: Counter[str] = Counter()
        self.decision_ms: deque[float] = deque(maxlen=1000)

    async def attend(
        self, run: str, entries: Sequence[HealthEntry] = (), *, deciding: bool = True
    ) -> None:
        """Act on what is new in a run.

        Raises:
            TransportError: not permanent; nothing is lost, call again.
        """
        watch = self.watches.setdefault(run, RunWatch(run))
        async with watch.lock:
            try:
                await self._refresh(watch, entries)
                watch.absorb(entries)
                await self._judge(watch)
                if deciding and watch.undecided:
                    with tracing.span("tamiyo.decide", run=run):
                        await self._decide(watch)
            except TransportError as error:
                watch.outdate()
                if not error.permanent:
                    raise
                self._give_up(watch, error)
            except Exception:
                # One run's data caused an error here: log it, and go on with the other runs.
                logger.exception("run %s could not be decided on", run)
                self.counts["errors"] += 1
                watch.undecided = False

    async def attend_live_runs(self, *, deciding: bool) -> None:
        """Attend every live run once, and drop those that ended.

        Args:
            deciding: also decide. Without it, only where no notification came since the last call:
                then notifications are lost, and a run must not wait for one.
        """
        live = {str(run["uid"]) for run in await self._urza.live_runs()}
        for gone in self.watches.keys() - live:
            del self.watches[gone]
        for run in sorted(live):
            overdue = run in self.watches and self.watches[run].undecided
            try:
                await self.attend(run, deciding=deciding or overdue)
            except TransportError as error:
                logger.warning("run %s has to wait: %s", run, error)

    async def _refresh(self, watch: RunWatch, entries: Sequence[HealthEntry]) -> None:
        if not watch.needs_snapshot(entries, max_age_seconds=self._refresh_seconds):
            return
        data = await self._urza.snapshot(watch.uid)
        try:
            watch.take(wire.report_from_wire(data))
        except CodecError as error:
            # A server of another version: wait for its update instead of dropping the run.
            raise TransportError(str(error), permanent=False) from error

    async def _decide(self, watch: RunWatch) -> None:
        snapshot = watch.snapshot(learning=self._learning)
        started = time.perf_counter()
        planned = self._plan(watch, snapshot)
        if planned is not None:
            self.decision_ms.append((time.perf_counter() - started) * 1e3)
            self.counts["decisions"] += 1
            await self._propose_plan(watch, snapshot, planned)
            watch.undecided = False
            return
        policy = self._champion(watch)
        answer = decide(snapshot, policy, self._selector, watch.limits, decision_rng(snapshot))
        self.decision_ms.append((time.perf_counter() - started) * 1e3)
        self.counts["decisions"] += 1
        if isinstance(answer, Decision):
            await self._propose(watch, snapshot, answer)
        else:
            await self._note_refusal(watch, snapshot, answer)
        watch.undecided = False

    def _champion(self, watch: RunWatch) -> Policy:
        """Who decides: what the server's curator says. Without learning, the default policy."""
        promoted = self._learning and watch.report.champion == self._challenger.name
        return self._challenger if promoted else self._policy

    def _chances(self, decision: Decision, watch: RunWatch) -> dict[str, float]:
        """With which probability each policy would have decided so, for the curator."""
        snapshot = watch.snapshot(learning=self._learning)
        policies = (self._policy, self._challenger)
        return chances(
            decision,
            snapshot,
            policies,
            self._selector,
            watch.limits,
            lambda: decision_rng(snapshot),
        )

    def _plan(self, watch: RunWatch, snapshot: RunSnapshot) -> Plan | None:
        """Several changes at once, where the policy allows plans and at least two fit."""
        if watch.limits.max_plan_changes < 2:
            return None
        if time.monotonic() < watch.held_until.get(_PLAN, 0.0):
            return None
        rng = decision_rng(snapshot)
        answer = plan_run(snapshot, self._policy, self._selector, watch.limits, rng)
        return answer if isinstance(answer, Plan) else None

    async def _propose_plan(self, watch: RunWatch, snapshot: RunSnapshot, plan: Plan) -> None:
        try:
            await self._urza.propose_plan(watch.uid, wire.plan_of(plan, snapshot, watch.limits))
        except TransportError as error:
            if not error.permanent:
                raise
            # The server's gates know more; a single change may pass them.
            watch.held_until[_PLAN] = time.monotonic() + self._refresh_seconds
            self.counts["proposals_refused"] += 1
            logger.info("run %s: a plan was refused: %s", watch.uid, error)
        else:
            self.counts["plans"] += 1
        watch.outdate()

    async def _propose(self, watch: RunWatch, snapshot: RunSnapshot, decision: Decision) -> None:
        wish = (decision.adaptation.layer_name, str(decision.adaptation.adaptation_type))
        if time.monotonic() < watch.held_until.get(wish, 0.0):
            return
        try:
            await self._urza.propose(
                watch.uid,
                wire.proposal_of(decision, snapshot, watch.limits, self._chances(decision, watch)),
            )
        except TransportError as error:
            if not error.permanent:
                raise
            # The server's gates know more; propose again when the run has changed.
            watch.held_until[wish] = time.monotonic() + self._refresh_seconds
            self.counts["proposals_refused"] += 1
            logger.info("run %s: %s into %s was refused: %s", watch.uid, *wish[::-1], error)
        else:
            self.counts["proposals"] += 1
        watch.outdate()

    async def _note_refusal(
        self, watch: RunWatch, snapshot: RunSnapshot, declined: Declined
    ) -> None:
        if declined.adaptation is None or not declined.violations:
            return
        rules = sorted({str(check.rule) for check in declined.violations})
        what = (declined.adaptation.layer_name, *rules)
        now = time.monotonic()
        if now - watch.declined_at.get(what, -np.inf) < self._decline_quiet_seconds:
            return
        decline = wire.decline_of(declined, snapshot, watch.limits, policy=self._policy.name)
        await self._urza.decline(watch.uid, decline)
        watch.declined_at[what] = now
        self.counts["declines"] += 1

    async def _judge(self, watch: RunWatch) -> None:
        for adaptation in watch.active:
            if adaptation.state is not AdaptationState.PROBATION or adaptation.uid in watch.judged:
                continue
            verdict = judge_probation(watch.report, adaptation, now=time.time()).verdict
            if verdict is not None:
                await self._post_verdict(watch, adaptation, verdict)

    async def _post_verdict(
        self, watch: RunWatch, adaptation: protocol.Active, verdict: Verdict
    ) -> None:
        report = watch.report
        resource = await self._urza.adaptation(adaptation.uid)
        since = str(resource.get("since") or "")
        place = place_of(report.snapshot.layer, adaptation.layer, since)
        if place is None:
            at = f"{since} … {adaptation.layer}" if since else adaptation.layer
            raise CodecError(f"{adaptation.uid} is at {at}, which is no layer")
        cost = cost_of(resource, place)
        body = protocol.Verdict.of(verdict, reward_of(verdict, report, adaptation, cost))
        try:
            await self._urza.judge(adaptation.uid, body, key=f"{adaptation.uid}:verdict")
        except TransportError as error:
            if not error.permanent:
                raise
            logger.info("adaptation %s was settled without us: %s", adaptation.uid, error)
        else:
            self.counts["verdicts"] += 1
        watch.judged.add(adaptation.uid)
        watch.outdate()
        if self._learning:
            await self._suggest(adaptation.blueprint)

    async def _suggest(self, slug: str) -> None:
        """A variant of a blueprint that should be tried; without an answer there is none."""
        try:
            blueprint = self._selector.blueprint(slug)
            if not isinstance(blueprint, Blueprint):
                return
            found = suggestion_for(blueprint, await self._urza.tried_sizes(slug))
            if found is not None:
                await self._urza.suggest_variant(slug, found)
                self.counts["suggestions"] += 1
        except (TransportError, CodecError, UnknownBlueprintError) as error:
            logger.info("no variant of %s was suggested: %s", slug, error)

    def _give_up(self, watch: RunWatch, error: TransportError) -> None:
        """The server refuses this for good: the run is gone, or one side has an error."""
        self.counts["errors"] += 1
        logger.error("run %s: %s", watch.uid, error)
        watch.undecided = False
        if error.status in (404, 410):
            self.watches.pop(watch.uid, None)

    def status(self) -> dict[str, Any]:
        """Numbers about the runs and the decisions so far."""
        return {
            "runs": {
                uid: {
                    "step": watch.report.snapshot.step,
                    "epoch": watch.report.snapshot.epoch,
                    "frames": len(watch.report.snapshot.frames),
                    "active_adaptations": len(watch.active),
                }
                for uid, watch in self.watches.items()
                if watch.known
            },
            "decisions": dict(self.counts),
            "decision_ms": _percentiles(self.decision_ms),
        }


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    p50, p99 = np.percentile(np.array(values), [50, 99])
    return {"p50": round(float(p50), 3), "p99": round(float(p99), 3)}
