"""The catalogue: curators switch its blueprints, through the service, with a reason."""

from __future__ import annotations

from typing import Any

from django.contrib import admin, messages
from django.db.models import QuerySet
from django.http import HttpRequest

from apps.accounts.policy import Act
from apps.accounts.read_only_admin import VIA, ReasonActionForm, ServedAdmin
from apps.blueprints.models import Blueprint
from apps.blueprints.services import switch_blueprint
from apps.rest.problems import Problem


@admin.register(Blueprint)
class BlueprintAdmin(ServedAdmin):
    list_display = ("slug", "category", "kind", "risk", "enabled", "disabled_reason", "present")
    list_filter = ("category", "risk", "enabled")
    search_fields = ("slug", "title")
    actions = ("switch_on", "switch_off")
    action_form = ReasonActionForm
    act = Act.SWITCH_BLUEPRINT
    page = ("blueprint", "slug")

    def editable(self, request: HttpRequest, obj: Any = None) -> tuple[str, ...]:
        return ("enabled", "disabled_reason") if self.may_edit(request) else ()

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return self.may_edit(request)

    def serve(self, request: HttpRequest, form: Any) -> Blueprint:
        given = form.cleaned_data
        return _switch(request, form.instance, given["enabled"], given["disabled_reason"])

    @admin.action(description="Switch on")
    def switch_on(self, request: HttpRequest, rows: QuerySet[Blueprint]) -> None:
        self._switch_all(request, rows, on=True)

    @admin.action(description="Switch off (give a reason)")
    def switch_off(self, request: HttpRequest, rows: QuerySet[Blueprint]) -> None:
        self._switch_all(request, rows, on=False)

    def _switch_all(self, request: HttpRequest, rows: QuerySet[Blueprint], *, on: bool) -> None:
        for row in rows:
            try:
                _switch(request, row, on, request.POST.get("reason", ""))
            except Problem as problem:
                self.message_user(request, f"{row.slug}: {problem}", messages.ERROR)
            else:
                self.message_user(request, f"{row.slug} is switched {'on' if on else 'off'}.")


def _switch(request: HttpRequest, row: Blueprint, enabled: bool, reason: str) -> Blueprint:
    user: Any = request.user
    return switch_blueprint(blueprint=row, enabled=enabled, user=user, via=VIA, reason=reason)
