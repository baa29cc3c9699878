"""A person's own settings, channels, saved views, tokens, sessions and rights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from django.conf import settings
from django.contrib.auth.decorators import login_required
from django.db.models import Count, Q
from django.http import HttpRequest, HttpResponse, HttpResponseBadRequest, QueryDict
from django.shortcuts import redirect
from django.urls import reverse
from django.utils.translation import gettext as _
from django.utils.translation import gettext_noop
from django.views.decorators.http import require_POST

from apps.accounts.models import DEFAULT_PROJECT, ApiToken, SecondFactor, User
from apps.accounts.openid_people import identity_of
from apps.accounts.policy import IN_WORDS, Act, may
from apps.accounts.preferences import (
    SavedView,
    preferences_of,
    remove_view,
    save_settings,
    save_view,
    time_zones,
)
from apps.accounts.projects import projects_of
from apps.accounts.sessions import sessions_of
from apps.console.language import in_words
from apps.console.panels import Panel, render_page
from apps.console.request import page, person
from apps.notifications.models import Channel, ChannelKind
from apps.notifications.services import EVENTS, URGENT, push_public_key
from apps.rest.problems import Problem
from esper.contracts import TokenScope

_TOKEN_SCOPES = {
    TokenScope.RUNS_CREATE: gettext_noop("attach trainers: register runs and send their telemetry"),
    TokenScope.READ: gettext_noop("read everything that you may read"),
    TokenScope.PROPOSE: gettext_noop(
        "ask for remedies, which wait for a person; for assistants (esper mcp)"
    ),
    TokenScope.ACT: gettext_noop("do everything that you may do"),
}


@page
def me(request: HttpRequest) -> HttpResponse:
    user = person(request)
    panels = [
        Panel(
            "settings", _("Settings"), "console/me/settings.html", lambda: settings_context(user)
        ),
        Panel(
            "channels",
            _("Where you are told of events"),
            "console/me/channels.html",
            lambda: channels_context(user),
        ),
        Panel(
            "tokens",
            _("Tokens"),
            "console/me/tokens.html",
            lambda: {
                "tokens": tokens_of(user),
                "scopes": [(scope, _(text)) for scope, text in _TOKEN_SCOPES.items()],
                "projects": projects_of(user).order_by("name")
                if len(user.access.roles) > 1
                else (),
            },
        ),
        Panel(
            "second-factor",
            _("Authenticator app"),
            "console/me/second_factor.html",
            lambda: second_factor_context(user),
        ),
        *_identity_panel(user),
        Panel(
            "sessions",
            _("Where you are signed in"),
            "console/me/sessions.html",
            lambda: {"sessions": sessions_of(user, present=request.session.session_key or "")},
        ),
        Panel(
            "rights",
            _("What you may do"),
            "console/me/rights.html",
            lambda: {"rights": rights(user)},
        ),
    ]
    return render_page(
        request, "console/simple.html", title=_("Account and settings"), panels=panels
    )


def _identity_panel(user: User) -> list[Panel]:
    """Only where this server has a provider."""
    if not settings.ESPER_OIDC_ISSUER:
        return []
    title = _("Sign in through %(provider)s") % {"provider": settings.ESPER_OIDC_NAME}
    template = "console/me/identity.html"
    return [Panel("identity", title, template, lambda: {"linked": identity_of(user)})]


def settings_context(user: User) -> dict[str, Any]:
    return {"chosen": preferences_of(user), "zones": time_zones()}


def second_factor_context(user: User) -> dict[str, Any]:
    unused = Count("recovery_codes", filter=Q(recovery_codes__used_at=None))
    factor = SecondFactor.objects.filter(user=user).annotate(left=unused).first()
    return {"factor": factor, "codes_left": factor.left if factor else 0}


DELIVERIES_SHOWN = 5


def channels_context(user: User) -> dict[str, Any]:
    """A person's channels with what was sent there last, and what they may choose."""
    own = list(Channel.objects.filter(owner=user))
    return {
        "channels": [(channel, channel.deliveries.all()[:DELIVERIES_SHOWN]) for channel in own],
        "events": EVENTS.items(),
        "urgent": URGENT,
        "kinds": ChannelKind.choices,
        "push_key": push_public_key(),
        "mail": user.email if settings.EMAIL_HOST else "",
    }


@login_required
@require_POST
def save_my_settings(request: HttpRequest) -> HttpResponse:
    """The form of the settings; this browser's own theme and language end with it."""
    given = request.POST
    try:
        save_settings(
            person(request),
            language=given.get("language", ""),
            zone=given.get("zone", ""),
            theme=given.get("theme", ""),
            density=given.get("density", ""),
            keys=given.get("keys") == "on",
            notify=given.get("notify") == "on",
        )
    except Problem as problem:
        return HttpResponse(problem.detail, status=problem.status, content_type="text/plain")
    answer = redirect(f"{reverse('console:me')}?saved=1#panel-settings")
    for own in ("theme", settings.LANGUAGE_COOKIE_NAME):
        answer.delete_cookie(own)
    return answer


@login_required
@require_POST
def save_my_view(request: HttpRequest) -> HttpResponse:
    """Save the filters of a list under a name, or remove such a view; then show the list."""
    path, name = request.POST.get("path", ""), request.POST.get("name", "")
    if path not in {reverse(f"console:{page}") for page in PAGES_WITH_VIEWS}:
        return HttpResponseBadRequest("This page has no views.", content_type="text/plain")
    query = QueryDict(request.POST.get("query", ""), mutable=True)
    for own in ("panel", "page"):
        query.pop(own, None)
    view = SavedView(name, path, query.urlencode())
    try:
        if "remove" in request.POST:
            remove_view(person(request), name=name, path=path)
        else:
            save_view(person(request), view)
    except Problem as problem:
        return HttpResponse(problem.detail, status=problem.status, content_type="text/plain")
    return redirect(view.address)


# Lists whose filters can be saved.
PAGES_WITH_VIEWS = ("inbox", "runs", "incidents", "violations", "audit")


@dataclass(frozen=True, slots=True)
class Right:
    """One act in words; ``note`` says to which runs it is limited, or who has the right."""

    words: str
    allowed: bool
    note: str = ""


def rights(user: User) -> list[Right]:
    return [_right(user, act) for act in Act]


@dataclass(frozen=True, slots=True)
class _OwnRun:
    """Any run of this person in the default project."""

    owner_id: int
    project_id: int = DEFAULT_PROJECT


def _right(user: User, act: Act) -> Right:
    anywhere, own = may(user, act), may(user, act, of=_OwnRun(user.pk))
    if anywhere.allowed:
        return Right(
            in_words(IN_WORDS[act]), True, "" if own.allowed else _("in the runs of others")
        )
    if own.allowed:
        return Right(in_words(IN_WORDS[act]), True, _("in your own runs"))
    return Right(in_words(IN_WORDS[act]), False, anywhere.why)


def tokens_of(user: User) -> list[ApiToken]:
    """A person's own tokens, without those that a run received for itself."""
    return list(ApiToken.objects.filter(owner=user, run_uid="", revoked_at=None))
