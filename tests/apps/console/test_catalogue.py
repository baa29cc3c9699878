"""The German texts: all of them, with what they must contain, and compiled."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from babel.messages.mofile import write_mo

from apps.accounts.policy import IN_WORDS
from apps.console.status import BUILD_STEPS, BY_KIND, CERTIFICATE, RULES, TIERS
from apps.console.vocabulary import FINDINGS, WORDS
from esper import contracts
from esper.diagnosis import list_rules
from esper.remedies import list_remedies
from hosts.paths import ROOT
from tests.apps.console.catalogue import (
    DOMAINS,
    FOLDER,
    Key,
    catalogue,
    key_of,
    keys_of_files,
    keys_of_templates,
    messages,
    templates,
    unmarked_texts,
)

# Names, units, and what a person would type: the same in each language.
SAME = {"Esper", "API", "MiB", "ms", "min", "UTC", "EMA", "SHA-256", "Aegis"}
NOTES_OF_PROGRAMMERS = ("rest/problem_codes.html",)  # a page of the API, which is English


@pytest.mark.parametrize("path", templates(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_template_shows_no_text_that_is_not_translated(path: Path) -> None:
    if str(path).endswith(NOTES_OF_PROGRAMMERS):
        return
    found = [text for text in unmarked_texts(path.read_text()) if not text.startswith("&")]
    assert set(found) <= SAME


@pytest.mark.parametrize(
    "source",
    [
        "<p>Hello there</p>",
        '<p title="Hello there"></p>',
        '<button data-doing="Sending">{% translate "Send" %}</button>',
        '<p>{{ on|yesno:"on,off" }}</p>',
        "{% if a > 1 %}hello{% endif %}",
    ],
)
def test_a_text_that_is_not_marked_is_found(source: str) -> None:
    assert list(unmarked_texts(source))


def _known(domain: str) -> set[Key]:
    return {key_of(message) for message in messages(domain)}


def test_the_catalogues_hold_what_the_pages_say_and_nothing_else() -> None:
    code = {*keys_of_templates(), *keys_of_files("apps", "python", "py")}
    assert _known("django") == code, "run makemessages; see docs/how-to/language.md"
    assert _known("djangojs") == set(keys_of_files("static/console", "javascript", "js"))


_PLACEHOLDER = re.compile(r"%\(\w+\)s|%%|\{\w+\}|</?\w+>")


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_text_has_a_german_one_with_the_same_placeholders(domain: str) -> None:
    for message in messages(domain):
        forms = message.id if isinstance(message.id, tuple) else (message.id,)
        german = message.string if isinstance(message.string, tuple) else (message.string,)
        assert not message.fuzzy, message.id
        assert len(german) == len(forms), message.id
        assert all(german), message.id
        for english, text in zip(forms, german, strict=True):
            wanted = sorted(_PLACEHOLDER.findall(english))
            assert sorted(_PLACEHOLDER.findall(text)) == wanted, message.id
            assert text[:1].isspace() == english[:1].isspace(), message.id


def test_choices_of_yes_and_no_have_as_many_parts_in_german() -> None:
    choices = re.compile(r"""yesno:_\((["'])(.+?)\1\)""")
    german = {key_of(message)[1]: message.string for message in messages("django")}
    found = [text for path in templates() for _, text in choices.findall(path.read_text())]
    assert found
    for text in found:
        assert german[text].count(",") == text.count(","), text


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_compiled_catalogue_is_that_of_the_texts(domain: str) -> None:
    compiled = io.BytesIO()
    write_mo(compiled, catalogue(domain))
    command = f"run: pybabel compile -d locale -D {domain}"
    assert (FOLDER / f"{domain}.mo").read_bytes() == compiled.getvalue(), command


def _plain(value: object) -> str:
    return str(value).replace("_", " ").replace(".", " ")


SHOWN_AS_WORDS = (
    *("Risk", "Role", "RunMode", "Severity", "AdaptationKind", "AdaptationState", "PlanState"),
    *("RunState", "LaunchState", "JobState", "JobStep", "CommandKind", "CommandState"),
    *("RefusalCode", "RejectReason", "VariantState", "WorkerKind", "WorkerMode", "Signal"),
    *("AdaptationType", "BlueprintCategory", "GraftKind"),
)


def test_every_value_that_is_shown_as_words_is_translated() -> None:
    values = {_plain(value) for name in SHOWN_AS_WORDS for value in getattr(contracts, name)}
    values |= {str(role).capitalize() for role in contracts.Role} | set(IN_WORDS.values())
    values |= {_plain(remedy.slug) for remedy in list_remedies()}
    values |= {_plain(name) for remedy in list_remedies() for name in remedy.default_config()}
    assert values <= WORDS
    assert {rule.slug: rule.title for rule in list_rules()} == FINDINGS
    known = {text for _, text in _known("django")}
    states = {status.word for kind in BY_KIND.values() for status in kind.values()}
    states |= set(BUILD_STEPS.values()) | set(FINDINGS.values())
    assert states | set(RULES.values()) | set(CERTIFICATE.values()) | set(TIERS.values()) <= known


def test_every_step_of_a_build_is_shown_in_plain_words() -> None:
    named = re.compile(r'_timed\(stage_ms, "(\w+)"|stage_ms\["(\w+)"\] =|"stage_ms": \{"(\w+)"')
    sources = (ROOT / "esper/compilation").glob("*.py")
    found = {
        name for path in sources for names in named.findall(path.read_text()) for name in names
    }
    assert found - {""} == set(BUILD_STEPS)
