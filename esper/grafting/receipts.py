"""Receipts of a change to a live model: what was done, and how to undo it.

ChangeReceipt     digests before and after, the snapshot that a hard undo restores
├── Receipt       a graft; hard or soft undo
└── RemedyReceipt a remedy; hard undo only
"""

from __future__ import annotations

import itertools
import math
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from esper.blueprints import Graft, get_blueprint
from esper.contracts import Certificate
from esper.exceptions import UndoError
from esper.grafting.companions.companion import Companion, dismiss
from esper.grafting.compiled import anything_was_compiled
from esper.grafting.copies import let_follow
from esper.grafting.manifest import GraftRecord
from esper.grafting.pauses import without_collection
from esper.grafting.ranks.replicas import Joint, jointly
from esper.grafting.slot import (
    find_host,
    find_slot,
    living_grafts,
    remove_unused_slots,
    slot_of,
    slots_of_grafts,
    take_out,
)
from esper.grafting.snapshots.rolling_back import roll_back
from esper.grafting.snapshots.snapshot import Snapshot, SnapshotMemory, own_change
from esper.grafting.snapshots.spilling import Writing
from esper.grafting.state_dicts import put_back_slots
from esper.grafting.surroundings import Surroundings
from esper.grafting.tensors.digests import Frozen, hash_in_background


