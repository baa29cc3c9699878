"""The callers of the API in these tests, and what they send."""

from __future__ import annotations

import base64
import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from django.http import HttpResponse
from django.test import Client

from apps.accounts.models import User
from apps.adaptations.models import Adaptation
from apps.runs.models import Run
from esper.contracts import SIGNALS, TokenScope, codec
from tests.apps.cast import make_layer, token_of

_keys = itertools.count(1)


@dataclass
class Caller:
    """A caller with a token."""

    token: str
    client: Client = field(default_factory=lambda: Client(raise_request_exception=False))

    def get(self, path: str, **headers: str) -> Answer:
        return self._ask("get", path, headers=headers)

    def post(self, path: str, body: Any = None, **headers: str) -> Answer:
        """``body`` may be raw bytes. An idempotency key is added unless one is given."""
        content = body if isinstance(body, bytes) else codec.encode(body or {})
        headers.setdefault("Idempotency-Key", f"key-{next(_keys)}")
        kind = headers.pop("Content-Type", "application/json")
        return self._ask("post", path, data=content, content_type=kind, headers=headers)

    def delete(self, path: str) -> Answer:
        return self._ask("delete", path, headers={})

    def act(self, path: str, body: Any = None, *, version: int) -> Answer:
        return self.post(path, body, **{"If-Match": f'"{version}"'})

    def _ask(self, method: str, path: str, *, headers: dict[str, str], **rest: Any) -> Answer:
        if self.token:
            headers.setdefault("Authorization", f"Bearer {self.token}")
        path = path.removeprefix("http://testserver")  # links in answers are absolute
        url = path if path.startswith("/") else f"/api/v1/{path}"
        return Answer(getattr(self.client, method)(url, headers=headers, **rest))


@dataclass
class Answer:
    response: HttpResponse

    @property
    def status(self) -> int:
        return self.response.status_code

    @property
    def data(self) -> Any:
        return codec.decode(self.response.content, max_bytes=1 << 24)

    @property
    def code(self) -> str:
        """The problem's code; fails when it is no problem document."""
        assert self.response.headers["Content-Type"] == "application/problem+json", self.data
        problem = self.data
        assert {"type", "title", "status", "detail", "code", "request_id", "errors"} <= set(problem)
        assert problem["status"] == self.status
        assert problem["type"] == f"/api/docs/problems#{problem['code']}"
        assert problem["request_id"] == self.response.headers["X-Request-Id"]
        return str(problem["code"])

    def header(self, name: str) -> str:
        return str(self.response.headers.get(name, ""))


def layer(name: str, **changes: Any) -> dict[str, Any]:
    return {**make_layer(name).to_wire(), **changes}


LAYERS = [layer("fc"), layer("head")]


def registration(**changes: Any) -> dict[str, Any]:
    return {
        "name": "digits",
        "mode": "automatic",
        "host": "elsewhere",
        "capability": "cpu",
        "target_steps": 5000,
        "versions": {"torch": "2.13.0", "python": "3.11", "esper": "0.1.0"},
        "model_parameters": 100_000,
        "layers": LAYERS,
        **changes,
    }


def frame(step: int, value: float = 0.5, layers: int = len(LAYERS)) -> dict[str, Any]:
    values = np.full((layers, len(SIGNALS)), value, dtype="<f4")
    return {
        "step": step,
        "wall_time": 1795000000.0 + step,
        "values": base64.b64encode(values.tobytes()).decode(),
    }


def metrics(step: int, **values: Any) -> dict[str, Any]:
    return {"step": step, "wall_time": 1795000000.0 + step, "values": values}


@dataclass
class Trainer(Caller):
    """A registered trainer; ``caller`` is its run token."""

    run: str = ""
    epoch: int = 1
    seq: int = 0
    answer: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return f"runs/{self.run}"

    def batch(self, *, frames: Any = (), metrics: Any = (), findings: Any = ()) -> dict[str, Any]:
        items = len(frames) + len(metrics) + len(findings)
        first, self.seq = self.seq + 1, self.seq + items
        return {
            "epoch": self.epoch,
            "seq_from": first,
            "seq_to": self.seq,
            "frames": list(frames),
            "metrics": list(metrics),
            "findings": list(findings),
            "dropped": 0,
        }

    def send(self, **items: Any) -> Answer:
        return self.post(f"{self.path}/telemetry", self.batch(**items))

    def row(self) -> Run:
        return Run.objects.get(uid=self.run)


def register(user: User, **changes: Any) -> Trainer:
    answer = Caller(token_of(user, TokenScope.RUNS_CREATE)).post("runs", registration(**changes))
    assert answer.status == 201, answer.data
    data = answer.data
    return Trainer(token=data["token"], run=data["uid"], epoch=data["epoch"], answer=data)


def proposal(step: int = 1000, **changes: Any) -> dict[str, Any]:
    return {
        "epoch": 1,
        "step": step,
        "layer": "fc",
        "adaptation_type": "add_efficiency",
        "confidence": 0.6,
        "urgency": 0.3,
        "reasons": [
            {"signal": "loss", "observed": "nan", "weight": 0.5, "text": "The loss stands still."}
        ],
        "blueprint": "proj_lora_64",
        "config": {"rank": 4},
        "risk": "low",
        "forecast": {
            "parameters": 2048,
            "flops": 4096,
            "memory_mib": 0.1,
            "latency_ms": 0.1,
        },
        "checks": [],
        "why_not": [{"blueprint": "attn_std", "reason": "The layer has no sequence."}],
        "asks": [],
        "evidence": {
            "loss": 1.0,
            "grad_norm": 0.5,
            "weight_norm": 3.0,
            "health": 0.5,
            "act_std": "nan",
        },
        "policy": "heuristic-1",
        **changes,
    }


def shown(adaptation: Adaptation) -> dict[str, str]:
    """The part of an approval that binds it to what the person was shown."""
    return {"evidence_hash": adaptation.evidence_hash}


@dataclass
class Inbox:
    """A run at step 1000 with telemetry, and Tamiyo who proposes."""

    trainer: Trainer
    tamiyo: Caller

    def propose(self, **changes: Any) -> Answer:
        body = proposal(**changes)
        key = f"{self.trainer.run}:1:{body['step']}:{body['layer']}:add_efficiency"
        headers = {"Idempotency-Key": key}
        return self.tamiyo.post(f"{self.trainer.path}/adaptations", body, **headers)

    def waiting(self) -> Adaptation:
        answer = self.propose()
        assert answer.status == 201, answer.data
        return Adaptation.objects.get(uid=answer.data["uid"])
