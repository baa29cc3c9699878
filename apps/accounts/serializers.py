from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rest_framework import serializers

from apps.accounts.models import ApiToken, Project, User
from apps.accounts.policy import Permission
from apps.rest.fields import BoundedList, PersonsInput, Text, WholeNumber
from esper.contracts import Role, TokenScope

# Scopes that a person may give to a script of theirs; `run:write` comes from registering a run.
GIVEN_BY_PEOPLE = (
    TokenScope.READ,
    TokenScope.PROPOSE,
    TokenScope.ACT,
    TokenScope.RUNS_CREATE,
)
MAX_TOKEN_DAYS = 366


class PermissionOutput(serializers.Serializer[Any]):
    """Whether the caller may do it now, and the reason if not."""

    allowed = serializers.BooleanField()
    code = serializers.CharField()
    why = serializers.CharField()

    @classmethod
    def of(cls, permissions: Mapping[str, Permission]) -> dict[str, Any]:
        """By act: ``{"allowed", "code", "why"}``."""
        return {str(act): asdict(permission) for act, permission in permissions.items()}


class PersonOutput(serializers.ModelSerializer[User]):
    class Meta:
        model = User
        fields: tuple[str, ...] = ("username", "role", "first_name", "last_name", "last_login")


class MeOutput(PersonOutput):
    """Who the caller is, and what they may do."""

    may = serializers.SerializerMethodField()
    token = serializers.SerializerMethodField()
    scopes = serializers.SerializerMethodField()

    class Meta(PersonOutput.Meta):
        fields: tuple[str, ...] = (*PersonOutput.Meta.fields, "may", "token", "scopes")

    def get_may(self, user: User) -> list[str]:
        acts: list[str] = self.context["may"]
        return acts

    def get_token(self, user: User) -> str | None:
        """Prefix of the token that was used, null for a session."""
        token: ApiToken | None = self.context["token"]
        return token.prefix if token else None

    def get_scopes(self, user: User) -> list[str]:
        """What this token or session may be used for."""
        scopes: list[str] = self.context["scopes"]
        return scopes


class TokenOutput(serializers.ModelSerializer[ApiToken]):
    scopes = serializers.ListField(child=serializers.ChoiceField(choices=list(TokenScope)))
    project = serializers.CharField(source="project.uid", default=None, allow_null=True)

    class Meta:
        model = ApiToken
        fields: tuple[str, ...] = (
            "uid",
            "name",
            "prefix",
            "scopes",
            "run_uid",
            "project",
            "created_at",
            "expires_at",
            "last_used_at",
            "revoked_at",
        )


class NewTokenOutput(TokenOutput):
    """``secret`` is shown this once."""

    secret = serializers.SerializerMethodField()

    class Meta(TokenOutput.Meta):
        fields: tuple[str, ...] = (*TokenOutput.Meta.fields, "secret")

    def get_secret(self, token: ApiToken) -> str:
        secret: str = self.context["secret"]
        return secret


class TokenInput(PersonsInput):
    name = Text(max_length=80)
    scopes = BoundedList(
        child=serializers.ChoiceField(choices=list(GIVEN_BY_PEOPLE)),
        allow_empty=False,
        max_length=len(GIVEN_BY_PEOPLE),
    )
    project = Text(max_length=40, required=False, default="", allow_blank=True)
    expires_in_days = WholeNumber(min_value=1, max_value=MAX_TOKEN_DAYS, default=90)


class SessionOutput(serializers.Serializer[Any]):
    """One browser; ``present``: the one that asks. ``started`` null: not known."""

    started = serializers.DateTimeField(allow_null=True)
    expires = serializers.DateTimeField()
    browser = serializers.CharField()
    address = serializers.CharField()
    present = serializers.BooleanField()


class EndedOutput(serializers.Serializer[Any]):
    """``ended``: how many browsers were signed out."""

    ended = serializers.IntegerField()


class MemberOutput(serializers.Serializer[Any]):
    """A person's role in a project."""

    username = serializers.CharField(source="user.username")
    role = serializers.ChoiceField(choices=list(Role))


class ProjectOutput(serializers.ModelSerializer[Project]):
    """``role``: the caller's own in it."""

    role = serializers.SerializerMethodField()

    class Meta:
        model = Project
        fields: tuple[str, ...] = ("uid", "name", "created_at", "role")

    def get_role(self, project: Project) -> str:
        user: User = self.context["user"]
        return str(user.access.roles[project.pk])


class ServiceAccountOutput(serializers.Serializer[Any]):
    """A program with tokens of its own; ``active`` false: they do not work any more."""

    name = serializers.CharField(source="user.username")
    active = serializers.BooleanField(source="user.is_active")
    created_at = serializers.DateTimeField(source="user.date_joined")


class ProjectDetailOutput(ProjectOutput):
    """``members``: those with a role of their own in it; of the default project everybody else has
    the role of their account."""

    members = MemberOutput(many=True, source="people")
    service_accounts = ServiceAccountOutput(many=True, source="services")

    class Meta(ProjectOutput.Meta):
        fields: tuple[str, ...] = (
            *ProjectOutput.Meta.fields,
            "members",
            "service_accounts",
        )


class ProjectInput(PersonsInput):
    name = Text(max_length=80)


class MemberInput(PersonsInput):
    """``role`` empty: a member no longer."""

    username = Text(max_length=150)
    role = serializers.ChoiceField(choices=[*Role, ""])


class ServiceAccountInput(PersonsInput):
    name = Text(max_length=150)
    scopes = BoundedList(
        child=serializers.ChoiceField(choices=list(GIVEN_BY_PEOPLE)),
        allow_empty=False,
        max_length=len(GIVEN_BY_PEOPLE),
    )
    expires_in_days = WholeNumber(min_value=1, max_value=MAX_TOKEN_DAYS, default=90)


class EndServiceAccountInput(PersonsInput):
    name = Text(max_length=150)
