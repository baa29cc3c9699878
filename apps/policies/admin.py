"""The policy's versions: curators write a new one through the service. The switches, to look at."""

from __future__ import annotations

from typing import Any

from django import forms
from django.contrib import admin
from django.http import HttpRequest

from apps.accounts.policy import Act
from apps.accounts.read_only_admin import VIA, ReadOnlyAdmin, ServedAdmin, ServedForm
from apps.policies.models import AdaptationSwitch, Freeze, PolicyVersion, ProjectSwitch
from apps.policies.services import current_policy, publish_policy
from esper.constraints.strictness import thresholds
from esper.contracts import Risk


class NewVersionForm(ServedForm):
    """One field for each threshold, with the values that are in force for all runs."""

    reason = forms.CharField(widget=forms.Textarea(attrs={"rows": 3}))

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name, value in _values().items():
            if name in self.fields:
                self.fields[name].initial = value

    @property
    def changes(self) -> dict[str, Any]:
        """The thresholds that differ from those in force."""
        given, values = self.cleaned_data, _values()
        return {name: given[name] for name in values if given[name] != values[name]}

    class Meta:
        model = PolicyVersion
        fields = ("reason",)


def _values() -> dict[str, Any]:
    values = current_policy().values
    return {name: values[name] for name in sorted(thresholds()) if name in values}


def _field(value: Any) -> forms.Field:
    if isinstance(value, str):
        return forms.ChoiceField(choices=[(risk, risk) for risk in Risk])
    if isinstance(value, int):
        return forms.IntegerField()
    return forms.FloatField()


@admin.register(PolicyVersion)
class PolicyVersionAdmin(ServedAdmin):
    list_display = ("version", "state", "scope", "author", "reason", "created_at")
    list_filter = ("state", "scope")
    act = Act.EDIT_POLICY
    page = ("policy",)

    def has_add_permission(self, request: HttpRequest) -> bool:
        return self.may_edit(request)

    def editable(self, request: HttpRequest, obj: Any = None) -> tuple[str, ...]:
        return () if obj else ("reason", *_values())

    def get_fields(self, request: HttpRequest, obj: Any = None) -> Any:
        return super().get_fields(request, obj) if obj else list(self.editable(request))

    def get_form(
        self, request: HttpRequest, obj: Any = None, change: bool = False, **more: Any
    ) -> Any:
        if obj is not None:
            return super().get_form(request, obj, change=change, **more)
        fields = {name: _field(value) for name, value in _values().items()}
        serve = {"served": lambda form: self.serve(request, form)}
        return type("NewVersionForm", (NewVersionForm,), fields | serve)

    def serve(self, request: HttpRequest, form: Any) -> PolicyVersion:
        user: Any = request.user
        return publish_policy(
            changes=form.changes, reason=form.cleaned_data["reason"], user=user, via=VIA
        )


@admin.register(AdaptationSwitch)
class AdaptationSwitchAdmin(ReadOnlyAdmin):
    list_display = ("on", "changed_by", "reason", "changed_at")
    page = ("switch",)


@admin.register(ProjectSwitch)
class ProjectSwitchAdmin(ReadOnlyAdmin):
    list_display = ("project", "on", "changed_by", "reason", "changed_at")
    page = ("switch",)


@admin.register(Freeze)
class FreezeAdmin(ReadOnlyAdmin):
    list_display = ("uid", "project", "starts_at", "ends_at", "reason", "set_by", "ended_at")
    page = ("switch",)
