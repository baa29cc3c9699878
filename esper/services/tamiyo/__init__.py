"""Tamiyo: the service that decides. Public names are loaded when they are asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esper.contracts import AdaptationDecision
    from esper.services.tamiyo.blueprint_integration import (
        BlueprintSelector,
        ExecutionSystemIntegrator,
        ModelState,
        Phase2IntegrationOrchestrator,
    )
    from esper.services.tamiyo.enhanced_main import EnhancedTamiyoService

_HOMES = {
    "AdaptationDecision": "esper.contracts",
    "BlueprintSelector": "esper.services.tamiyo.blueprint_integration",
    "EnhancedTamiyoService": "esper.services.tamiyo.enhanced_main",
    "ExecutionSystemIntegrator": "esper.services.tamiyo.blueprint_integration",
    "ModelState": "esper.services.tamiyo.blueprint_integration",
    "Phase2IntegrationOrchestrator": "esper.services.tamiyo.blueprint_integration",
}

__all__ = [
    "AdaptationDecision",
    "BlueprintSelector",
    "EnhancedTamiyoService",
    "ExecutionSystemIntegrator",
    "ModelState",
    "Phase2IntegrationOrchestrator",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
