"""The policy's versions and the switch, to look at; both are changed on their own pages."""

from __future__ import annotations

from django.contrib import admin

from apps.accounts.read_only_admin import ReadOnlyAdmin
from apps.policies.models import AdaptationSwitch, PolicyVersion


@admin.register(PolicyVersion)
class PolicyVersionAdmin(ReadOnlyAdmin):
    list_display = ("version", "author", "reason", "created_at")


@admin.register(AdaptationSwitch)
class AdaptationSwitchAdmin(ReadOnlyAdmin):
    list_display = ("on", "changed_by", "reason", "changed_at")
