from __future__ import annotations

import json
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandParser

from apps.accounts.actors import SYSTEM
from apps.accounts.models import User
from apps.accounts.service_accounts import make_service_account
from apps.accounts.services import create_person, issue_token
from esper.contracts import Role, TokenScope
from hosts.keyring import write_private

PEOPLE = {
    "vera": Role.VIEWER,
    "rafi": Role.RESEARCHER,
    "olga": Role.OPERATOR,
    "carl": Role.CURATOR,
    "ada": Role.ADMIN,
}


class Command(BaseCommand):
    """Made for a fresh demo: people who exist already are left alone."""

    help = "Create one person per role, and tokens for Tamiyo and the demo trainers (JSON)."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--json", action="store_true", help="print one JSON object")

    def handle(self, *args: Any, **options: Any) -> None:
        people = [
            self._create(name, role)
            for name, role in PEOPLE.items()
            if not User.objects.filter(username=name).exists()
        ]
        tokens = self._tokens()
        if options["json"]:
            self.stdout.write(json.dumps({"people": people, "tokens": tokens}))
            return
        lines = [f"{who['username']:8} {who['role']:11} {who['password']}" for who in people]
        if self.stdout.isatty() or not lines:
            self.stdout.write("\n".join(lines))
            return
        # What is redirected may end in a log that others can read.
        path = settings.ESPER_DATA_DIR / "first-passwords.txt"
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_private(path, "\n".join(lines) + "\n")
        self.stdout.write(f"The first passwords are in {path}, which only you can read.")

    def _create(self, name: str, role: Role) -> dict[str, str]:
        password = create_person(username=name, role=role, actor=SYSTEM)
        _, secret = issue_token(
            owner=User.objects.get(username=name),
            name="demo",
            scopes=[TokenScope.READ, TokenScope.ACT],
            actor=SYSTEM,
        )
        return {"username": name, "role": str(role), "password": password, "token": secret}

    def _tokens(self) -> dict[str, str]:
        """Secrets cannot be read again, so every call issues new ones."""
        researcher = User.objects.get(username="rafi")
        tamiyo = User.objects.filter(username="tamiyo").first() or make_service_account(
            name="tamiyo", project=None, actor=SYSTEM
        )
        _, trainer_secret = issue_token(
            owner=researcher, name="demo trainers", scopes=[TokenScope.RUNS_CREATE]
        )
        _, tamiyo_secret = issue_token(
            owner=tamiyo, name="Tamiyo", scopes=[TokenScope.DECIDE, TokenScope.READ]
        )
        return {"trainer": trainer_secret, "tamiyo": tamiyo_secret}
