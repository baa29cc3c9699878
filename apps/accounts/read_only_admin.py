"""Django's admin for rows that only services write: nobody edits them, not even an admin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from django.contrib import admin

from apps.accounts.policy import Act, may
from apps.accounts.visibility import visible_projects

if TYPE_CHECKING:
    from django.db.models import QuerySet
    from django.http import HttpRequest

    _Admin = admin.ModelAdmin[Any]
else:
    _Admin = admin.ModelAdmin


class ReadOnlyAdmin(_Admin):
    """View and search; no add, no change, no delete, no bulk action.

    Attributes:
        of_everybody: its rows are of no project but may tell of each, so that only who sees every
            project sees them.
    """

    actions = None
    of_everybody: ClassVar[bool] = False

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        rows = super().get_queryset(request)
        return rows.none() if self.of_everybody and visible_projects() is not None else rows

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
