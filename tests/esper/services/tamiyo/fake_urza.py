"""A small server that speaks the part of the protocol that Tamiyo uses, over real HTTP.

It keeps what the real one promises: one adaptation per idempotency key, a layer with an adaptation
under way says so in the snapshot, and acts without ``If-Match`` answer 428 where asked to.
"""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from esper import blueprints
from esper.contracts import SIGNAL_INDEX, SIGNALS, LayerInfo, SafetyPolicy, Signal, codec, wire
from esper.services.tamiyo.test_integration import STATUS_KEYS
from tests.esper.conftest import LACKS_CAPACITY

LAYERS = tuple(
    LayerInfo(
        name=name,
        kind="Linear",
        in_shape=(32, 16),
        out_shape=(32, 16),
        dtype="float32",
        parameters=272,
        graftable=True,
        features_in=16,
        features_out=16,
        order=order,
    )
    for order, name in enumerate(("fc1", "fc2", "head"))
)
Answer = tuple[int, dict[str, Any]]


def health_values() -> np.ndarray[Any, np.dtype[np.float32]]:
    """A plausible frame: everything is known, and fc2 uses up its capacity."""
    values = np.full((len(LAYERS), len(SIGNALS)), 0.2, dtype=np.float32)
    values[:, SIGNAL_INDEX[Signal.GRAD_NORM]] = (0.1, 0.9, 0.1)
    values[:, SIGNAL_INDEX[Signal.WEIGHT_NORM]] = 3.0
    values[:, SIGNAL_INDEX[Signal.UPDATE_RATIO]] = 1e-3
    values[:, SIGNAL_INDEX[Signal.STABLE_RANK]] = (0.1, 0.5, 0.1)
    values[:, SIGNAL_INDEX[Signal.DEAD_FRACTION]] = 0.0
    values[:, SIGNAL_INDEX[Signal.HEALTH]] = 0.9
    return values


class FakeRun:
    """One run that lacks capacity, so that Tamiyo wants to help."""

    def __init__(self, uid: str) -> None:
        self.uid = uid
        self.epoch = 1
        self.step = 1000
        self.noise = np.random.default_rng(7)
        self.loss = [2.3 * 0.99**i + 0.9 for i in range(300)]
        self.loss += list(0.9 + 0.01 * self.noise.standard_normal(700))
        self.metrics: list[dict[str, Any]] = []
        self.active: list[dict[str, Any]] = []
        self.in_flight: set[str] = set()
        self.last_step = -1

    def train(self, steps: int, *, loss: float = 0.9, spread: float = 0.01) -> None:
        self.step += steps
        self.loss += list(loss + spread * self.noise.standard_normal(steps))

    def snapshot(self) -> dict[str, Any]:
        now = time.time()
        values = base64.b64encode(health_values().tobytes()).decode()
        window = range(max(0, self.step - 900), self.step)
        return {
            "run": self.uid,
            "epoch": self.epoch,
            "mode": "automatic",
            "step": self.step,
            "layers": [layer.to_wire() for layer in LAYERS],
            "frames": [
                {"step": step, "wall_time": now - (self.step - step) / 100, "values": values}
                for step in range(self.step - 200, self.step + 1, 10)
            ],
            "metrics": [
                {"step": step, "wall_time": now, "values": {"loss": self.loss[step]}}
                for step in window
            ]
            + self.metrics,
            "model_parameters": 100_000,
            "added_parameters": 0,
            "adaptations_today": 0,
            "in_flight": len(self.in_flight),
            "last_adaptation_step": self.last_step,
            "frozen": "",
            "history": {
                layer: {
                    "grafts": [],
                    "in_flight": True,
                    "last_adaptation_step": -1,
                    "last_rolled_back": False,
                }
                for layer in self.in_flight
            },
            "experience": {},
            "disabled_blueprints": [],
            "safety_policy": SafetyPolicy().to_wire(),
            "policy_version": 1,
            "active": self.active,
            "findings": [wire.to_wire(LACKS_CAPACITY)],
        }


