"""The parts of a session, and how they are put together."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from esper.contracts import RunMode, SafetyPolicy
from esper.fail_closed import FailClosed
from esper.grafting import Surroundings
from esper.grafting.compiled import Compilation
from esper.health.pace import Periods, SamplingPace
from esper.sdk.announcing import Announcer
from esper.sdk.compiling_ahead import CompilingAhead
from esper.sdk.diagnosing import DiagnosisWatch
from esper.sdk.evaluation import Evaluations
from esper.sdk.evaluation_pace import Recorded
from esper.sdk.explaining import Explainer
from esper.sdk.failures import UNMEASURED, Failures
from esper.sdk.findings import Findings, LedgerWatch, switched_off
from esper.sdk.following import Follower
from esper.sdk.guarding import ProbationGuard
from esper.sdk.layers import Layers
from esper.sdk.loaded_states import LoadedStates
from esper.sdk.local import LocalLoop
from esper.sdk.proposing import RemedyProposer
from esper.sdk.ranks import Ranks
from esper.sdk.remedy_loop import RemedyLoop
from esper.sdk.reporting import SurgeryReports
from esper.sdk.run_state import RunState
from esper.sdk.server_link import ServerLink
from esper.sdk.shadow import Shadow, ShadowTrials
from esper.sdk.surgery import Surgery
from esper.sdk.tracking import Mirror
from esper.sdk.transport import Pace, TransportQueues


@dataclass(frozen=True, slots=True)
class Setup:
    """The checked arguments of ``attach``."""

    model: nn.Module
    surroundings: Surroundings
    run: str
    server: str  # empty: local mode
    token: str
    mode: RunMode
    slots: tuple[str, ...]
    evaluate: Callable[[], float | None] | None
    checkpoint: Callable[[], object] | None
    target_steps: int | None
    safety_policy: SafetyPolicy
    pace: Pace
    snapshot_limit: int  # bytes
    snapshot_folder: Path | None = None
    sampling: tuple[Periods, ...] | None = None  # None: chosen from what sampling costs
    evaluate_every: Recorded | None = None  # None: chosen from what an evaluation costs
    verbose: bool = True
    good_states: Path | None = None  # folder; None: in memory only
    mirror: Mirror | None = None  # the user's trackers
    shadow: Shadow | None = None  # how grafts are tried on copies of the run
    trained: Any = None  # what the training loop calls: the model, or wrappers around it


class Parts:
    """The parts of one session, which know each other.

    Attributes:
        queues: to and from the server; None in local mode, and where the process does not decide.
        server: None where ``queues`` is.
        local: the loop of local mode; None with a server, and where the process does not decide.
        diagnosis: None where the process does not decide, and where the model is spread over ranks.
        remedies: None where ``diagnosis`` is.
        shadow: None where the script has not said how, and on several ranks.
    """

    def __init__(self, setup: Setup) -> None:
        model, around = setup.model, setup.surroundings
        self.setup = setup
        self.ranks = Ranks(around.replicas)
        self.queues = TransportQueues() if setup.server and self.ranks.decides else None
        self.run = RunState(setup.run, setup.mode, setup.safety_policy, self.queues)
        self.announcer = Announcer(
            self.run,
            verbose=setup.verbose,
            decides=self.ranks.decides,
            mirror=setup.mirror,
            target_steps=setup.target_steps,
        )
        send = self.queues.telemetry.offer_finding if self.queues is not None else None
        self.findings = Findings(send, self.announcer.finding)
        self.fail_closed = FailClosed(lambda failure: self.findings.add(switched_off(failure)))
        self.failures = Failures(self.fail_closed)
        self.compilation = Compilation(model, setup.trained)
        self.layers = Layers(
            model,
            setup.slots,
            around.replicas,
            self.fail_closed,
            self.compilation,
            takes_no_graft=around.takes_no_graft,
        )
        self.ledger = LedgerWatch(model, around, self.findings)
        self.diagnosis: DiagnosisWatch | None = self.fail_closed.run(
            self._make_diagnosis, part="diagnosis", unmeasured=UNMEASURED["diagnosis"]
        )
        self.surgery = Surgery(
            model,
            around,
            self.run,
            layers=self.layers,
            ranks=self.ranks,
            ledger=self.ledger,
            findings=self.findings,
            snapshot_limit=setup.snapshot_limit,
            snapshot_folder=setup.snapshot_folder,
            state_folder=setup.good_states,
            checkpoint=setup.checkpoint,
            reports=SurgeryReports(self.queues, self.announcer),
        )
        self.loads = LoadedStates(model, self.surgery)
        self.evaluations = self._make_evaluations()
        self.follower = Follower(self.ranks, self.surgery, self.evaluations)
        self.remedies = self._make_remedies()
        self.ahead = CompilingAhead(
            model, self.compilation, self.announcer, evaluates=setup.evaluate is not None
        )
        self.shadow = self._make_shadow()
        self.server = self._make_server()
        self.local = self._make_local()
        self.explainer = Explainer(
            self.run,
            self.layers,
            self.surgery,
            self.findings,
            local=self.local,
            server=self.server,
            remedies=self.remedies,
        )
        self.guard = ProbationGuard(
            self.surgery, self.run, skips_steps=around.scaler is not None, local=self.local
        )
        self.sampling = SamplingPace(fixed=setup.sampling)

    def _make_diagnosis(self) -> DiagnosisWatch | None:
        around = self.setup.surroundings
        # Its probes read whole tensors, which on one rank alone would wait for the others.
        spread = around.replicas is not None and around.replicas.layout is not None
        if spread or not self.ranks.decides:
            return None
        return DiagnosisWatch(
            self.setup.model,
            around,
            self.run,
            self.findings,
            self.fail_closed,
            self.compilation,
        )

    def _make_evaluations(self) -> Evaluations:
        diagnosis = self.diagnosis
        watched = diagnosis.recorder.evaluating if diagnosis is not None else nullcontext
        made = Evaluations(
            self.setup.evaluate,
            self.surgery,
            self.run,
            self.ranks,
            watched,
            fixed=self.setup.evaluate_every,
        )
        self.surgery.remedies.evaluate = made.on_request
        return made

    def _make_remedies(self) -> RemedyLoop | None:
        if self.diagnosis is None:
            return None
        return RemedyLoop(
            self.setup.model,
            self.surgery,
            self.run,
            self.diagnosis,
            self.announcer,
            alone=self.ranks.alone,
            proposer=RemedyProposer(self.queues) if self.queues is not None else None,
        )

    def _make_server(self) -> ServerLink | None:
        if self.queues is None:
            return None
        return ServerLink(
            self.setup.server,
            self.setup.token,
            self.queues,
            self.surgery,
            self.run,
            self.setup.pace,
            self.announcer,
            self.remedies,
            self.ahead,
            self.shadow,
        )

    def _make_shadow(self) -> ShadowTrials | None:
        setup = self.setup
        if setup.shadow is None or not self.ranks.alone:
            return None
        return ShadowTrials(
            setup.model,
            setup.surroundings.optimizers,
            self.surgery,
            setup.shadow,
            most_bytes=setup.snapshot_limit,
        )

    def _make_local(self) -> LocalLoop | None:
        if self.setup.server or not self.ranks.decides:
            return None
        return LocalLoop(
            self.surgery,
            self.run,
            self.announcer,
            self.findings,
            alone=self.ranks.alone,
            ahead=self.ahead,
        )
