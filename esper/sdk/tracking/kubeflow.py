"""Progress of a run in the status of its Kubeflow TrainJob: ``status.trainerStatus``.

Kubeflow Trainer 2.2 and later, with the feature gate ``TrainJobStatus``, gives each pod the address
of its status server, the path of a token that is replaced every hour, and that of the server's
certificate (https://github.com/kubeflow/trainer, proposal 2779). Each message replaces the whole
status. Nothing of Kubeflow has to be installed.
"""

from __future__ import annotations

import logging
import os
import ssl
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from esper.contracts import codec
from esper.sdk.tracking.events import Event, Progress

logger = logging.getLogger("esper")

URL = "KUBEFLOW_TRAINER_SERVER_URL"
TOKEN = "KUBEFLOW_TRAINER_SERVER_TOKEN"  # noqa: S105 (the name of the variable)
CA_CERTIFICATE = "KUBEFLOW_TRAINER_SERVER_CA_CERT"
TIMEOUT_SECONDS = 5.0
MOST_SECONDS = 2**31 - 1  # the field is an int32
MAX_PAUSE_SECONDS = 600.0
FIRST_PAUSE_SECONDS = 20.0


class NotInKubeflowError(Exception):
    """The environment does not name a status server."""


class Kubeflow:
    """Percentage, remaining seconds, losses and the number of grafts and findings of this run.

    A server that does not answer is asked again with growing pauses: the next message holds all.

    Raises:
        NotInKubeflowError: this process is in no TrainJob that reports its status.
    """

    def __init__(self) -> None:
        self._url = os.environ.get(URL, "")
        if not self._url or not os.environ.get(TOKEN):
            raise NotInKubeflowError(
                f"{URL} and {TOKEN} are not set: this is no pod of a TrainJob, or the feature gate "
                "TrainJobStatus of Kubeflow Trainer is off"
            )
        if not self._url.startswith("https://"):  # the token would be readable on its way
            raise NotInKubeflowError(f"{URL} must begin with https://")
        self._counts: Counter[str] = Counter()
        self._begin: tuple[int, float] | None = None  # step and time of the first message
        self._client: httpx.Client | None = None
        self._pause, self._silent_until = 0.0, 0.0

    def write(self, event: Event) -> None:
        """Count it; the next message says so."""
        self._counts[event.kind] += 1

    def report(self, progress: Progress) -> None:
        """Send the present status, unless the server failed a moment ago."""
        now = time.monotonic()
        if self._begin is None:
            self._begin = progress.step, now
        if now < self._silent_until:
            return
        status = self._status(progress, now)
        try:
            self._send({"trainerStatus": status})
            self._pause = 0.0
        except (httpx.HTTPError, OSError, ValueError) as error:
            if not self._pause:
                logger.warning("the TrainJob's status is not updated for now: %s", error)
            self._pause = min(max(2 * self._pause, FIRST_PAUSE_SECONDS), MAX_PAUSE_SECONDS)
            self._silent_until = time.monotonic() + self._pause

    def close(self) -> None:
        if self._client is not None:
            self._client.close()

    def _send(self, body: dict[str, Any]) -> None:
        if self._client is None:
            certificate = os.environ.get(CA_CERTIFICATE) or None
            self._client = httpx.Client(
                verify=ssl.create_default_context(cafile=certificate),
                timeout=TIMEOUT_SECONDS,
                trust_env=False,  # the server is in the cluster, behind no proxy
            )
        token = Path(os.environ[TOKEN]).read_text().strip()  # it is replaced while we run
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        answer = self._client.post(self._url, content=codec.encode(body), headers=headers)
        answer.raise_for_status()

    def _status(self, progress: Progress, now: float) -> dict[str, Any]:
        status: dict[str, Any] = {
            "lastUpdatedTime": datetime.now(UTC).isoformat(timespec="seconds"),
            "metrics": [{"name": name, "value": value} for name, value in self._metrics(progress)],
        }
        if progress.target_steps:
            share = progress.step / progress.target_steps
            status["progressPercentage"] = min(100, int(100 * share))
            remaining = self._remaining_seconds(progress, progress.target_steps, now)
            if remaining is not None:
                status["estimatedRemainingSeconds"] = remaining
        return status

    def _metrics(self, progress: Progress) -> list[tuple[str, str]]:
        found = [("step", str(progress.step))]
        if progress.target_steps:
            found.append(("total_steps", str(progress.target_steps)))
        losses = (("loss", progress.loss), ("eval_loss", progress.held_out))
        found += [(name, f"{value:.6g}") for name, value in losses if value is not None]
        return found + [(f"esper_{kind}", str(n)) for kind, n in sorted(self._counts.items())]

    def _remaining_seconds(self, progress: Progress, target: int, now: float) -> int | None:
        """At the pace since the first message, which a run that was resumed begins late."""
        first, begun = self._begin or (progress.step, now)
        left, done = max(0, target - progress.step), progress.step - first
        if not left:
            return 0
        return min(MOST_SECONDS, int(left * (now - begun) / done)) if done > 0 else None
