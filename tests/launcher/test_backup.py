"""A backup is written while others write, and restored into a database that has gone on."""

from __future__ import annotations

import json
import os
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import another_python

pytestmark = [pytest.mark.process, pytest.mark.timeout(900)]
Esper = Callable[..., str]


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def esper(request: pytest.FixtureRequest, tmp_path: Path) -> Esper:
    """Runs ``esper …`` on an installation of its own; its output."""
    environment = {**os.environ, "ESPER_DATA_DIR": str(tmp_path / "data")}
    environment.pop("DJANGO_SETTINGS_MODULE", None)
    environment.pop("DATABASE_URL", None)
    if request.param == "postgresql":
        environment["DATABASE_URL"] = request.getfixturevalue("postgres_url")

    def run(*words: str, fails: bool = False) -> str:
        answer = another_python.esper(*words, environment=environment)
        assert (answer.returncode != 0) is fails, answer.stdout + answer.stderr
        assert "Traceback" not in answer.stderr
        return answer.stdout + answer.stderr

    return run


def test_a_backup_is_restored_and_the_keys_come_with_it(esper: Esper, tmp_path: Path) -> None:
    esper("manage", "migrate", "-v", "0")
    esper("token", "issue", "before")
    file = tmp_path / "esper.backup"
    assert "MiB" in esper("backup", str(file))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with tarfile.open(file) as tar:
        names = set(tar.getnames())
    assert names == {"manifest.json", "database", "secrets.json", "kernel.key"}
    keys = (tmp_path / "data" / "secrets.json").read_text()

    esper("token", "issue", "after")
    (tmp_path / "other").write_text("not a tar file")
    assert "is no backup of Esper" in esper("restore", str(tmp_path / "other"), fails=True)
    shown = esper("restore", str(file))
    assert "The audit log is intact" in shown
    assert "live runs register again" in shown
    assert (tmp_path / "data" / "secrets.json").read_text() == keys
    listed = esper("token", "list")
    assert "before" in listed
    assert "after" not in listed
    assert "are intact" in esper("audit", "verify")
    assert "live runs register again" in esper("rotate", "command")
    rotated = (tmp_path / "data" / "secrets.json").read_text()
    assert json.loads(rotated)["command_key"] != json.loads(keys)["command_key"]
    assert json.loads(rotated)["secret_key"] == json.loads(keys)["secret_key"]
