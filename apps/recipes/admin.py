"""Recipes and launches, to look at; they are started and stopped on their own pages."""

from __future__ import annotations

from django.contrib import admin

from apps.accounts.read_only_admin import ReadOnlyAdmin
from apps.recipes.models import Launch, Recipe


@admin.register(Recipe)
class RecipeAdmin(ReadOnlyAdmin):
    page = ("recipe", "uid")
    list_display = ("host", "slug", "digest", "present", "problem", "registered_at")
    list_filter = ("host", "present")


@admin.register(Launch)
class LaunchAdmin(ReadOnlyAdmin):
    page = ("launch", "uid")
    list_display = ("uid", "recipe", "state", "attempt", "requested_by", "created_at")
    list_filter = ("state",)
    search_fields = ("uid", "run_uid")
