"""The whole loop in one process, with no server: decide, graft, judge, learn.

frame -> decide() -> automatic: grafted at this step boundary
                  -> asks:      kept in ``session.waiting`` until a person approves or rejects
                  -> observe:   said to the user, and not done
graft -> probation -> judge() -> kept, or taken out again -> experience -> decide()
"""

from __future__ import annotations

import math
import time
import zlib
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from esper import blueprints
from esper.constraints import check_run, gate_inputs
from esper.contracts import (
    AdaptationDecision,
    AdaptationState,
    AdaptationType,
    CostForecast,
    Decision,
    Declined,
    Experience,
    HealthFrame,
    LayerHistory,
    LayerInfo,
    Plan,
    Reward,
    RunMode,
    RunSnapshot,
    Verdict,
)
from esper.exceptions import EsperError, PlanError
from esper.health import extract_features
from esper.health.features import MAX_FRAMES
from esper.pipeline import consider, decide, place_of_proposal
from esper.planning import plan_run
from esper.policy import HeuristicPolicy
from esper.reward import (
    LossWindow,
    after_later_looks,
    after_undo,
    compute_reward,
    held_out_level,
    judge,
)
from esper.sdk.adaptation import Adaptation, Operation
from esper.sdk.announcing import Announcer, describe, how_to_answer
from esper.sdk.changes import serves_loss
from esper.sdk.compiling_ahead import CompilingAhead
from esper.sdk.experience_file import (
    keep_case,
    keep_change,
    read_experience,
    with_case,
    with_change,
)
from esper.sdk.findings import Findings
from esper.sdk.plans import PlanReceipt, apply_plan
from esper.sdk.run_state import RunState
from esper.sdk.surgery import Surgery
from esper.sdk.twin import Twin
from esper.selection import BlueprintSelector

SECONDS_PER_DAY = 86_400.0
# Observe mode decides only to say what it would propose, so that may cost next to nothing.
FIRST_OPINION_SECONDS, SECONDS_PER_LAYER = 5.0, 0.1  # how long the first one waits
LEVEL_STEPS = 50  # losses whose median is the level of the loss
SMALLEST_EFFECT = 0.005  # share of the loss that matters
OPINION_SHARE = 500  # one part in so many of the time between two


@dataclass(frozen=True, slots=True, eq=False)
class Waiting:
    """A decision that a person must take. ``decision.asks`` says why."""

    decision: Decision
    expires_at: float  # seconds since the epoch
    alone: bool = True  # there are no other ranks

    def __str__(self) -> str:
        minutes = max(0.0, self.expires_at - time.time()) / 60
        answer = how_to_answer(self.decision, alone=self.alone)
        return f"{describe(self.decision)} waits for you. {answer}. It expires in {minutes:.0f} min"

    def __repr__(self) -> str:
        return f"<Waiting {self}>"

    @property
    def layer(self) -> str:
        return self.decision.adaptation.layer_name

    @property
    def blueprint(self) -> str:
        return self.decision.blueprint

    @property
    def confidence(self) -> float:
        return self.decision.adaptation.confidence


@dataclass(slots=True)
class LocalMemory:
    """What the local loop has learned, and when it acted.

    Attributes:
        experience: by blueprint.
        grafted_at: seconds since the epoch.
        last: layer -> (step of its last adaptation, it was rolled back).
    """

    experience: dict[str, Experience] = field(default_factory=dict)
    grafted_at: list[float] = field(default_factory=list)
    last: dict[str, tuple[int, bool]] = field(default_factory=dict)

    def to_state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "experience": {slug: asdict(seen) for slug, seen in self.experience.items()},
            "grafted_at": list(self.grafted_at),
            "last": {layer: list(entry) for layer, entry in self.last.items()},
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> LocalMemory:
        return cls(
            experience={
                str(slug): Experience(**seen) for slug, seen in state["experience"].items()
            },
            grafted_at=[float(moment) for moment in state["grafted_at"]],
            last={str(layer): (int(at), bool(back)) for layer, (at, back) in state["last"].items()},
        )


