"""Sentences of the gates in the page's language.

The gates write English, which the server stores, so that the API, the audit log and exports are
the same for everybody. A page shows such a sentence in the reader's language where it is one of
these; every other sentence stays as it was written. A test compares them with what the gates say.
"""

from __future__ import annotations

import re
from functools import cache

from django.utils.translation import gettext
from django.utils.translation import gettext_noop as _

from apps.console.language import as_written, in_words

SENTENCES = (
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
    _("Risk is %(risk)s; only risk up to %(limit)s needs no person."),
    _("Risk %(risk)s needs no person."),
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
_VALUE = re.compile(r"%\((\w+)\)s")
_LONGEST = 500
_NUMBER = re.compile(r"-?[\d,]*\.?\d+( (MiB|ms|s))?")


@cache
def _patterns() -> tuple[tuple[str, re.Pattern[str]], ...]:
    """What each sentence looks like with its values; those with the most fixed words come first."""
    ordered = sorted(SENTENCES, key=lambda one: -len(_VALUE.sub("", one)))
    return tuple((one, re.compile(_as_pattern(one))) for one in ordered)


def _as_pattern(sentence: str) -> str:
    """``_VALUE`` splits it into fixed texts and, at the odd places, the names of values."""
    parts = _VALUE.split(sentence)
    return "".join(
        f"(?P<{part}>.+?)" if at % 2 else re.escape(part) for at, part in enumerate(parts)
    )


def in_sentence(text: str) -> str:
    """A sentence of the gates in the page's language; any other text as it is."""
    if len(text) > _LONGEST:  # whatever it is, no gate has written it
        return text
    for sentence, pattern in _patterns():
        if found := pattern.fullmatch(text):
            return gettext(sentence) % {
                name: _value(value) for name, value in found.groupdict().items()
            }
    return text


def _value(text: str) -> str:
    return as_written(text) if _NUMBER.fullmatch(text) else in_words(text)
