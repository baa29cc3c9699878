"""Handling the server's commands: prepared beside the training, applied at a step boundary."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from esper import blueprints, tracing
from esper.blueprints import Graft
from esper.compilation.instantiate import instantiate
from esper.compilation.verify import open_compiled
from esper.contracts import (
    Command,
    CommandAck,
    CommandKind,
    CommandState,
    KernelSpec,
    RefusalCode,
)
from esper.exceptions import (
    CertificateError,
    CommandRefusedError,
    ConfigurationError,
    EsperError,
    GraftError,
    IncompatibleLayerError,
    KernelDigestError,
    KernelError,
    SignatureError,
    UnknownBlueprintError,
    UnknownLayerError,
)
from esper.fail_closed import is_the_scripts
from esper.grafting import Receipt, RemedyReceipt
from esper.grafting.slot import find_slot
from esper.sdk.adaptation import Adaptation, Operation
from esper.sdk.compiling_ahead import CompilingAhead
from esper.sdk.remedy_loop import RemedyLoop
from esper.sdk.reporting import short_details
from esper.sdk.shadow import NO_SHADOW, ShadowTrial, ShadowTrials
from esper.sdk.surgery import Surgery
from esper.sdk.transport.commands import LocalVeto
from esper.sdk.transport.queues import ReadyCommand, TransportQueues
from esper.sdk.twin import Twin

if TYPE_CHECKING:
    from esper.compilation import CompiledGraft, Trial

logger = logging.getLogger("esper")

RESERVE_SECONDS = 10.0  # of a command's time, for the graft itself
NOT_GRAFTED = "this model does not hold that graft"
MERGED = "it was merged into its host's weights, and cannot be taken out of them"


@dataclass(frozen=True, slots=True)
class Swap:
    """A compiled kernel that was measured beside the training, and its graft."""

    graft: Graft
    compiled: CompiledGraft
    trial: Trial


@dataclass(frozen=True, slots=True)
class Answer:
    """The result of a command.

    Attributes:
        digests: digests of the model as fields of the ack. Hashes the whole model, so it is called
            in the transport thread.
    """

    ack: CommandAck
    digests: Callable[[], dict[str, Any]] = dict


class CommandHandler:
    """Handles one run's commands.

    Args:
        surgery: changes the model.
        veto: the trainer's own limits.
        queues: commands come from them, answers go into them.
        remedies: applies and judges remedies; None where this run takes none of the server.
        ahead: compiles grafts beside the training; None where nothing is grafted.
        shadow: tries grafts on copies; None where the script has not said how.

    Attributes:
        stop_reason: why a person stopped the run, empty while nobody has.
    """

    def __init__(
        self,
        surgery: Surgery,
        veto: LocalVeto,
        queues: TransportQueues,
        remedies: RemedyLoop | None = None,
        ahead: CompilingAhead | None = None,
        shadow: ShadowTrials | None = None,
    ) -> None:
        self._shadow = shadow
        self._surgery = surgery
        self._ahead = ahead
        self._remedies = remedies
        self._veto = veto
        self._queues = queues
        self.stop_reason = ""

    def prepare(self, command: Command, spec: KernelSpec) -> Operation:
        """Transport thread: build the module, so that the step boundary only swaps it in.

        Raises:
            CommandRefusedError: it cannot be built here.
        """
        try:
            since = str(command.payload.get("since") or "")
            layer = self._surgery.layer(command.layer, since, spec.blueprint)
            graft = instantiate(spec, layer)
        except (IncompatibleLayerError, UnknownLayerError) as error:
            raise CommandRefusedError(RefusalCode.INCOMPATIBLE_LAYER, str(error)) from error
        except (UnknownBlueprintError, KernelError, ConfigurationError) as error:
            raise CommandRefusedError(RefusalCode.UNKNOWN_BLUEPRINT, str(error)) from error
        return Operation(
            layer=layer,
            blueprint=blueprints.get_blueprint(spec.blueprint),
            config=spec.config,
            seed=spec.seed,
            uid=command.adaptation,
            graft=graft,
            memory=self._surgery.reserve_memory(),
        )

    def try_out(self, command: Command, files: Mapping[str, bytes]) -> Swap:
        """A thread of its own: verify, load and measure a compiled kernel, so that the step
        boundary only swaps it in.

        Raises:
            CommandRefusedError: not verified, not for this graft, not loadable, or not faster.
        """
        adaptation = self._surgery.changes.find(command.adaptation)
        if adaptation is None or adaptation.receipt is None:
            raise CommandRefusedError(RefusalCode.NOT_GRAFTED, NOT_GRAFTED)
        layer, graft = adaptation.receipt.record.layer, adaptation.receipt.graft
        key = self._veto.code_key
        try:
            spec = open_compiled(files, command.kernel_digest, key)[1]
            if (spec.blueprint, spec.config) != (adaptation.blueprint, adaptation.config):
                raise CommandRefusedError(
                    RefusalCode.INCOMPATIBLE_LAYER, "the kernel was compiled for another graft"
                )
            # Not at the top: PyTorch's compiler takes seconds to import, and few trainers need it.
            from esper.compilation import load_compiled, try_compiled

            compiled = load_compiled(files, command.kernel_digest, key)
            trial = try_compiled(graft, compiled, layer)
        except KernelDigestError as error:
            raise CommandRefusedError(RefusalCode.BAD_DIGEST, str(error)) from error
        except SignatureError as error:
            raise CommandRefusedError(RefusalCode.BAD_SIGNATURE, str(error)) from error
        except KernelError as error:
            raise CommandRefusedError(RefusalCode.UNAVAILABLE, str(error)) from error
        return Swap(graft, compiled, trial)

    @property
    def paused(self) -> bool:
        """A person has paused adaptation."""
        return self._veto.paused

    def handle_all(self, step: int) -> None:
        """Handle every command that waits, at the boundary after ``step``."""
        later = []
        waiting = set[str]()  # no command about an adaptation overtakes an earlier one about it
        while self._queues.inbox:
            ready = self._queues.inbox.popleft()
            overtakes = ready.command.adaptation in waiting
            if (
                overtakes
                or self._waits_for_inputs(ready.command)
                or self._waits_for_script(ready.command)
                or self._waits_for_compiler(ready)
            ):
                later.append(ready)
                waiting.add(ready.command.adaptation)
                continue
            about = ready.command.adaptation
            with tracing.span(f"trainer {ready.command.kind}", adaptation=about, step=step):
                answer = self._handle(ready)
            if answer is None:  # it is answered when it is over
                continue
            self._queues.answer(replace(answer.ack, step=step), rest=answer.digests)
        self._queues.inbox.extendleft(reversed(later))

    def _waits_for_inputs(self, command: Command) -> bool:
        """A remedy that needs a batch of the model's inputs gets it in the next forward pass."""
        return (
            command.kind is CommandKind.REMEDY
            and self._remedies is not None
            and self._queues.now() < command.expires_at
            and not self._remedies.server.has_inputs_for(str(command.payload.get("remedy")))
        )

    def _waits_for_script(self, command: Command) -> bool:
        """A graft comes once it is known whether the script keeps an average by hand."""
        if command.kind is not CommandKind.GRAFT:
            return False
        if self._queues.now() >= command.expires_at - RESERVE_SECONDS:
            return False
        try:
            return self._surgery.script_copies.must_wait()
        except Exception as error:  # the graft searches again, and is answered
            if is_the_scripts(error):
                raise
            logger.debug("the search for averages failed", exc_info=error)
            return False

    def _waits_for_compiler(self, ready: ReadyCommand) -> bool:
        """A graft into compiled code comes when its code is there, and in time in any case."""
        if ready.command.kind is not CommandKind.GRAFT or self._ahead is None:
            return False
        rest = ready.command.expires_at - self._queues.now() - RESERVE_SECONDS
        try:
            return self._ahead.waits(ready.graft, until=time.monotonic() + rest)
        except Exception as error:
            if is_the_scripts(error):
                raise
            logger.debug("compiling ahead failed", exc_info=error)
            return False

    def refuse_all(self, step: int) -> None:
        """The run ends: answer the commands that wait, and the trial that is under way."""
        if self._shadow is not None:
            self._shadow.stop("the run ended before the trial was over")
        while self._queues.inbox:
            command = self._queues.inbox.popleft().command
            ack = failed(command, "the run ended before its next step boundary")
            self._queues.answer(replace(ack, step=step))

    def _handle(self, ready: ReadyCommand) -> Answer | None:
        """Never raises: the server waits for an answer."""
        try:
            if ready.command.kind is CommandKind.SHADOW:
                return self._try_in_shadow(ready.command)
            if ready.command.kind is CommandKind.GRAFT:
                return self._graft(ready.command, ready.graft)
            if ready.command.kind is CommandKind.REMEDY:
                return self._remedy(ready.command)
            if ready.command.kind is CommandKind.SPEED_UP:
                return Answer(self._swap(ready.command, ready.graft))
            if ready.command.kind is CommandKind.UNDO:
                return self._undo(ready.command)
            return Answer(self._handle_other(ready.command))
        except Exception as error:
            if is_the_scripts(error):
                raise
            logger.exception("command %d failed", ready.command.seq)
            return Answer(failed(ready.command, f"{type(error).__name__}: {error}"))

    def _try_in_shadow(self, command: Command) -> Answer | None:
        if self._queues.now() >= command.expires_at:
            reason = "it expired before a step boundary came"
            return Answer(refused(command, RefusalCode.EXPIRED, reason))
        if self._shadow is None:
            return Answer(refused(command, RefusalCode.DOES_NOT_FIT, NO_SHADOW))
        payload = command.payload
        wanted = ShadowTrial(
            layer=command.layer,
            blueprint=str(payload["blueprint"]),
            since=str(payload.get("since", "")),
            config=dict(payload.get("config", {})),
            steps=int(payload["steps"]),
            seconds=float(payload["seconds"]),
            factors=dict(payload.get("factors", {})),
        )
        try:
            self._shadow.begin(wanted, partial(self._end_of_shadow, command))
        except (EsperError, ValueError) as error:
            return Answer(refused(command, RefusalCode.DOES_NOT_FIT, str(error)))
        return None

    def _end_of_shadow(self, command: Command, found: Twin | None, reason: str) -> None:
        if found is None:
            ack = failed(command, reason)
        else:
            details = {name: value for name, value in asdict(found).items() if _is_known(value)}
            ack = CommandAck(seq=command.seq, state=CommandState.APPLIED, details=details)
        self._queues.answer(replace(ack, step=self._surgery.step))

    def _handle_other(self, command: Command) -> CommandAck:
        if command.kind is CommandKind.KEEP:
            return self._keep(command)
        if command.kind is CommandKind.REPORT_HELD:
            return self._report_held(command)
        if command.kind is CommandKind.STOP_RUN:
            self.stop_reason = str(command.payload.get("reason") or "stopped by a person")
        else:
            self._veto.paused = command.kind is CommandKind.PAUSE_ADAPTATION
        return CommandAck(seq=command.seq, state=CommandState.APPLIED)

    def _graft(self, command: Command, operation: Operation) -> Answer:
        registration = self._queues.registration
        if registration is not None and command.epoch != registration.epoch:
            reason = "the run has registered again since"
            return Answer(failed(command, reason, RefusalCode.OLD_EPOCH))
        if self._queues.now() >= command.expires_at:
            reason = "it expired before a step boundary came"
            return Answer(failed(command, reason, RefusalCode.EXPIRED))
        try:
            self._veto.check(command)
            receipt = self._surgery.apply(operation).receipt
        except CommandRefusedError as refusal:
            return Answer(failed(command, refusal.reason, refusal.code))
        except CertificateError as error:
            ack = failed(command, str(error), RefusalCode.CERTIFICATE_FAILED)
            return Answer(replace(ack, certificate=error.certificate))
        except (IncompatibleLayerError, UnknownLayerError) as error:
            return Answer(failed(command, str(error), RefusalCode.INCOMPATIBLE_LAYER))
        assert receipt is not None
        ack = CommandAck(
            seq=command.seq,
            state=CommandState.APPLIED,
            pause_ms=receipt.pause_ms,
            certificate=receipt.certificate,
        )
        return Answer(ack, partial(_digests, receipt))

    def _remedy(self, command: Command) -> Answer:
        if self._queues.now() >= command.expires_at:
            reason = "it expired before a step boundary came"
            return Answer(refused(command, RefusalCode.EXPIRED, reason))
        if self._remedies is None:
            reason = "the parameters are spread over several ranks, where no remedy is applied"
            return Answer(refused(command, RefusalCode.DOES_NOT_FIT, reason))
        payload = command.payload
        try:
            self._veto.check(command)
            receipt = self._remedies.server.apply(
                command.adaptation,
                remedy=str(payload["remedy"]),
                layer=command.layer,
                config=dict(payload.get("config", {})),
                finding=str(payload.get("finding", "")),
            )
        except CommandRefusedError as refusal:
            return Answer(refused(command, refusal.code, refusal.reason))
        except (ConfigurationError, UnknownLayerError, GraftError) as error:
            return Answer(refused(command, RefusalCode.DOES_NOT_FIT, str(error)))
        ack = CommandAck(
            seq=command.seq,
            state=CommandState.APPLIED,
            pause_ms=receipt.pause_ms,
            details=short_details(receipt.details),
        )
        return Answer(ack, partial(_digests, receipt))

    def _swap(self, command: Command, swap: Swap) -> CommandAck:
        """One write; the parameters are the eager graft's, before and after."""
        adaptation = self._surgery.changes.find(command.adaptation)
        slot = find_slot(self._surgery.model, command.layer)
        slug = adaptation.blueprint if adaptation is not None else ""
        answer = CommandAck(
            seq=command.seq,
            state=CommandState.REFUSED,
            code=RefusalCode.NOT_FASTER,
            reason=swap.trial.text,
            speedup=swap.trial.speedup if math.isfinite(swap.trial.speedup) else None,
        )
        if not swap.trial.faster:
            return answer
        if slot is None or slot.grafts().get(slug) is not swap.graft:
            return replace(
                answer,
                code=RefusalCode.NOT_GRAFTED,
                reason="the graft is not in the model any more",
            )
        slot.speed_up(slug, swap.compiled)
        return replace(answer, state=CommandState.APPLIED, code="")

    def _keep(self, command: Command) -> CommandAck:
        adaptation = self._surgery.changes.find(command.adaptation)
        remedy = self._surgery.changes.find_remedy(command.adaptation)
        observed = command.adaptation in self._surgery.changes.observed
        if adaptation is None and remedy is None and not observed:
            return _not_grafted(command)
        if adaptation is not None:
            self._surgery.keep(adaptation)
        return CommandAck(seq=command.seq, state=CommandState.APPLIED)

    def _report_held(self, command: Command) -> CommandAck:
        """The server asks: an answer to an earlier command was late, or was lost."""
        changes = self._surgery.changes
        adaptation = changes.find(command.adaptation)
        if adaptation is not None and adaptation.merged:
            return refused(command, RefusalCode.MERGED, MERGED)
        if adaptation is not None and adaptation.receipt is not None:
            receipt: Receipt | RemedyReceipt | None = adaptation.receipt
        else:
            receipt = changes.find_remedy(command.adaptation)
        if receipt is None and command.adaptation not in changes.observed:
            return _not_grafted(command)
        return CommandAck(
            seq=command.seq,
            state=CommandState.APPLIED,
            certificate=receipt.certificate if isinstance(receipt, Receipt) else None,
            details={} if receipt is None else {"since_step": receipt.step},
        )

    def _undo(self, command: Command) -> Answer:
        remedy = self._surgery.changes.find_remedy(command.adaptation)
        if remedy is not None:
            return self._take_back(command, remedy)
        if command.adaptation in self._surgery.changes.observed:
            note = "it has changed nothing"
            ack = CommandAck(seq=command.seq, state=CommandState.APPLIED, reason=note)
            return Answer(ack)
        adaptation = self._surgery.changes.find(command.adaptation)
        if adaptation is None:
            return Answer(_not_grafted(command))
        if adaptation.merged:
            return Answer(refused(command, RefusalCode.MERGED, MERGED))
        wanted = command.payload.get("hard") is not False
        hard = wanted and adaptation.restorable
        report, gone = self._surgery.removals.take_out_for_server(adaptation, hard=hard)
        ack = CommandAck(
            seq=command.seq,
            state=CommandState.APPLIED,
            pause_ms=report.pause_ms,
            reason=_undo_note(adaptation, gone, softened=wanted and not hard),
            details={"back_to_step": adaptation.step} if report.hard else {},
        )
        return Answer(ack, lambda: {"digest_after": report.digest})

    def _take_back(self, command: Command, remedy: RemedyReceipt) -> Answer:
        wanted = command.payload.get("hard") is not False
        hard = wanted and remedy.can_undo_hard
        report = self._surgery.remedies.take_back_for_server(remedy, hard=hard)
        note = "only ended: the snapshot before it was not kept" if wanted and not hard else ""
        ack = CommandAck(
            seq=command.seq,
            state=CommandState.APPLIED,
            pause_ms=report.pause_ms,
            reason=note,
            details={"exact": report.exact},
        )
        return Answer(ack, lambda: {"digest_after": report.digest})


def _is_known(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def refused(command: Command, code: str, reason: str) -> CommandAck:
    """The answer to a command that was not tried."""
    return CommandAck(seq=command.seq, state=CommandState.REFUSED, code=str(code), reason=reason)


def failed(command: Command, reason: str, code: str = "") -> CommandAck:
    """The answer to a command that was tried; the model is as before."""
    return CommandAck(seq=command.seq, state=CommandState.FAILED, code=str(code), reason=reason)


def _digests(receipt: Receipt | RemedyReceipt) -> dict[str, Any]:
    return {"digest_before": receipt.digest_before, "digest_after": receipt.digest_after}


def _not_grafted(command: Command) -> CommandAck:
    return CommandAck(
        seq=command.seq,
        state=CommandState.REFUSED,
        code=RefusalCode.NOT_GRAFTED,
        reason=NOT_GRAFTED,
    )


def _undo_note(adaptation: Adaptation, gone: Sequence[Adaptation], *, softened: bool) -> str:
    notes = []
    if softened:
        notes.append("taken out softly: the snapshot before it was not kept")
    later = [entry.uid for entry in gone if entry is not adaptation]
    if later:
        notes.append(f"later grafts went with it: {', '.join(later)}")
    return "; ".join(notes)
