"""People, their tokens, and the projects whose runs they see."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from types import MappingProxyType

from django.contrib.auth.models import AbstractUser
from django.db import models
from django.db.models import Exists, OuterRef, Q, Subquery

from apps.rest.identifiers import UID_LENGTH, new_uid
from esper.contracts import Role

DEFAULT_PROJECT = 0  # a key that no sequence gives


@dataclass(frozen=True, slots=True)
class Access:
    """The projects of one person: ``roles`` by the key of the project.

    Attributes:
        limit: the keys of the projects whose rows they see; None: there is no other project.
    """

    roles: Mapping[int, Role]
    limit: frozenset[int] | None

    def role_in(self, project: int | None) -> Role | None:
        """None: no member."""
        return None if project is None else self.roles.get(project)

    def within(self, project: int | None) -> Access:
        """Of a token that is bound to one project."""
        if project is None:
            return self
        roles = {key: role for key, role in self.roles.items() if key == project}
        return Access(MappingProxyType(roles), frozenset(roles))


class User(AbstractUser):
    role = models.CharField(
        max_length=16, choices=[(role, role.capitalize()) for role in Role], default=Role.VIEWER
    )

    preferences = models.JSONField(default=dict, blank=True, editable=False)
    # A program (a trainer, CI): it has tokens and no password, and never decides.
    is_service = models.BooleanField("service account", default=False, editable=False)

    def save(self, *args: object, **kwargs: object) -> None:
        # Django's admin reads these two; people only set the role.
        if self._state.adding and self.is_superuser:  # manage.py createsuperuser
            self.role = Role.ADMIN
        self.is_staff = self.role in {Role.ADMIN, Role.CURATOR}
        self.is_superuser = self.role == Role.ADMIN
        super().save(*args, **kwargs)  # type: ignore[arg-type]

    has_one_project = False
    bound_to: int | None = None  # the project of the token that the person has signed in with

    @cached_property
    def access(self) -> Access:
        """Found once for each instance, so once a request; by ``PeopleBackend`` without a query
        where there is one project."""
        if self.has_one_project:
            return Access(MappingProxyType({DEFAULT_PROJECT: Role(self.role)}), None)
        return access_of(self).within(self.bound_to)

    def forget_access(self) -> None:
        """A project was made, or a role in one has changed, since it was found."""
        self.has_one_project = False
        self.__dict__.pop("access", None)


class SecondFactor(models.Model):
    """A person's authenticator app: its codes are asked for beside the password."""

    user = models.OneToOneField(User, on_delete=models.CASCADE, related_name="second_factor")
    secret = models.BinaryField()  # encrypted
    last_step = models.BigIntegerField()  # the time step of the newest code that was taken
    since = models.DateTimeField(auto_now_add=True)

    def __str__(self) -> str:
        return f"second factor of {self.user_id}"


class RecoveryCode(models.Model):
    """Stands once for a code of the app; only its SHA-256 is stored."""

    factor = models.ForeignKey(
        SecondFactor, on_delete=models.CASCADE, related_name="recovery_codes"
    )
    digest = models.CharField(max_length=64)
    used_at = models.DateTimeField(null=True)

    class Meta:
        constraints = (
            models.UniqueConstraint(fields=("factor", "digest"), name="recovery_code_once"),
        )

    def __str__(self) -> str:
        return f"recovery code of {self.factor_id}"


class Identity(models.Model):
    """Whom an OpenID provider means by a subject."""

    user = models.ForeignKey(User, on_delete=models.CASCADE, related_name="identities")
    issuer = models.CharField(max_length=500)
    subject = models.CharField(max_length=255)

    class Meta:
        constraints = (
            models.UniqueConstraint(fields=("issuer", "subject"), name="one_person_per_subject"),
        )

    def __str__(self) -> str:
        return f"{self.subject} of {self.issuer}"


