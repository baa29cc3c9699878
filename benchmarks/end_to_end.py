"""Triggering frame leaves the trainer -> graft acknowledged, through the real processes.

A trainer that implements the protocol registers a run whose loss has long been flat, sends the
finding and the frame that trigger Tamiyo, and answers the command with a real graft into a real
model. The rest is Esper as ``./up`` starts it: web, Valkey, Tamiyo, compile worker, control worker.
"""

from __future__ import annotations

import asyncio
import base64
import platform
import time
import uuid
from collections.abc import Iterable
from typing import Any

import httpx
import numpy as np
import torch
from torch import nn
from websockets.asyncio.client import connect

from benchmarks.installation import Installation, installation
from esper import __version__, blueprints, grafting
from esper.compilation import capability, open_kernel
from esper.compilation.instantiate import instantiate
from esper.contracts import (
    BUNDLE_FILES,
    SIGNAL_INDEX,
    SIGNALS,
    Command,
    CommandAck,
    CommandState,
    Finding,
    LayerInfo,
    Severity,
    Signal,
    ViolationRule,
    codec,
    signing,
    wire,
)
from hosts.keyring import read_keyring

STEPS = 1000
BATCH = 200
START_SECONDS = 180.0
ADAPTATION_SECONDS = 60.0
PAUSE_SECONDS = 2.0  # the server slows a run down that has just sent its whole history at once
# Without it nothing is proposed. It names no layer, so the bottleneck is what the signals show.
LACKS_CAPACITY = Finding(
    ViolationRule.DIAGNOSIS,
    "",
    Severity.CAUTION,
    f"The loss has been flat for {STEPS} steps.",
    "a loss that falls",
    "Let it grow.",
    slug="capacity",
    since_step=0,
)
Json = dict[str, Any]


def end_to_end(adaptations: int, *, server: str = "", token: str = "") -> list[float]:
    """Milliseconds of each adaptation, one run after the other.

    Args:
        adaptations: how many; one more comes first, to wait for all processes and warm them up.
        server, token: a running Esper, whose policy lets a graft of any confidence go alone, and a
            token with scope ``runs:create``; default: start one in a temporary directory.

    Raises:
        RuntimeError, TimeoutError: Esper did not start, or an adaptation did not arrive.
    """
    if server:
        return asyncio.run(_measure(server, token, adaptations))
    with installation() as esper:
        _let_grafts_go_alone(esper)
        return asyncio.run(_measure(esper.url, esper.token("trainer"), adaptations))


def _let_grafts_go_alone(esper: Installation) -> None:
    """What is measured is the way without a person, so any confidence is enough."""
    people = read_keyring(esper.data_dir)["people"]

    def post(person: str, path: str, body: Json) -> Json:
        headers = {
            "Authorization": f"Bearer {people[person]['token']}",
            "Idempotency-Key": uuid.uuid4().hex,
        }
        answer = httpx.post(f"{esper.url}/api/v1/{path}", json=body, headers=headers, timeout=30.0)
        if not answer.is_success:
            raise RuntimeError(f"POST {path}: {answer.status_code} {answer.text[:500]}")
        return dict(answer.json())

    changes = {"confidence_refuse": 0.0, "confidence_auto": 0.0, "max_adaptations_per_day": 1000}
    draft = post("carl", "policies", {"changes": changes, "reason": "benchmark"})
    post("ada", f"policies/{draft['version']}/approve", {})


async def _measure(url: str, token: str, adaptations: int) -> list[float]:
    await _adapt(url, token, patience=START_SECONDS)
    return [await _adapt(url, token, patience=ADAPTATION_SECONDS) for _ in range(adaptations)]


async def _adapt(url: str, token: str, *, patience: float) -> float:
    async with httpx.AsyncClient(base_url=f"{url}/api/v1/", timeout=30.0) as http:
        trainer = Trainer(http)
        await trainer.register(token)
        async with (
            asyncio.timeout(patience),
            connect(
                f"{url.replace('http', 'ws', 1)}/ws/v1/trainer/{trainer.uid}?after=0",
                additional_headers={"Authorization": f"Bearer {trainer.token}"},
            ) as socket,
        ):
            await trainer.send_history()
            await asyncio.sleep(PAUSE_SECONDS)
            started = time.perf_counter()
            await trainer.send_frame()
            async for message in socket:
                received = codec.decode(message)
                if received["type"] == "command":
                    await trainer.carry_out(received["command"], received["signature"])
                    break
            elapsed_ms = (time.perf_counter() - started) * 1e3
        await trainer.finish()
    return elapsed_ms


