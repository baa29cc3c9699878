"""People are managed here. Rights come from roles, so groups and single permissions are hidden."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.contrib import admin
from django.contrib.auth.admin import UserAdmin
from django.contrib.auth.models import Group

from apps.accounts.models import ApiToken, Membership, Project, User
from apps.accounts.policy import Act, may
from apps.accounts.projects import create_project, set_member
from apps.accounts.read_only_admin import VIA, ReadOnlyAdmin, ServedAdmin

if TYPE_CHECKING:
    from django.http import HttpRequest

    _Admin = UserAdmin[User]
else:
    _Admin = UserAdmin

admin.site.site_header = admin.site.site_title = "Esper administration"
admin.site.unregister(Group)


@admin.register(User)
class PersonAdmin(_Admin):
    list_display = ("username", "role", "is_service", "is_active", "last_login")
    list_filter = ("role", "is_service", "is_active")
    fieldsets = (
        (None, {"fields": ("username", "password")}),
        ("Person", {"fields": ("first_name", "last_name", "email")}),
        ("Rights", {"fields": ("role", "is_active", "is_service")}),
    )
    add_fieldsets = ((None, {"fields": ("username", "role", "password1", "password2")}),)
    filter_horizontal = ()
    readonly_fields = ("last_login", "is_service")

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
class ProjectAdmin(ServedAdmin):
    of_everybody = True
    list_display = ("uid", "name", "created_at")
    search_fields = ("uid", "name")
    act = Act.MANAGE_PEOPLE
    page = ("projects",)

    def has_add_permission(self, request: HttpRequest) -> bool:
        return self.may_edit(request)

    def editable(self, request: HttpRequest, obj: Any = None) -> tuple[str, ...]:
        return () if obj else ("name",)

    def get_fields(self, request: HttpRequest, obj: Any = None) -> Any:
        return super().get_fields(request, obj) if obj else ["name"]

    def serve(self, request: HttpRequest, form: Any) -> Project:
        user: Any = request.user
        return create_project(name=form.cleaned_data["name"], user=user, via=VIA)


@admin.register(Membership)
class MembershipAdmin(ServedAdmin):
    """A role may be given and changed here; to end a membership is an act of the page Projects."""

    of_everybody = True
    list_display = ("project", "user", "role")
    list_filter = ("role",)
    act = Act.MANAGE_PEOPLE
    page = ("projects",)

    def has_add_permission(self, request: HttpRequest) -> bool:
        return self.may_edit(request)

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return self.may_edit(request)

    def editable(self, request: HttpRequest, obj: Any = None) -> tuple[str, ...]:
        return ("role",) if obj else ("project", "user", "role")

    def serve(self, request: HttpRequest, form: Any) -> Membership:
        user: Any = request.user
        known: Membership = form.instance
        project = known.project if known.pk else form.cleaned_data["project"]
        member = known.user if known.pk else form.cleaned_data["user"]
        role = form.cleaned_data["role"]
        name = member.get_username()
        set_member(project=project, user=user, via=VIA, username=name, role=role)
        return Membership.objects.get(project=project, user=member)
