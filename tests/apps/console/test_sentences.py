"""What the gates say is shown in the reader's language, with the values that they said."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import product

import pytest
from django.utils import translation

from apps.console.sentences import SENTENCES, in_sentence
from esper.constraints.gates import GateInputs, check_gates
from esper.constraints.remedy_gates import RemedyInputs, check_remedy
from esper.contracts import Risk, RunMode, SafetyPolicy

POLICY = SafetyPolicy()
UNKNOWN = math.nan


def of_grafts() -> Iterator[str]:
    """Each input that a gate distinguishes, alone and at its limits."""
    for mode, risk, confidence, amount in product(
        RunMode, Risk, (0.01, 0.6, 0.97, UNKNOWN), (0.201, 2_048.0, UNKNOWN)
    ):
        inputs = GateInputs(
            mode=mode,
            step=12_000,
            frozen="" if amount < 1 else "olga has paused adaptation of this run",
            layer_in_flight=amount > 1,
            run_in_flight=3,
            layer_last_step=11_000 if amount < 1 else -1,
            layer_refused_seconds=amount if confidence > 0.5 else math.inf,
            run_last_step=-1 if amount < 1 else 11_990,
            adaptations_today=2,
            model_parameters=1_000_000,
            new_parameters=12_345,
            memory_mib=amount,
            latency_ms=amount,
            risk=risk,
            category_cases=0 if amount < 1 else 400,
            missing_evidence=("grad_norm", "saturation") if amount < 1 else (),
            age_seconds=amount,
            confidence=confidence,
        )
        yield from (check.text for check in check_gates(inputs, POLICY))


def of_remedies() -> Iterator[str]:
    for mode, risk, under_way, urgent, given, asks in product(
        RunMode, Risk, (0, 17), (False, True), (0, 1, 2), (False, True)
    ):
        inputs = RemedyInputs(
            mode=mode,
            step=500,
            remedy="set_lr",
            risk=risk,
            under_way=under_way,
            urgent=urgent,
            declined_step=-1 if asks else 480,
            given=given,
            always_asks=asks,
            changes_nothing=asks,
        )
        yield from (check.text for check in check_remedy(inputs, POLICY))


@pytest.mark.parametrize("said", [of_grafts, of_remedies])
def test_every_sentence_of_a_gate_is_known_and_keeps_its_numbers(said: object) -> None:
    texts = set(said())  # type: ignore[operator]
    assert len(texts) > 12
    for text in texts:
        with translation.override("en"):
            assert in_sentence(text) == text
        with translation.override("de"):
            german = in_sentence(text)
        assert german != text, f"no sentence of apps/console/sentences.py fits: {text}"
        assert _digits(german) == _digits(text), (text, german)


def _digits(text: str) -> list[str]:
    return sorted(re.findall(r"\d+", text))


def test_numbers_and_risks_are_written_as_german_writes_them() -> None:
    with translation.override("de"):
        assert in_sentence("Confidence 0.66 is below 0.75.") == (
            "Die Konfidenz 0,66 liegt unter 0,75."
        )
        assert "mittel" in in_sentence("Risk medium needs no person.")
        assert "1.024 MiB" in in_sentence(
            "The graft's forecast memory is 1,101 MiB; the limit is 1,024 MiB."
        )


@pytest.mark.parametrize(
    "text", ["", "Look at the schedule.", "Confidence is low", "olga asks for it. Or not"]
)
def test_any_other_sentence_stays(text: str) -> None:
    with translation.override("de"):
        assert in_sentence(text) == text


def test_each_sentence_is_recognised_as_itself() -> None:
    value = re.compile(r"%\((\w+)\)s")
    for sentence in SENTENCES:
        filled = value.sub("7", sentence.replace("%%", "%"))
        with translation.override("de"):
            assert in_sentence(filled) == translation.gettext(sentence) % dict.fromkeys(
                value.findall(sentence), "7"
            )
