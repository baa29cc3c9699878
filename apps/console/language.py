"""The language of the pages: the reader's choice, this browser's cookie, or what it asks for.

Only pages are translated. The API, exports, the administration and what machines read are always
English, so that a program reads the same bytes whoever asks.
"""

from __future__ import annotations

from django.conf import settings
from django.http import HttpRequest
from django.http.response import HttpResponseBase
from django.middleware.locale import LocaleMiddleware
from django.utils import translation
from django.utils.cache import patch_vary_headers
from django.utils.formats import get_format

from apps.accounts.models import User
from apps.accounts.preferences import preferences_of

_ALWAYS_ENGLISH = ("/api/", "/admin/", "/healthz", "/readyz", "/metrics")


def _is_page(request: HttpRequest) -> bool:
    return not request.path_info.startswith(_ALWAYS_ENGLISH)


class PageLanguageMiddleware(LocaleMiddleware):
    """Stands after the authentication, because a person's own choice comes first."""

    def process_request(self, request: HttpRequest) -> None:
        language = language_of(request) if _is_page(request) else settings.LANGUAGE_CODE
        translation.activate(language)
        request.LANGUAGE_CODE = translation.get_language()

    def process_response(
        self, request: HttpRequest, response: HttpResponseBase
    ) -> HttpResponseBase:
        translation.deactivate()  # what this thread does next is nobody's page
        if not _is_page(request):
            return response
        patch_vary_headers(response, ("Accept-Language", "Cookie"))
        response.headers.setdefault("Content-Language", request.LANGUAGE_CODE)
        return response


def language_of(request: HttpRequest) -> str:
    user = request.user
    chosen = preferences_of(user).language if isinstance(user, User) else ""
    return chosen or translation.get_language_from_request(request)


def html_language() -> str:
    """Of the page in force, as ``<html lang>`` and the scripts take it: ``en``, ``de``."""
    return (translation.get_language() or settings.LANGUAGE_CODE).split("-")[0]


def in_words(text: str) -> str:
    """A word that the code shows (``vocabulary.py``) in the page's language; others stay."""
    return translation.gettext(text) if text else text


def as_written(number: str) -> str:
    """A number in English as the page's language writes it: ``67.5%`` is ``67,5 %``."""
    if html_language() == "en":
        return number
    marks = {
        ".": get_format("DECIMAL_SEPARATOR"),
        ",": get_format("THOUSAND_SEPARATOR"),
        "%": " %",
    }
    return "".join(marks.get(char, char) for char in number)
