"""Signing in through an OpenID provider."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from django.conf import settings
from django.core import signing
from django.db import IntegrityError
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.urls import reverse
from django.utils.crypto import constant_time_compare
from django.utils.translation import gettext as _
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_safe

from apps.accounts.models import User
from apps.accounts.openid import (
    SignInError,
    Trip,
    authorization_address,
    claims_for,
    discover,
    proved_at,
)
from apps.accounts.openid_people import offered_identity, person_of
from apps.accounts.step_up import has_second_factor, is_recent, note_password
from apps.audit.services import note_refused_identity
from apps.console.entering import enter, own_address
from apps.console.offered_identity import keep_offer
from apps.console.request import person

VIA = "provider"
COOKIE, TRIP_SECONDS = "esper_trip", 600


@never_cache
@require_safe
def provider_sign_in(request: HttpRequest) -> HttpResponse:
    """Off to the provider; what has to come back lies in a signed cookie of this browser."""
    _require_provider()
    signed_in = request.user.is_authenticated
    again = signed_in and request.GET.get("again") == "1"
    links = person(request).pk if signed_in and request.GET.get("link") == "1" else 0
    address = own_address(request, request.GET.get("next", ""))
    trip = Trip.begin(address, again=again, links=links)
    if signed_in and not (again or links):
        return redirect(trip.address)
    try:
        there = authorization_address(discover(), trip, _return_to(request))
    except SignInError as problem:
        return _refusal(request, problem)
    answer = redirect(there)
    answer.set_cookie(
        COOKIE,
        signing.dumps(asdict(trip), salt=COOKIE),
        max_age=TRIP_SECONDS,
        path=reverse("console:provider-callback"),
        secure=settings.SESSION_COOKIE_SECURE,
        httponly=True,
        samesite="Lax",
    )
    return answer


@never_cache
@require_safe
def provider_callback(request: HttpRequest) -> HttpResponse:
    """Back from the provider. Each trip ends here once, whatever comes of it."""
    _require_provider()
    try:
        answer = _arrive(request)
    except SignInError as problem:
        answer = _refusal(request, problem)
    answer.delete_cookie(COOKIE, path=reverse("console:provider-callback"), samesite="Lax")
    return answer


def _arrive(request: HttpRequest) -> HttpResponse:
    trip = _trip_of(request)
    if request.GET.get("error"):
        raise SignInError(
            403,
            "sign-in-refused",
            _("%(provider)s has not signed you in.") % {"provider": settings.ESPER_OIDC_NAME},
        )
    if request.GET.get("iss", settings.ESPER_OIDC_ISSUER) != settings.ESPER_OIDC_ISSUER:
        raise SignInError(403, "sign-in-refused", _("This is the answer of another provider."))
    claims = claims_for(request.GET.get("code", ""), trip, _return_to(request))
    if trip.links:
        return _offer(request, claims, trip)
    try:
        user = person_of(claims)
    except IntegrityError as error:  # the same first sign-in twice at once
        raise SignInError(503, "busy", _("Your account is being made. Sign in again.")) from error
    except SignInError as problem:
        note_refused_identity(claims["iss"], claims["sub"], problem.code)
        raise
    at = proved_at(claims)
    if trip.again:
        return _proved_again(request, user, at, trip.address)
    methods = claims.get("amr")
    mfa = isinstance(methods, list) and "mfa" in methods
    return enter(request, user, via=VIA, address=trip.address, proved_at=at, mfa=mfa)


def _offer(request: HttpRequest, claims: dict[str, Any], trip: Trip) -> HttpResponse:
    """Back at the account page, which names the account found there and asks before it links."""
    if request.user.pk != trip.links:
        raise SignInError(403, "sign-in-refused", _("That is another account than yours here."))
    try:
        offered = offered_identity(claims)
    except SignInError as problem:
        note_refused_identity(claims["iss"], claims["sub"], problem.code)
        raise
    keep_offer(request, offered)
    return redirect("console:identity")


def _proved_again(request: HttpRequest, user: User, at: float, address: str) -> HttpResponse:
    if request.user != user:
        raise SignInError(403, "sign-in-refused", _("That is another account than yours here."))
    if has_second_factor(user):
        raise SignInError(
            403, "sign-in-refused", _("Give a code of your authenticator app instead.")
        )
    note_password(request.session, at)
    if not is_recent(request.session):
        raise SignInError(
            403,
            "sign-in-refused",
            _(
                "%(provider)s has not asked for your password again. Sign out there, or "
                "set up an authenticator app here."
            )
            % {"provider": settings.ESPER_OIDC_NAME},
        )
    return redirect(address)


def _trip_of(request: HttpRequest) -> Trip:
    """The one that this browser has begun; another's answer must not sign it in."""
    try:
        kept = signing.loads(request.COOKIES.get(COOKIE, ""), salt=COOKIE, max_age=TRIP_SECONDS)
    except signing.BadSignature:
        kept = None
    trip = Trip(**kept) if kept else None
    if trip is None or not constant_time_compare(request.GET.get("state", ""), trip.state):
        raise SignInError(
            400,
            "sign-in-refused",
            _("This sign-in took too long, or was begun in another browser. Begin again."),
        )
    return trip


def _return_to(request: HttpRequest) -> str:
    return request.build_absolute_uri(reverse("console:provider-callback"))


def _require_provider() -> None:
    if not settings.ESPER_OIDC_ISSUER:
        raise Http404("no provider is configured")


def _refusal(request: HttpRequest, problem: SignInError) -> HttpResponse:
    context = {"title": _("Sign in"), "problem": problem.detail, "next": "/"}
    return render(request, "console/sign_in.html", context, status=problem.status)