class LocalLoop:
    """Decides, grafts and judges for one run, from what the session measures.

    Args:
        announcer: says to the user what is done, and what waits.
        findings: a graft answers one of them.
        alone: there are no other ranks.
        ahead: compiles grafts beside the training; None where nothing is grafted.

    Attributes:
        memory: replaced when a checkpoint is loaded.
    """

    def __init__(
        self,
        surgery: Surgery,
        run: RunState,
        announcer: Announcer,
        findings: Findings,
        *,
        alone: bool = True,
        ahead: CompilingAhead | None = None,
    ) -> None:
        self._surgery = surgery
        self._ahead = ahead
        # Decided; it comes once its code is there, and the script is known to keep no average.
        self._coming: Operation | None = None
        self._run = run
        self._announcer = announcer
        self._findings = findings
        self._alone = alone
        self._policy = HeuristicPolicy()
        self._selector = BlueprintSelector(blueprints.list_blueprints())
        self._frames: deque[HealthFrame] = deque(maxlen=MAX_FRAMES)
        self._waiting: list[Waiting] = []
        self._layers: tuple[LayerInfo, ...] = ()
        self._model_parameters = 0
        self._next_opinion = 0.0  # observe mode: when to decide again, by the monotonic clock
        self.memory = LocalMemory(experience=read_experience())

    def open(self, layers: tuple[LayerInfo, ...], model_parameters: int) -> None:
        """The first step is over, so the layers are known."""
        self._layers, self._model_parameters = layers, model_parameters
        wait = FIRST_OPINION_SECONDS + SECONDS_PER_LAYER * len(layers)
        self._next_opinion = time.monotonic() + wait

    def know(self, layers: tuple[LayerInfo, ...]) -> None:
        """More layers have run."""
        self._layers = layers

    @property
    def acts(self) -> bool:
        """Its mode allows it to change the model."""
        return self._run.mode is not RunMode.OBSERVE

    @property
    def waiting(self) -> tuple[Waiting, ...]:
        """Decisions that no person has taken yet. One that expires is not approved."""
        now = time.time()
        for entry in [entry for entry in self._waiting if entry.expires_at <= now]:
            self._waiting.remove(entry)
            self._cool_down(entry.layer)
            self._announcer.expired(entry.decision)
        return tuple(self._waiting)

    def waiting_for(self, layer: str) -> Waiting:
        """The decision that waits for a layer, at most one; raises ``ValueError`` for none."""
        found = next((entry for entry in self.waiting if entry.layer == layer), None)
        if found is None:
            layers = ", ".join(repr(entry.layer) for entry in self.waiting)
            others = f"one waits for {layers}" if layers else "none waits for any layer"
            raise ValueError(f"no decision waits for layer {layer!r}; {others}")
        return found

    def on_frame(self, frame: HealthFrame) -> None:
        """A step with a health frame: end probations that are over, then decide."""
        self.settle_rewards()
        for entry, verdict in self._verdicts():
            if entry.state is AdaptationState.KEPT:
                self._announcer.kept(entry, verdict.reason)
            else:
                hard = entry.restorable and self._left_worse(entry)
                report, gone = self._surgery.removals.take_out(
                    entry, hard=hard, state=AdaptationState.ROLLED_BACK
                )
                self._announcer.taken_out(gone, report, verdict.reason)
        if self._coming is not None:
            self._frames.append(frame)
            self._graft(self._coming)
            return
        decision = self._decide(frame)
        if decision is not None:
            self._graft(self._operation(decision))

    def approve(self, waiting: Waiting) -> Adaptation:
        """A person approved.

        Raises:
            ValueError: it expired, or was taken already.
            The errors of :meth:`Surgery.apply`.
        """
        if waiting not in self.waiting:
            raise ValueError("this decision is not waiting any more")
        self._waiting.remove(waiting)
        operation = self._operation(waiting.decision)
        if self._ahead is not None:
            self._ahead.tell(operation)
        return self._surgery.apply(operation)

    def plan(self, changes: int) -> Plan | Declined:
        """What several changes at once would be; nothing is done.

        Decisions that wait do not stand in the way: an approved plan replaces them.
        """
        rng = np.random.default_rng(self._run.step)
        snapshot, limits = self.snapshot(waiting=()), self._run.policy
        return plan_run(snapshot, self._policy, self._selector, limits, rng, changes=changes)

    def approve_plan(self, plan: Plan) -> PlanReceipt:
        """A person approved a plan; every gate of the run is checked again for each member.

        Raises:
            PlanError: a gate is closed by now, and nothing was touched; or see :func:`apply_plan`.
        """
        snapshot = self.snapshot(waiting=())
        for member in plan.members:
            placed = place_of_proposal(member.adaptation, snapshot, self._run.policy)
            if isinstance(placed, Declined):
                raise PlanError(f"the plan cannot be applied now: {' '.join(placed.reasons)}")
        receipt = apply_plan(plan, self._surgery, self._operation)
        self._waiting.clear()
        return receipt

    def reject(self, waiting: Waiting) -> None:
        """A person rejected; the layer is not adapted during its cooldown."""
        self._waiting = [entry for entry in self._waiting if entry is not waiting]
        self._cool_down(waiting.layer)

    def _cool_down(self, layer: str) -> None:
        """A cooldown begins now; it stays doubled where the last graft was rolled back."""
        _, rolled_back = self.memory.last.get(layer, (-1, False))
        self.memory.last[layer] = (self._run.step, rolled_back)

    def note_twin(self, twin: Twin) -> None:
        """A result that is shown is a closed case of its blueprint."""
        helps = twin.helps(self._run.policy.min_gain_ratio)
        if helps is None:
            return
        experience = self.memory.experience
        seen = experience.get(twin.blueprint, Experience())
        reward = max(0.0, twin.low) if helps else min(0.0, twin.high)
        experience[twin.blueprint] = with_case(seen, helps, reward)
        keep_case(twin.blueprint, kept=helps, reward=reward)

    def on_rolled_back(self, gone: Iterable[Adaptation], reason: str) -> None:
        """The guard took grafts out, which counts as a rollback of each."""
        for entry in gone:
            self._close(entry, Verdict(keep=False, reason=reason))

    def settle_rewards(self) -> None:
        """Kept grafts earn on, at each later look; one that was taken out loses what it earned."""
        for entry in self._surgery.changes.adaptations:
            reward, looks = entry.reward, entry.later_looks(self._run.policy)
            if entry.state is AdaptationState.KEPT and reward is not None:
                self._change_reward(entry, reward, after_later_looks(reward.terms, looks))
            elif entry.state is AdaptationState.REVERTED and reward is not None:
                self._change_reward(entry, reward, after_undo(reward.terms))
            elif entry.state is AdaptationState.REVERTED and entry.verdict is None:
                self._close(entry, Verdict(keep=False, reason="It was taken out before its end."))

    def _change_reward(self, entry: Adaptation, old: Reward, terms: dict[str, float]) -> None:
        if terms == old.terms:
            return
        entry.reward = reward = Reward(terms)
        lost, difference = entry.state is AdaptationState.REVERTED, reward.total - old.total
        experience = self.memory.experience
        if entry.blueprint in experience:
            seen = experience[entry.blueprint]
            experience[entry.blueprint] = with_change(seen, lost, difference)
        keep_change(entry.blueprint, lost=lost, difference=difference)

    # -- deciding ------------------------------------------------------------------------------

    def _decide(self, frame: HealthFrame) -> Decision | None:
        """What to graft now, if anything; a decision that asks is put in :attr:`waiting`."""
        self._frames.append(frame)
        if not self.acts:
            self._say_opinion()
            return None
        outcome = self.decide_now()
        if isinstance(outcome, Declined):
            return None
        if not outcome.automatic:
            self._ask(outcome)
            return None
        return outcome

    def decide_now(self) -> Decision | Declined:
        """What the policy and the gates say at this moment; nothing is done.

        In observe mode it is what a supervised run would be asked.
        """
        rng = np.random.default_rng(self._run.step)
        snapshot = self.snapshot()
        return decide(snapshot, self._policy, self._selector, self._run.policy, rng)

    def reasons_for(self, layer: LayerInfo) -> list[str]:
        """Why this layer is not adapted at this moment: the policy first, then the gates."""
        snapshot, limits = self.snapshot(), self._run.policy
        features = extract_features(snapshot, self._selector.types)
        proposals = self._policy.propose(snapshot, features, np.random.default_rng(0))
        found: list[str] = []
        for proposal in proposals:
            if proposal.layer_name != layer.name:
                continue
            answer = consider(
                proposal,
                snapshot,
                self._selector,
                limits,
                policy=self._policy.name,
                features=features,
            )
            if isinstance(answer, Decision):
                return [f"The policy proposes {describe(answer)}."]
            found.extend(answer.reasons)
        if not found:
            # No rule proposes this layer; the gates that hold in any case are told with it.
            nothing = AdaptationDecision(layer.name, AdaptationType.ADD_DIAGNOSTIC, math.nan)
            gates = check_run(gate_inputs(snapshot, nothing), limits)
            found = [*proposals.reasons, *(check.text for check in gates if check.blocks)]
            if not proposals.reasons:
                others = sorted({proposal.layer_name for proposal in proposals})
                found.insert(0, f"The policy prefers {', '.join(others)}.")
        return found

    def _say_opinion(self) -> None:
        """Observe mode: say what would be proposed, now and then, at no noticeable cost."""
        started = time.monotonic()
        if started < self._next_opinion:
            return
        outcome = self.decide_now()
        ended = time.monotonic()
        self._next_opinion = ended + OPINION_SHARE * (ended - started)
        if isinstance(outcome, Decision):
            self._announcer.would_propose(outcome)

    def _graft(self, operation: Operation) -> None:
        self._coming = None
        if self._surgery.script_copies.must_wait() or (
            self._ahead is not None and self._ahead.waits(operation)
        ):
            self._coming = operation
            return
        try:
            self._surgery.apply(operation)
        except EsperError as error:
            # Asking again at once would fail again.
            self.memory.last[operation.layer.name] = (self._run.step, True)
            self._announcer.not_grafted(str(error))

    def snapshot(self, waiting: Sequence[Waiting] | None = None) -> RunSnapshot:
        """All that a decision of this moment depends on.

        Args:
            waiting: the decisions that count as under way; None: all that wait.
        """
        waiting = self.waiting if waiting is None else waiting
        losses, memory, grafted = self._run.losses, self.memory, self._surgery.changes.grafted
        added = [entry.receipt for entry in grafted if entry.receipt is not None]
        on_probation = [entry for entry in grafted if entry.on_probation]
        day_ago = time.time() - SECONDS_PER_DAY
        return RunSnapshot(
            run=self._run.name,
            epoch=1,
            mode=self._run.mode if self.acts else RunMode.SUPERVISED,
            step=self._run.step,
            layers=self._layers,
            frames=tuple(self._frames),
            loss_steps=np.array([at for at, _ in losses], dtype=np.int64),
            loss=np.array([loss for _, loss in losses], dtype=np.float64),
            model_parameters=self._model_parameters,
            added_parameters=sum(receipt.certificate.parameters for receipt in added),
            adaptations_today=sum(at > day_ago for at in memory.grafted_at),
            in_flight=len(on_probation) + len(waiting) + (self._coming is not None),
            last_adaptation_step=max((at for at, _ in memory.last.values()), default=-1),
            history={layer.name: self._history(layer.name, waiting) for layer in self._layers},
            experience=dict(memory.experience),
            findings=tuple(f for f in self._findings.all() if f.slug),
            held_out=self._run.held_out,
        )

    def _history(self, layer: str, waiting: Sequence[Waiting]) -> LayerHistory:
        here = [entry for entry in self._surgery.changes.grafted if entry.layer == layer]
        step, rolled_back = self.memory.last.get(layer, (-1, False))
        return LayerHistory(
            grafts=tuple(entry.blueprint for entry in here),
            in_flight=any(entry.on_probation for entry in here)
            or any(entry.layer == layer for entry in waiting),
            last_adaptation_step=step,
            last_rolled_back=rolled_back,
        )

    def _ask(self, decision: Decision) -> None:
        timeout = self._run.policy.approval_timeout_seconds
        self._surgery.script_copies.must_wait()  # while the person thinks
        if self._ahead is not None:
            self._ahead.begin(self._planned(decision))
        self._waiting.append(Waiting(decision, time.time() + timeout, self._alone))
        self._announcer.waits(
            decision,
            minutes=timeout / 60,
            alone=self._alone,
            pause=self.pause_of(decision),
        )

    def pause_of(self, decision: Decision) -> str:
        """How long the graft will make a step wait for torch.compile; empty: not at all."""
        forecast = self._ahead.forecast(self._planned(decision)) if self._ahead else None
        return str(forecast) if forecast is not None else ""

    def _operation(self, decision: Decision) -> Operation:
        self.memory.last[decision.adaptation.layer_name] = (self._run.step, False)
        self.memory.grafted_at.append(time.time())
        return self._planned(decision)

    def _planned(self, decision: Decision) -> Operation:
        step, name = self._run.step, decision.adaptation.layer_name
        seed = zlib.crc32(f"{self._run.name}:{step}:{name}:{decision.blueprint}".encode())
        return Operation(
            layer=self._surgery.layer(name, decision.adaptation.since, decision.blueprint),
            blueprint=blueprints.get_blueprint(decision.blueprint),
            config=decision.config,
            seed=seed,
            uid=self._surgery.changes.next_uid(),
        )

    # -- judging -------------------------------------------------------------------------------

    def _verdicts(self) -> list[tuple[Adaptation, Verdict]]:
        """Ends of probation at this step. A graft that is to be taken out is still in."""
        found = []
        for entry in self._surgery.changes.grafted:
            verdict = self._judged(entry) if entry.on_probation else None
            if verdict is not None:
                self._close(entry, verdict)
                # A run that only observes keeps what a person put in, whatever the verdict says.
                if verdict.keep or not self.acts:
                    entry.state = AdaptationState.KEPT
                found.append((entry, verdict))
        return found

    def _judged(self, entry: Adaptation) -> Verdict | None:
        policy = self._run.policy
        waited = time.time() - entry.grafted_at
        found = judge(
            _window(entry.loss_before),
            _window([(at, loss) for at, loss in self._run.losses if at > entry.step]),
            graft_step=entry.step,
            policy=policy,
            kind=blueprints.get_blueprint(entry.blueprint).kind,
            looks=entry.looks,
            serves_loss=serves_loss(entry.blueprint),
            deadline_reached=waited > policy.probation_timeout_seconds,
        )
        entry.test = found.test
        return found.verdict

    def _left_worse(self, entry: Adaptation) -> bool:
        """Without the graft, the host would be worse than it was before the graft, or is unknown.

        A soft undo keeps what the host has learned beside the graft. Where that is no gain, and
        nothing else was changed since, going back is the better undo.
        """
        if not self._surgery.changes.is_last(entry):
            return False
        before = _level([loss for _, loss in entry.loss_before])
        now = _level([loss for at, loss in self._run.losses if at > entry.step])
        gain = entry.ablation_gain if math.isfinite(entry.ablation_gain) else 0.0
        return not now + max(0.0, gain) <= before + SMALLEST_EFFECT * abs(before)

    def _close(self, entry: Adaptation, verdict: Verdict) -> None:
        """Record the outcome: reward and experience."""
        entry.verdict = verdict
        self.memory.last[entry.layer] = (self._run.step, not verdict.keep)
        if entry.receipt is None:
            return
        entry.reward = compute_reward(
            verdict,
            loss_level=_level([loss for _, loss in entry.loss_before]),
            held_out_level=held_out_level(entry.looks),
            cost=_measured_cost(entry),
            model_parameters=self._model_parameters,
            policy=self._run.policy,
        )
        experience = self.memory.experience
        seen = experience.get(entry.blueprint, Experience())
        experience[entry.blueprint] = with_case(seen, verdict.keep, entry.reward.total)
        keep_case(entry.blueprint, kept=verdict.keep, reward=entry.reward.total)


def _level(losses: Sequence[float]) -> float:
    """Median of the newest losses that are finite; NaN where there is none."""
    newest = [loss for loss in losses[-LEVEL_STEPS:] if math.isfinite(loss)]
    return float(np.median(newest)) if newest else math.nan


def _window(losses: Iterable[tuple[int, float]]) -> LossWindow:
    pairs = list(losses)
    return LossWindow(
        steps=np.array([step for step, _ in pairs], dtype=np.int64),
        loss=np.array([loss for _, loss in pairs], dtype=np.float64),
    )


def _measured_cost(entry: Adaptation) -> CostForecast:
    assert entry.receipt is not None
    certificate = entry.receipt.certificate
    return CostForecast(
        parameters=certificate.parameters,
        flops=0,  # not part of the reward
        memory_mib=certificate.memory_mib,
        latency_ms=certificate.latency_ms,
    )
