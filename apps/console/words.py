"""The texts of the scripts, as Django's catalogue for JavaScript."""

from __future__ import annotations

from django.views.decorators.cache import cache_control
from django.views.i18n import JavaScriptCatalog

# The address of a page names the language, so that another choice is another address.
words = cache_control(private=True, max_age=3600)(
    JavaScriptCatalog.as_view(packages=["apps.console"])
)
