"""Evaluates a model between two steps of its training, and leaves no trace there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from esper.grafting.tensors.random_streams import kept_streams


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside: no gradients, eval mode. After: random streams and every module's mode as before."""
    modes = _Modes(model)
    with torch.no_grad(), kept_streams():
        try:
            model.eval()
            yield
        finally:
            modes.put_back()


class _Modes:
    """The modes of a model's modules, and what their own ``train`` and ``eval`` write.

    A class may do more there than set a flag. LoRA layers merge their weights in eval mode, and
    leave their adapters out until ``train()`` has taken them out of the weights again, which rounds
    the weights. So their own method ends the evaluation, and then the weights are put back.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modes = [(module, module.training) for module in model.modules()]
        own = [module for module, _ in self._modes if _has_own_modes(module)]
        self._calls_train = bool(own)
        tensors = (
            t for m in own for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))
        )
        self._tensors = [(tensor, tensor.detach().clone()) for tensor in tensors]

    def put_back(self) -> None:
        try:
            if self._calls_train:
                self._model.train(self._modes[0][1])
        finally:
            for module, mode in self._modes:
                module.training = mode
            for tensor, before in self._tensors:
                if not torch.equal(tensor.detach(), before):
                    # As autograd saw it, so it counts as no write.
                    tensor.data.copy_(before)


def _has_own_modes(module: nn.Module) -> bool:
    """Its class, or the module alone, has another ``train`` or ``eval`` than torch's."""
    kind, base = type(module), nn.Module
    alone = vars(module).keys() & {"train", "eval"}
    return bool(alone) or kind.train is not base.train or kind.eval is not base.eval
