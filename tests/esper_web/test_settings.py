"""Settings: a wrong value stops the start with a message, and every setting is documented."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from django.core.exceptions import ImproperlyConfigured

from esper.contracts import signing
from esper.exceptions import ConfigurationError
from esper.utils.config import _variable
from esper_web import env
from hosts.paths import ROOT

PRODUCTION = {
    "DJANGO_SETTINGS_MODULE": "esper_web.settings.production",
    "SECRET_KEY": "Zk3vQ9" * 10,
    "ALLOWED_HOSTS": "esper.example.org",
    "DATABASE_URL": "postgresql://esper:password@db.example.org/esper",
    "REDIS_URL": "rediss://:password@redis.example.org:6379/0",
    "ESPER_COMMAND_KEY": signing.generate_private_key(),
    "ESPER_AUDIT_KEY": signing.generate_private_key(),
    "ESPER_KERNEL_PUBLIC_KEY": signing.public_key(signing.generate_private_key()),
}


def load_settings(**changes: str | None) -> subprocess.CompletedProcess[str]:
    """Reads the settings in a fresh process; a change of None takes a variable away."""
    variables = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", **PRODUCTION}
    for name, value in changes.items():
        variables.pop(name, None)
        if value is not None:
            variables[name] = value
    program = (
        "import importlib, os; from esper_web import env\n"
        "importlib.import_module(os.environ['DJANGO_SETTINGS_MODULE'])\n"
        "print(*sorted(env.READ))"
    )
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_production_starts_with_good_values() -> None:
    assert load_settings().returncode == 0


def test_a_compile_worker_starts_without_the_keys_of_sessions_commands_and_the_audit_log() -> None:
    keys = ("SECRET_KEY", "ESPER_COMMAND_KEY", "ESPER_AUDIT_KEY")
    without: dict[str, str | None] = dict.fromkeys(keys)
    assert load_settings(**without, ESPER_ISSUES_COMMANDS="false").returncode == 0
    assert load_settings(**without).returncode != 0


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("SECRET_KEY", None, "SECRET_KEY is not set"),
        ("SECRET_KEY", "short", "SECRET_KEY is too weak"),
        ("SECRET_KEY", "django-insecure-" + "Zk3vQ9" * 10, "SECRET_KEY is too weak"),
        ("ALLOWED_HOSTS", "*", "ALLOWED_HOSTS must name the hosts"),
        ("DEBUG", "true", "DEBUG must be off in production"),
        ("DATABASE_URL", None, "DATABASE_URL is not set"),
        (
            "DATABASE_URL",
            "mysql://u:p@h/db",
            "DATABASE_URL must start with sqlite:// or postgresql",
        ),
        ("REDIS_URL", "redis://redis.example.org:6379/0", "without a password"),
        ("REDIS_URL", "amqp://guest@mq", "REDIS_URL must look like redis://"),
        ("ESPER_COMMAND_KEY", "c2hvcnQ=", "ESPER_COMMAND_KEY: a signing key is base64 of 32 bytes"),
        ("ESPER_COMPILE_LEASE_SECONDS", "soon", "must be a whole number, not 'soon'"),
        ("ESPER_COMPILE_LEASE_SECONDS", "0", "must lie in 2…600, not 0"),
        ("ESPER_HTTPS_ONLY", "perhaps", "ESPER_HTTPS_ONLY must be true or false, not 'perhaps'"),
    ],
)
def test_a_bad_value_stops_the_start(name: str, value: str | None, sentence: str) -> None:
    answer = load_settings(**{name: value})
    assert answer.returncode != 0
    assert sentence in answer.stderr


def test_every_setting_is_documented_and_every_documented_setting_is_read(tmp_path: Path) -> None:
    read: set[str] = {"DJANGO_SETTINGS_MODULE"}
    for profile in ("production", "local"):
        answer = load_settings(
            DJANGO_SETTINGS_MODULE=f"esper_web.settings.{profile}", ESPER_DATA_DIR=str(tmp_path)
        )
        assert answer.returncode == 0, answer.stderr
        read |= set(answer.stdout.split())
    table = (ROOT / "docs" / "settings.md").read_text()
    assert set(re.findall(r"^\| `([A-Z_]+)` \|", table, re.MULTILINE)) == read


def test_every_esper_setting_has_a_reader() -> None:
    declared = re.findall(
        r"^(ESPER_[A-Z_]+)\b.*=", (ROOT / "esper_web/settings/base.py").read_text(), re.MULTILINE
    )
    sources = [*ROOT.glob("apps/**/*.py"), *ROOT.glob("esper_web/**/*.py")]
    text = "\n".join(path.read_text() for path in sources if "settings" not in path.parts)
    assert [name for name in declared if name not in text] == []


def test_an_empty_directory_is_the_default_and_not_the_current_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ESPER_TEST_DIR", "")
    assert env.directory("ESPER_TEST_DIR", tmp_path) == tmp_path


def test_a_setting_is_read_from_a_file_where_the_environment_does_not_have_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "secret"
    file.write_text("from the file\n")
    monkeypatch.setenv("ESPER_TEST_FILE", str(file))
    assert env.text("ESPER_TEST") == "from the file"
    assert _variable("ESPER_TEST") == "from the file"  # Tamiyo's way
    monkeypatch.setenv("ESPER_TEST", "from the environment")
    assert env.text("ESPER_TEST") == _variable("ESPER_TEST") == "from the environment"
    monkeypatch.delenv("ESPER_TEST")
    file.unlink()
    with pytest.raises(ImproperlyConfigured, match="cannot be read"):
        env.text("ESPER_TEST", "a default")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        _variable("ESPER_TEST")


def test_a_password_in_redis_is_not_asked_for_on_loopback() -> None:
    assert env.redis_url("NO_SUCH_VARIABLE", "redis://127.0.0.1:6379/0")


def test_sqlite_and_postgresql_get_the_options_that_they_need() -> None:
    sqlite = env.database_from_url("sqlite:////tmp/esper.sqlite3")
    assert sqlite["OPTIONS"]["transaction_mode"] == "IMMEDIATE"
    assert "journal_mode=WAL" in sqlite["OPTIONS"]["init_command"]
    postgresql = env.database_from_url("postgresql://esper:secret@db/esper")
    assert postgresql["OPTIONS"]["pool"]
    assert postgresql["CONN_MAX_AGE"] == 0


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("sqlite:////tmp/esper.sqlite3", "/tmp/esper.sqlite3"),
        ("sqlite:///esper.sqlite3", "esper.sqlite3"),
        ("sqlite:////tmp/a folder/esper.sqlite3", "/tmp/a folder/esper.sqlite3"),
        ("sqlite://:memory:", ":memory:"),
    ],
)
def test_a_sqlite_url_names_a_file_or_memory(url: str, name: str) -> None:
    config = env.database_from_url(url)
    assert (config["ENGINE"], config["NAME"]) == ("django.db.backends.sqlite3", name)


def test_every_part_of_a_postgresql_url_is_read_and_decoded() -> None:
    config = env.database_from_url("postgresql://a%40b:p%2Fw%3A@db:5433/esper%20a?sslmode=require")
    parts = [config[part] for part in ("USER", "PASSWORD", "HOST", "PORT", "NAME")]
    assert parts == ["a@b", "p/w:", "db", 5433, "esper a"]
    assert config["ENGINE"] == "django.db.backends.postgresql"
    assert config["OPTIONS"]["sslmode"] == "require"
    short = env.database_from_url("postgres://db/esper")
    parts = [short[part] for part in ("USER", "PASSWORD", "HOST", "PORT", "NAME")]
    assert parts == ["", "", "db", "", "esper"]


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("", "must start with"),
        ("esper.sqlite3", "must start with"),
        ("sqlite://", "must start with"),
        ("sqlite:///", "names no file"),
        ("postgresql://user:hunter2@db", "names no database"),
        ("postgresql://user:hunter2@db:http/esper", "has a port that is not a number"),
        ("postgresql://user:hunter2@db:70000/esper", "has a port that is not a number"),
    ],
)
def test_a_database_url_that_is_wrong_is_refused_without_its_password(
    url: str, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        env.database_from_url(url)
    assert "hunter2" not in str(caught.value)


def test_a_database_url_that_cannot_be_read_is_named() -> None:
    os.environ["ESPER_TEST_DATABASE"] = "oracle://x"
    try:
        with pytest.raises(ImproperlyConfigured, match="ESPER_TEST_DATABASE"):
            env.database("ESPER_TEST_DATABASE")
    finally:
        del os.environ["ESPER_TEST_DATABASE"]


def test_the_kernel_key_is_no_setting_of_the_web() -> None:
    source = "\n".join(path.read_text() for path in (ROOT / "esper_web/settings").glob("*.py"))
    assert "kernel.key" not in source
    assert "kernel_key_path" not in source