@dataclass(frozen=True, slots=True)
class UndoReceipt:
    """What an undo did.

    Attributes:
        exact: hard undo: all weights, buffers, optimizer state, counters of schedulers and random
            streams equal the snapshot to the bit. Soft undo: False.
        discarded: other grafts that were removed with it, as ``layer/blueprint``.
        kept: hard undo: what the script has set or loaded since the snapshot, and what stayed so.
        not_restored: hard undo: what the snapshot had no values for, and what stayed as it was.
        rewound: hard undo: weights that nothing trains, whose numbers the script has written in
            place, as by ``copy_``; they are as before. What it has loaded is in ``kept``.
    """

    hard: bool
    exact: bool
    pause_ms: float
    discarded: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    not_restored: tuple[str, ...] = ()
    rewound: tuple[str, ...] = ()
    _after: Frozen | None = field(repr=False, default=None)

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the model after the undo, computed in another thread; may be empty."""
        return "" if self._after is None else self._after.digest

    def __str__(self) -> str:
        what = "hard undo" if self.hard else "soft undo"
        after = "equals the state before, to the bit" if self.exact else "keeps what it has learned"
        if self.hard and not self.exact:
            after = "is as before, except for what follows"
        notes = [f"kept {text}" for text in self.kept]
        notes += [f"not restored: {text}" for text in self.not_restored]
        notes += [f"rewound, though the script has written them: {text}" for text in self.rewound]
        others = f"; also removed: {', '.join(self.discarded)}" if self.discarded else ""
        return f"{what} in {self.pause_ms:.0f} ms: the model {after}{others}" + "".join(
            f"; {note}" for note in notes
        )

    def __repr__(self) -> str:
        return f"<UndoReceipt {self}>"


@dataclass(frozen=True, slots=True)
class CopiedReceipt:
    """What a copy or a pickle has in the place of a receipt: a model may keep one.

    A receipt holds locks and snapshots, and undoes a change in the one model that it is of.

    Attributes:
        text: the receipt's words.
    """

    text: str

    def undo(self, hard: bool = True) -> NoReturn:
        """Raises ``UndoError``."""
        raise UndoError(
            f"a copy of a receipt undoes nothing, use the receipt itself: {self.text}", layer=""
        )

    def __str__(self) -> str:
        return self.text


@dataclass(slots=True, eq=False, kw_only=True)
class ChangeReceipt:
    """A change of a live model that can be undone.

    Attributes:
        layer: the layer that was changed.
        step: optimizer step, -1 where there is no run.
        pause_ms: how long the training loop waited for the change.
    """

    layer: str
    step: int
    pause_ms: float
    _before: Frozen = field(repr=False)
    _after: Frozen = field(repr=False)
    _model: nn.Module = field(repr=False)
    _snapshot: Snapshot | None = field(repr=False, default=None)
    _writing: Writing | None = field(repr=False, init=False, default=None)
    _serial: int = field(repr=False, init=False, default_factory=itertools.count().__next__)

    @property
    def digest_before(self) -> str:
        """Hex SHA-256 of the model before the change; computed at the first call."""
        return self._before.digest

    @property
    def digest_after(self) -> str:
        """Hex SHA-256 of the model with the change in it, before the next step."""
        return self._after.digest

    @property
    def can_undo_hard(self) -> bool:
        return self._snapshot is not None

    @property
    def snapshot_bytes(self) -> int:
        """Memory of the snapshot; 0 when it was freed."""
        return 0 if self._snapshot is None else self._snapshot.nbytes

    @property
    def snapshot_bytes_on_disk(self) -> int:
        """What of the snapshot is in the folder for snapshots."""
        return 0 if self._snapshot is None else self._snapshot.bytes_on_disk

    def __reduce__(self) -> tuple[Any, ...]:
        """For copies and pickles of what keeps the receipt."""
        return CopiedReceipt, (str(self),)

    def is_of(self, model: nn.Module) -> bool:
        """It tells of a change of this very model."""
        return self._model is model

    def is_younger_than(self, other: ChangeReceipt) -> bool:
        """Its change was made later in this process, by whatever session."""
        return self._serial > other._serial

    @property
    def is_being_written(self) -> bool:
        """The snapshot is in memory and on its way to disk."""
        return self._writing is not None

    def begin_spilling(self, folder: Path) -> None:
        """Another thread begins to write the snapshot to disk, where it costs no memory."""
        snapshot = self._snapshot
        if snapshot is not None and not snapshot.bytes_on_disk and self._writing is None:
            self._writing = Writing(snapshot, folder)

    def finish_spilling(self, *, wait: bool = False) -> None:
        """Frees the memory of a snapshot that is on disk now.

        Args:
            wait: until it is.

        Raises:
            OSError: it cannot be written there; it stays in memory.
        """
        writing, snapshot = self._writing, self._snapshot
        if writing is None or snapshot is None or not (wait or writing.is_done):
            return
        self._writing = None
        snapshot.bytes_on_disk = writing.take_over()
        for frozen in (self._before, self._after):  # they hold the copies in memory till then
            hash_in_background(frozen)

    def forget_snapshot(self) -> None:
        """Frees the snapshot. A hard undo is impossible from now on."""
        # The digests are computed from the snapshot's copies, which are free afterwards.
        for frozen in (self._before, self._after):
            hash_in_background(frozen)
        if self._writing is not None:
            self._writing.stop()
            self._writing = None
        self._snapshot = None

    def _roll_back(self, snapshot: Snapshot, *, exact: bool) -> UndoReceipt:
        """Restores the snapshot, and compares.

        Args:
            exact: the caller changes nothing more that is in the snapshot.
        """
        result = roll_back(snapshot)
        if result.differences:
            what = ", ".join(result.differences)
            raise UndoError(f"the state before could not be restored: {what}", layer=self.layer)
        exact = exact and not result.not_restored and not snapshot.loaded
        kept = tuple(result.kept)
        if exact and not self._before.fits(self._model):
            exact, kept = False, kept or ("the modules where the script has put them",)
        return UndoReceipt(
            hard=True,
            exact=exact,
            pause_ms=math.nan,
            kept=kept,
            not_restored=tuple(result.not_restored),
            rewound=tuple(result.rewound),
            _after=self._before,
        )


@dataclass(slots=True, eq=False, kw_only=True)
class Receipt(ChangeReceipt):
    """A graft that is in the model: what was done, and how to undo it."""

    record: GraftRecord
    _graft: Graft = field(repr=False)
    _surroundings: Surroundings = field(repr=False)
    _companion: Companion | None = field(repr=False, default=None)

    def __str__(self) -> str:
        certificate, at = self.certificate, f" at step {self.step}" if self.step >= 0 else ""
        birth = "output unchanged" if certificate.preserving else "output changed"
        undo = (
            ""
            if self.can_undo_hard
            else "; only a soft undo is possible"
            if self.present
            else "; not in the model any more"
        )
        if self.is_being_written:
            undo += "; its snapshot is being written to disk"
        if self.snapshot_bytes_on_disk:
            undo += f"; its snapshot is on disk ({self.snapshot_bytes_on_disk / 2**20:.1f} MiB)"
        since = self.record.layer.since
        where = f"{since!r} … {self.layer!r}" if since else f"{self.layer!r}"
        return (
            f"{self.blueprint} in {where}{at}: {certificate.parameters:,} parameters, "
            f"{birth}, {self.pause_ms:.0f} ms pause{self._untrained()}{undo}"
        )

    def __repr__(self) -> str:
        return f"<Receipt {self}>"

    def _untrained(self) -> str:
        """A note where no optimizer was given, so nothing trains the new weights."""
        trains = any(parameter.requires_grad for parameter in self._graft.parameters())
        alone = trains and not self._surroundings.optimizers
        return "; no optimizer trains it" if alone else ""

    @property
    def adaptation(self) -> str:
        return self.record.adaptation

    @property
    def blueprint(self) -> str:
        """Slug."""
        return self.record.blueprint

    @property
    def config(self) -> dict[str, Any]:
        return dict(self.record.config)

    @property
    def seed(self) -> int:
        return self.record.seed

    @property
    def certificate(self) -> Certificate:
        return self.record.certificate

    @property
    def graft(self) -> Graft:
        """The living module."""
        return self._graft

    @property
    def present(self) -> bool:
        """True while the graft is in the model; a hard undo of an older graft removes it too."""
        return self._is_at(self.layer) or self._has_moved()

    def _is_at(self, layer: str) -> bool:
        slot = find_slot(self._model, layer)
        return slot is not None and slot._modules.get(self.blueprint) is self._graft

    def _has_moved(self) -> bool:
        """The script has put the layer into another module, as adapters do: its name is new now."""
        layer, _ = living_grafts(self._model).get(self._graft, ("", ""))
        slot = find_slot(self._model, layer) if layer else None
        if slot is None:
            return False
        self.layer = layer
        self.record = replace(self.record, layer=replace(self.record.layer, name=layer))
        slot.records[self.blueprint] = self.record
        return True

    @property
    def can_undo_hard(self) -> bool:
        return self.present and self._snapshot is not None

    def undo(self, hard: bool = True) -> UndoReceipt:
        """Removes the graft.

        Soft: removes it and keeps what the host has learnt since; grafts that require it are
        removed too. Hard: restores the state before the graft to the bit, with optimizer and
        random streams; grafts that were added later are removed too. ``discarded`` names them in
        both cases. What the script itself has set since stays: ``kept`` names it.

        The graft is removed as a whole, or an error leaves everything as it was, and the undo can
        be tried again. Where the model has replicas, each rank must call this; all ranks remove
        the graft, or none does.

        Raises:
            UndoError: the graft is no longer in the model, the snapshot is gone (hard), or the
                values of the snapshot could not be restored.
            ReplicaError: another rank could not remove it, so it stays on all ranks.
        """
        undo = self._undo_hard if hard else self._undo_soft
        return _undo_whole(self, self._surroundings, undo, values=hard)

    def notice_gone(self) -> None:
        """Something else has taken the graft out: nothing trains it any more."""
        if self._companion is not None:
            self._companion.leave()
        self.forget_snapshot()

    def undo_here(self, hard: bool = True) -> UndoReceipt:
        """As :meth:`undo`, on this rank alone; for a caller that synchronises the ranks."""
        undo = self._undo_hard if hard else self._undo_soft
        return _undo_whole(self, replace(self._surroundings, replicas=None), undo, values=hard)

    def _refuse_gone(self) -> None:
        if not self.present:
            raise UndoError(f"{self.blueprint} is not in {self.layer!r} any more", layer=self.layer)

    def _undo_soft(self) -> UndoReceipt:
        self._refuse_gone()
        take_out(self._model, self.layer, self.blueprint)
        if self._companion is not None:
            self._companion.leave()
        discarded = self._discard_helpless()
        return UndoReceipt(
            hard=False,
            exact=False,
            pause_ms=math.nan,
            discarded=discarded,
            _after=self._before,
        )

    def _undo_hard(self) -> UndoReceipt:
        self._refuse_gone()
        snapshot = self._snapshot
        if snapshot is None:
            raise UndoError(
                f"the snapshot before {self.blueprint} is gone; only a soft undo is possible",
                layer=self.layer,
            )
        gone = snapshot.grafts() - living_grafts(self._model).keys()
        # A graft that was merged since is restored: the host's weights no longer contain it.
        merged = {graft for graft in gone if isinstance(graft, Graft) and graft.merged}
        removed_since = gone - merged
        for graft in merged:
            graft.__dict__.pop("merged")
        discarded = self._discard_later(snapshot)
        if self._companion is not None:
            self._companion.leave()
        report = self._roll_back(snapshot, exact=not removed_since)
        self._discard_revived(removed_since)
        return replace(report, discarded=discarded)

    def _discard_helpless(self) -> tuple[str, ...]:
        """Removes the layer's grafts whose required blueprint was just removed."""
        slot = slot_of(find_host(self._model, self.layer))
        present = slot.grafts() if slot is not None else {}
        helpless = [
            slug
            for slug in present
            if (needs := get_blueprint(slug).requires) and not needs & present.keys()
        ]
        for slug in helpless:
            self._discard(present[slug], self.layer, slug)
        return tuple(f"{self.layer}/{slug}" for slug in helpless)

    def _discard(self, graft: nn.Module, layer: str, slug: str) -> None:
        take_out(self._model, layer, slug)
        dismiss(graft.parameters(), self._surroundings.optimizers)

    def _discard_later(self, snapshot: Snapshot) -> tuple[str, ...]:
        """Removes each graft that is not in the snapshot, including this one."""
        discarded = []
        for graft, (layer, slug) in living_grafts(self._model).items():
            if graft not in snapshot.grafts():
                take_out(self._model, layer, slug)
                if graft is not self._graft:
                    discarded.append(f"{layer}/{slug}")
        return tuple(discarded)

    def _discard_revived(self, removed_since: set[nn.Module]) -> None:
        # An older graft was in the snapshot and was removed on purpose since: it stays removed,
        # and so does what trained it, which the snapshot brings back too.
        living = living_grafts(self._model)
        for graft in removed_since:
            if graft in living:
                self._discard(graft, *living[graft])
            dismiss(graft.parameters(), self._surroundings.optimizers)


