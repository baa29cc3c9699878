"""Receipts of a change to a live model: what was done, and how to undo it.

ChangeReceipt     digests before and after, the snapshot that a hard undo restores
├── Receipt       a graft; hard or soft undo
└── RemedyReceipt a remedy; hard undo only
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from esper.blueprints import Graft, get_blueprint
from esper.contracts import Certificate
from esper.exceptions import UndoError
from esper.grafting.companion import Companion, dismiss
from esper.grafting.copies import let_follow
from esper.grafting.manifest import GraftRecord
from esper.grafting.replicas import jointly
from esper.grafting.slot import (
    find_host,
    graft_at,
    living_grafts,
    slot_of,
    take_out,
)
from esper.grafting.snapshot import Frozen, Snapshot, digest
from esper.grafting.surroundings import Surroundings


@dataclass(frozen=True, slots=True)
class UndoReceipt:
    """What an undo did.

    Attributes:
        digest: of the model afterwards.
        exact: hard undo: everything equals the snapshot to the bit. Soft undo: False.
        discarded: other grafts that were removed with it, as ``layer/blueprint``.
    """

    digest: str
    hard: bool
    exact: bool
    pause_ms: float
    discarded: tuple[str, ...] = ()

    def __str__(self) -> str:
        what = "hard undo" if self.hard else "soft undo"
        after = "equals the state before, to the bit" if self.exact else "keeps what it has learned"
        others = f"; also removed: {', '.join(self.discarded)}" if self.discarded else ""
        return f"{what} in {self.pause_ms:.0f} ms: the model {after}{others}"

    def __repr__(self) -> str:
        return f"<UndoReceipt {self}>"


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

    def forget_snapshot(self) -> None:
        """Frees the snapshot. A hard undo is impossible from now on."""
        # The digests are computed from the snapshot's copies, so this is their last chance.
        _ = self.digest_before, self.digest_after
        self._snapshot = None

    def _not_restored(self, change: str, differences: list[str]) -> UndoError:
        what = ", ".join(differences) or "the model's digest"
        return UndoError(f"not as before the {change}: {what}", layer=self.layer)


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
        return (
            f"{self.blueprint} in {self.layer!r}{at}: {certificate.parameters:,} parameters, "
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
        return graft_at(self._model, self.layer, self.blueprint) is self._graft

    @property
    def can_undo_hard(self) -> bool:
        return self.present and self._snapshot is not None

    def undo(self, hard: bool = True) -> UndoReceipt:
        """Removes the graft.

        Soft: removes it and keeps what the host has learnt since; grafts that require it are
        removed too. Hard: restores the state before the graft to the bit, with optimizer and
        random streams; grafts that were added later are removed too. ``discarded`` names them in
        both cases. Where the model has replicas, each rank must call this; all ranks remove the
        graft, or none does.

        Raises:
            UndoError: the graft is no longer in the model, the snapshot is gone (hard), or the
                model was not restored exactly.
            ReplicaError: another rank could not remove it, so it stays on all ranks.
        """
        if self._surroundings.replicas is None:
            return self.undo_here(hard)
        with undoing_everywhere(self._model, self._surroundings, self):
            return self.undo_here(hard)

    def undo_here(self, hard: bool = True) -> UndoReceipt:
        """As :meth:`undo`, on this rank alone; for a caller that synchronises the ranks."""
        if not self.present:
            raise UndoError(f"{self.blueprint} is not in {self.layer!r} any more", layer=self.layer)
        return self._undo_hard() if hard else self._undo_soft()

    def _undo_soft(self) -> UndoReceipt:
        started = time.perf_counter()
        take_out(self._model, self.layer, self.blueprint)
        if self._companion is not None:
            self._companion.leave()
        discarded = self._discard_helpless()
        let_follow(self._model, self._surroundings.copies)
        pause_ms = (time.perf_counter() - started) * 1e3
        self.forget_snapshot()
        return UndoReceipt(
            digest(self._model), hard=False, exact=False, pause_ms=pause_ms, discarded=discarded
        )

    def _undo_hard(self) -> UndoReceipt:
        snapshot = self._snapshot
        if snapshot is None:
            raise UndoError(
                f"the snapshot before {self.blueprint} is gone; only a soft undo is possible",
                layer=self.layer,
            )
        started = time.perf_counter()
        gone = snapshot.grafts() - living_grafts(self._model).keys()
        # A graft that was merged since is restored: the host's weights no longer contain it.
        merged = {graft for graft in gone if isinstance(graft, Graft) and graft.merged}
        removed_since = gone - merged
        for graft in merged:
            graft.__dict__.pop("merged")
        discarded = self._discard_later(snapshot)
        if self._companion is not None:
            self._companion.leave()
        snapshot.restore()
        differences = snapshot.differences()
        self._discard_revived(removed_since)
        let_follow(self._model, self._surroundings.copies)
        after = digest(self._model)
        pause_ms = (time.perf_counter() - started) * 1e3
        self.forget_snapshot()
        exact = not removed_since and after == self.digest_before
        if differences or not (exact or removed_since):
            raise self._not_restored("graft", differences)
        return UndoReceipt(after, hard=True, exact=exact, pause_ms=pause_ms, discarded=discarded)

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
        # An older graft was in the snapshot and was removed on purpose since: it stays removed.
        for graft, (layer, slug) in living_grafts(self._model).items():
            if graft in removed_since:
                self._discard(graft, layer, slug)


@dataclass(slots=True, eq=False, kw_only=True)
class RemedyReceipt(ChangeReceipt):
    """A remedy that is in effect.

    Attributes:
        remedy: its name.
        details: JSON values that tell what was done, such as ``factor`` or ``max_abs_diff``.
        key: its identity, the same for as long as the receipt lives.
    """

    remedy: str
    details: dict[str, Any]
    _merged: Graft | None = field(repr=False, default=None)
    _end: Callable[[], None] | None = field(repr=False, default=None)
    key: str = field(default_factory=lambda: str(uuid.uuid4()))

    def __str__(self) -> str:
        details = ", ".join(
            f"{name} {value}" for name, value in self.details.items() if _is_short(value)
        )
        place = f"at {self.layer!r}" if self.layer else "of the run"
        return f"{self.remedy} {place}{f' ({details})' if details else ''}"

    def __repr__(self) -> str:
        return f"<RemedyReceipt {self}>"

    def end(self) -> None:
        """Ends what the remedy does in each step; what the model learnt stays."""
        if self._end is not None:
            self._end()
            self._end = None

    def undo(self, hard: bool = True) -> UndoReceipt:
        """Restores the state before the remedy to the bit, as a graft's hard undo does.

        Args:
            hard: otherwise only end what the remedy does in each step, and keep what was learnt.

        Raises:
            UndoError: the snapshot is gone, a graft was added or removed since, or the model was
                not restored exactly.
        """
        if not hard:
            return self._undo_soft()
        report = self.undo_here()
        self.end()
        return report

    def undo_here(self) -> UndoReceipt:
        """As a hard :meth:`undo`, but what the remedy does in each step goes on.

        For a caller that synchronises the ranks, and ends it when all of them have agreed.
        """
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
        started = time.perf_counter()
        snapshot.restore()
        if self._merged is not None:
            self._merged.__dict__.pop("merged", None)
        differences, after = snapshot.differences(), digest(self._model)
        self.forget_snapshot()
        pause_ms = (time.perf_counter() - started) * 1e3
        if differences or after != self.digest_before:
            raise self._not_restored("remedy", differences)
        return UndoReceipt(after, hard=True, exact=True, pause_ms=pause_ms)

    def _undo_soft(self) -> UndoReceipt:
        if self._end is None:
            raise UndoError(
                f"{self.remedy} has changed the model once, so only a hard undo takes it back",
                layer=self.layer,
            )
        started = time.perf_counter()
        self.end()
        self.forget_snapshot()
        pause_ms = (time.perf_counter() - started) * 1e3
        return UndoReceipt(digest(self._model), hard=False, exact=False, pause_ms=pause_ms)


def _is_short(value: object) -> bool:
    return isinstance(value, str | int | float) and len(str(value)) <= 40


def _merged_grafts(snapshot: Snapshot | None) -> list[Graft]:
    """Grafts of the snapshot that were merged into their host since."""
    grafts = snapshot.grafts() if snapshot is not None else set()
    return [graft for graft in grafts if isinstance(graft, Graft) and graft.merged]


@contextmanager
def undoing_everywhere(
    model: nn.Module, surroundings: Surroundings, receipt: ChangeReceipt
) -> Iterator[None]:
    """Undoes ``receipt`` inside the block on all ranks; if one rank fails, all are restored."""
    with jointly(surroundings.replicas) as joint:
        kept, before = receipt._snapshot, Snapshot.take(model, surroundings)
        merged = _merged_grafts(kept)
        try:
            yield
            joint.agree()
        except BaseException:
            if not joint.done:
                before.restore()
                let_follow(model, surroundings.copies)
                receipt._snapshot = kept
                for graft in merged:
                    graft.merged = True
            raise
