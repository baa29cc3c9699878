"""A person's own tokens, sessions and rights."""

from __future__ import annotations

from dataclasses import dataclass

from django.http import HttpRequest, HttpResponse

from apps.accounts.models import ApiToken, User
from apps.accounts.policy import IN_WORDS, Act, may
from apps.accounts.sessions import sessions_of
from apps.console.panels import Panel, render_page
from apps.console.request import page, person
from esper.contracts import TokenScope

_TOKEN_SCOPES = {
    TokenScope.RUNS_CREATE: "attach trainers: register runs and send their telemetry",
    TokenScope.READ: "read everything that you may read",
    TokenScope.PROPOSE: "ask for remedies, which wait for a person; for assistants (esper mcp)",
    TokenScope.ACT: "do everything that you may do",
}


@page
def me(request: HttpRequest) -> HttpResponse:
    user = person(request)
    panels = [
        Panel(
            "tokens",
            "Tokens",
            "console/me/tokens.html",
            lambda: {"tokens": tokens_of(user), "scopes": _TOKEN_SCOPES.items()},
        ),
        Panel(
            "sessions",
            "Where you are signed in",
            "console/me/sessions.html",
            lambda: {"sessions": sessions_of(user, present=request.session.session_key or "")},
        ),
        Panel(
            "rights",
            "What you may do",
            "console/me/rights.html",
            lambda: {"rights": rights(user)},
        ),
    ]
    return render_page(request, "console/simple.html", title="Account", panels=panels)


@dataclass(frozen=True, slots=True)
class Right:
    """One act in words; ``note`` says to which runs it is limited, or who has the right."""

    words: str
    allowed: bool
    note: str = ""


def rights(user: User) -> list[Right]:
    return [_right(user, act) for act in Act]


def _right(user: User, act: Act) -> Right:
    anywhere, own = may(user, act), may(user, act, owner_id=user.pk)
    if anywhere.allowed:
        return Right(IN_WORDS[act], True, "" if own.allowed else "in the runs of others")
    if own.allowed:
        return Right(IN_WORDS[act], True, "in your own runs")
    return Right(IN_WORDS[act], False, anywhere.why)


def tokens_of(user: User) -> list[ApiToken]:
    """A person's own tokens, without those that a run received for itself."""
    return list(ApiToken.objects.filter(owner=user, run_uid="", revoked_at=None))
