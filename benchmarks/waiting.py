"""Adaptations that wait for a person, and the person who approves them while a benchmark runs."""

from __future__ import annotations

import os
import threading
import time
import uuid
from typing import Any

import httpx

from benchmarks.installation import Installation
from esper.contracts import (
    AdaptationType,
    CostForecast,
    LayerInfo,
    Risk,
    RunMode,
    codec,
    protocol,
)


def use_database_of(installation: Installation) -> None:
    """Django in this process, on the tables of the installation; called once, before any model."""
    import django

    os.environ["ESPER_DATA_DIR"] = str(installation.data_dir)
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "esper_web.settings.local")
    os.environ["DJANGO_ALLOW_ASYNC_UNSAFE"] = "true"
    django.setup()


def layer(name: str, width: int = 64) -> LayerInfo:
    return LayerInfo(
        name=name,
        kind="Linear",
        in_shape=(8, width),
        out_shape=(8, width),
        dtype="float32",
        parameters=width * (width + 1),
        graftable=True,
        features_in=width,
        features_out=width,
    )


def registration(name: str, layers: int) -> protocol.Registration:
    return protocol.Registration(
        name=name,
        mode=RunMode.AUTOMATIC,
        host="benchmark",
        capability="cpu",
        target_steps=1_000_000,
        versions={"torch": "2.13.0"},
        model_parameters=layers * 64 * 65,
        layers=tuple(layer(f"layer{index}") for index in range(layers)),
    )


def propose(count: int, *, owner: str = "rafi") -> list[str]:
    """The uids of ``count`` adaptations that wait for approval, each of a run of its own."""
    from apps.accounts.actors import Actor, ActorKind
    from apps.accounts.models import User
    from apps.adaptations.services import propose_adaptation
    from apps.trainers.services import register_run

    person = User.objects.get(username=owner)
    tamiyo, uids = Actor(ActorKind.TAMIYO, "tamiyo"), []
    for number in range(count):
        name = f"waits-{number}-{uuid.uuid4().hex[:6]}"
        found = register_run(
            owner=person, actor=Actor.person(person), spec=registration(name, layers=1)
        )
        found.run.step = 1000
        found.run.save(update_fields=["step"])
        adaptation = propose_adaptation(
            run=found.run,
            proposal=_proposal(found.run.epoch),
            idempotency_key=f"{found.run.uid}:benchmark",
            actor=tamiyo,
        )
        uids.append(adaptation.uid)
    return uids


def _proposal(epoch: int) -> protocol.Proposal:
    return protocol.Proposal(
        epoch=epoch,
        step=1000,
        layer="layer0",
        adaptation_type=AdaptationType.ADD_EFFICIENCY,
        confidence=0.6,  # a person is asked
        urgency=0.3,
        blueprint="proj_lora_64",
        config={"rank": 4},
        risk=Risk.LOW,
        forecast=CostForecast(2048, 4096, 0.1, 0.1),
        reasons=(),
        checks=(),
        why_not=(),
        asks=(),
        evidence={"loss": 1.0, "grad_norm": 0.5, "weight_norm": 3.0, "health": 0.5},
        policy="heuristic-1",
    )


class Approver(threading.Thread):
    """Approves one after the other, as a browser does: it reads each, and sends what it was shown.

    Attributes:
        answered_ms: of each approval, from the request to its answer.
        refused: answers other than success, with their text.
    """

    def __init__(
        self, installation: Installation, uids: list[str], *, pause_seconds: float
    ) -> None:
        super().__init__(daemon=True)
        self._installation = installation
        self._uids = uids
        self._pause_seconds = pause_seconds
        self._stopped = threading.Event()
        self.answered_ms: list[float] = []
        self.refused: list[str] = []

    def run(self) -> None:
        """Until all are approved, or until ``finish``."""
        with httpx.Client(base_url=self._installation.url, timeout=60.0) as http:
            sign_in(http, "olga", self._installation.password("olga"))
            for uid in self._uids:
                if self._stopped.is_set():
                    return
                self._approve(http, uid)
                self._stopped.wait(self._pause_seconds)

    def finish(self) -> None:
        """Stop after the approval that is under way."""
        self._stopped.set()
        self.join()

    def _approve(self, http: httpx.Client, uid: str) -> None:
        shown = http.get(f"/api/v1/adaptations/{uid}")
        shown.raise_for_status()
        body = {"reason": "seen", "evidence_hash": shown.json()["evidence_hash"]}
        started = time.perf_counter()
        answer = http.post(
            f"/api/v1/adaptations/{uid}/approve",
            content=codec.encode(body),
            headers={
                "Content-Type": "application/json",
                "If-Match": shown.headers["ETag"],
                "Idempotency-Key": uuid.uuid4().hex,
                "X-CSRFToken": http.cookies["csrftoken"],
            },
        )
        self.answered_ms.append((time.perf_counter() - started) * 1e3)
        if not answer.is_success:
            self.refused.append(f"{answer.status_code} {answer.text[:300]}")


def sign_in(http: httpx.Client, name: str, password: str) -> None:
    """As a browser does; the client keeps the session's cookie."""
    http.get("/login").raise_for_status()
    form: dict[str, Any] = {
        "username": name,
        "password": password,
        "csrfmiddlewaretoken": http.cookies["csrftoken"],
    }
    http.post("/login", data=form)
    if "sessionid" not in http.cookies:
        raise RuntimeError(f"{name} could not sign in")
