"""``python -m launcher.supervisor.preparation``: tables, catalogue and demo people. Idempotent.

One process, because each ``manage.py`` call would set up Django again. It prints to the terminal
only: passwords are shown once and are written to no log file.
"""

from __future__ import annotations

import json
import os
import sys
from io import StringIO
from pathlib import Path
from typing import Any

TOKENS = frozenset({"tamiyo", "trainer"})


def main() -> int:
    """Prepares the data directory that ``ESPER_DATA_DIR`` names."""
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "esper_web.settings.local")
    import django

    django.setup()
    from django.core.management import CommandError
    from django.db import DatabaseError

    try:
        _prepare()
    except (CommandError, DatabaseError, OSError) as error:
        print(f"The database cannot be prepared: {error}", flush=True)
        return 1
    return 0


def _prepare() -> None:
    from django.core.management import call_command

    # ``call_command`` leaves out all checks, of which this one is needed here.
    call_command("check", tags=["database"], databases=["default"], stdout=StringIO())
    call_command("migrate", interactive=False, verbosity=0)
    call_command("sync_blueprints", verbosity=0, stdout=StringIO())
    if not _tokens_work():
        _make_people()
    from apps.audit.services import sign_head

    sign_head()


def _tokens_work() -> bool:
    """Whether the keyring is complete and its tokens work with this database."""
    from django.conf import settings

    from apps.accounts.services import authenticate_token
    from hosts.keyring import read_keyring

    tokens = read_keyring(settings.ESPER_DATA_DIR).get("tokens", {})
    return set(tokens) >= TOKENS and all(authenticate_token(tokens[name]) for name in TOKENS)


def _make_people() -> None:
    from django.conf import settings
    from django.core.management import call_command

    from hosts.keyring import SECRETS_FILE, update_keyring

    answer = StringIO()
    call_command("create_demo_people", json=True, stdout=answer)
    made = json.loads(answer.getvalue())
    people = {person["username"]: person for person in made["people"]}
    update_keyring(settings.ESPER_DATA_DIR, tokens=made["tokens"], people=people)
    if people:
        _tell_passwords(made["people"], settings.ESPER_DATA_DIR / SECRETS_FILE)


def _tell_passwords(people: list[dict[str, Any]], stored_in: Path) -> None:
    """On a terminal. What is redirected may end in a log that others read: it names the file."""
    if sys.stdout.isatty():
        print(_table(people), flush=True)
        return
    names = ", ".join(str(who["username"]) for who in people)
    print(f"    The first passwords of {names} are in {stored_in}, which only you can read.")


def _table(people: list[dict[str, Any]]) -> str:
    rows = [f"    {who['username']:<10} {who['role']:<12} {who['password']}" for who in people]
    return "\n".join(
        [
            "",
            "    Demo people (the passwords are also in secrets.json in the data directory)",
            f"    {'user':<10} {'role':<12} password",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
