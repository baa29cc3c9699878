"""People and their tokens."""

from __future__ import annotations

from functools import partial

from django.contrib.auth.models import AbstractUser
from django.db import models

from apps.rest.identifiers import UID_LENGTH, new_uid
from esper.contracts import Role


class User(AbstractUser):
    role = models.CharField(
        max_length=16, choices=[(role, role.capitalize()) for role in Role], default=Role.VIEWER
    )

    preferences = models.JSONField(default=dict, blank=True, editable=False)

    def save(self, *args: object, **kwargs: object) -> None:
        # Django's admin reads these two; people only set the role.
        if self._state.adding and self.is_superuser:  # manage.py createsuperuser
            self.role = Role.ADMIN
        self.is_staff = self.role in {Role.ADMIN, Role.CURATOR}
        self.is_superuser = self.role == Role.ADMIN
        super().save(*args, **kwargs)  # type: ignore[arg-type]


class ApiToken(models.Model):
    """A bearer token; only its SHA-256 is stored. ``run_uid`` restricts it to one run."""

    uid = models.CharField(
        max_length=UID_LENGTH, unique=True, default=partial(new_uid, "tok"), editable=False
    )
    owner = models.ForeignKey(User, on_delete=models.CASCADE, related_name="tokens")
    name = models.CharField(max_length=80)
    prefix = models.CharField(max_length=12)
    digest = models.CharField(max_length=64, unique=True)
    scopes = models.JSONField(default=list)
    run_uid = models.CharField(max_length=UID_LENGTH, blank=True, db_index=True)
    created_at = models.DateTimeField(auto_now_add=True)
    expires_at = models.DateTimeField(null=True, blank=True)
    last_used_at = models.DateTimeField(null=True, blank=True)
    revoked_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering = ("-id",)

    def __str__(self) -> str:
        return f"{self.name} ({self.prefix}…)"