@dataclass(slots=True, eq=False, kw_only=True)
class RemedyReceipt(ChangeReceipt):
    """A remedy that is in effect.

    Attributes:
        remedy: its name.
        details: JSON values that tell what was done, such as ``factor`` or ``max_abs_diff``.
        key: its identity, the same for as long as the receipt lives.
        adaptation: its uid at the server that ordered it; empty: nobody did.
        changed_nothing: it has measured or saved something. There is nothing to undo, and the
            digests are empty.
        words: what was done, for people; empty: its name says it.
    """

    remedy: str
    details: dict[str, Any]
    _surroundings: Surroundings = field(repr=False)
    _merged: Graft | None = field(repr=False, default=None)
    _end: Callable[[], None] | None = field(repr=False, default=None)
    key: str = field(default_factory=lambda: str(uuid.uuid4()))
    adaptation: str = ""
    changed_nothing: bool = False
    words: str = ""
    _so_far: Callable[[dict[str, Any]], str] = field(repr=False, default=lambda _: "")

    @property
    def digest_before(self) -> str:
        return "" if self.changed_nothing else ChangeReceipt.digest_before.__get__(self)

    @property
    def digest_after(self) -> str:
        return "" if self.changed_nothing else ChangeReceipt.digest_after.__get__(self)

    @property
    def in_force(self) -> bool:
        """It does something in each step."""
        return self._end is not None

    def __str__(self) -> str:
        said = self.words[:1].lower() + self.words[1:] or self.remedy
        place = f" at {self.layer!r}" if self.layer else ""
        so_far = self._so_far(self.details)
        return f"{said}{place}{f' ({so_far})' if so_far else ''}"

    def __repr__(self) -> str:
        return f"<RemedyReceipt {self}>"

    def end(self) -> None:
        """Ends what the remedy does in each step; what the model learnt stays."""
        if self._end is not None:
            self._end()
            self._end = None

    def undo(self, hard: bool = True) -> UndoReceipt:
        """Restores the state before the remedy, as a graft's hard undo does.

        Args:
            hard: otherwise only end what the remedy does in each step, and keep what was learnt.

        Raises:
            UndoError: the snapshot is gone, a graft was added or removed since, or the values of
                the snapshot could not be restored.
            ReplicaError: another rank could not undo it, so it stays in effect on all ranks.
        """
        if self.changed_nothing:
            return UndoReceipt(hard=hard, exact=True, pause_ms=0.0)
        if not hard:
            return self._undo_soft()
        return _undo_whole(self, self._surroundings, self._undo_hard, last=self.end)

    def undo_here(self) -> UndoReceipt:
        """As a hard :meth:`undo`, on this rank alone; what it does in each step goes on.

        For a caller that synchronises the ranks, and ends it when all of them have agreed.
        """
        if self.changed_nothing:
            return UndoReceipt(hard=True, exact=True, pause_ms=0.0)
        return _undo_whole(self, replace(self._surroundings, replicas=None), self._undo_hard)

    def _undo_hard(self) -> UndoReceipt:
        snapshot = self._snapshot
        if snapshot is None:
            raise UndoError(
                "the snapshot before this remedy is gone, so it cannot be undone", layer=self.layer
            )
        merged = set() if self._merged is None else {self._merged}
        if living_grafts(self._model).keys() != snapshot.grafts() - merged:
            raise UndoError(
                "a graft was added or removed since; undo that change first", layer=self.layer
            )
        report = self._roll_back(snapshot, exact=True)
        if self._merged is not None:
            self._merged.__dict__.pop("merged", None)
        return report

    def _undo_soft(self) -> UndoReceipt:
        if self._end is None:
            raise UndoError(
                f"{self.remedy} has changed the model once, so only a hard undo takes it back",
                layer=self.layer,
            )
        started = time.perf_counter()
        self.end()
        self.forget_snapshot()
        after = Frozen.of(self._model)
        hash_in_background(after)
        pause_ms = (time.perf_counter() - started) * 1e3
        return UndoReceipt(hard=False, exact=False, pause_ms=pause_ms, _after=after)


