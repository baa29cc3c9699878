"""The commands of ``esper`` that work on an installation's database."""

from __future__ import annotations

import json
import shutil
import subprocess
from contextlib import redirect_stdout
from datetime import timedelta
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
from click import ClickException, Context
from click.testing import CliRunner
from django.db import connection, transaction

import esper
from apps.accounts.actors import SYSTEM
from apps.accounts.models import ApiToken, User
from apps.accounts.services import authenticate_token, create_person
from apps.audit import triggers
from apps.audit.models import AuditEvent
from apps.audit.services import record
from esper.contracts import Role
from hosts.paths import ROOT
from launcher.command import cli
from launcher.commands.sections import SECTIONS
from tests.apps.recipes.rows import make_recipe


def run(*words: str) -> str:
    """What the command prints; ``ClickException`` when it fails."""
    buffer = BytesIO()
    with redirect_stdout(TextIOWrapper(buffer, encoding="utf-8", write_through=True)):
        cli.main(list(words), standalone_mode=False)
        return buffer.getvalue().decode()


# --- tokens -------------------------------------------------------------------------------------


@pytest.mark.django_db
def test_a_service_token_works_and_its_account_has_no_password() -> None:
    token = authenticate_token(run("token", "issue", "tamiyo").strip())
    assert token is not None
    assert token.scopes == ["decide", "read"]
    assert not token.owner.has_usable_password()


@pytest.mark.django_db
def test_a_token_has_the_scopes_name_and_expiry_that_were_asked_for() -> None:
    create_person(username="rafi", role=Role.RESEARCHER, actor=SYSTEM)
    run("token", "issue", "rafi", "--scope", "runs:create", "--name", "laptop", "--days", "7")
    token = ApiToken.objects.get()
    assert (token.owner.username, token.owner.role) == ("rafi", Role.RESEARCHER)
    assert (token.scopes, token.name) == (["runs:create"], "laptop")
    assert token.expires_at is not None
    assert round((token.expires_at - token.created_at) / timedelta(days=1), 3) == 7


@pytest.mark.django_db
def test_the_list_shows_working_tokens_without_their_secrets() -> None:
    secret = run("token", "issue", "tamiyo").strip()
    run("token", "issue", "other")
    shown = run("token", "list", "tamiyo")
    assert secret not in shown
    assert secret[:10] in shown
    assert "other" not in shown
    assert len(run("token", "list").splitlines()) == 2


@pytest.mark.django_db
def test_a_revoked_token_stops_working_and_the_audit_log_has_it() -> None:
    secret = run("token", "issue", "tamiyo").strip()
    token = ApiToken.objects.get()
    assert "is revoked" in run("token", "revoke", token.prefix)
    assert authenticate_token(secret) is None
    assert run("token", "list") == ""
    assert AuditEvent.objects.filter(act="token.revoked", object_uid=token.uid).exists()
    with pytest.raises(ClickException, match="0 working tokens"):
        run("token", "revoke", token.uid)


@pytest.mark.django_db
def test_tokens_whose_first_characters_are_the_same_are_revoked_by_uid() -> None:
    run("token", "issue", "tamiyo")
    run("token", "issue", "tamiyo")
    first, second = ApiToken.objects.all()
    ApiToken.objects.update(prefix="esp_same00")
    with pytest.raises(ClickException, match="2 working tokens"):
        run("token", "revoke", "esp_same00")
    run("token", "revoke", first.uid)
    assert list(ApiToken.objects.filter(revoked_at=None)) == [second]


# --- audit --------------------------------------------------------------------------------------


@pytest.mark.django_db
def test_the_audit_log_is_verified_and_exported_oldest_first(tmp_path: Path) -> None:
    with transaction.atomic():
        for number in range(3):
            record(
                actor=SYSTEM, act="test", object_kind="thing", object_uid=f"t{number}", run_uid="r"
            )
    assert run("audit", "verify").startswith("3 events are intact")
    exported = [json.loads(line) for line in run("audit", "export").splitlines()]
    assert [event["object_uid"] for event in exported] == ["t0", "t1", "t2"]
    file = tmp_path / "audit.ndjson"
    run("audit", "export", "--after", "2", "--run", "r", "--output", str(file))
    assert [json.loads(line)["object_uid"] for line in file.read_text().splitlines()] == ["t2"]


@pytest.mark.django_db
def test_a_changed_audit_log_is_an_error_that_names_the_event() -> None:
    with transaction.atomic():
        event = record(actor=SYSTEM, act="test", object_kind="thing", object_uid="t")
    triggers.remove(connection)  # as somebody with the database file would
    with connection.cursor() as cursor:
        cursor.execute("UPDATE audit_auditevent SET reason = 'forged' WHERE id = %s", [event.id])
    with pytest.raises(ClickException, match=rf"not intact.*event {event.id}\)"):
        run("audit", "verify")


# --- the rest -----------------------------------------------------------------------------------


def test_the_version_is_that_of_the_library() -> None:
    assert run("version") == f"{esper.__version__}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_a_completion_script(shell: str) -> None:
    assert "_ESPER_COMPLETE" in run("completion", shell)


def test_commands_and_options_are_completed() -> None:
    answer = CliRunner().invoke(
        cli,
        prog_name="esper",
        env={
            "_ESPER_COMPLETE": "bash_complete",
            "COMP_WORDS": "esper token iss",
            "COMP_CWORD": "2",
        },
    )
    assert answer.output.split() == ["plain,issue"]


@pytest.mark.django_db
def test_an_unknown_account_cannot_act() -> None:
    make_recipe()
    with pytest.raises(ClickException, match="There is no account 'nobody'"):
        run("recipe", "start", "counter", "--as", "nobody")
    assert not User.objects.filter(username="nobody").exists()


# --- help ---------------------------------------------------------------------------------------


def test_up_tells_its_options_before_it_installs_anything(tmp_path: Path) -> None:
    for name in ("up", "scripts/up_help.txt"):  # a clone without the rest cannot install
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    told = subprocess.run(
        [tmp_path / "up", "--help"], capture_output=True, text=True, check=True, timeout=600
    ).stdout
    known = CliRunner().invoke(cli, ["up", "--help"], prog_name="esper").output
    assert told.split() == known.replace("Usage: esper up", "Usage: ./up", 1).split()


def test_the_help_has_each_command_in_one_section_with_its_whole_sentence() -> None:
    listed = [name for names in SECTIONS.values() for name in names]
    assert sorted(listed) == sorted(cli.commands)
    assert "..." not in cli.get_help(Context(cli, terminal_width=60)).partition("Options:")[2]
