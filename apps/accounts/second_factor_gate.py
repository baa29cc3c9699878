"""Whoever must have a second factor and has given none is led to it before anything else."""

from __future__ import annotations

from urllib.parse import urlencode

from django.conf import settings
from django.http import HttpRequest, HttpResponse, HttpResponseBase, JsonResponse
from django.shortcuts import redirect, resolve_url
from django.utils.deprecation import MiddlewareMixin

from apps.accounts.models import User
from apps.accounts.step_up import (
    demands_second_factor,
    passed_second_factor,
    second_factor_needed,
)
from apps.rest.errors import MEDIA_TYPE, problem_body
from apps.rest.middleware import request_id

PAGE = "console:second-factor"
OPEN = (PAGE, "console:sign-out")


class SecondFactorGate(MiddlewareMixin):
    """For browsers. Tokens are not affected: they were issued behind it."""

    def process_request(self, request: HttpRequest) -> HttpResponseBase | None:
        if not settings.ESPER_TOTP_REQUIRED_ROLES or _is_let_through(request):
            return None
        if request.path.startswith("/api/v1/"):
            problem = second_factor_needed()
            body = problem_body(problem, request_id(request))
            return JsonResponse(body, status=problem.status, content_type=MEDIA_TYPE)
        page = resolve_url(PAGE)
        if request.headers.get("HX-Request"):  # a panel of an open page
            return HttpResponse(status=204, headers={"HX-Redirect": page})
        asked = request.get_full_path() if request.method == "GET" else "/"
        return redirect(f"{page}?{urlencode({'next': asked})}")


def _is_let_through(request: HttpRequest) -> bool:
    user = request.user
    return (
        not isinstance(user, User)
        or passed_second_factor(request.session)
        or not demands_second_factor(user)
        or request.path in {resolve_url(page) for page in OPEN}
    )