class FakeUrza:
    """The server; ``with FakeUrza() as urza`` listens on a free port of this machine."""

    def __init__(self) -> None:
        self.runs: dict[str, FakeRun] = {"run_a": FakeRun("run_a")}
        self.proposals: dict[str, dict[str, Any]] = {}  # by idempotency key, in order
        self.proposal_attempts = 0
        self.declines: list[dict[str, Any]] = []
        self.suggestions: list[dict[str, Any]] = []
        self.verdicts: dict[str, dict[str, Any]] = {}
        self.blueprints = [blueprint.slug for blueprint in blueprints.list_blueprints()]
        self.heartbeats: list[dict[str, Any]] = []
        self.requests: list[str] = []
        self.if_match_needed = False
        # Asked before everything else: an answer to give instead, None to go on.
        self.trouble: Callable[[str, str], Answer | None] = lambda method, path: None
        # Asked after a proposal was stored, before it is answered.
        self.after_proposal: Callable[[], None] = lambda: None
        self._lock = threading.Lock()

    def __enter__(self) -> FakeUrza:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer("GET")

            def do_POST(self) -> None:
                self._answer("POST")

            def _answer(self, method: str) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                status, answer = fake.handle(
                    method, self.path, dict(self.headers), codec.decode(body) if body else {}
                )
                content = codec.encode(answer)
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("ETag", '"3"')
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def handle(
        self, method: str, target: str, headers: dict[str, str], body: dict[str, Any]
    ) -> Answer:
        path = target.partition("?")[0].removeprefix("/api/v1/")
        self.requests.append(f"{method} {path}")
        trouble = self.trouble(method, path)
        if trouble:
            return trouble
        if headers.get("Authorization") != "Bearer esp_test":
            return 401, {"code": "unauthorised", "title": "Who are you?"}
        with self._lock:
            return self._route(method, path.split("/"), headers, body)

    def _route(
        self, method: str, path: list[str], headers: dict[str, str], body: dict[str, Any]
    ) -> Answer:
        match method, *path:
            case "GET", "runs":
                return 200, {"results": [{"uid": uid} for uid in self.runs], "next": None}
            case "GET", "runs", uid, "snapshot":
                return (200, self.runs[uid].snapshot()) if uid in self.runs else _missing()
            case "GET", "blueprints":
                return 200, {"results": [{"slug": slug} for slug in self.blueprints], "next": None}
            case "GET", "integration-status":
                return 200, {key: {} for key in STATUS_KEYS}
            case "GET", "experience":
                return 200, {"results": []}
            case "GET", "adaptations", uid:
                return 200, {"uid": uid, "state": "probation"}
            case "POST", "runs", uid, "adaptations":
                return self._propose(self.runs[uid], headers["Idempotency-Key"], body)
            case "GET", "blueprints", _, "tried-sizes":
                taken = [body["factors"] for body in self.suggestions]
                return 200, {"cases": [], "taken": taken, "waiting": bool(taken)}
            case "POST", "blueprints", _, "variants":
                self.suggestions.append(body)
                return 201, {}
            case "POST", "runs", _, "declines":
                self.declines.append(body)
                return 201, {}
            case "POST", "adaptations", uid, "verdict":
                return self._judge(uid, headers, body)
            case "POST", "services", "tamiyo", "heartbeat":
                self.heartbeats.append(body)
                return 200, {}
        return _missing()

    def _propose(self, run: FakeRun, key: str, body: dict[str, Any]) -> Answer:
        self.proposal_attempts += 1
        if key not in self.proposals:
            if body["layer"] in run.in_flight:
                return 409, {"code": "gate-closed", "detail": "busy"}
            self.proposals[key] = body
            run.in_flight.add(body["layer"])
            self.after_proposal()
        return 201, {"uid": f"adp_{len(self.proposals)}", "state": "approved"}

    def _judge(self, uid: str, headers: dict[str, str], body: dict[str, Any]) -> Answer:
        if self.if_match_needed and headers.get("If-Match") != '"3"':
            return 428, {"code": "precondition-required"}
        if uid in self.verdicts:
            return 409, {"code": "not-in-probation"}
        self.verdicts[uid] = body
        for run in self.runs.values():
            run.active = [item for item in run.active if item["uid"] != uid]
        return 200, {}


def _missing() -> Answer:
    return 404, {"code": "not-found", "title": "There is no such thing."}
