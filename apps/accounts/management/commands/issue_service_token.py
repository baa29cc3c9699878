from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from apps.accounts.actors import SYSTEM
from apps.accounts.models import User
from apps.accounts.services import issue_token
from esper.contracts import Role, TokenScope


class Command(BaseCommand):
    """The account has no password: nobody signs in as a service."""

    help = "Print a new token of a service account, for example for Tamiyo. It is shown this once."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("name", help="the service's account, made if there is none: tamiyo")
        parser.add_argument(
            "--scope",
            action="append",
            choices=list(TokenScope),
            help="may be given several times; default: decide and read",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        name = options["name"]
        account = User.objects.filter(username=name).first()
        if account is None:
            account = User.objects.create_user(username=name, role=Role.VIEWER)
        scopes = [TokenScope(scope) for scope in options["scope"] or ("decide", "read")]
        _, secret = issue_token(owner=account, name=name, scopes=scopes, actor=SYSTEM)
        self.stdout.write(secret)
