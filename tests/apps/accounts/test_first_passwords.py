"""First passwords are shown on a terminal, and never land in a log by redirection."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from django.core.management import call_command

from launcher.supervisor import preparation

PEOPLE = [{"username": "olga", "role": "operator", "password": "a-very-secret-password"}]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.django_db
def test_the_command_writes_redirected_passwords_to_a_private_file(
    settings: Any, tmp_path: Path
) -> None:
    settings.ESPER_DATA_DIR = tmp_path
    output = io.StringIO()
    call_command("create_demo_people", stdout=output)
    file = tmp_path / "first-passwords.txt"
    assert str(file) in output.getvalue()
    assert file.stat().st_mode & 0o777 == 0o600
    passwords = [line.split()[2] for line in file.read_text().splitlines()]
    assert len(passwords) == 5
    assert not [password for password in passwords if password in output.getvalue()]


@pytest.mark.parametrize(("stream", "printed"), [(Terminal(), True), (io.StringIO(), False)])
def test_esper_up_prints_them_on_a_terminal_only(
    stream: io.StringIO, printed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout", stream)
    preparation._tell_passwords(PEOPLE, Path("/data/secrets.json"))
    assert ("a-very-secret-password" in stream.getvalue()) is printed
    assert "secrets.json" in stream.getvalue()
