"""Django's admin for rows that only services write: nobody edits them, not even an admin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from django.contrib import admin

from apps.accounts.policy import Act, may

if TYPE_CHECKING:
    from django.http import HttpRequest

    _Admin = admin.ModelAdmin[Any]
else:
    _Admin = admin.ModelAdmin


class ReadOnlyAdmin(_Admin):
    """View and search; no add, no change, no delete, no bulk action.

    Attributes:
        act: who may do this may view the rows; of rows of everybody, those who manage people.
    """

    actions = None
    act: ClassVar[Act] = Act.VIEW

    def has_module_permission(self, request: HttpRequest) -> bool:
        return may(request.user, self.act).allowed

    def has_view_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return may(request.user, self.act).allowed

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False
