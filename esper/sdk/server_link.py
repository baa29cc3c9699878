"""One run's server, for the training thread. Nothing here waits, except ``close``."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Literal
from urllib.parse import quote

import torch

from esper import tracing
from esper.compilation import capability
from esper.contracts import AdaptationState, HealthFrame, LayerInfo, protocol
from esper.grafting import RemedyReceipt
from esper.remedies import get_remedy
from esper.sdk.announcing import Announcer
from esper.sdk.command_handler import CommandHandler
from esper.sdk.compiling_ahead import CompilingAhead
from esper.sdk.idle_steps import IdleStep
from esper.sdk.remedy_loop import RemedyLoop
from esper.sdk.run_state import RunState
from esper.sdk.shadow import ShadowTrials
from esper.sdk.surgery import Surgery
from esper.sdk.transport import Pace, Transport, TransportQueues
from esper.sdk.transport.commands import LocalVeto
from esper.sdk.transport.kernels import code_key
from esper.sdk.transport.registration import RunDescription
from esper.version import __version__


class ServerLink:
    """Registers the run, hands its commands over, and sends what the steps measure.

    Args:
        server, token: where, and the right to create runs.
        queues: between this thread and the transport's.
        remedies: applies what the server orders; None where the run takes no remedy of it.
        announcer: says where the run's page is.
        ahead: compiles grafts beside the training.
        shadow: tries grafts on copies; None where the script has not said how.
    """

    def __init__(
        self,
        server: str,
        token: str,
        queues: TransportQueues,
        surgery: Surgery,
        run: RunState,
        pace: Pace,
        announcer: Announcer,
        remedies: RemedyLoop | None = None,
        ahead: CompilingAhead | None = None,
        shadow: ShadowTrials | None = None,
    ) -> None:
        tracing.start("trainer")
        self._address = server
        self._announcer = announcer
        self._page_said = False
        self._queues = queues
        self._surgery = surgery
        self._run = run
        self._remedies = remedies
        veto = LocalVeto(run.mode, code_key=code_key())
        self._handler = CommandHandler(surgery, veto, queues, remedies, ahead, shadow)
        self._transport = Transport(
            server, token, queues, veto=veto, preparation=self._handler, pace=pace
        )

    @property
    def stop_reason(self) -> str:
        """Why a person stopped the run; empty while nobody has."""
        return self._handler.stop_reason

    @property
    def page(self) -> str:
        """Where to look: the run's page, or the server until it has the run."""
        registration = self._queues.registration
        return f"{self._address}/runs/{registration.run}" if registration else self._address

    @property
    def paused(self) -> bool:
        """A person has paused adaptation."""
        return self._handler.paused

    @property
    def has_commands(self) -> bool:
        """Some wait for the next step boundary."""
        return bool(self._queues.inbox)

    def start(
        self,
        layers: tuple[LayerInfo, ...],
        *,
        target_steps: int | None,
        model_parameters: int,
    ) -> None:
        """Begin to register, in the background."""
        self._transport.start(
            RunDescription(
                name=self._run.name,
                mode=self._run.mode,
                capability=capability(),
                # One run may need kernels for several devices.
                capabilities={device: capability(device) for device in {e.device for e in layers}},
                target_steps=target_steps,
                versions=_versions(),
                model_parameters=model_parameters,
                layers=layers,
                step=self._run.step,
                applied=self._applied,
                remedies=self._held_remedies,
            )
        )

    def handle_commands(self) -> None:
        """At a step boundary: do what the server ordered, and queue the answers."""
        self._handler.handle_all(self._run.step)

    def send_step(self, frame: HealthFrame | None, metrics: Mapping[str, float]) -> None:
        """Queue what this step measured, and apply what the server answered to hello."""
        if not self._page_said and self._queues.registration is not None:
            self._page_said = True
            self._announcer.registered(self.page)
        while self._queues.waiting:
            entry = self._queues.waiting.popleft()
            page = f"{self._address}/adaptations/{quote(entry.adaptation, safe='')}"
            self._announcer.waits_at_server(entry.layer, entry.blueprint, page)
        self._queues.telemetry.offer_metrics(self._run.step, time.time(), metrics)
        if frame is not None:
            self._queues.telemetry.offer_frame(frame)
            self._transport.send_soon()
        while self._queues.settled:
            self._surgery.settle(*self._queues.settled.popleft())

    def send_idle(self, steps: Iterable[IdleStep]) -> None:
        """Queue the losses of steps that were only counted."""
        for step, _, loss, wall_time in steps:
            self._queues.telemetry.offer_metrics(step, wall_time, {"loss": loss})

    def close(self, *, state: Literal["finished", "failed"], reason: str, timeout: float) -> None:
        """Answer the commands that wait, and report how the run ended; see ``Transport.close``."""
        self._handler.refuse_all(self._run.step)
        finish = partial(
            protocol.Finish, step=self._run.step, state=state, reason=reason or self.stop_reason
        )
        self._transport.close(lambda epoch: finish(epoch=epoch), timeout=timeout)

    def _applied(self) -> tuple[protocol.Applied, ...]:
        """What the model holds of the server's grafts."""
        return tuple(
            protocol.Applied(
                adaptation=entry.uid,
                layer=entry.layer,
                blueprint=entry.blueprint,
                step=entry.step,
                merged=entry.merged,
                kept=entry.state is AdaptationState.KEPT,
                since=entry.since,
            )
            for entry in self._surgery.changes.grafted
            if not entry.local
        )

    def _held_remedies(self) -> tuple[protocol.HeldRemedy, ...]:
        """The server's remedies that are in effect."""
        return tuple(
            self._held(receipt) for receipt in self._surgery.changes.remedies if receipt.adaptation
        )

    def _held(self, receipt: RemedyReceipt) -> protocol.HeldRemedy:
        settings = get_remedy(receipt.remedy).default_config()
        config = {name: receipt.details[name] for name in settings if name in receipt.details}
        finding, kept = "", False
        if self._remedies is not None:
            finding, kept = self._remedies.server.result_of(receipt.adaptation)
        return protocol.HeldRemedy(
            adaptation=receipt.adaptation,
            step=receipt.step,
            remedy=receipt.remedy,
            layer=receipt.layer,
            config=config,
            finding=finding,
            kept=kept,
        )


def _versions() -> dict[str, str]:
    versions = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "esper": __version__,
    }
    return versions | ({"machine_code": "taken"} if code_key() else {})
