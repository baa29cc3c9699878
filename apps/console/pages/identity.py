"""A person links their account with the one that they have at the OpenID provider, or ends that.

The provider is asked first. What it says lies in the session until its person confirms it here,
with a form that another site cannot send: a provider that is signed in as somebody else must not
link that person's account to this one.
"""

from __future__ import annotations

from django.conf import settings
from django.contrib.auth.decorators import login_required
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import redirect, render, resolve_url
from django.utils.translation import gettext as _
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_http_methods

from apps.accounts.models import User
from apps.accounts.openid_people import (
    identity_of,
    link_identity,
    unlink_identity,
)
from apps.accounts.step_up import has_second_factor, is_recent, note_password, passed_second_factor
from apps.console.offered_identity import forget_offer, offer_of
from apps.console.proving import prove
from apps.console.request import person
from apps.rest.problems import Problem

VIA = "session"


@login_required
@never_cache
@require_http_methods(["GET", "POST"])
def identity(request: HttpRequest) -> HttpResponse:
    if not settings.ESPER_OIDC_ISSUER:
        raise Http404("no provider is configured")
    user = person(request)
    try:
        match request.method, request.POST.get("act"):
            case "POST", "link":
                return _link(request, user)
            case "POST", "unlink":
                return _unlink(request, user)
            case "POST", "cancel":
                forget_offer(request)
                return _account()
    except Problem as problem:
        return _page(request, user, problem)
    return _page(request, user)


def _link(request: HttpRequest, user: User) -> HttpResponse:
    offered = offer_of(request)
    if offered is None:
        raise Problem(409, "stale", _("That took more than five minutes. Begin again."))
    _require_proof(request, user)
    link_identity(user=user, offered=offered, via=VIA)
    forget_offer(request)
    return _account()


def _unlink(request: HttpRequest, user: User) -> HttpResponse:
    _require_proof(request, user)
    unlink_identity(user=user, via=VIA, present=request.session.session_key or "")
    return _account()


def _account() -> HttpResponse:
    return redirect(f"{resolve_url('console:me')}#panel-identity")


def _needs_proof(request: HttpRequest, user: User) -> bool:
    coded = not has_second_factor(user) or passed_second_factor(request.session)
    return not (coded and is_recent(request.session))


def _require_proof(request: HttpRequest, user: User) -> None:
    """Raises ``Problem`` where the password or the code of the form is needed and wrong."""
    if not _needs_proof(request, user):
        return
    if not user.has_usable_password() and not has_second_factor(user):
        raise Problem(403, "password-needed", _("Sign in again, and come back within ten minutes."))
    refusal = prove(request, user)
    if refusal is not None:
        raise Problem(refusal.status, "refused", refusal.detail)
    note_password(request.session)


def _page(request: HttpRequest, user: User, problem: Problem | None = None) -> HttpResponse:
    needs_proof = _needs_proof(request, user)
    context = {
        "title": _("Sign in through %(provider)s") % {"provider": settings.ESPER_OIDC_NAME},
        "linked": identity_of(user),
        "offered": offer_of(request),
        "ask_password": needs_proof and user.has_usable_password(),
        "ask_code": needs_proof and has_second_factor(user),
        "has_password": user.has_usable_password(),
        "problem": problem.detail if problem else "",
    }
    return render(
        request, "console/identity.html", context, status=problem.status if problem else 200
    )
