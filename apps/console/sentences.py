"""Stored sentences in the page's language: of the gates, of findings and of remedies.

They are written and stored in English, so that the API, the audit log and exports are the same for
everybody. A page shows such a sentence in the reader's language where it is one of ``SENTENCES``;
every other sentence stays as it was written. Tests compare them with what the gates, the rules and
the remedies say.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, lru_cache

from django.utils.translation import gettext
from django.utils.translation import gettext_noop as _

from apps.adaptations.models import Adaptation
from apps.console import catalogue_texts, library_texts
from apps.console.language import as_written, html_language, in_words

GATES = (
    _("Adaptation is switched on."),
    _("Nothing may be changed now: %(why)s."),
    _("This run is only observed; nothing may be changed."),
    _("This run is supervised; a person decides."),
    _("This run may be adapted without a person."),
    _("It changes nothing, so the mode of the run allows it."),
    _("Another adaptation of this layer is in progress."),
    _("No other adaptation of this layer is in progress."),
    _("%(count)s of at most %(limit)s adaptations of this run are in progress."),
    _("The result of %(number)s is not known yet."),
    _("The finding is critical, so it does not wait for the result of %(number)s."),
    _("No other remedy is on probation in this run."),
    _("This layer has not been adapted before."),
    _("This layer was adapted %(steps)s steps ago; the cooldown is %(needed)s steps."),
    _("This run has not been adapted before."),
    _("This run was adapted %(steps)s steps ago; the cooldown is %(needed)s steps."),
    _("It has not been declined for this finding."),
    _(
        "%(remedy)s was declined or taken back for this finding %(steps)s steps ago; the cooldown "
        "is %(needed)s steps."
    ),
    _(
        "A proposal for this layer was rejected or expired %(seconds)s s ago; the next one is made "
        "after %(needed)s s."
    ),
    _("The time since the last refusal for this layer is unknown."),
    _("%(count)s of at most %(limit)s adaptations today."),
    _("%(remedy)s was applied %(times)s time by rule for this kind of finding."),
    _("%(remedy)s was applied %(times)s times by rule for this kind of finding."),
    _("%(remedy)s was applied %(times)s time by rule for this kind of finding, which came back."),
    _("%(remedy)s was applied %(times)s times by rule for this kind of finding, which came back."),
    _("Grafts would have %(total)s of at most %(limit)s added parameters."),
    _("The graft's forecast %(cost)s is %(amount)s; the limit is %(limit)s."),
    _("The graft's %(cost)s cannot be forecast; the limit is %(limit)s."),
    _("It changes what the model computes; this always needs a person."),
    _("Risk is %(risk)s; only risk up to %(most)s needs no person."),
    _("Risk %(risk)s needs no person."),
    _("risk %(risk)s needs no person, and it can be taken back"),
    _("confidence %(confidence)s ≥ %(limit)s and risk %(risk)s"),
    _("%(count)s closed cases of its category are too few to trust; %(needed)s are needed."),
    _("It may undo what the script wants, so a person decides."),
    _("The decision depends on signals that were not measured: %(signals)s."),
    _("Every signal that the decision depends on was measured."),
    _("The evidence is %(seconds)s s old; the limit is %(limit)s s."),
    _("The age of the evidence is unknown."),
    _("Its confidence is unknown, which never counts as high."),
    _("Confidence %(confidence)s is below %(limit)s."),
    _("Confidence %(confidence)s is between %(low)s and %(high)s; a person decides."),
    _("Confidence %(confidence)s reaches %(limit)s."),
    _(
        "The newest confidences were %(excess)s too high on the average, so %(needed)s is needed "
        "instead of %(limit)s; this one is %(confidence)s."
    ),
    _("Several changes are made at once, so a person decides on the whole."),
    _("%(name)s asks for it."),
)
SENTENCES = (*GATES, *library_texts.ALL, *catalogue_texts.ALL)
_VALUE = re.compile(r"%\((\w+)\)s")
_LONGEST = 1_500
_NUMBER = re.compile(r"[-+]?[\d,]*\.?\d+(?:e[-+]?\d+)?(?:%| (?:MiB|ms|s))?")
_NUMBERS = ("limit", "low", "high")
_CLAUSE, _SUBJECT = "; ", ": "
_END = re.compile(r"(?<=\.) (?=[A-Z])")


@dataclass(frozen=True, slots=True)
class _Form:
    """A sentence, and how it is recognised.

    Attributes:
        sentence: with names of values.
        fixed: its longest text without a value; a text without it is no such sentence.
        pattern: a value ends before the next clause; the first letter may be large or small, and
            the full stop may be missing, as a page or the server has shown it.
    """

    sentence: str
    fixed: str
    pattern: re.Pattern[str]


@cache
def _forms() -> tuple[_Form, ...]:
    """Those with the most fixed words come first."""
    ordered = sorted(SENTENCES, key=lambda one: -len(_VALUE.sub("", one)))
    return tuple(_form(one) for one in ordered)


def _form(sentence: str) -> _Form:
    """``_VALUE`` splits it into fixed texts and, at the odd places, the names of values."""
    parts = [part.replace("%%", "%") for part in _VALUE.split(sentence.removesuffix("."))]
    fixed = max((part[1:] for part in parts[::2]), key=len)
    pattern = "".join(
        _value_pattern(part, begins=at == 1 and not parts[0]) if at % 2 else re.escape(part)
        for at, part in enumerate(parts)
    )
    first = sentence[0]
    if first.isalpha():
        pattern = f"[{first.lower()}{first.upper()}]{pattern[1:]}"
    return _Form(sentence, fixed, re.compile(rf"{pattern}\.?"))


def _value_pattern(name: str, *, begins: bool) -> str:
    """A limit is a number, so that "at least two people" is no limit; a subject is no value."""
    if name in _NUMBERS:
        return f"(?P<{name}>{_NUMBER.pattern})"
    return f"(?P<{name}>[^;:]+?)" if begins else f"(?P<{name}>[^;]+?)"


def in_sentence(text: str) -> str:
    """A stored sentence in the page's language; any other text as it is."""
    language = html_language()
    return text if language == "en" else _translated(text, language)


