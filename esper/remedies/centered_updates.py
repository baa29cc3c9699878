"""Trains a layer as if the mean of its inputs were taken out of them.

Where inputs have a mean much larger than their spread, as behind a sigmoid, nearly all of a
gradient moves what the layer gives to every input alike, and its units end where they do not differ
any more. With inputs x, their mean m and a bias c = b + m sum(W), the layer W x + b is
W (x - m) + c; its gradient by W is G - m g, where g is the gradient by the bias (Schraudolph 1998).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from esper.blueprints import layout
from esper.grafting.layers.graph import kind_of
from esper.remedies.update_hooks import Optimizer, after_update, before_update


class CenteredUpdates:
    """Changes the gradient of a weight before each update, and corrects the bias after it.

    It keeps a copy of the weight during a step. A step in which weight or bias is not trained
    is left as it is.

    Args:
        optimizer: trains the weight.
        module: a linear layer or a convolution.
        mean: of its inputs; of each of them in a shape that fits the weight.
    """

    def __init__(self, optimizer: Optimizer, module: nn.Module, mean: float | Tensor) -> None:
        self._weight, self._bias = module._parameters["weight"], module._parameters.get("bias")
        self._axis = 1 if kind_of(module) in layout.TRANSPOSED_LINEAR else 0
        self._mean = mean
        self._before: Tensor | None = None
        undone = "The mean of a layer's inputs counts in such a step."
        self._handles = before_update([optimizer], self._center, undone)
        self._handles += after_update([optimizer], self._correct, undone)

    def end(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._before = None

    @torch.no_grad()
    def _center(self, optimizer: Optimizer) -> None:
        weight, bias = self._weight, self._bias
        self._before = None
        if weight is None or bias is None or weight.grad is None or bias.grad is None:
            return
        if not any(bias is p for group in optimizer.param_groups for p in group["params"]):
            return
        shape = [1] * weight.ndim
        shape[self._axis] = -1
        self._before = weight.detach().clone()
        weight.grad.sub_(bias.grad.reshape(shape) * self._mean)

    @torch.no_grad()
    def _correct(self, _: Optimizer) -> None:
        before, self._before = self._before, None
        if before is not None and self._weight is not None and self._bias is not None:
            moved = (self._weight - before) * self._mean
            self._bias.sub_(moved.movedim(self._axis, 0).flatten(1).sum(1))
