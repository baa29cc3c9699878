"""Django's admin for rows that only services write, and for reference data that curators edit.

A change goes through the same service as on the console's pages, which checks the right and writes
the audit log. No row is saved or deleted past it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from django import forms
from django.contrib import admin
from django.contrib.admin.helpers import ActionForm
from django.db import models, transaction
from django.urls import reverse
from django.utils.html import format_html

from apps.accounts.policy import Act, may
from apps.accounts.visibility import visible_projects
from apps.rest.problems import Problem

if TYPE_CHECKING:
    from django.db.models import QuerySet
    from django.http import HttpRequest

    _Admin = admin.ModelAdmin[Any]
    _Form = forms.ModelForm[Any]
else:
    _Admin = admin.ModelAdmin
    _Form = forms.ModelForm

VIA = "admin"


class ReadOnlyAdmin(_Admin):
    """View and search; no add, no change, no delete.

    Attributes:
        of_everybody: its rows are of no project but may tell of each, so that only who sees every
            project sees them.
        page: the console's page of a row: its name, and the field that is in the address, if any.
    """

    actions: Any = None
    of_everybody: ClassVar[bool] = False
    page: ClassVar[tuple[str, ...]] = ()

    def view_on_site(self, obj: Any) -> str | None:
        """The link into the console."""
        if not self.page:
            return None
        name, *fields = self.page
        return reverse(f"console:{name}", args=[getattr(obj, field) for field in fields])

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        rows = super().get_queryset(request)
        return rows.none() if self.of_everybody and visible_projects() is not None else rows

    def get_fields(self, request: HttpRequest, obj: Any = None) -> Any:
        """All columns; objects in JSON are shown one value a line."""
        written = self.editable(request, obj)
        names: list[Any] = []
        for field in self.opts.fields:
            if field.name in (self.exclude or ()) or field.primary_key:
                continue
            json_shown = isinstance(field, models.JSONField) and field.name not in written
            names.append(_pretty(field.name) if json_shown else field.name)
        return names

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> Any:
        written = set(self.editable(request, obj))
        return [name for name in self.get_fields(request, obj) if name not in written]

    def editable(self, request: HttpRequest, obj: Any = None) -> tuple[str, ...]:
        """Fields that a person may change here."""
        return ()

    def has_module_permission(self, request: HttpRequest) -> bool:
        return may(request.user, Act.VIEW).allowed

    def has_view_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return may(request.user, Act.VIEW).allowed

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


class ServedForm(_Form):
    """A form whose content is handed to a service; what the service refuses is an error of it."""

    served: ClassVar[Callable[[Any], Any]]

    def _post_clean(self) -> None:
        super()._post_clean()  # type: ignore[misc]
        if self.errors:
            return
        try:
            with transaction.atomic():
                self.instance = type(self).served(self)
        except Problem as problem:
            self.add_error(None, str(problem))


class ServedAdmin(ReadOnlyAdmin):
    """Reference data that is edited through a service.

    Attributes:
        act: who may.
    """

    form = ServedForm
    act: ClassVar[Act]

    def serve(self, request: HttpRequest, form: Any) -> Any:
        """Call the service with ``form.cleaned_data`` and return the row; it raises ``Problem``."""
        raise NotImplementedError

    def get_form(
        self, request: HttpRequest, obj: Any = None, change: bool = False, **more: Any
    ) -> Any:
        more["fields"] = list(self.editable(request, obj))
        made = super().get_form(request, obj, change=change, **more)
        return type(made.__name__, (made,), {"served": lambda form: self.serve(request, form)})

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        """The service has saved it."""

    def save_related(self, request: HttpRequest, form: Any, formsets: Any, change: bool) -> None:
        """The service has saved that, too."""

    def save_form(self, request: HttpRequest, form: Any, change: bool) -> Any:
        return form.instance

    def may_edit(self, request: HttpRequest) -> bool:
        return may(request.user, self.act).allowed


class ReasonActionForm(ActionForm):
    """Actions on chosen rows, with the reason that is kept in the audit log."""

    reason = forms.CharField(max_length=500, required=False, label="Reason")


@cache  # the admin finds a column by its identity
def _pretty(name: str) -> Callable[[Any], str]:
    def shown(row: Any) -> str:
        text = json.dumps(getattr(row, name), indent=2, ensure_ascii=False, default=str)
        return format_html("<pre>{}</pre>", text)

    shown.__name__ = name
    shown.short_description = name.replace("_", " ")  # type: ignore[attr-defined]
    return shown
