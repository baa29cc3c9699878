"""The whole loop in one process, with no server: decide, graft, judge, learn.

frame -> decide() -> automatic: grafted at this step boundary
                  -> asks:      kept in ``session.waiting`` until a person approves or rejects
graft -> probation -> judge() -> kept, or taken out again -> experience -> decide()
"""

from __future__ import annotations

import logging
import math
import time
import zlib
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from esper import blueprints
from esper.contracts import (
    AdaptationState,
    CostForecast,
    Decision,
    Declined,
    Experience,
    HealthFrame,
    LayerHistory,
    LayerInfo,
    RunMode,
    RunSnapshot,
    Verdict,
)
from esper.exceptions import EsperError
from esper.health.features import MAX_FRAMES
from esper.pipeline import decide
from esper.policy import HeuristicPolicy
from esper.reward import LossWindow, compute_reward, judge
from esper.sdk.adaptation import Adaptation, Operation
from esper.sdk.run_state import RunState
from esper.sdk.surgery import Surgery
from esper.selection import BlueprintSelector

logger = logging.getLogger("esper")

SECONDS_PER_DAY = 86_400.0


@dataclass(frozen=True, slots=True, eq=False)
class Waiting:
    """A decision that a person must take. ``decision.asks`` says why."""

    decision: Decision
    expires_at: float  # seconds since the epoch

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

    Attributes:
        memory: replaced when a checkpoint is loaded.
    """

    def __init__(self, surgery: Surgery, run: RunState) -> None:
        self._surgery = surgery
        self._run = run
        self._policy = HeuristicPolicy()
        self._selector = BlueprintSelector(blueprints.list_blueprints())
        self._frames: deque[HealthFrame] = deque(maxlen=MAX_FRAMES)
        self._waiting: list[Waiting] = []
        self._layers: tuple[LayerInfo, ...] = ()
        self._model_parameters = 0
        self.memory = LocalMemory()

    def open(self, layers: tuple[LayerInfo, ...], model_parameters: int) -> None:
        """The first step is over, so the layers are known."""
        self._layers, self._model_parameters = layers, model_parameters

    @property
    def acts(self) -> bool:
        """Its mode allows it to change the model."""
        return self._run.mode is not RunMode.OBSERVE

    @property
    def waiting(self) -> tuple[Waiting, ...]:
        """Decisions that no person has taken yet. One that expires is not approved."""
        now = time.time()
        self._waiting = [entry for entry in self._waiting if entry.expires_at > now]
        return tuple(self._waiting)

    def on_frame(self, frame: HealthFrame) -> None:
        """A step with a health frame: end probations that are over, then decide."""
        for entry, verdict in self._verdicts():
            if not verdict.keep and self.acts:
                self._surgery.take_out(entry, hard=False, state=AdaptationState.ROLLED_BACK)
            logger.info(
                "step %d: %s at %s %s: %s",
                self._run.step,
                entry.blueprint,
                entry.layer,
                entry.state,
                verdict.reason,
            )
        decision = self._decide(frame)
        if decision is not None:
            self._graft(decision)

    def approve(self, waiting: Waiting) -> Adaptation:
        """A person approved.

        Raises:
            ValueError: it expired, or was taken already.
            The errors of :meth:`Surgery.apply`.
        """
        if waiting not in self.waiting:
            raise ValueError("this decision is not waiting any more")
        self._waiting.remove(waiting)
        return self._surgery.apply(self._operation(waiting.decision))

    def reject(self, waiting: Waiting) -> None:
        """A person rejected; the layer is not adapted during its cooldown."""
        self._waiting = [entry for entry in self._waiting if entry is not waiting]
        self.memory.last[waiting.layer] = (waiting.decision.step, False)

    def on_rolled_back(self, gone: Iterable[Adaptation], reason: str) -> None:
        """The guard took grafts out, which counts as a rollback of each."""
        for entry in gone:
            self._close(entry, Verdict(keep=False, reason=reason))

    # -- deciding ------------------------------------------------------------------------------

    def _decide(self, frame: HealthFrame) -> Decision | None:
        """What to graft now, if anything; a decision that asks is put in :attr:`waiting`."""
        self._frames.append(frame)
        if not self.acts:
            return None
        rng = np.random.default_rng(self._run.step)
        outcome = decide(self._snapshot(), self._policy, self._selector, self._run.policy, rng)
        if isinstance(outcome, Declined):
            return None
        if not outcome.automatic:
            self._ask(outcome)
            return None
        return outcome

    def _graft(self, decision: Decision) -> None:
        operation = self._operation(decision)
        try:
            self._surgery.apply(operation)
        except EsperError as error:
            # Asking again at once would fail again.
            self.memory.last[operation.layer.name] = (self._run.step, True)
            logger.warning("step %d: not grafted: %s", self._run.step, error)

    def _snapshot(self) -> RunSnapshot:
        losses, memory, grafted = self._run.losses, self.memory, self._surgery.changes.grafted
        added = [entry.receipt for entry in grafted if entry.receipt is not None]
        on_probation = [entry for entry in grafted if entry.on_probation]
        day_ago = time.time() - SECONDS_PER_DAY
        return RunSnapshot(
            run=self._run.name,
            epoch=1,
            mode=self._run.mode,
            step=self._run.step,
            layers=self._layers,
            frames=tuple(self._frames),
            loss_steps=np.array([at for at, _ in losses], dtype=np.int64),
            loss=np.array([loss for _, loss in losses], dtype=np.float64),
            model_parameters=self._model_parameters,
            added_parameters=sum(receipt.certificate.parameters for receipt in added),
            adaptations_today=sum(at > day_ago for at in memory.grafted_at),
            in_flight=len(on_probation) + len(self.waiting),
            last_adaptation_step=max((at for at, _ in memory.last.values()), default=-1),
            history={layer.name: self._history(layer.name) for layer in self._layers},
            experience=dict(memory.experience),
        )

    def _history(self, layer: str) -> LayerHistory:
        here = [entry for entry in self._surgery.changes.grafted if entry.layer == layer]
        step, rolled_back = self.memory.last.get(layer, (-1, False))
        return LayerHistory(
            grafts=tuple(entry.blueprint for entry in here),
            in_flight=any(entry.on_probation for entry in here)
            or any(entry.layer == layer for entry in self._waiting),
            last_adaptation_step=step,
            last_rolled_back=rolled_back,
        )

    def _ask(self, decision: Decision) -> None:
        timeout = self._run.policy.approval_timeout_seconds
        self._waiting.append(Waiting(decision, time.time() + timeout))
        logger.info(
            "step %d: %s at %s waits for a person: %s",
            decision.step,
            decision.blueprint,
            decision.adaptation.layer_name,
            "; ".join(decision.asks),
        )

    def _operation(self, decision: Decision) -> Operation:
        step, name = self._run.step, decision.adaptation.layer_name
        self.memory.last[name] = (step, False)
        self.memory.grafted_at.append(time.time())
        seed = zlib.crc32(f"{self._run.name}:{step}:{name}:{decision.blueprint}".encode())
        return Operation(
            layer=next(layer for layer in self._layers if layer.name == name),
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
            verdict = self._judge(entry) if entry.on_probation else None
            if verdict is not None:
                self._close(entry, verdict)
                # A run that only observes keeps what a person put in, whatever the verdict says.
                if verdict.keep or not self.acts:
                    entry.state = AdaptationState.KEPT
                found.append((entry, verdict))
        return found

    def _judge(self, entry: Adaptation) -> Verdict | None:
        policy = self._run.policy
        waited = time.time() - entry.grafted_at
        return judge(
            _window(entry.loss_before),
            _window([(at, loss) for at, loss in self._run.losses if at > entry.step]),
            graft_step=entry.step,
            policy=policy,
            kind=blueprints.get_blueprint(entry.blueprint).kind,
            ablation_gain=entry.ablation_gain,
            deadline_reached=waited > policy.probation_timeout_seconds,
        )

    def _close(self, entry: Adaptation, verdict: Verdict) -> None:
        """Record the outcome: reward and experience."""
        entry.verdict = verdict
        self.memory.last[entry.layer] = (self._run.step, not verdict.keep)
        if entry.receipt is None:
            return
        blueprint = blueprints.get_blueprint(entry.blueprint)
        levels = [loss for _, loss in entry.loss_before[-50:] if math.isfinite(loss)]
        entry.reward = compute_reward(
            verdict,
            loss_level=float(np.median(levels)) if levels else math.nan,
            cost=_measured_cost(entry),
            model_parameters=self._model_parameters,
            risk=blueprint.risk,
            policy=self._run.policy,
        )
        experience = self.memory.experience
        seen = experience.get(entry.blueprint, Experience())
        experience[entry.blueprint] = _with_case(seen, verdict.keep, entry.reward.total)


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


def _with_case(seen: Experience, keep: bool, reward: float) -> Experience:
    total = seen.cases * seen.mean_reward if seen.cases else 0.0
    return Experience(
        kept=seen.kept + keep,
        rolled_back=seen.rolled_back + (not keep),
        mean_reward=(total + reward) / (seen.cases + 1),
    )
