"""Applies a plan to the model of this process: all of its grafts, or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from esper.contracts import AdaptationState, Decision, Plan
from esper.exceptions import EsperError, PlanError
from esper.grafting import Receipt, UndoReceipt
from esper.sdk.adaptation import Adaptation, Operation
from esper.sdk.surgery import Surgery


@dataclass(frozen=True, slots=True, eq=False)
class PlanReceipt:
    """A plan that is in the model; ``session.undo`` takes all of it out.

    Attributes:
        receipts: of its grafts, in the order in which they were applied.
    """

    plan: Plan
    receipts: tuple[Receipt, ...]

    def __str__(self) -> str:
        here = sum(receipt.present for receipt in self.receipts)
        return f"plan of {len(self.receipts)} changes, {here} of them in the model"


def apply_plan(
    plan: Plan, surgery: Surgery, operation: Callable[[Decision], Operation]
) -> PlanReceipt:
    """Graft every member in order, at one step boundary.

    Args:
        operation: makes the graft of a member.

    Raises:
        PlanError: a member could not be grafted, and those before it were taken out again; or one
            of them could not be, which the message says.
    """
    done: list[Adaptation] = []
    for member in plan.members:
        try:
            done.append(surgery.apply(operation(member)))
        except EsperError as error:
            stays = _take_back(done, surgery)
            place = member.adaptation.layer_name
            raise PlanError(_failed(place, error, len(done), stays), stays=stays) from error
    return PlanReceipt(plan, tuple(entry.receipt for entry in done if entry.receipt is not None))


def undo_plan(receipt: PlanReceipt, surgery: Surgery, *, hard: bool) -> UndoReceipt:
    """Take the members out, the last one first.

    Args:
        hard: restore the model as it was before each; a member whose snapshot is gone is taken
            out without one.

    Returns:
        What the last of these undos, that of the first member, has done.

    Raises:
        PlanError: nothing of it is in the model.
        UndoError: a member could not be taken out; those before it stay.
    """
    last: UndoReceipt | None = None
    for member in reversed(receipt.receipts):
        if member.present:
            last = surgery.undo(member, hard=hard and member.can_undo_hard)
    if last is None:
        raise PlanError("nothing of this plan is in the model any more")
    return last


def _take_back(done: Sequence[Adaptation], surgery: Surgery) -> tuple[str, ...]:
    """The last one first; the places of those that could not be taken out."""
    stays = []
    for entry in reversed(done):
        if not entry.grafted:
            continue  # it went with a later one
        try:
            surgery.removals.take_out(
                entry, hard=entry.restorable, state=AdaptationState.ROLLED_BACK
            )
        except EsperError:
            stays.append(entry.layer)
    return tuple(stays)


def _failed(place: str, error: EsperError, before: int, stays: tuple[str, ...]) -> str:
    text = f"the plan's graft into {place!r} failed: {error}"
    if stays:
        return f"{text}; these could not be taken out again and stay: {', '.join(stays)}"
    return f"{text}; " + (
        "nothing was changed" if not before else f"the {before} before it were taken out again"
    )
