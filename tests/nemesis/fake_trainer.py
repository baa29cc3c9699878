"""A trainer without a model: the real transport, the real journal and real checkpoints.

Its "model" is the set of changes that it holds. It kills itself now and then at one of the moments
at which a crash could leave the server and the model with different opinions.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import numpy as np

from esper.contracts import (
    Command,
    CommandAck,
    CommandKind,
    CommandState,
    Finding,
    HealthFrame,
    KernelSpec,
    LayerInfo,
    RefusalCode,
    RunMode,
    Severity,
    ViolationRule,
)
from esper.contracts.health import SIGNALS
from esper.contracts.protocol import (
    Applied,
    HeldRemedy,
    RemedyProposal,
    RemedyVerdict,
    Rollback,
)
from esper.exceptions import CommandRefusedError
from esper.sdk.transport.commands import LocalVeto
from esper.sdk.transport.queues import Pace, PendingReport, ReadyCommand, TransportQueues
from esper.sdk.transport.registration import RunDescription
from esper.sdk.transport.transport import Transport
from tests.nemesis.ledger import Ledger

STEP_SECONDS = 0.1
CHECKPOINT_STEPS = 20
FRAME_STEPS = 10
JUDGE_STEPS = 15  # probation of a remedy
LAYERS = 60
PACE = Pace(flush=0.3, least_gap=0.1, first_retry=0.1, longest_retry=1.0)
CALM_FILE = "calm"  # where it exists, no trainer crashes or proposes any more
PROPOSED_REMEDIES = ("clip_layer", "skip_update", "weight_decay")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Of one fake trainer.

    Attributes:
        crash_chance: of a kill at each of the moments.
        guard_chance: that its own guard takes a new graft out.
        remedy_steps: a remedy is proposed every so many steps; 0: never.
        clock_error: seconds by which its clock is wrong.
    """

    name: str
    server: str
    token: str
    folder: str
    seed: int = 0
    crash_chance: float = 0.0
    guard_chance: float = 0.0
    remedy_steps: int = 0
    clock_error: float = 0.0


@dataclass
class Held:
    """A change that the model holds."""

    adaptation: str
    layer: str
    slug: str
    step: int
    remedy: bool = False
    finding: str = ""
    kept: bool = False
    config: dict[str, Any] = field(default_factory=dict)


def helps(adaptation: str) -> bool:
    """Whether a remedy helps; the same in each life of its run."""
    return random.Random(adaptation).random() < 0.75


class NoModel:
    """Nothing is built: the kernel is fetched and verified, and its spec is kept."""

    def prepare(self, command: Command, spec: KernelSpec) -> KernelSpec:
        return spec

    def try_out(self, command: Command, files: Any) -> Any:
        raise CommandRefusedError(RefusalCode.UNAVAILABLE, "there is no model")