@lru_cache(maxsize=2_000)
def _translated(text: str, language: str) -> str:
    if len(text) > _LONGEST:  # whatever it is, Esper has not written it
        return text
    if _NUMBER.fullmatch(text):  # a limit that is only a number
        return _value(text)
    known = _whole(text) or _clauses(text) or _with_subject(text) or _several(text)
    return text if known is None else known


def title_of(adaptation: Adaptation) -> str:
    """What it does, for people: as ``Adaptation.title``, in the page's language."""
    if not adaptation.remedy:
        return f"{adaptation.slug} → {in_sentence(adaptation.place)}"
    if not adaptation.layer:
        return in_sentence(adaptation.title)
    return gettext("%(what)s at %(layer)s") % {
        "what": in_sentence(adaptation.in_words),
        "layer": adaptation.layer,
    }


def delegation_words(text: str) -> str:
    """What was approved ahead: the remedy, and its limits in brackets."""
    remedy, bracket, limits = text.partition(" (")
    if not bracket:
        return in_sentence(text)
    return f"{in_sentence(remedy)} ({in_sentence(limits.removesuffix(')'))})"


def _whole(text: str) -> str | None:
    for form in _forms():
        if form.fixed in text and (found := form.pattern.fullmatch(text)):
            values = {name: _value(value) for name, value in found.groupdict().items()}
            return _written_like(text, gettext(form.sentence) % values)
    return None


def _clauses(text: str) -> str | None:
    """Of a sentence that ends with what else is known, such as "; the weights are finite"."""
    clauses = text.split(_CLAUSE)
    for at in range(len(clauses) - 1, 0, -1):
        first, rest = _CLAUSE.join(clauses[:at]), _CLAUSE.join(clauses[at:])
        if (known := _whole(first)) and (more := _whole(rest) or _clauses(rest)):
            return f"{known}{_CLAUSE}{more}"
    return None


def _several(text: str) -> str | None:
    """Of several sentences, such as the answers of two checks."""
    parts = _END.split(text)
    known = [_whole(one) or _clauses(one) for one in parts] if len(parts) > 1 else [None]
    return None if None in known else " ".join(filter(None, known))


def _with_subject(text: str) -> str | None:
    """Of a sentence that begins with the layer or the run that it is about."""
    subject, colon, rest = text.partition(_SUBJECT)
    known = (_whole(rest) or _clauses(rest) or _with_subject(rest)) if colon else None
    if known and subject.startswith("Layer "):
        subject = _value(subject)
    return f"{subject}{_SUBJECT}{known}" if known else None


def _written_like(text: str, translated: str) -> str:
    """With a large first letter and a full stop where the text has them."""
    stop = "." if text.endswith(".") else ""
    bare = translated.removesuffix(".")
    return f"{bare[:1].upper() if text[:1].isupper() else bare[:1]}{bare[1:]}{stop}"


def in_value(text: str) -> str:
    """A value that stands by itself: a number, or a word such as the mode of a run."""
    return text if html_language() == "en" else _value(text)


def _value(text: str) -> str:
    if _NUMBER.fullmatch(text):
        return as_written(text)
    word = in_words(text)
    return in_sentence(text) if word == text else word
