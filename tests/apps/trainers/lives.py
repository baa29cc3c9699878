"""Real trainers of one run, one after the other, at a real server."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from django.utils import timezone

import esper
from apps.accounts.services import issue_token
from apps.adaptations import services
from apps.adaptations.models import Adaptation
from apps.policies.services import current_policy
from apps.runs.models import Run
from esper import blueprints
from esper.contracts import AdaptationState, TokenScope, Verdict
from esper.sdk.adaptation import Operation
from tests.apps.cast import TAMIYO, TRAINER
from tests.apps.stage import Stage
from tests.esper.sdk.tiny_training import Training

S = AdaptationState


class Lives:
    """One run of several lives, each a trainer of its own."""

    def __init__(self, stage: Stage, server: str) -> None:
        self.stage = stage
        self._server = server
        scopes = [TokenScope.RUNS_CREATE]
        _, self._token = issue_token(
            owner=stage.owner, name="trainer", scopes=scopes, actor=TRAINER
        )
        self.sessions: list[esper.Session] = []

    def begin(self, state: dict[str, Any] | None = None) -> tuple[Training, esper.Session]:
        """Attached, resumed from ``state``, and its hello is answered."""
        training = Training()
        session = esper.attach(
            training.model,
            training.optimizer,
            scheduler=training.scheduler,
            run="lives",
            mode="automatic",
            server=self._server,
            token=self._token,
        )
        self.sessions.append(session)
        if state is not None:
            session.load_state_dict(state)
        training.run(1, session)
        for older in self.sessions[:-1]:  # it is told that it was replaced, and stops
            until(lambda older=older: not alive(older), "the older life gives up")
        until(lambda: sender_of(session) is not None, "its hello is answered")
        return training, session

    def graft(self, training: Training, session: esper.Session) -> Adaptation:
        """As a command would have it: in the model, and in probation on the server."""
        adaptation = Adaptation.objects.create(
            run=self.run,
            run_epoch=self.run.epoch,
            idempotency_key="lives",
            layer="3",
            adaptation_type="add_efficiency",
            blueprint=self.stage.blueprint,
            risk="low",
            forecast_parameters=1,
            policy="heuristic-1",
            safety_policy=current_policy(),
            proposed_step=1,
            graft_step=1,
            grafted_at=timezone.now(),
            state=S.PROBATION,
        )
        layer = next(layer for layer in session.layers if layer.name == "3")
        lora = blueprints.get_blueprint("proj_lora_64")
        session._parts.surgery.apply(Operation(layer, lora, {}, seed=1, uid=adaptation.uid))
        training.run(3, session)
        return adaptation

    @property
    def run(self) -> Run:
        return Run.objects.get(name="lives")


def alive(session: esper.Session) -> bool:
    thread = session._parts.server and session._parts.server._transport._thread
    return thread is not None and thread.is_alive()


def sender_of(session: esper.Session) -> object:
    """The transport makes it once its hello was answered."""
    return session._parts.server and session._parts.server._transport._sender


def until(condition: Callable[[], object], what: str, seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited in vain until {what}"
        time.sleep(0.02)


def judged(adaptation: Adaptation, *, keep: bool) -> Adaptation:
    verdict = Verdict(keep=keep, reason="as the test wants it")
    return services.judge_adaptation(
        adaptation=adaptation, verdict=verdict, reward_terms={}, actor=TAMIYO
    )


def state_of(adaptation: Adaptation) -> str:
    return Adaptation.objects.get(pk=adaptation.pk).state
