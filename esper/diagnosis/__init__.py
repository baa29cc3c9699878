"""What is wrong with a training run: rules that turn measurements into findings."""

from __future__ import annotations

from esper.diagnosis.base import Evidence, Memory, RemedySlug, Rule, Threshold
from esper.diagnosis.engine import Change, Diagnosed, Diagnosis
from esper.diagnosis.observation import Observation, Unknown
from esper.diagnosis.recorder import Recorder
from esper.diagnosis.registry import discover, get_rule, list_rules, title_of
from esper.diagnosis.weights import weights_digest

__all__ = [
    "Change",
    "Diagnosed",
    "Diagnosis",
    "Evidence",
    "Memory",
    "Observation",
    "Recorder",
    "RemedySlug",
    "Rule",
    "Threshold",
    "Unknown",
    "discover",
    "get_rule",
    "list_rules",
    "title_of",
    "weights_digest",
]
