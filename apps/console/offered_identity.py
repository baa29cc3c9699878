"""The account that the provider has named, until its person confirms the link or leaves it."""

from __future__ import annotations

import time
from dataclasses import asdict

from django.conf import settings
from django.http import HttpRequest

from apps.accounts.openid_people import OfferedIdentity

HOLDS_FOR_SECONDS = 300
_KEY = "offered_identity"


def keep_offer(request: HttpRequest, offered: OfferedIdentity) -> None:
    """For five minutes, and for this session alone."""
    request.session[_KEY] = {**asdict(offered), "at": time.time()}


def offer_of(request: HttpRequest) -> OfferedIdentity | None:
    kept = dict(request.session.get(_KEY) or {})
    fresh = 0 <= time.time() - kept.pop("at", 0.0) <= HOLDS_FOR_SECONDS
    offered = OfferedIdentity(**kept) if fresh else None
    return offered if offered and offered.issuer == settings.ESPER_OIDC_ISSUER else None


def forget_offer(request: HttpRequest) -> None:
    request.session.pop(_KEY, None)
