"""Another thread of the script may draw random numbers while Esper works.

A loader that fetches ahead and augments does. The draws come at fixed points here, not by chance.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from esper.blueprints import Graft, get_blueprint
from esper.blueprints.catalog.proj_ia3 import ChannelGain, ProjIa3
from esper.blueprints.initial import Initializer
from esper.contracts import LayerInfo
from esper.grafting import apply_graft, digest, trace_layers
from esper.grafting.tensors.random_streams import RandomStreams
from tests.esper.tiny_models import Training, make_training, surroundings_of

TARGET = "blocks.0.wide"
DRAWS: list[Callable[[], Any]] = [
    lambda: torch.rand(1),
    random.random,
    lambda: numpy.random.rand(),
]
STREAMS = pytest.mark.parametrize("draw", DRAWS, ids=["torch", "python", "numpy"])


def beside(draw: Callable[[], Any]) -> None:
    thread = threading.Thread(target=draw)
    thread.start()
    thread.join()


class InterruptedGain(ChannelGain):
    draws: list[Callable[[], Any]]

    def combine(self, x: Tensor, y: Tensor) -> Tensor:
        if self.draws:
            beside(self.draws.pop())
        return super().combine(x, y)


class Interrupted(ProjIa3):
    """Draws nothing, and another thread draws while it is built and while it is run first."""

    def __init__(self, draw: Callable[[], Any]) -> None:
        self._while_built, self._while_run = [draw], [draw]

    def make(self, layer: LayerInfo, config: dict[str, Any], weights: Initializer) -> Graft:
        if self._while_built:
            beside(self._while_built.pop())
        graft = InterruptedGain(weights.ones(layer.features_out), channel_axis=layer.channel_axis)
        graft.draws = self._while_run
        return graft


def layer_of(training: Training) -> LayerInfo:
    tokens = training.batches[0][:, :-1]
    infos = trace_layers(training.model, lambda: training.model(tokens))
    return next(info for info in infos if info.name == TARGET)


@STREAMS
def test_a_graft_is_not_refused_for_what_another_thread_draws(draw: Callable[[], Any]) -> None:
    training = make_training()
    training.run(2)
    blueprint = Interrupted(draw)
    receipt = apply_graft(
        training.model, layer_of(training), blueprint, surroundings=surroundings_of(training)
    )
    assert not blueprint._while_built
    assert not blueprint._while_run
    assert receipt.certificate.passed
    training.run(2)


@STREAMS
def test_an_undo_succeeds_though_another_thread_draws(
    draw: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    training = make_training()
    training.run(2)
    before, streams = digest(training.model), RandomStreams.read()
    receipt = apply_graft(
        training.model,
        layer_of(training),
        get_blueprint("proj_lora_64"),
        surroundings=surroundings_of(training),
    )
    training.run(2)
    restore, draws = RandomStreams.restore, [draw]

    def interrupted(self: RandomStreams) -> None:
        restore(self)
        if draws:
            beside(draws.pop())

    monkeypatch.setattr(RandomStreams, "restore", interrupted)
    receipt.undo(hard=True)
    assert not draws
    assert digest(training.model) == before
    assert streams.equals(RandomStreams.read())
