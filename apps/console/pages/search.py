"""Search: pages, runs, decisions, blueprints and saved views by a few letters (Ctrl+K)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from django.db.models import Q
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.urls import reverse
from django.utils.translation import gettext as _
from django.utils.translation import gettext_noop

from apps.accounts.models import User
from apps.accounts.preferences import preferences_of
from apps.adaptations.models import Adaptation
from apps.blueprints.models import Blueprint
from apps.console.language import in_words
from apps.console.panels import render_page
from apps.console.request import page, person
from apps.console.sentences import in_sentence, title_of
from apps.console.waiting import waiting
from apps.runs.models import Run
from apps.runs.selectors import HUGE_COLUMNS, HUGE_COLUMNS_OF_RUN

MOST = 6  # of each kind
NEWEST = 20_000  # decisions whose words are looked through, so that a search costs the same always
LONGEST = 120
# Where a person goes, with other words for it.
PAGES: tuple[tuple[str, str, str], ...] = (
    ("console:overview", gettext_noop("Overview"), gettext_noop("home start")),
    ("console:inbox", gettext_noop("Inbox"), gettext_noop("approve decide waiting decisions")),
    ("console:runs", gettext_noop("Runs"), gettext_noop("trainings")),
    ("console:compare", gettext_noop("Compare two runs"), gettext_noop("difference")),
    ("console:blueprints", gettext_noop("Blueprints"), gettext_noop("catalogue")),
    ("console:incidents", gettext_noop("Incidents"), gettext_noop("findings alarms")),
    ("console:violations", gettext_noop("Violations"), gettext_noop("limits findings records")),
    ("console:policy", gettext_noop("Policy"), gettext_noop("thresholds limits")),
    (
        "console:switch",
        gettext_noop("Adaptation switch"),
        gettext_noop("kill stop all pause blueprint"),
    ),
    ("console:workers", gettext_noop("Workers"), gettext_noop("queue hosts")),
    ("console:kernels", gettext_noop("Kernels"), gettext_noop("cache compiled")),
    ("console:recipes", gettext_noop("Recipes"), gettext_noop("start launches")),
    ("console:audit", gettext_noop("Audit log"), gettext_noop("history who verify export")),
    ("console:report", gettext_noop("Weekly report"), gettext_noop("summary")),
    ("console:duty", gettext_noop("Duty list"), gettext_noop("shift roster on call escalation")),
    ("console:status", gettext_noop("Status of the system"), gettext_noop("health workers queue")),
    ("console:wall", gettext_noop("Wall display"), gettext_noop("monitor screen")),
    (
        "console:me",
        gettext_noop("Account and settings"),
        gettext_noop("tokens theme zone notifications sessions password"),
    ),
    ("api-docs", "API", gettext_noop("rest openapi documentation")),
)


@dataclass(frozen=True, slots=True)
class Hit:
    """One place that fits."""

    kind: str
    words: str
    address: str
    note: str = ""


@page
def search(request: HttpRequest) -> HttpResponse:
    """The whole page, or with ``part=list`` the hits alone, for the dialog of Ctrl+K."""
    text = request.GET.get("q", "").strip()[:LONGEST]
    found = hits(text, person(request))
    if request.GET.get("part") == "list":
        return render(request, "console/search/list.html", {"q": text, "hits": found})
    return render_page(
        request, "console/search.html", title=_("Search"), panels=[], q=text, hits=found
    )


def hits(text: str, user: User) -> list[Hit]:
    """What fits, the most certain first; without text, what is most often wanted."""
    if not text:
        return [*_decisions(waiting(user)[:MOST]), *_pages(text), *_views(text, user)]
    number = re.fullmatch(r"([A-Za-z])-?([0-9]{1,18})|([0-9]{1,18})", text)
    found = [*_numbered(number)] if number else []
    found += [*_runs(text), *_waiting_or_past(text), *_blueprints(text)]
    return [*found, *_views(text, user), *_pages(text)]


def _numbered(match: re.Match[str]) -> Iterator[Hit]:
    """``A-17``, ``R-3`` or a bare number."""
    letter, pk = (match[1] or "").upper(), int(match[2] or match[3])
    if letter in ("", "A"):
        yield from _decisions(Adaptation.objects.filter(pk=pk))
    if letter in ("", "R"):
        yield from _run_hits(Run.objects.filter(pk=pk))


def _runs(text: str) -> Iterator[Hit]:
    return _run_hits(Run.objects.filter(Q(name__icontains=text) | Q(uid=text))[:MOST])


def _run_hits(rows: object) -> Iterator[Hit]:
    for run in rows.defer(*HUGE_COLUMNS):  # type: ignore[attr-defined]
        address = reverse("console:run", args=[run.uid])
        yield Hit(_("run"), f"R-{run.pk} {run.name}", address, in_words(str(run.state)))


def _waiting_or_past(text: str) -> Iterator[Hit]:
    """Among the newest by their words; an older one is found by its number or uid."""
    if text.startswith("adp_"):
        return _decisions(Adaptation.objects.filter(uid=text))
    last = Adaptation.objects.values_list("pk", flat=True).first() or 0
    grafted = list(Blueprint.objects.filter(slug__icontains=text).values_list("pk", flat=True))
    named = Q(layer__icontains=text) | Q(since__icontains=text)
    fits = Q(in_words__icontains=text) | named | Q(blueprint__in=grafted)
    return _decisions(Adaptation.objects.filter(fits, pk__gt=last - NEWEST)[:MOST])


def _decisions(rows: object) -> Iterator[Hit]:
    for row in rows.select_related("run", "blueprint").defer(*HUGE_COLUMNS_OF_RUN):  # type: ignore[attr-defined]
        address = reverse("console:adaptation", args=[row.uid])
        note = f"{row.run.name}, {in_words(row.state.replace('_', ' '))}"
        yield Hit(_("adaptation"), f"A-{row.number} {title_of(row)}", address, note)


def _blueprints(text: str) -> Iterator[Hit]:
    fits = Q(slug__icontains=text) | Q(title__icontains=text)
    for row in Blueprint.objects.filter(fits, present=True)[:MOST]:
        yield Hit(
            _("blueprint"),
            in_sentence(row.title),
            reverse("console:blueprint", args=[row.slug]),
            row.slug,
        )


def _views(text: str, user: User) -> Iterator[Hit]:
    for view in preferences_of(user).views:
        if text.casefold() in view.name.casefold():
            yield Hit(_("saved view"), view.name, view.address, view.path)


def _pages(text: str) -> Iterator[Hit]:
    for name, words, others in PAGES:
        known = f" {words} {others} {_(words)} {_(others)}"  # in English too, in each language
        if f" {text}".casefold() in known.casefold():  # where a word begins
            yield Hit(_("page"), _(words), reverse(name))