class Trainer:
    """One run, with a model of three layers."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.model = build_model()
        self.layers = trace_model(self.model)
        self._http = http
        self._registration: Json = {}
        self._seq = 0
        self._rng = np.random.default_rng(0)

    async def register(self, token: str) -> None:
        """Raises ``RuntimeError`` when the server refuses."""
        body = {
            "name": f"latency-{uuid.uuid4().hex[:8]}",
            "mode": "automatic",
            "host": "benchmark",
            "capability": capability(),
            "target_steps": 10 * STEPS,
            "versions": {
                "torch": torch.__version__,
                "python": platform.python_version(),
                "esper": __version__,
            },
            "model_parameters": sum(p.numel() for p in self.model.parameters()),
            "layers": [layer.to_wire() for layer in self.layers],
        }
        self._registration = await _post(self._http, "runs", body, token)
        await self._send("hello", {"epoch": self._epoch, "step": 0, "applied": []})

    @property
    def uid(self) -> str:
        return str(self._registration["uid"])

    @property
    def token(self) -> str:
        return str(self._registration["token"])

    async def send_history(self) -> None:
        """A loss that fell and has been flat since; without a frame, so nothing is triggered."""
        loss = losses(self._rng)
        for begin in range(0, STEPS, BATCH):
            steps = range(begin, begin + BATCH)
            await self._telemetry(
                metrics=[_metric(step, float(loss[step])) for step in steps], frames=[]
            )

    async def send_frame(self) -> None:
        values = signals(len(self.layers))
        text = base64.b64encode(values.tobytes()).decode("ascii")
        frame = {"step": STEPS, "wall_time": time.time(), "values": text}
        await self._telemetry(
            metrics=[_metric(STEPS, 0.9)], frames=[frame], findings=[wire.to_wire(LACKS_CAPACITY)]
        )

    async def carry_out(self, wire: Json, signature: str) -> None:
        """Verify, fetch, graft and acknowledge, as the SDK does."""
        command = Command.from_wire(wire)
        signing.verify(command.signing_bytes(), signature, self._registration["command_key"])
        await self._acknowledge(CommandAck(command.seq, CommandState.ACCEPTED))
        digest = command.kernel_digest
        files = {name: await self._fetch(f"kernels/{digest}/{name}") for name in BUNDLE_FILES}
        _, spec, _ = open_kernel(files, digest, self._registration["kernel_key"])
        layer = next(layer for layer in self.layers if layer.name == command.layer)
        receipt = grafting.apply_graft(
            self.model,
            layer,
            blueprints.get_blueprint(spec.blueprint),
            config=spec.config,
            graft=instantiate(spec, layer),
            seed=spec.seed,
            adaptation=command.adaptation,
            step=STEPS,
        )
        await self._acknowledge(
            CommandAck(
                command.seq,
                CommandState.APPLIED,
                step=STEPS,
                pause_ms=receipt.pause_ms,
                certificate=receipt.certificate,
            )
        )

    async def finish(self) -> None:
        body = {"epoch": self._epoch, "state": "finished", "step": STEPS, "reason": "measured"}
        await self._send("finish", body)

    @property
    def _epoch(self) -> int:
        return int(self._registration["epoch"])

    async def _telemetry(
        self, *, metrics: list[Json], frames: list[Json], findings: Iterable[Json] = ()
    ) -> None:
        findings = list(findings)
        first, self._seq = self._seq + 1, self._seq + len(metrics) + len(frames) + len(findings)
        await self._send(
            "telemetry",
            {
                "epoch": self._epoch,
                "seq_from": first,
                "seq_to": self._seq,
                "frames": frames,
                "metrics": metrics,
                "findings": findings,
                "dropped": 0,
            },
        )

    async def _acknowledge(self, ack: CommandAck) -> None:
        await self._send(f"commands/{ack.seq}/ack", {**ack.to_wire(), "epoch": self._epoch})

    async def _send(self, path: str, body: Json) -> Json:
        return await _post(self._http, f"runs/{self.uid}/{path}", body, self.token)

    async def _fetch(self, path: str) -> bytes:
        headers = {"Authorization": f"Bearer {self.token}"}
        answer = await self._http.get(path, headers=headers)
        answer.raise_for_status()
        return answer.content


async def _post(http: httpx.AsyncClient, path: str, body: Json, token: str) -> Json:
    headers = {
        "Authorization": f"Bearer {token}",
        "Content-Type": "application/json",
        "Idempotency-Key": uuid.uuid4().hex,
    }
    answer = await http.post(path, content=codec.encode(body), headers=headers)
    if answer.status_code == httpx.codes.TOO_MANY_REQUESTS:
        await asyncio.sleep(float(answer.headers["Retry-After"]))
        return await _post(http, path, body, token)
    if not answer.is_success:
        raise RuntimeError(f"POST {path}: {answer.status_code} {answer.text[:500]}")
    found: Json = codec.decode(answer.content) if answer.content else {}
    return found


def build_model() -> nn.Module:
    """Three linear layers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def trace_model(model: nn.Module) -> tuple[LayerInfo, ...]:
    """The layers of ``build_model()``."""
    return grafting.trace_layers(model, lambda: model(torch.zeros(32, 64)))


def _metric(step: int, loss: float) -> Json:
    return {"step": step, "wall_time": time.time(), "values": {"loss": loss}}


def losses(rng: np.random.Generator) -> Any:
    """A loss that falls, and is flat long before the last step; float64 [STEPS]."""
    return 0.9 + 1.6 * 0.98 ** np.arange(STEPS) + 0.01 * rng.standard_normal(STEPS)


def signals(layers: int) -> Any:
    """Healthy layers; the second uses all its capacity. float32 [layers, signals]."""
    values = np.full((layers, len(SIGNALS)), 0.2, dtype="<f4")
    values[:, SIGNAL_INDEX[Signal.UPDATE_RATIO]] = 1e-3
    values[:, SIGNAL_INDEX[Signal.DEAD_FRACTION]] = 0.0
    values[:, SIGNAL_INDEX[Signal.HEALTH]] = 0.9
    values[1, SIGNAL_INDEX[Signal.STABLE_RANK]] = 0.5
    values[1, SIGNAL_INDEX[Signal.GRAD_NORM]] = 0.9
    return values
