"""Applies a remedy of the catalogue to a live run.

    check → snapshot → change → receipt
An exception at any point leaves model, optimizers and random streams as they were.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from esper.exceptions import GraftError
from esper.grafting import RemedyReceipt
from esper.grafting.remedies import apply_change
from esper.grafting.tensors.digests import Frozen
from esper.remedies.base import Effect, Remedy, Target


def apply_remedy(remedy: Remedy, target: Target, config: dict[str, Any]) -> RemedyReceipt:
    """Applies ``remedy`` between two steps.

    Args:
        config: settings that differ from the remedy's defaults.

    Raises:
        ConfigurationError: a setting is unknown or out of range.
        UnknownLayerError: the model has no such layer.
        GraftError: the remedy does not fit this run; the message says why. Nothing was changed.
    """
    full = remedy.config_for(config)
    reason = refusal(remedy, target, full)
    if reason:
        raise GraftError(f"{remedy.slug} cannot be applied: {reason}", layer=target.layer)
    if remedy.changes_nothing:
        return _observe(remedy, target, full)
    return _take(remedy, target, lambda: remedy.apply(target, full))


def resume_remedy(remedy: Remedy, target: Target, details: dict[str, Any]) -> RemedyReceipt:
    """What stays in force of a remedy that an earlier process applied; ``details`` of its receipt.

    Raises:
        KeyError: a setting is missing in ``details``.
    """
    return _take(remedy, target, lambda: remedy.resume(target, details))


def _observe(remedy: Remedy, target: Target, config: dict[str, Any]) -> RemedyReceipt:
    """Without a snapshot: nothing is changed, so there is nothing to take back."""
    started = time.perf_counter()
    effect = remedy.apply(target, config)
    receipt = RemedyReceipt(
        remedy=remedy.slug,
        layer=target.layer,
        step=target.step,
        details=effect.details,
        pause_ms=(time.perf_counter() - started) * 1e3,
        changed_nothing=True,
        _before=Frozen([]),
        _after=Frozen([]),
        _model=target.model,
        _surroundings=target.surroundings,
    )
    return _worded(receipt, remedy)


def _take(remedy: Remedy, target: Target, act: Callable[[], Effect]) -> RemedyReceipt:
    effects: list[Effect] = []

    def change() -> dict[str, Any]:
        effects.append(act())
        return effects[0].details

    try:
        receipt = apply_change(
            target.model, remedy.slug, target.layer, change, target.surroundings, target.step
        )
    except BaseException:
        for effect in effects:
            effect.end()
        raise
    receipt._end = effects[0].end if remedy.stays else None
    return _worded(receipt, remedy)


def _worded(receipt: RemedyReceipt, remedy: Remedy) -> RemedyReceipt:
    receipt.words = remedy.done_in_words(receipt.details)
    receipt._so_far = remedy.so_far
    return receipt


def refusal(remedy: Remedy, target: Target, config: dict[str, Any]) -> str:
    """Why the remedy cannot be applied, a sentence; empty: it can."""
    if target.layer and remedy.scope == "run":
        return "it is for the whole run, not for one layer"
    if not target.layer and remedy.scope == "layer":
        return "it needs the name of a layer"
    anywhere = remedy.works_on_parts or remedy.changes_nothing
    reason = "" if anywhere else target.surroundings.why_no_remedy()
    return reason or remedy.why_not(target, config)
