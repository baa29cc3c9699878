"""Gives dead units a new start."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from esper.blueprints import layout
from esper.contracts import Risk
from esper.exceptions import ConfigurationError, GraftError
from esper.fail_closed import contained
from esper.grafting.layers.graph import kind_of
from esper.grafting.optimizers import parameters_of
from esper.grafting.slot import find_host, watch
from esper.remedies.base import Effect, Remedy, Target
from esper.remedies.dead_units import (
    FiringTimes,
    answer,
    check_pair,
    fires,
    reader_of,
    renew,
    silence,
    silent_units,
    weight_of,
)
from esper.remedies.update_hooks import Optimizer, after_update

TURNS = 5  # a newborn unit that does not fire for the batch is drawn again
CHECK_EVERY = 10  # passes; each check is one read from the device


class Recycle(Remedy):
    slug = "recycle"
    title = "Give dead units a new start"
    idea = (
        "Gives the units of a layer that do not fire for the batch new incoming weights, outgoing "
        "weights of zero and no moments, so that the output changes only by what they still gave. "
        "In force, it does so again with units that fall silent, each judged by its own usual "
        "silences. On several ranks it acts once."
    )
    source = "Self-normalised resets, Farias and Jozefiak 2024, arXiv 2410.20098"
    when = "Many units of a layer do not fire for any input."
    risk = Risk.MEDIUM
    changes_weights = True
    needs_sample = True
    scope = "layer"

    def default_config(self) -> dict[str, Any]:
        return {"next_layer": "", "seed": 0}  # "": the layer that reads the units is found

    def check_config(self, config: dict[str, Any]) -> None:
        seed, name = config["seed"], config["next_layer"]
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ConfigurationError(f"seed must be a whole number from 0 on, got {seed!r}")
        if not isinstance(name, str):
            raise ConfigurationError(f"next_layer must be the name of a layer, got {name!r}")

    def so_far(self, details: dict[str, Any]) -> str:
        later = details["later"]
        return f"units {len(details['units']):,}{f', and {later:,} more since' if later else ''}"

    def why_not(self, target: Target, config: dict[str, Any]) -> str:
        find_host(target.model, target.layer)
        if config["next_layer"]:
            find_host(target.model, config["next_layer"])
        return "" if target.sample is not None else "it needs a batch of the model's inputs"

    def apply(self, target: Target, config: dict[str, Any]) -> Effect:
        model, sample, around = target.model, target.sample, target.surroundings
        assert sample is not None
        seed, layer = config["seed"], target.layer
        next_layer = config["next_layer"] or reader_of(model, layer, sample)
        host, reader = find_host(model, layer), find_host(model, next_layer)
        width = check_pair(model, layer, host, reader)
        dead = silent_units(model, next_layer, width, sample)
        if not dead:
            raise GraftError("the layer has no dead unit", layer=layer)
        before = answer(model, sample)
        silence(reader, dead, around)
        without = answer(model, sample)
        newborn = dead
        for turn in range(TURNS):
            renew(host, newborn, around, seed=seed + turn)
            newborn = [u for u in silent_units(model, next_layer, width, sample) if u in dead]
            if not newborn:
                break
        if not torch.equal(answer(model, sample), without):
            raise GraftError(f"another layer than {next_layer!r} reads its units", layer=layer)
        lost = float((without - before).abs().max())
        details = {"units": dead, "next_layer": next_layer, "seed": seed, "max_abs_diff": lost}
        return self.resume(target, details)

    def resume(self, target: Target, details: dict[str, Any]) -> Effect:
        details = {**details, "later": 0}
        if target.surroundings.replicas is not None:
            return Effect(details)  # units fire differently on each rank
        return Effect(details, _Resets(target, details).end)


class _Resets:
    """Watches the units in the passes that train, and resets those that died after an update."""

    def __init__(self, target: Target, details: dict[str, Any]) -> None:
        model, name = target.model, details["next_layer"]
        self._host, self._reader = find_host(model, target.layer), find_host(model, name)
        self._around = target.surroundings
        self._details = details
        self._width = check_pair(model, target.layer, self._host, self._reader)
        self._axis = layout.channel_axis_of(kind_of(self._reader))
        self._times = FiringTimes(self._width)
        self._unchecked = 0
        unmeasured = "No dead unit gets a new start."
        self._end_watch = watch(model, name, contained("remedy", unmeasured)(self._look))
        own = [o for o in target.optimizers if _holds(o, weight_of(self._host))]
        self._handles = after_update(own, self._reset, unmeasured)

    def end(self) -> None:
        self._end_watch()
        for handle in self._handles:
            handle.remove()

    def _look(self, x: Tensor, _: Tensor) -> None:
        if torch.is_grad_enabled() and self._reader.training:
            self._times.observe(fires(x, self._axis, self._width))
            self._unchecked += 1

    @torch.no_grad()
    def _reset(self, _: Optimizer) -> None:
        if self._unchecked < CHECK_EVERY:
            return
        self._unchecked = 0
        dead = self._times.dead().nonzero().flatten().tolist()
        if dead:
            self._details["later"] += len(dead)
            silence(self._reader, dead, self._around)
            renew(
                self._host, dead, self._around, seed=self._details["seed"] + self._details["later"]
            )
            self._times.forget(dead)


def _holds(optimizer: Optimizer, parameter: nn.Parameter) -> bool:
    return any(parameter is own for own in parameters_of(optimizer))
