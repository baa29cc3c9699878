"""Findings and remedies are shown in the reader's language: all of them, with their values."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.utils import translation
from django.utils.translation import gettext

from apps.adaptations.deadlines import _OVERDUE
from apps.console.sentences import in_sentence, in_value
from esper.blueprints import list_blueprints
from esper.contracts import SIGNAL_NOTES
from esper.contracts.remedies import MARKED, NEWEST
from esper.diagnosis import list_rules
from esper.policy.cases import MEASURED
from esper.policy.confidence import Confidence
from esper.remedies import list_remedies
from hosts.paths import ROOT
from tests.apps.console.library_texts import OTHERS, RULES, returned_texts, texts_of

# These say something only through their values: a number, a name, or another text.
VALUES_ALONE = ("net.0", "0.1234", "net.0: net.0", "the undo of net.0 net.0")
CHECKS = ("gates", "remedy_gates")
NAMES_OF_SETTINGS = ("torch._dynamo.config.recompile_limit",)


def german(text: str) -> str:
    with translation.override("de"):
        return in_sentence(text)


def is_translated(text: str) -> bool:
    with translation.override("en"):
        assert in_sentence(text) == text
    translated = german(text)
    return translated != text and _digits(translated) == _digits(text)


def _digits(text: str) -> list[str]:
    return sorted(re.findall(r"\d+", text))


@pytest.mark.parametrize("path", [*RULES, *OTHERS], ids=lambda path: path.stem)
def test_every_sentence_of_a_finding_has_a_german_one_with_its_values(path: Path) -> None:
    texts = set(texts_of(path)).difference(VALUES_ALONE, NAMES_OF_SETTINGS)
    assert [text for text in sorted(texts) if not is_translated(text)] == []


def test_every_reason_of_a_decision_is_german() -> None:
    sure = [Confidence(0.6, 0.41, 0.8, cases, ()).about for cases in (0, 500)]
    reasons = [*MEASURED.values(), *(f"its confidence is {about}" for about in sure)]
    assert [text for text in reasons if not is_translated(text)] == []


def test_every_verdict_on_a_graft_is_german() -> None:
    """With what it has seen in it, which another function writes."""
    texts = {text for text in returned_texts(ROOT / "esper/reward/verdict.py") if " " in text}
    assert len(texts) > 20
    assert [text for text in sorted(texts) if not is_translated(text)] == []


def test_every_answer_why_not_another_blueprint_is_german() -> None:
    texts = {text for text in returned_texts(ROOT / "esper/selection.py") if text.endswith(".")}
    assert len(texts) > 8
    assert [text for text in sorted(texts) if not is_translated(text)] == []


def test_the_sentences_of_all_rules_were_found() -> None:
    without = {path.stem for path in RULES if not list(texts_of(path))}
    assert {path.stem for path in RULES} == {rule.slug for rule in list_rules()}
    assert without <= {"not_held"}  # the ledger has seen it, and writes what it has seen


def test_every_advice_of_a_rule_is_german() -> None:
    assert [rule.slug for rule in list_rules() if not is_translated(rule.advice)] == []


SETTINGS: dict[str, tuple[Any, ...]] = {
    "factor": (1.0, 0.5, 2.0, 0.1, 0.3, 3.0),
    "step": (NEWEST, MARKED, 5_800),
    "value": (0.003,),
}


def _of_remedies() -> Iterator[str]:
    for remedy in list_remedies():
        yield from (remedy.title, remedy.idea, remedy.when)
        default = remedy.default_config()
        for name in default:
            for value in SETTINGS.get(name, ()):
                yield remedy.in_words({**default, name: value})
        yield remedy.in_words(default)


def test_every_text_of_a_remedy_is_german() -> None:
    texts = set(_of_remedies())
    assert len(texts) > 3 * len(list_remedies())
    assert [text for text in sorted(texts) if not is_translated(text)] == []


def test_numbers_clauses_and_the_subject_are_written_as_german_writes_them() -> None:
    assert german(
        "fc1: 55% of the units of fc1 had a gradient of exactly zero in 8 readings in a row"
    ) == (
        "fc1: 55 % der Einheiten von fc1 hatten in 8 Messungen nacheinander einen Gradienten von "
        "genau null"
    )
    assert german("the loss became nan; weights and gradients are finite") == (
        "der Verlust wurde nan; Gewichte und Gradienten sind endlich"
    )
    assert german("the loss became nan; it was first seen at net.0") == (
        "der Verlust wurde nan; zuerst gesehen wurde es an net.0"
    )
    assert german("The loss is a sum over 32 rows.") == "Der Verlust ist eine Summe über 32 Zeilen."
    assert german("1.557") == "1,557"
    assert german("Rewind to step 5,800 and halve the learning rate") == (
        "Auf Schritt 5.800 zurückspulen und die Lernrate halbieren"
    )


def test_a_value_alone_is_a_number_or_a_word() -> None:
    with translation.override("de"):
        assert in_value("0.66") == "0,66"
        assert in_value("supervised") == gettext("supervised") != "supervised"
        assert in_value("net.0") == "net.0"
    with translation.override("en"):
        assert in_value("0.66") == "0.66"


def test_the_outcome_of_every_deadline_is_german() -> None:
    assert [text for text in _OVERDUE.values() if not is_translated(text)] == []


def test_why_a_run_is_not_changed_is_german() -> None:
    texts = set(returned_texts(ROOT / "apps/adaptations/history.py"))
    assert len([text for text in texts if text.startswith("the run")]) == 3
    assert [text for text in texts if " " in text and not is_translated(text)] == []
    assert german("the run has finished") == "der Lauf ist beendet"


def test_several_sentences_are_translated_one_by_one() -> None:
    assert german(
        "This run is supervised; a person decides. Risk is medium; only risk up to low needs no "
        "person."
    ) == (
        "Dieser Lauf ist beaufsichtigt; eine Person entscheidet. Das Risiko ist mittel; nur bis "
        "zum Risiko niedrig ist keine Person nötig."
    )


def test_what_is_not_known_in_part_stays_whole() -> None:
    for text in (
        "the loss became nan; and nobody knows why",
        "net.0: something new was seen",
        "At least two people should look at this; finite",
    ):
        assert german(text) == text


CATALOGUE = ROOT / "esper/blueprints"
WHY_NOT = (
    *sorted((CATALOGUE / "catalog").glob("[a-z]*.py")),
    *(CATALOGUE / f"{name}.py" for name in ("attention", "base", "fitting", "layout", "pointwise")),
    *(CATALOGUE / f"{name}.py" for name in ("composition", "feedforward", "gradient_reduction")),
    *(ROOT / "esper" / path for path in ("grafting/layers/graph.py", "contracts/spans.py")),
)


def test_every_text_of_a_blueprint_is_german() -> None:
    """Its source is a reference to a paper, and stays."""
    written = [(one.title, one.idea, one.when) for one in list_blueprints()]
    assert [text for texts in written for text in texts if not is_translated(text)] == []


def test_every_answer_why_a_layer_takes_no_graft_is_german() -> None:
    texts = {text for path in WHY_NOT for text in returned_texts(path) if " " in text}
    assert len(texts) > 50
    assert [text for text in sorted(texts) if not is_translated(text)] == []


def test_every_note_of_a_signal_is_german() -> None:
    notes = [note for _, note in SIGNAL_NOTES.values()]
    assert [note for note in notes if not is_translated(note)] == []


@pytest.mark.parametrize("path", [ROOT / "esper/constraints" / f"{name}.py" for name in CHECKS])
def test_what_a_check_has_compared_is_german(path: Path) -> None:
    """A number alone stays a number."""
    texts = {text for text in texts_of(path) if re.search("[a-z]{2}", text.replace("net.0", ""))}
    assert texts
    with translation.override("de"):
        assert [text for text in sorted(texts) if in_value(text) == text] == []


def test_the_place_of_a_span_is_german_with_its_size() -> None:
    assert german("parallel to fc1 … fc2, 32 units") == "parallel zu fc1 … fc2, 32 Einheiten"
    assert german("parallel to fc1 … fc2") == "parallel zu fc1 … fc2"
