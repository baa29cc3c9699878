"""The status of a Kubeflow TrainJob: what a real HTTPS server gets, and what does no harm."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from datetime import datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper.sdk.tracking import Event, Kubeflow, Progress, trackers_of
from tests.tls import TlsServer, serving

PATH = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/team/trainjobs/digits/status"


class StatusServer(TlsServer):
    """Stands in for Kubeflow Trainer's: a bearer token, the TrainJob's path."""

    status = 200

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, _Handler)
        self.got: list[tuple[str, dict[str, Any]]] = []


class _Handler(BaseHTTPRequestHandler):
    server: StatusServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == PATH:
            self.server.got.append((self.headers["Authorization"], body))
        self.send_response(self.server.status if self.path == PATH else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture
def pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StatusServer]:
    """The server, and the environment of a pod of its TrainJob."""
    with serving(StatusServer(tmp_path)) as server:
        (tmp_path / "token").write_text("token-1\n")
        monkeypatch.setenv(
            "KUBEFLOW_TRAINER_SERVER_URL", f"https://127.0.0.1:{server.server_port}{PATH}"
        )
        monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_TOKEN", str(tmp_path / "token"))
        monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_CA_CERT", str(tmp_path / "ca.crt"))
        yield server


def _last(server: StatusServer) -> dict[str, Any]:
    status: dict[str, Any] = server.got[-1][1]["trainerStatus"]
    return status


def _metrics(server: StatusServer) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in _last(server)["metrics"]}


def test_progress_losses_and_counts_are_posted_as_the_protocol_wants(pod: StatusServer) -> None:
    tracker = Kubeflow()
    tracker.report(Progress(100, 400, 0.5))
    assert "estimatedRemainingSeconds" not in _last(pod)  # no pace is known yet
    tracker.write(Event(120, "graft", "proj_lora_64 into 'fc'"))
    tracker.write(Event(130, "graft", "proj_lora_64 into 'fc'"))
    tracker.report(Progress(200, 400, float("nan"), 0.25))
    token, body = pod.got[-1]
    assert token == "Bearer token-1"
    assert set(body) == {"trainerStatus"}
    status = _last(pod)
    assert status["progressPercentage"] == 50
    assert 0 <= status["estimatedRemainingSeconds"] < 600
    assert datetime.fromisoformat(status["lastUpdatedTime"]).tzinfo is not None
    assert _metrics(pod) == {
        "step": "200",
        "total_steps": "400",
        "loss": "nan",  # it has diverged, and that is said
        "eval_loss": "0.25",
        "esper_graft": "2",
    }
    tracker.report(Progress(500, 400))
    assert (_last(pod)["progressPercentage"], _last(pod)["estimatedRemainingSeconds"]) == (100, 0)
    tracker.report(Progress(500))
    assert "progressPercentage" not in _last(pod)  # nothing is invented
    tracker.close()


def test_a_token_that_was_replaced_is_read_again(pod: StatusServer, tmp_path: Path) -> None:
    tracker = Kubeflow()
    tracker.report(Progress(1))
    (tmp_path / "token").write_text("token-2")
    tracker.report(Progress(2))
    assert [token for token, _ in pod.got] == ["Bearer token-1", "Bearer token-2"]
    tracker.close()


@pytest.mark.parametrize("fault", ["refused", "down", "untrusted", "no token"])
def test_a_server_that_fails_is_left_alone_for_a_while_and_nothing_raises(
    fault: str,
    pod: StatusServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if fault == "refused":
        pod.status = 403
    elif fault == "down":
        monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", f"https://127.0.0.1:1{PATH}")
    elif fault == "untrusted":
        monkeypatch.delenv("KUBEFLOW_TRAINER_SERVER_CA_CERT")
    else:
        (tmp_path / "token").unlink()
    tracker = Kubeflow()
    with caplog.at_level(logging.WARNING, "esper"):
        for step in range(5):
            tracker.report(Progress(step))
    assert len(pod.got) <= 1
    assert caplog.text.count("is not updated for now") == 1
    assert "token-1" not in caplog.text
    tracker.close()


def test_no_token_goes_over_a_plain_connection(
    pod: StatusServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", "http://127.0.0.1/status")
    assert trackers_of(["kubeflow"]) == []


def test_one_setting_lets_a_run_report_itself(
    pod: StatusServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ESPER_TRACKERS", "kubeflow")
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    session = esper.attach(model, optimizer, target_steps=8, verbose=False)
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).square().mean()
        loss.backward()
        optimizer.step()
        session.step(loss)
    session.close()
    assert _last(pod)["progressPercentage"] == 50
    assert float(_metrics(pod)["loss"]) == pytest.approx(loss.item(), rel=1e-3)
