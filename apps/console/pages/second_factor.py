"""A person sets up their authenticator app, gets new recovery codes, or turns it off."""

from __future__ import annotations

from typing import Any

import segno
from django.contrib.auth.decorators import login_required
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render, resolve_url
from django.utils.safestring import SafeString, mark_safe
from django.utils.translation import gettext as _
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_http_methods

from apps.accounts.models import SecondFactor, User
from apps.accounts.second_factor import (
    app_address,
    in_letters,
    offer_secret,
    offered_secret,
    renew_recovery_codes,
    turn_off,
    turn_on,
)
from apps.accounts.step_up import (
    SECOND_FACTOR,
    Passed,
    demands_second_factor,
    is_recent,
    note_password,
    note_second_factor,
)
from apps.console.entering import own_address
from apps.console.proving import prove
from apps.console.request import person
from apps.rest.problems import Problem

VIA = "session"


@login_required
@never_cache
@require_http_methods(["GET", "POST"])
def second_factor(request: HttpRequest) -> HttpResponse:
    user = person(request)
    if request.method == "GET":
        return _page(request, user)
    try:
        match request.POST.get("act"):
            case "turn-on":
                return _turn_on(request, user)
            case "renew":
                return _renew(request, user)
            case "turn-off":
                return _turn_off(request, user)
    except Problem as problem:
        return _page(request, user, problem)
    return _page(request, user)


def _turn_on(request: HttpRequest, user: User) -> HttpResponse:
    if not is_recent(request.session):
        _prove(request, user)
    codes = turn_on(
        user=user,
        via=VIA,
        offer=request.POST.get("offer", ""),
        code=request.POST.get("code", ""),
        present=request.session.session_key or "",
    )
    note_second_factor(request.session, Passed.HERE)
    return _codes(request, codes)


def _renew(request: HttpRequest, user: User) -> HttpResponse:
    _prove(request, user)
    return _codes(request, renew_recovery_codes(user=user, via=VIA))


def _turn_off(request: HttpRequest, user: User) -> HttpResponse:
    _prove(request, user)
    turn_off(user=user, via=VIA)
    request.session.pop(SECOND_FACTOR, None)
    return redirect(f"{resolve_url('console:me')}#panel-second-factor")


def _prove(request: HttpRequest, user: User) -> None:
    """Raises ``Problem`` where the password or the code of the form is wrong."""
    has_one = SecondFactor.objects.filter(user=user).exists()
    if not has_one and not user.has_usable_password():
        raise Problem(403, "password-needed", _("Sign in again, and come back within ten minutes."))
    refusal = prove(request, user)
    if refusal is not None:
        raise Problem(refusal.status, "refused", refusal.detail)
    note_password(request.session)


def _codes(request: HttpRequest, codes: list[str]) -> HttpResponse:
    next_page = own_address(request, request.POST.get("next", ""))
    return _render(request, {"codes": codes, "next": next_page})


def _page(request: HttpRequest, user: User, problem: Problem | None = None) -> HttpResponse:
    factor = SecondFactor.objects.filter(user=user).first()
    context: dict[str, Any] = {
        "factor": factor,
        "demanded": demands_second_factor(user),
        "next": own_address(request, request.POST.get("next", request.GET.get("next", ""))),
        "has_password": user.has_usable_password(),
        "recent": is_recent(request.session),
        "problem": problem.detail if problem else "",
    }
    if factor is not None:
        context["codes_left"] = factor.recovery_codes.filter(used_at=None).count()
    else:
        context |= _offer(request, user, problem)
    return _render(request, context, problem.status if problem else 200)


def _offer(request: HttpRequest, user: User, problem: Problem | None) -> dict[str, Any]:
    """The same secret again after a wrong code: the app has it already."""
    offer = request.POST.get("offer", "") if problem else ""
    try:
        secret = offered_secret(user, offer)
    except Problem:
        offer = offer_secret(user)
        secret = offered_secret(user, offer)
    address = app_address(user, secret, request.get_host())
    return {
        "offer": offer,
        "letters": in_letters(secret),
        "app_address": address,
        "picture": qr_code(address),
    }


def qr_code(text: str) -> SafeString:
    """As SVG, dark on white in every theme: many phones do not read the opposite."""
    code = segno.make(text, error="m", micro=False)
    drawn = code.svg_inline(scale=4, dark="#000", light="#fff", omitsize=True, svgclass="qr")
    return mark_safe(drawn)  # noqa: S308 (numbers of its own making)


def _render(request: HttpRequest, context: dict[str, Any], status: int = 200) -> HttpResponse:
    context["title"] = _("Authenticator app")
    return render(request, "console/second_factor.html", context, status=status)