class Project(models.Model):
    """The place of runs: who is no member of it does not see that they exist.

    The first one, :data:`DEFAULT_PROJECT`, is everybody's, with the role of their account.
    """

    uid = models.CharField(
        max_length=UID_LENGTH, unique=True, default=partial(new_uid, "prj"), editable=False
    )
    name = models.CharField(max_length=80, unique=True)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ("-id",)

    def __str__(self) -> str:
        return self.name

    @property
    def is_default(self) -> bool:
        return self.pk == DEFAULT_PROJECT

    @property
    def people(self) -> list[Membership]:
        """Members with a role of their own."""
        return [one for one in self.members.all() if not one.user.is_service]

    @property
    def services(self) -> list[Membership]:
        """Programs that work in it."""
        return [one for one in self.members.all() if one.user.is_service]

    # What the table of rights asks of a run, so that a project can be asked about too.
    @property
    def project_id(self) -> int:
        return self.pk

    @property
    def owner_id(self) -> None:
        return None


class Membership(models.Model):
    """A person's role in one project, whatever the role of their account."""

    project = models.ForeignKey(Project, on_delete=models.CASCADE, related_name="members")
    user = models.ForeignKey(User, on_delete=models.CASCADE, related_name="memberships")
    role = models.CharField(max_length=16, choices=[(role, role.capitalize()) for role in Role])

    class Meta:
        ordering = ("project", "user__username")
        constraints = (
            models.UniqueConstraint(fields=("project", "user"), name="one_role_per_project"),
        )

    def __str__(self) -> str:
        return f"{self.user_id} is {self.role} of {self.project_id}"


def has_one_project(person: str) -> Q:
    """For a query that reads a person: there is only the default project, with no roles of its own
    for them."""
    others = Project.objects.exclude(pk=DEFAULT_PROJECT)
    own = Membership.objects.filter(user=OuterRef(person))
    return ~Q(Exists(others)) & ~Q(Exists(own))


def access_of(user: User) -> Access:
    """Which projects a person sees now, and with which role. One query.

    Admins of the server are admins of every project.
    """
    own = Membership.objects.filter(project=OuterRef("pk"), user=user).values("role")[:1]
    return _access(user, Project.objects.order_by().values_list("pk", Subquery(own)))


def accesses_of(users: Collection[User]) -> dict[int, Access]:
    """As ``access_of`` for each of them, by two queries; by the keys of the people."""
    projects = list(Project.objects.order_by().values_list("pk", flat=True))
    own = {
        (user, project): role
        for user, project, role in Membership.objects.order_by()
        .filter(user__in=users)
        .values_list("user", "project", "role")
    }
    return {
        user.pk: _access(user, [(key, own.get((user.pk, key))) for key in projects])
        for user in users
    }


def _access(user: User, rows: Iterable[tuple[int, str | None]]) -> Access:
    """From each project's key, and the person's own role there."""
    roles: dict[int, Role] = {}
    hidden = False
    for key, role in rows:
        if user.role == Role.ADMIN:
            roles[key] = Role.ADMIN
        elif role is not None:
            roles[key] = Role(role)
        elif key == DEFAULT_PROJECT:
            roles[key] = Role(user.role)
        else:
            hidden = True
    return Access(MappingProxyType(roles), frozenset(roles) if hidden else None)


class ApiToken(models.Model):
    """A bearer token; only its SHA-256 is stored.

    ``run_uid`` restricts it to one run, ``project`` to the runs of one project.
    """

    uid = models.CharField(
        max_length=UID_LENGTH, unique=True, default=partial(new_uid, "tok"), editable=False
    )
    owner = models.ForeignKey(User, on_delete=models.CASCADE, related_name="tokens")
    name = models.CharField(max_length=80)
    prefix = models.CharField(max_length=12)
    digest = models.CharField(max_length=64, unique=True)
    scopes = models.JSONField(default=list)
    run_uid = models.CharField(max_length=UID_LENGTH, blank=True, db_index=True)
    project = models.ForeignKey(
        Project, on_delete=models.CASCADE, null=True, blank=True, related_name="tokens"
    )
    created_at = models.DateTimeField(auto_now_add=True)
    expires_at = models.DateTimeField(null=True, blank=True)
    last_used_at = models.DateTimeField(null=True, blank=True)
    revoked_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering = ("-id",)

    def __str__(self) -> str:
        return f"{self.name} ({self.prefix}…)"
