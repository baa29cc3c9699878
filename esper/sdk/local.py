"""The whole loop in one process, with no server: decide, graft, judge, learn.

frame -> decide() -> automatic: grafted at this step boundary
                  -> asks:      kept in ``session.waiting`` until a person says yes or no
graft -> probation -> judge() -> kept, or taken out again -> experience -> decide()
"""

from __future__ import annotations

import logging
import math
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
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
    SafetyPolicy,
    Verdict,
)
from esper.health.features import MAX_FRAMES
from esper.pipeline import decide
from esper.policy import HeuristicPolicy
from esper.reward import LossWindow, compute_reward, judge
from esper.sdk.surgeon import Adaptation, Operation, Surgeon
from esper.selection import BlueprintSelector

logger = logging.getLogger("esper")

SECONDS_PER_DAY = 86_400.0
Losses = Sequence[tuple[int, float]] | deque[tuple[int, float]]


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


class LocalLoop:
    """Decides for one run, from what the session measures.

    Args:
        surgeon: whose adaptations are judged.
        limits: the safety policy in force.
    """

    def __init__(self, surgeon: Surgeon, limits: Callable[[], SafetyPolicy]) -> None:
        self._surgeon = surgeon
        self._limits = limits
        self._policy = HeuristicPolicy()
        self._selector = BlueprintSelector(blueprints.list_blueprints())
        self._frames: deque[HealthFrame] = deque(maxlen=MAX_FRAMES)
        self._waiting: list[Waiting] = []
        self._experience: dict[str, Experience] = {}
        self._grafted_at: list[float] = []  # seconds since the epoch
        self._last: dict[str, tuple[int, bool]] = {}  # layer -> (step, rolled back)
        self._run = ""
        self._mode = RunMode.OBSERVE
        self._layers: tuple[LayerInfo, ...] = ()
        self._model_parameters = 0
        self.declined: Declined | None = None  # the latest "no", with its reasons

    def open(
        self,
        *,
        run: str,
        mode: RunMode,
        layers: tuple[LayerInfo, ...],
        model_parameters: int,
    ) -> None:
        """The run as its first step has shown it."""
        self._run, self._mode = run, mode
        self._layers, self._model_parameters = layers, model_parameters

    @property
    def waiting(self) -> tuple[Waiting, ...]:
        """Decisions that nobody has taken yet; time never approves one."""
        now = time.time()
        self._waiting = [entry for entry in self._waiting if entry.expires_at > now]
        return tuple(self._waiting)

    def consider(self, frame: HealthFrame, step: int, losses: Losses) -> Operation | None:
        """What to graft now, if anything; a decision that asks is put in :attr:`waiting`."""
        self._frames.append(frame)
        if self._mode is RunMode.OBSERVE:
            return None
        snapshot = self._snapshot(step, losses)
        rng = np.random.default_rng(step)
        outcome = decide(snapshot, self._policy, self._selector, self._limits(), rng)
        if isinstance(outcome, Declined):
            self.declined = outcome
            return None
        if not outcome.automatic:
            self._ask(outcome)
            return None
        return self._operation(outcome, step)

    def take_approved(self, waiting: Waiting, step: int) -> Operation:
        """The operation of a waiting decision, which waits no longer.

        Raises:
            ValueError: it expired, or was taken already.
        """
        if waiting not in self.waiting:
            raise ValueError("this decision is not waiting any more")
        self._waiting.remove(waiting)
        return self._operation(waiting.decision, step)

    def reject(self, waiting: Waiting) -> None:
        """A person said no; the layer is left alone for its cooldown."""
        self._waiting = [entry for entry in self._waiting if entry is not waiting]
        step = waiting.decision.step
        self._last[waiting.layer] = (step, False)

    def verdicts(self, step: int, losses: Losses) -> list[tuple[Adaptation, Verdict]]:
        """Ends of probation at this step. A graft that is not to be kept is still in."""
        found = []
        for entry in self._surgeon.grafted:
            if entry.state is AdaptationState.PROBATION:
                verdict = self._judge(entry, step, losses)
                if verdict is not None:
                    self._close(entry, verdict, step)
                    if verdict.keep:
                        entry.state = AdaptationState.KEPT
                    found.append((entry, verdict))
        return found

    def on_rolled_back(self, gone: Iterable[Adaptation], step: int, reason: str) -> None:
        """The guard took grafts out: the worst that can happen to a blueprint."""
        for entry in gone:
            self._close(entry, Verdict(keep=False, reason=reason), step)

    def on_failed(self, operation: Operation, step: int) -> None:
        """It could not be grafted; asking again at once would fail again."""
        self._last[operation.layer.name] = (step, True)

    # -- saving --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What it has learned and when it acted; frames are measured again."""
        return {
            "experience": {slug: asdict(seen) for slug, seen in self._experience.items()},
            "grafted_at": list(self._grafted_at),
            "last": {layer: list(entry) for layer, entry in self._last.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes all of it or, when something is wrong with it, nothing."""
        experience = {str(slug): Experience(**seen) for slug, seen in state["experience"].items()}
        grafted_at = [float(moment) for moment in state["grafted_at"]]
        last = {str(layer): (int(at), bool(back)) for layer, (at, back) in state["last"].items()}
        self._experience, self._grafted_at, self._last = experience, grafted_at, last

    # -- the steps -----------------------------------------------------------------------------

    def _snapshot(self, step: int, losses: Losses) -> RunSnapshot:
        added = [entry.receipt for entry in self._surgeon.grafted if entry.receipt is not None]
        on_probation = [e for e in self._surgeon.grafted if e.state is AdaptationState.PROBATION]
        day_ago = time.time() - SECONDS_PER_DAY
        return RunSnapshot(
            run=self._run,
            epoch=1,
            mode=self._mode,
            step=step,
            layers=self._layers,
            frames=tuple(self._frames),
            loss_steps=np.array([at for at, _ in losses], dtype=np.int64),
            loss=np.array([loss for _, loss in losses], dtype=np.float64),
            model_parameters=self._model_parameters,
            added_parameters=sum(receipt.certificate.parameters for receipt in added),
            adaptations_today=sum(at > day_ago for at in self._grafted_at),
            in_flight=len(on_probation) + len(self.waiting),
            last_adaptation_step=max((at for at, _ in self._last.values()), default=-1),
            history={layer.name: self._history(layer.name) for layer in self._layers},
            experience=dict(self._experience),
        )

    def _history(self, layer: str) -> LayerHistory:
        here = [entry for entry in self._surgeon.grafted if entry.layer == layer]
        step, rolled_back = self._last.get(layer, (-1, False))
        return LayerHistory(
            grafts=tuple(entry.blueprint for entry in here),
            in_flight=any(entry.state is AdaptationState.PROBATION for entry in here)
            or any(entry.layer == layer for entry in self._waiting),
            last_adaptation_step=step,
            last_rolled_back=rolled_back,
        )

    def _ask(self, decision: Decision) -> None:
        timeout = self._limits().approval_timeout_seconds
        self._waiting.append(Waiting(decision, time.time() + timeout))
        logger.info(
            "step %d: %s at %s waits for a person: %s",
            decision.step,
            decision.blueprint,
            decision.adaptation.layer_name,
            "; ".join(decision.asks),
        )

    def _operation(self, decision: Decision, step: int) -> Operation:
        name = decision.adaptation.layer_name
        self._last[name] = (step, False)
        self._grafted_at.append(time.time())
        layer = next(layer for layer in self._layers if layer.name == name)
        seed = zlib.crc32(f"{self._run}:{step}:{name}:{decision.blueprint}".encode())
        return Operation(
            layer=layer,
            blueprint=blueprints.get_blueprint(decision.blueprint),
            config=decision.config,
            seed=seed,
            uid=self._surgeon.next_uid(),
        )

    def _judge(self, entry: Adaptation, step: int, losses: Losses) -> Verdict | None:
        limits = self._limits()
        waited = time.time() - entry.grafted_at
        return judge(
            _window(entry.loss_before),
            _window([(at, loss) for at, loss in losses if at > entry.step]),
            graft_step=entry.step,
            policy=limits,
            kind=blueprints.get_blueprint(entry.blueprint).kind,
            ablation_gain=entry.ablation_gain,
            deadline_reached=waited > limits.probation_timeout_seconds,
        )

    def _close(self, entry: Adaptation, verdict: Verdict, step: int) -> None:
        """Write what the case taught: reward and experience."""
        entry.verdict = verdict
        self._last[entry.layer] = (step, not verdict.keep)
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
            policy=self._limits(),
        )
        seen = self._experience.get(entry.blueprint, Experience())
        self._experience[entry.blueprint] = _with_case(seen, verdict.keep, entry.reward.total)


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