@without_collection()
def _undo_whole(
    receipt: ChangeReceipt,
    surroundings: Surroundings,
    undo: Callable[[], UndoReceipt],
    *,
    values: bool = True,
    last: Callable[[], None] | None = None,
) -> UndoReceipt:
    """Undoes a change as a whole: an error leaves everything as it was, on all ranks.

    Args:
        values: the undo writes values of tensors.
        last: called when all ranks have undone it; it cannot be taken back.
    """
    undo_with = partial(_undo_with, receipt, surroundings, undo, values=values, last=last)
    if surroundings.replicas is None:
        return undo_with(Joint(None))
    with jointly(surroundings.replicas) as joint:
        return undo_with(joint)


def _undo_with(
    receipt: ChangeReceipt,
    surroundings: Surroundings,
    undo: Callable[[], UndoReceipt],
    joint: Joint,
    *,
    values: bool,
    last: Callable[[], None] | None,
) -> UndoReceipt:
    model, copies, snapshot = receipt._model, surroundings.copies, receipt._snapshot
    started, grad_mode = time.perf_counter(), torch.is_grad_enabled()
    memory = SnapshotMemory(on_device=True)
    before = Snapshot.take(model, surroundings, memory, values=values)
    merged = _merged_grafts(snapshot)
    # Code that was compiled with a slot runs on with it.
    slots = {} if anything_was_compiled() else slots_of_grafts(model)
    try:
        with own_change(model):
            report = undo()
            let_follow(model, copies, keep_slots=True)
            after = receipt._before if report.exact else Frozen.of(model)
            joint.agree()
        receipt.forget_snapshot()
        hash_in_background(after)
        let_follow(model, copies)
        pause_ms = (time.perf_counter() - started) * 1e3
        report = replace(report, pause_ms=pause_ms, _after=after)
        remove_unused_slots(model, slots)
        if last is not None:
            last()
        return report
    except BaseException:
        torch.set_grad_enabled(grad_mode)  # Ctrl-C may end a block before its exit runs
        if not joint.done:
            put_back_slots(model, slots)
            before.restore()
            let_follow(model, copies)
            receipt._snapshot = snapshot
            for graft in merged:
                graft.merged = True
        raise


def _merged_grafts(snapshot: Snapshot | None) -> list[Graft]:
    """Grafts of the snapshot that were merged into their host since."""
    grafts = snapshot.grafts() if snapshot is not None else set()
    return [graft for graft in grafts if isinstance(graft, Graft) and graft.merged]
