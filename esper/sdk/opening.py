"""The first complete step: the layers are known, so they are measured, and the run registers."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from esper.contracts import LayerInfo, RunMode
from esper.grafting import Surroundings
from esper.grafting.layers.graph import count_of
from esper.grafting.layers.watching import LayerWatch
from esper.health import HealthSampler
from esper.health.sharded import ShardedSampler
from esper.sdk.parts import Parts
from esper.sharding import FrameSum


def open_run(
    parts: Parts, *, model_parameters: int, measure: bool, wants_meeting: Callable[[], bool]
) -> None:
    """Fix the layers, once they have been seen to run, and tell the parts that wait for them.

    Args:
        model_parameters: of the model as it was attached.
        measure: health frames are made.
        wants_meeting: on several ranks: this process wants to change or evaluate the model.
    """
    if not parts.layers.fix():
        return
    layers = parts.layers.own
    parts.surgery.idle_slots.settle()
    if measure:
        parts.surgery.sampler = _sampler(parts, layers, wants_meeting)
    parts.surgery.copies.open()
    if parts.run.mode is not RunMode.OBSERVE:
        parts.surgery.copies.begin()
    parts.evaluations.begin()
    if not parts.ranks.decides:
        return
    if parts.diagnosis is not None:
        parts.diagnosis.open(layers)
    if parts.server is not None:
        parts.server.start(
            layers,
            target_steps=parts.setup.target_steps,
            model_parameters=model_parameters,
        )
    if parts.local is not None:
        parts.local.open(layers, model_parameters)


def parameters_of(model: nn.Module, surroundings: Surroundings) -> int:
    """Elements of all parameters, on all ranks together."""
    layout = surroundings.replicas.layout if surroundings.replicas is not None else None
    if layout is None:
        return sum(map(count_of, model.parameters()))
    return sum(part.shape.numel() for part in layout.parts())


def _sampler(
    parts: Parts, layers: tuple[LayerInfo, ...], wants_meeting: Callable[[], bool]
) -> HealthSampler | ShardedSampler | None:
    """On every rank where each holds a part of the model, otherwise on rank 0 alone."""
    model, around = parts.setup.model, parts.setup.surroundings
    watch = LayerWatch(model, parts.compilation, parts.fail_closed)
    if around.replicas is not None and around.replicas.layout is not None:
        return ShardedSampler(
            around.replicas.layout,
            FrameSum(around.replicas.background),
            around.optimizers,
            layers,
            watch=watch,
            leads=parts.ranks.decides,
            wants_meeting=wants_meeting,
            pace=parts.sampling,
            fail_closed=parts.fail_closed,
        )
    if not parts.ranks.decides:
        return None
    return HealthSampler(
        model,
        around.optimizers,
        layers,
        watch=watch,
        watch_seconds=watch.take_seconds,
        pace=parts.sampling,
        fail_closed=parts.fail_closed,
    )
