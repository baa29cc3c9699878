"""Who proposes, approves, refuses, cancels and takes back while the processes are attacked.

Each act is sent again with the same key until it is answered, as a client should.
"""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import psycopg

from tests.nemesis.installation import Installation
from tests.tls import TRUSTS_NOBODY

QUICK = {
    "cooldown_layer_steps": 0,
    "cooldown_refused_seconds": 0,
    "cooldown_run_steps": 0,
    "max_adaptations_per_day": 100_000,
    "max_in_flight_per_run": 4,
    "max_added_parameters_ratio": 100.0,
    "maturity_steps": 5,
    "probation_steps": 20,
    "probation_timeout_seconds": 60,
    "approval_timeout_seconds": 15,
    "dispatch_timeout_seconds": 20,
    "error_budget_ratio": 1e6,
    "evidence_max_age_seconds": 600.0,
}
NO_MORE = {"cooldown_run_steps": 10**9, "cooldown_layer_steps": 10**9}
ACT_SECONDS = 120.0  # an act is repeated for so long
ASKED_FOR = (("set_lr", {"factor": 0.9}), ("weight_decay", {"value": 0.02}), ("clip_layer", {}))
TRY_AGAIN = frozenset({429, 500, 502, 503, 504})


class People:
    """Vera, Olga, Ada and policy services; several propose at once, and one decides."""

    def __init__(
        self, installation: Installation, seed: int, pause: float, *, proposers: int = 1
    ) -> None:
        self._installation = installation
        self._random = random.Random(seed)
        self._pause = pause  # seconds between two proposals
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._proposers = proposers
        self._numbers = itertools.count(1)  # of proposals
        self.answers: Counter[str] = Counter()
        self.errors: list[str] = []

    # --- acts

    def call(
        self, who: str, method: str, path: str, body: Any = None, *, key: str = "", tag: str = ""
    ) -> httpx.Response:
        """The answer, however often it had to be asked for.

        Raises:
            httpx.HTTPError: nothing answered for two minutes.
        """
        keyring = self._installation.esper.keyring
        tokens, people = keyring["tokens"], keyring["people"]
        secret = tokens[who] if who in tokens else people[who]["token"]
        headers = {
            "Authorization": f"Bearer {secret}",
            "Idempotency-Key": key or str(uuid.uuid4()),
        }
        if tag:
            headers["If-Match"] = tag
        url = f"{self._installation.url}/api/v1/{path}"
        deadline = time.monotonic() + ACT_SECONDS
        while True:
            try:
                answer = httpx.request(
                    method, url, headers=headers, json=body, timeout=20, verify=TRUSTS_NOBODY
                )
                self.answers[str(answer.status_code)] += 1
                if answer.status_code == 500:
                    self.errors.append(f"{method} {path}: {answer.text[:300]}")
                if answer.status_code not in TRY_AGAIN or time.monotonic() > deadline:
                    return answer
            except httpx.HTTPError as error:
                self.answers[type(error).__name__] += 1
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.3)

    def publish(self, changes: dict[str, Any]) -> None:
        draft = self.call("carl", "POST", "policies", {"changes": changes, "reason": "nemesis"})
        assert draft.status_code == 201, draft.text
        if draft.json()["state"] != "draft":
            return  # it allows nothing more than before
        done = self.call("ada", "POST", f"policies/{draft.json()['version']}/approve", {})
        assert done.status_code == 200, done.text

    def switch(self, *, on: bool) -> None:
        self.call("olga", "POST", "adaptation-switch", {"on": on, "reason": "nemesis"})

    def act(self, uid: str, act: str, body: dict[str, Any]) -> None:
        shown = self.call("olga", "GET", f"adaptations/{uid}")
        if shown.status_code != 200:
            return
        if act == "approve":
            body = {**body, "evidence_hash": shown.json()["evidence_hash"], "accept_drift": True}
        tag = shown.headers.get("ETag", "")
        answer = self.call("olga", "POST", f"adaptations/{uid}/{act}", body, tag=tag)
        self.answers[f"{act} {answer.status_code}"] += 1

    # --- their days

    def begin(self) -> None:
        days = [self._propose_now_and_then] * self._proposers
        for day in (*days, self._decide_now_and_then):
            thread = threading.Thread(target=self._endless, args=(day,), daemon=True)
            thread.start()
            self._threads.append(thread)

    def end(self) -> None:
        """They stop proposing and deciding; what waits for a decision expires."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(ACT_SECONDS + 60)

    def _endless(self, day: Callable[[], None]) -> None:
        while not self._stopping.wait(self._pause * self._random.uniform(0.5, 1.5)):
            try:
                day()
            except (httpx.HTTPError, psycopg.Error, KeyError, ValueError) as error:
                self.answers[f"{day.__name__.strip('_')}: {type(error).__name__}"] += 1

    def _propose_now_and_then(self) -> None:
        runs = self._installation.rows(
            "SELECT uid, epoch, step, layers::text FROM runs_run WHERE state = 'running'"
        )
        if not runs:
            return
        uid, epoch, step, layers = self._random.choice(runs)
        if self._random.random() < 0.2:
            remedy, config = self._random.choice(ASKED_FOR)
            body = {"remedy": remedy, "config": config, "reason": "nemesis"}
            answer = self.call("olga", "POST", f"runs/{uid}/ask-for-remedy", body)
            self.answers[f"ask {answer.status_code}"] += 1
            return
        self._propose(uid, epoch, step, self._random.choice(_graftable(layers)))

    def _propose(self, run: str, epoch: int, step: int, layer: str) -> None:
        body = {
            "epoch": epoch,
            "step": step,
            "layer": layer,
            "adaptation_type": "add_diagnostic",
            "confidence": self._random.choice((0.95, 0.5)),  # the second is for a person
            "urgency": 0.1,
            "reasons": [],
            "blueprint": "mon_act_stats",
            "config": {},
            "risk": "none",
            "forecast": {"parameters": 0, "flops": 0, "memory_mib": 0.01, "latency_ms": 0.01},
            "checks": [],
            "why_not": [],
            "asks": [] if self._random.random() < 0.5 else ["The test asks a person."],
            "evidence": {"grad_norm": 1.0, "weight_norm": 1.0},
            "policy": "nemesis",
        }
        key = f"nemesis:{next(self._numbers)}:{layer}"
        answer = self.call("tamiyo", "POST", f"runs/{run}/adaptations", body, key=key)
        self.answers[f"propose {answer.status_code}"] += 1

    def _decide_now_and_then(self) -> None:
        for uid, state in self._installation.rows(
            "SELECT uid, state FROM adaptations_adaptation WHERE state IN "
            "('awaiting_approval', 'compile_queued', 'compiled', 'probation', 'kept')"
        ):
            if self._stopping.is_set():
                return
            chance = self._random.random()
            if state == "awaiting_approval" and chance < 0.5:
                self.act(uid, "approve", {"reason": "nemesis"})
            elif state == "awaiting_approval" and chance < 0.65:
                self.act(uid, "reject", {"reason": "nemesis"})
            elif state in ("compile_queued", "compiled") and chance < 0.05:
                self.act(uid, "cancel", {"reason": "nemesis"})
            elif (state == "probation" and chance < 0.02) or (state == "kept" and chance < 0.002):
                self.act(uid, "rollback", {"reason": "nemesis"})


def _graftable(layers: str) -> list[str]:
    return [layer["name"] for layer in json.loads(layers) if layer["graftable"]]