class FakeTrainer:
    """One run, from its last checkpoint on."""

    def __init__(self, options: Options) -> None:
        self.options = options
        folder = Path(options.folder)
        self._calm = folder / CALM_FILE
        self._checkpoint = folder / f"{options.name}.checkpoint.json"
        self.ledger = Ledger(folder / f"{options.name}.ledger.jsonl")
        self.random = random.Random(f"{options.seed} {os.getpid()}")
        self.step, self.held = self._load()
        self._judged_next: dict[str, int] = {}  # adaptation -> step
        self._later: list[tuple[int, Callable[[], None]]] = []  # by step
        self.queues = TransportQueues()
        self.transport = Transport(
            options.server,
            options.token,
            self.queues,
            veto=LocalVeto(RunMode.AUTOMATIC),
            preparation=NoModel(),
            pace=PACE,
        )
        self.ledger.write("start", held=sorted(self.held), step=self.step)

    def live(self) -> None:
        """Endless; ends when the server accepts nothing more of this start."""
        self.transport.start(self._description())
        harness = parent_process()  # not the server that forked this process
        while harness is None or harness.is_alive():
            thread = self.transport._thread
            if thread is None or not thread.is_alive():
                self.ledger.write("transport_ended")
                return
            self.step += 1
            self._report()
            while self.queues.inbox:
                self._handle(self.queues.inbox.popleft())
            while self.queues.settled:
                adaptation, state = self.queues.settled.popleft()
                if adaptation in self.held and state == "kept":
                    self.held[adaptation].kept = True
            self._do_what_is_due()
            self._judge()
            if self.step % CHECKPOINT_STEPS == 0:
                self._save()
            if self.options.remedy_steps and self.step % self.options.remedy_steps == 0:
                self._propose()
            time.sleep(STEP_SECONDS)

    # --- what it says

    def _description(self) -> RunDescription:
        layers = tuple(
            LayerInfo(
                name=f"l{index}",
                kind="Linear",
                in_shape=(8, 16),
                out_shape=(8, 16),
                dtype="float32",
                parameters=272,
                graftable=True,
                features_in=16,
                features_out=16,
                order=index,
            )
            for index in range(LAYERS)
        )
        return RunDescription(
            name=self.options.name,
            mode=RunMode.AUTOMATIC,
            capability="cpu",
            target_steps=None,
            versions={},
            model_parameters=272 * LAYERS,
            layers=layers,
            step=self.step,
            applied=self._applied,
            remedies=self._remedies,
        )

    def _applied(self) -> tuple[Applied, ...]:
        return tuple(
            Applied(
                adaptation=held.adaptation,
                layer=held.layer,
                blueprint=held.slug,
                step=held.step,
                kept=held.kept,
            )
            for held in list(self.held.values())
            if not held.remedy
        )

    def _remedies(self) -> tuple[HeldRemedy, ...]:
        return tuple(
            HeldRemedy(
                adaptation=held.adaptation,
                step=held.step,
                remedy=held.slug,
                layer=held.layer,
                config=held.config,
                finding=held.finding,
                kept=held.kept,
            )
            for held in list(self.held.values())
            if held.remedy
        )

    def _report(self) -> None:
        loss = 1.0 + 1.0 / (1.0 + self.step) + 0.01 * self.random.random()
        self.queues.telemetry.offer_metrics(self.step, time.time(), {"loss": loss})
        if self.step % FRAME_STEPS == 0:
            names = tuple(f"l{index}" for index in range(LAYERS))
            values = np.full((LAYERS, len(SIGNALS)), np.nan, dtype=np.float32)
            frame = HealthFrame(self.step, time.time(), names, values, {"loss": loss})
            self.queues.telemetry.offer_frame(frame)
            self.transport.send_soon()

    def _propose(self) -> None:
        if self.queues.registration is None or self._calm.exists():
            return
        remedy = PROPOSED_REMEDIES[self.step // self.options.remedy_steps % 3]
        finding = Finding(
            rule=ViolationRule.DIAGNOSIS,
            layer="",
            severity=Severity.SERIOUS,
            observed="a fault that the test invents",
            limit="none",
            remedy=f"apply {remedy}",
            slug=f"fault_{self.step}",
            since_step=self.step,
            remedies=(remedy,),
        )
        key, step = f"{self.options.name}-{self.step}-{os.getpid()}", self.step
        asks = ("The test wants a person to decide.",) if self.random.random() < 0.5 else ()
        self.queues.queue_report(
            PendingReport(
                "remedy-proposals",
                lambda epoch: RemedyProposal(
                    epoch=epoch,
                    key=key,
                    step=step,
                    remedy=remedy,
                    layer="",
                    finding=finding,
                    asks=asks,
                ),
            )
        )

    def _judge(self) -> None:
        """A remedy's probation ends after some steps; it helps more often than not.

        A verdict is repeated, because the server may still be in doubt when it comes; but ever more
        rarely, so that on a slow server no answer waits behind a queue of verdicts.
        """
        for held in self.held.values():
            if not held.remedy or not held.finding or held.kept:
                continue
            if self.step >= self._judged_next.get(held.adaptation, held.step + JUDGE_STEPS):
                self._judged_next[held.adaptation] = 2 * self.step - held.step
                self._give_verdict(held.adaptation, keep=helps(held.adaptation))

    def _give_verdict(self, adaptation: str, *, keep: bool) -> None:
        step = self.step
        self.queues.queue_report(
            PendingReport(
                "remedy-verdicts",
                lambda epoch: RemedyVerdict(
                    epoch=epoch,
                    adaptation=adaptation,
                    keep=keep,
                    reason="as the test has drawn",
                    step=step,
                    steps_observed=JUDGE_STEPS,
                ),
            )
        )

    # --- what it does

    def _handle(self, ready: ReadyCommand) -> None:
        command = ready.command
        self.ledger.write("command", seq=command.seq, epoch=command.epoch, kind=str(command.kind))
        self._may_crash("before the change")
        ack = self._do(ready)
        self._may_crash("after the change, before its answer is queued")
        self.queues.answer(ack)
        self._may_crash("after its answer is queued")

    def _do(self, ready: ReadyCommand) -> CommandAck:
        command = ready.command
        if command.kind in (CommandKind.GRAFT, CommandKind.REMEDY):
            return self._apply(command, ready.graft)
        if command.kind in (CommandKind.UNDO, CommandKind.KEEP, CommandKind.REPORT_HELD):
            held = self.held.get(command.adaptation)
            if held is None:
                return self._refuse(command, RefusalCode.NOT_GRAFTED, "the model does not hold it")
            if command.kind is CommandKind.KEEP:
                held.kept = True
            elif command.kind is CommandKind.UNDO:
                self._take_out(command.adaptation, seq=command.seq)
        return CommandAck(seq=command.seq, state=CommandState.APPLIED, step=self.step)

    def _apply(self, command: Command, spec: KernelSpec | None) -> CommandAck:
        registration = self.queues.registration
        if registration is None or command.epoch != registration.epoch:
            return self._refuse(command, RefusalCode.OLD_EPOCH, "the run has registered again")
        if self.queues.now() >= command.expires_at:
            return self._refuse(command, RefusalCode.EXPIRED, "it expired before a step boundary")
        is_remedy = command.kind is CommandKind.REMEDY
        self.held[command.adaptation] = Held(
            adaptation=command.adaptation,
            layer=command.layer,
            slug=str(command.payload["remedy"]) if spec is None else spec.blueprint,
            step=self.step,
            remedy=is_remedy,
            finding=str(command.payload.get("finding", "")),
            config=dict(command.payload.get("config", {})),
        )
        self.ledger.write(
            "applied", adaptation=command.adaptation, seq=command.seq, epoch=command.epoch
        )
        if not is_remedy and self.random.random() < self.options.guard_chance:
            self._guard(command.adaptation)
        return CommandAck(seq=command.seq, state=CommandState.APPLIED, step=self.step, pause_ms=1.0)

    def _refuse(self, command: Command, code: RefusalCode, reason: str) -> CommandAck:
        state = CommandState.REFUSED
        if command.kind is CommandKind.GRAFT:
            state = CommandState.FAILED
        return CommandAck(seq=command.seq, state=state, step=self.step, code=code, reason=reason)

    def _guard(self, adaptation: str) -> None:
        """The trainer's own guard takes the graft out, after the answer to its command."""
        step = self.step

        def report() -> None:
            self._take_out(adaptation, seq=None)
            self.queues.queue_report(
                PendingReport(
                    "rollbacks",
                    lambda epoch: Rollback(
                        epoch=epoch,
                        adaptation=adaptation,
                        step=step,
                        rule=ViolationRule.NON_FINITE,
                        observed="nan",
                        limit="finite",
                        exact=True,
                    ),
                )
            )

        self._later.append((self.step + 2, report))

    def _do_what_is_due(self) -> None:
        due = [act for step, act in self._later if step <= self.step]
        self._later = [(step, act) for step, act in self._later if step > self.step]
        for act in due:
            act()

    def _take_out(self, adaptation: str, *, seq: int | None) -> None:
        if self.held.pop(adaptation, None) is not None:
            self.ledger.write("removed", adaptation=adaptation, seq=seq)

    # --- checkpoints and crashes

    def _load(self) -> tuple[int, dict[str, Held]]:
        if not self._checkpoint.exists():
            return 0, {}
        saved = json.loads(self._checkpoint.read_text())
        return saved["step"], {uid: Held(**held) for uid, held in saved["held"].items()}

    def _save(self) -> None:
        self._may_crash("before a checkpoint")
        held = {uid: asdict(entry) for uid, entry in self.held.items()}
        fresh = self._checkpoint.with_suffix(".new")
        fresh.write_text(json.dumps({"step": self.step, "held": held}))
        os.replace(fresh, self._checkpoint)
        self.ledger.write("checkpoint", held=sorted(held), step=self.step)
        self._may_crash("after a checkpoint")

    def _may_crash(self, moment: str) -> None:
        chance = self.options.crash_chance
        if "checkpoint" in moment:
            chance /= 10  # it comes far more often than a command
        if self.random.random() < chance and not self._calm.exists():
            self.ledger.write("crash", moment=moment)
            os.kill(os.getpid(), signal.SIGKILL)


def run_fake_trainer(options: Options) -> None:
    """The whole life of a process."""
    os.environ["ESPER_STATE_DIR"] = str(Path(options.folder) / "journals" / options.name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if options.clock_error:
        right = time.time
        time.time = lambda: right() + options.clock_error
    FakeTrainer(options).live()
