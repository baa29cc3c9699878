"""People are managed here. Rights come from roles, so groups and single permissions are hidden."""

from __future__ import annotations

from typing import TYPE_CHECKING

from django.contrib import admin
from django.contrib.auth.admin import UserAdmin
from django.contrib.auth.models import Group

from apps.accounts.models import ApiToken, Membership, Project, User
from apps.accounts.policy import Act, may
from apps.accounts.read_only_admin import ReadOnlyAdmin

if TYPE_CHECKING:
    from django.http import HttpRequest

    _Admin = UserAdmin[User]
else:
    _Admin = UserAdmin

admin.site.site_header = admin.site.site_title = "Esper administration"
admin.site.unregister(Group)


@admin.register(User)
class PersonAdmin(_Admin):
    list_display = ("username", "role", "is_active", "last_login")
    list_filter = ("role", "is_active")
    fieldsets = (
        (None, {"fields": ("username", "password")}),
        ("Person", {"fields": ("first_name", "last_name", "email")}),
        ("Rights", {"fields": ("role", "is_active")}),
    )
    add_fieldsets = ((None, {"fields": ("username", "role", "password1", "password2")}),)
    filter_horizontal = ()
    readonly_fields = ("last_login",)

    def has_view_permission(self, request: HttpRequest, obj: User | None = None) -> bool:
        return may(request.user, Act.MANAGE_PEOPLE).allowed

    def has_module_permission(self, request: HttpRequest) -> bool:
        return may(request.user, Act.MANAGE_PEOPLE).allowed

    def has_add_permission(self, request: HttpRequest) -> bool:
        return may(request.user, Act.MANAGE_PEOPLE).allowed

    def has_change_permission(self, request: HttpRequest, obj: User | None = None) -> bool:
        return may(request.user, Act.MANAGE_PEOPLE).allowed

    def has_delete_permission(self, request: HttpRequest, obj: User | None = None) -> bool:
        """Nobody: the audit log and decisions name people. Set a person inactive instead."""
        return False


@admin.register(ApiToken)
class ApiTokenAdmin(ReadOnlyAdmin):
    """Owners issue and revoke their tokens. The digest of a secret is not shown."""

    of_everybody = True
    list_display = (
        "name",
        "owner",
        "prefix",
        "run_uid",
        "created_at",
        "last_used_at",
        "revoked_at",
    )
    exclude = ("digest",)


@admin.register(Project)
class ProjectAdmin(ReadOnlyAdmin):
    """Projects and their members are changed on the page Projects, through the services."""

    of_everybody = True
    list_display = ("uid", "name", "created_at")
    search_fields = ("uid", "name")


@admin.register(Membership)
class MembershipAdmin(ReadOnlyAdmin):
    of_everybody = True
    list_display = ("project", "user", "role")
    list_filter = ("role",)
