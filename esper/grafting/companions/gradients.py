"""What the user's loop does to its optimizer's gradients, so that a graft's go through the same.

A loop clears gradients through its optimizer, which does not know a graft's weights. Nothing of the
user's is wrapped or hooked for that: a hook on each new weight runs as its gradient arrives, before
it is accumulated, and compares some gradients of the host with what they were.

cleared    the host's gradients were cleared since the last backward pass: so are the graft's
left out   all of the host optimizer's tensors are frozen for this pass only, as Lightning does with
           the other optimizers of a GAN: the graft's gradient counts as zero
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from esper.grafting.optimizers import parameters_of
from esper.grafting.tensors.versions import writes_to
from esper.sharding import local

WITNESSES = 8  # gradients of the host that are compared


@dataclass(frozen=True, slots=True)
class _Witness:
    """A gradient of the host as it was; it is not kept in memory."""

    parameter: nn.Parameter
    gradient: weakref.ref[Tensor]
    version: int

    def is_replaced(self) -> bool:
        """Another tensor is the gradient now, or none is."""
        gradient = self.parameter.grad
        return gradient is None or self.gradient() is not gradient

    def writes(self) -> int:
        """How often it was written into."""
        gradient = self.parameter.grad
        return 0 if gradient is None else writes_to(gradient) - self.version


class Passes:
    """The backward passes that are running.

    Reentrant checkpointing runs passes inside of a pass. A pass that raised never ends; it is found
    when the next one begins that is not inside of it.
    """

    def __init__(self) -> None:
        self._running: list[tuple[int, int]] = []  # (id, depth)
        self._ended = -1

    def is_new(self) -> bool:
        """No gradient of the present pass was seen so far."""
        present = torch._C._current_graph_task_id()
        return present != self._ended and all(present != known for known, _ in self._running)

    def begin(self, at_end: Callable[[], None]) -> tuple[bool, bool]:
        """The present pass begins; ``at_end`` is called when it is over.

        Returns:
            Whether it is inside of another, and whether an earlier one raised.
        """
        present, depth = torch._C._current_graph_task_id(), _depth()
        outer = [entry for entry in self._running if entry[1] < depth]
        raised = len(outer) < len(self._running)
        self._running = [*outer, (present, depth)]

        def end() -> None:
            self._running = [entry for entry in self._running if entry[0] != present]
            self._ended = present
            at_end()

        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(end)
        return bool(outer), raised


def _depth() -> int:
    """How many backward passes this thread is in."""
    code, depth = torch.autograd.graph._engine_run_backward.__code__, 0
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        depth += frame.f_code is code
        frame = frame.f_back
    return depth


class HostGradients:
    """Notices that the gradients of an optimizer were cleared, by whatever call."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._witnesses: list[_Witness] = []
        self._frozen = self._is_frozen()
        self._stepped = False  # the last mark is that of a step

    def mark(self, when_freed: Callable[[], None] | None = None) -> None:
        """Remembers the present gradients.

        Args:
            when_freed: called at once when one of them is freed, most likely because the loop has
                cleared it; not in a backward pass. It must not look at the host's gradients.
        """

        self._stepped = False

        def freed(_: object) -> None:
            if when_freed is not None and torch._C._current_graph_task_id() == -1:
                when_freed()

        self._witnesses = [
            _Witness(parameter, weakref.ref(gradient, freed), writes_to(gradient))
            for parameter, gradient in self._present()
        ]

    def end_step(self, when_freed: Callable[[], None]) -> None:
        """The host's optimizer has made a step: what is frozen now was not frozen for one pass."""
        self._frozen = self._is_frozen()
        self.mark(when_freed)
        self._stepped = True

    def cleared(self) -> bool:
        """The gradients were cleared since :meth:`mark`.

        Some may have been accumulated again in the present backward pass. Where the host had none,
        a clearing cannot be noticed; then each step counts as followed by one.
        """
        if not self._witnesses:
            return self._stepped
        if any(witness.is_replaced() for witness in self._witnesses):
            # With create_graph, accumulation makes a new tensor as well.
            keeps_graph = torch.is_grad_enabled()
            return not keeps_graph or any(w.parameter.grad is None for w in self._witnesses)
        writes = [witness.writes() for witness in self._witnesses]
        if min(writes) == 0 or max(writes) > 1:  # a pass writes once
            return min(writes) > 0
        # Set to zero, or accumulated in this pass before the graft's; this waits for a GPU.
        # Of one that is spread over ranks, this rank's part: the whole would be a collective call.
        found = [local(g) for w in self._witnesses if (g := w.parameter.grad) is not None]
        gradients = [gradient for gradient in found if gradient.numel()]
        if not gradients:
            return True
        device = gradients[0].device
        return not bool(torch.stack([g.any().to(device) for g in gradients]).all())

    def left_out(self) -> bool:
        """All tensors are frozen, and were not when the optimizer made its last step."""
        return self._is_frozen() and not self._frozen

    def _is_frozen(self) -> bool:
        optimizer = self._optimizer()
        held = [] if optimizer is None else parameters_of(optimizer)
        return bool(held) and not any(parameter.requires_grad for parameter in held)

    def _present(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        optimizer = self._optimizer()
        held = [] if optimizer is None else parameters_of(optimizer)
        having = [p for p in held if p.grad is not None and p.grad.layout is torch.strided]
        for parameter in having[:: max(1, -(-len(having) // WITNESSES))]:
            gradient = parameter.grad
            if gradient is not None:
                yield parameter, gradient
