"""What was changed in one model: which grafts and remedies, in which order."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from pathlib import Path

from esper import blueprints
from esper.contracts import AdaptationState, GraftKind, SafetyPolicy
from esper.exceptions import UndoError
from esper.grafting import Receipt, RemedyReceipt
from esper.grafting.snapshots.spilling import why_no_room
from esper.reward import FORWARD_UNCHANGED, LATER_LOOKS
from esper.reward.terms import NOT_YET
from esper.sdk.adaptation import Adaptation

SNAPSHOTS_KEPT = 3
FIRM = 4  # every so many looks one is taken whatever it costs; a power of two
LATER_COST_RATIO = 0.02  # of the time since the graft, for looks that only pay
OBSERVE = GraftKind.OBSERVE


class Changes:
    """The record of a model's changes. It changes nothing itself; see ``Surgery``.

    Attributes:
        adaptations: every graft of this session, oldest first.
        remedies: those that are in effect, oldest first.
        observed: ids at the server of remedies that have changed nothing.
        shortened: (snapshots kept, bytes of the last one), where the limit allowed fewer than
            :data:`SNAPSHOTS_KEPT`; None otherwise.

    Args:
        snapshot_limit: bytes of memory that all snapshots together may take.
        snapshot_folder: where those go that do not fit; None: they are freed.
    """

    def __init__(
        self, snapshot_limit: float = math.inf, snapshot_folder: Path | None = None
    ) -> None:
        self._snapshot_folder = snapshot_folder
        self.disk_error = ""  # why the last snapshot could not be moved to disk
        self.shortened: tuple[int, int] | None = None
        self._snapshot_limit = snapshot_limit
        self.adaptations: list[Adaptation] = []
        self.remedies: list[RemedyReceipt] = []
        self.observed: set[str] = set()
        self._history: list[Adaptation | RemedyReceipt] = []  # in effect, as they came

    # -- reading -------------------------------------------------------------------------------

    @property
    def on_probation(self) -> bool:
        """Some graft may still be taken out again."""
        return any(entry.on_probation for entry in self.adaptations)

    @property
    def grafted(self) -> tuple[Adaptation, ...]:
        """Those whose graft is in the model, oldest first."""
        return tuple(entry for entry in self.adaptations if entry.grafted)

    def find(self, uid: str) -> Adaptation | None:
        """The adaptation of that id, None where its graft is not in the model."""
        return next((entry for entry in self.grafted if entry.uid == uid), None)

    def find_remedy(self, uid: str) -> RemedyReceipt | None:
        """The remedy that the server ordered under that id, None where it is not in effect."""
        return next((r for r in self.remedies if r.adaptation == uid), None)

    def of_receipt(self, receipt: Receipt) -> Adaptation:
        """Raises ``UndoError`` where its graft is in no slot of the model any more."""
        for entry in self.grafted:
            if entry.receipt is receipt and not entry.merged:
                return entry
        raise UndoError(_why_no_entry(receipt), layer=receipt.layer)

    def knows(self, receipt: Receipt) -> bool:
        """The graft came in this session, whether it is still in the model or not."""
        return any(entry.receipt is receipt for entry in self.adaptations)

    def left_by_load(self, receipt: Receipt) -> bool:
        """A state that the script loaded has taken the graft out already."""
        return any(e.receipt is receipt and e.left_by_load for e in self.adaptations)

    def place_of(self, receipt: RemedyReceipt) -> int:
        """Its place among all changes, -1 for none: the same on all ranks."""
        return self._history.index(receipt) if receipt in self._history else -1

    def next_uid(self) -> str:
        """An id for a graft that no server has named."""
        taken = {entry.uid for entry in self.adaptations}
        return next(uid for n in itertools.count(1) if (uid := f"local-{n}") not in taken)

    def youngest_guarded(self, step: int) -> Adaptation | None:
        """The graft on probation that the guard may take out for a loss of this step.

        A graft that came at the end of that step, or later, had no part in the loss, and one that
        only observes cannot be why a run diverges.
        """
        guarded = (
            entry
            for entry in reversed(self.grafted)
            if entry.on_probation and entry.step < step <= entry.guarded_until
        )
        acts = (e for e in guarded if blueprints.get_blueprint(e.blueprint).kind is not OBSERVE)
        return next(acts, None)

    def due_for_look(self, step: int, policy: SafetyPolicy) -> list[Adaptation]:
        """Grafts whose gain is to be measured at this step."""
        due = [e for e in self.grafted if _look_is_due(e, step - e.step, policy)]
        return [
            entry
            for entry in due
            if serves_loss(entry.blueprint)
            and blueprints.get_blueprint(entry.blueprint).kind not in FORWARD_UNCHANGED
        ]

    # -- writing -------------------------------------------------------------------------------

    def add_graft(self, adaptation: Adaptation) -> None:
        self.adaptations.append(adaptation)
        self._history.append(adaptation)
        self._forget_old_snapshots()

    def add_remedy(self, receipt: RemedyReceipt, merged: Adaptation | None = None) -> None:
        """``merged`` is the adaptation that it folded into its host."""
        self.remedies.append(receipt)
        self._history.append(receipt)
        if merged is not None:
            merged.merged = True
        self._forget_old_snapshots()

    def drop_since(self, undone: Adaptation | RemedyReceipt) -> None:
        """The model is as it was before ``undone``, so everything since is undone with it."""
        self._drop_from(self._history.index(undone), graft=isinstance(undone, Adaptation))

    def drop_younger(self, undone: Receipt) -> None:
        """As :meth:`drop_since`, for a graft that is in no record of this session."""
        made = [e.receipt if isinstance(e, Adaptation) else e for e in self._history]
        younger = (n for n, r in enumerate(made) if r is not None and r.is_younger_than(undone))
        self._drop_from(next(younger, len(made)), graft=True)

    def _drop_from(self, place: int, *, graft: bool) -> None:
        gone, self._history = self._history[place:], self._history[:place]
        for entry in gone:
            if isinstance(entry, RemedyReceipt):
                self._drop_remedy(entry)
            elif graft:
                entry.merged = False  # into weights that are again as they were before it

    def is_last(self, adaptation: Adaptation) -> bool:
        """Nothing was changed after it, so a hard undo takes nothing else along."""
        return bool(self._history) and self._history[-1] is adaptation

    def mark_gone(self, state: AdaptationState) -> tuple[Adaptation, ...]:
        """Sets the state of grafts that are in the model no more, and returns them."""
        gone = tuple(entry for entry in self.grafted if not entry.in_effect)
        for entry in gone:
            entry.state = state
        return gone

    def resume(self, adaptations: Sequence[Adaptation], remedies: Sequence[RemedyReceipt]) -> None:
        """What a checkpoint held. Its remedies cannot be undone any more."""
        self.adaptations, self.remedies = list(adaptations), list(remedies)
        self._history = list(adaptations)

    def forget(self, receipt: RemedyReceipt) -> None:
        """A remedy was ended; the changes after it stay."""
        # One that came out of a checkpoint is in no history.
        self._history = [entry for entry in self._history if entry is not receipt]
        self.remedies.remove(receipt)

    def bring_back(self, receipt: Receipt) -> Adaptation:
        """The adaptation of a graft that was in a loaded state; a new one where none is known."""
        uid = receipt.adaptation
        known = next((entry for entry in self.adaptations if entry.uid == uid), None)
        if known is None or known.grafted:
            known = Adaptation(
                uid=self.next_uid() if known is not None or not uid else uid,
                layer=receipt.layer,
                blueprint=receipt.blueprint,
                step=receipt.step,
                state=AdaptationState.KEPT,
                config=receipt.config,
                grafted_at=time.time(),
            )
            self.adaptations.append(known)
        known.receipt, known.state, known.left_by_load = receipt, AdaptationState.KEPT, False
        if known not in self._history:
            self._history.append(known)
        return known

    def _drop_remedy(self, receipt: RemedyReceipt) -> None:
        receipt.end()
        self.remedies.remove(receipt)
        for entry in self.adaptations:
            if entry.merged and entry.receipt is not None and not entry.receipt.graft.merged:
                entry.merged = False

    def _forget_old_snapshots(self) -> None:
        """A snapshot is a copy of the model and its optimizer: only the newest few are kept.

        Where their limit allows fewer, the oldest go to disk or are freed; also the last one, if it
        does not fit. Until it is written, that one copy is in memory beyond the limit.
        """
        restorable = [receipt for receipt in self._receipts() if receipt.can_undo_hard]
        kept = restorable[-SNAPSHOTS_KEPT:]
        for receipt in restorable[: len(restorable) - len(kept)]:
            receipt.forget_snapshot()
        size = restorable[-1].snapshot_bytes if restorable else 0
        for receipt in tuple(kept):
            stay = [entry for entry in kept if not entry.is_being_written]
            if sum(entry.snapshot_bytes for entry in stay) <= self._snapshot_limit:
                return
            if self._snapshot_folder is not None:
                receipt.begin_spilling(self._snapshot_folder)
                continue
            receipt.forget_snapshot()
            kept.remove(receipt)
            self.shortened = len(kept), size

    def finish_spilling(self, *, wait: bool = False) -> None:
        """Frees the memory of snapshots that are on disk now; those that cannot be are gone.

        Args:
            wait: until all are written.
        """
        for receipt in self._receipts():
            try:
                receipt.finish_spilling(wait=wait)
            except OSError as error:
                self.disk_error, size = str(error), receipt.snapshot_bytes
                receipt.forget_snapshot()
                self.shortened = sum(r.can_undo_hard for r in self._receipts()), size

    def why_no_snapshot(self, nbytes: int) -> str:
        """Why the next change could not be undone hard, where a folder was given for that.

        Args:
            nbytes: of its snapshot, about.
        """
        held = sum(r.snapshot_bytes for r in self._receipts())
        if self._snapshot_folder is None or held + nbytes <= self._snapshot_limit:
            return ""
        return why_no_room(self._snapshot_folder, nbytes)

    def snapshots(self) -> str:
        """How many changes can be undone hard, and where their snapshots are; a line."""
        kept = [receipt for receipt in self._receipts() if receipt.can_undo_hard]
        if not kept:
            return ""
        memory = sum(receipt.snapshot_bytes for receipt in kept) / 2**20
        disk = sum(receipt.snapshot_bytes_on_disk for receipt in kept) / 2**20
        where = f", {disk:.1f} MiB in {self._snapshot_folder}" if disk else ""
        return f"{len(kept)} for hard undos: {memory:.1f} MiB in memory{where}"

    def _receipts(self) -> list[Receipt | RemedyReceipt]:
        found = [e.receipt if isinstance(e, Adaptation) else e for e in self._history]
        return [receipt for receipt in found if receipt is not None]


def _why_no_entry(receipt: Receipt) -> str:
    if receipt.present:
        return (
            "this graft was made by another session or by esper.graft; receipt.undo() takes it out"
        )
    return "this graft is not in the model any more"


def serves_loss(blueprint: str) -> bool:
    """False for a capacity limit or a balancer: without it the loss may well be lower."""
    return not blueprints.get_blueprint(blueprint).requires


def _look_is_due(entry: Adaptation, age: int, policy: SafetyPolicy) -> bool:
    if not policy.probation_looks:
        return False
    if entry.on_probation:
        return _tests_at(entry, age, policy)
    return _is_owed_a_look(entry) and _looks_later_at(entry, age, policy)


def _tests_at(entry: Adaptation, age: int, policy: SafetyPolicy) -> bool:
    """At even distances after the warm-up; fewer of them where they take too much time."""
    since, length, spacing = _test_of(age, policy)
    if since <= 0 or since > length:
        return False
    return since == length or since % (entry.look_every * spacing) == 0


def pace_looks(entry: Adaptation, step: int, policy: SafetyPolicy) -> None:
    """After a look: how many of the next ones are taken, from what they were measured to cost.

    It changes at the first look and at firm ones alone, so that an equal run takes the same looks.
    """
    since, _, spacing = _test_of(step - entry.step, policy)
    if not entry.on_probation or (len(entry.looks) > 1 and since % (FIRM * spacing)):
        return
    elapsed = max(0.0, time.time() - entry.grafted_at)
    step_seconds = max(0.0, elapsed - entry.look_seconds) / max(1, step - entry.step)
    allowed = policy.probation_cost_ratio * step_seconds * policy.probation_steps
    all_looks = policy.probation_looks * entry.look_seconds / len(entry.looks)
    entry.look_every = 1
    while entry.look_every < FIRM and all_looks > entry.look_every * allowed:
        entry.look_every *= 2


def _test_of(age: int, policy: SafetyPolicy) -> tuple[int, int, int]:
    """(steps since the warm-up, steps of the test, steps between two of the policy's looks)."""
    length = policy.probation_steps - policy.maturity_steps
    return age - policy.maturity_steps, length, max(1, length // max(1, policy.probation_looks))


def _looks_later_at(entry: Adaptation, age: int, policy: SafetyPolicy) -> bool:
    """A few times behind the end of the test: does it still lower the loss?"""
    taken = entry.later_looks(policy)
    last = taken[-1].step - entry.step if taken else policy.probation_steps
    spacing = max(1, policy.probation_steps // 2)
    is_time = len(taken) < LATER_LOOKS and age >= last + spacing
    return is_time and _has_time_for_look(entry, LATER_COST_RATIO)


def _is_owed_a_look(entry: Adaptation) -> bool:
    """It can be switched off, and a part of its reward is still to be earned, or a server knows."""
    if entry.merged or entry.receipt is None or not entry.receipt.present:
        return False
    return not entry.local or (entry.reward is not None and NOT_YET in entry.reward.terms)


def _has_time_for_look(entry: Adaptation, ratio: float) -> bool:
    """All looks at it take at most this share of the time since the graft."""
    elapsed = max(0.0, time.time() - entry.grafted_at)
    per_look = entry.look_seconds / max(1, len(entry.looks))
    return entry.look_seconds + per_look <= ratio * elapsed
