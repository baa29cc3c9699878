"""Slots that hold no graft: kept where compiled code would not run one that comes later."""

from __future__ import annotations

from esper import grafting
from esper.contracts import RunMode
from esper.grafting.compiled import anything_was_compiled
from esper.sdk.surgery.subject import Subject


class IdleSlots:
    """Keeps them, or takes them out of the model and its copies.

    Attributes:
        left_by_load: there may be some, because torch's hooks cannot be removed inside a load.
    """

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        # Compiled code runs no slot that comes later, so there they are prepared at attach.
        self._are_kept = subject.run.mode is not RunMode.OBSERVE
        self.left_by_load = False

    def settle(self) -> None:
        """The first step is over, so it is known whether torch.compile has compiled anything.

        If not, a graft gets its slot when it comes: an empty one costs some microseconds at each
        call of its layer.
        """
        if self._subject.ranks.alone and not anything_was_compiled():
            self._are_kept = False
            self.remove()

    def remove(self) -> None:
        """Where slots are not kept, a layer has one only while it holds grafts."""
        self.left_by_load = False
        if not self._are_kept:
            for model in (self._subject.model, *self._subject.surroundings.copies):
                grafting.remove_slots(model)

    def on_step(self) -> None:
        """An optimizer step is over."""
        if self.left_by_load:
            self.remove()
