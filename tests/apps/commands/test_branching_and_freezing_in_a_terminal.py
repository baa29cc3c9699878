"""``esper branch`` and ``esper freeze`` as a person types them."""

from __future__ import annotations

from datetime import timedelta

import pytest
from django.utils import timezone

from apps.accounts.models import User
from apps.audit.models import AuditEvent
from apps.policies.models import Freeze
from apps.recipes.models import Launch
from esper.contracts import Role, TokenScope
from launcher.remote.client import Exit
from tests.apps.cast import make_person, token_of
from tests.apps.commands.terminal import Terminal
from tests.apps.recipes.test_branches import run_of_recipe

pytestmark = pytest.mark.django_db


@pytest.fixture
def curators_terminal(people: dict[Role, User]) -> Terminal:
    return Terminal(token_of(people[Role.CURATOR], TokenScope.ACT))


def test_a_run_is_branched_and_its_tree_is_printed(terminal: Terminal) -> None:
    run, _ = run_of_recipe(make_person("rosa", Role.OPERATOR), states=(10, 40))
    words = ("branch", run.name, "steps=7", "--reason", "longer")
    dry = terminal.run(*words, "--dry-run")
    assert "would begin from step-40.pt, step 40" in dry.output
    assert not Launch.objects.exclude(branch_of=None).exists()
    made = terminal.run(*words, "--state", "step-10.pt")
    assert made.exit_code == 0, made.output
    assert "begins from step-10.pt, step 10" in made.output
    assert Launch.objects.exclude(branch_of=None).get().parameters == {"steps": 7}
    listed = terminal.run("branch", run.name, "--list").output
    assert all(word in listed for word in ("step-40.pt", "steps: 100", "(requested)"))
    gone = terminal.run("branch", run.name, "--state", "step-11.pt")
    assert gone.exit_code == Exit.CONFLICT
    assert "The newest is step-40.pt" in gone.output


def test_a_freeze_is_set_listed_and_ended(curators_terminal: Terminal, terminal: Terminal) -> None:
    words = ("--until", "2030-01-02 08:00", "--from", "2030-01-01 08:00", "--reason", "holidays")
    refused = curators_terminal.run("freeze", "set", *words)
    assert refused.exit_code == Exit.FAILED  # years ahead
    soon = ("--until", _tomorrow(), "--reason", "holidays")
    assert terminal.run("freeze", "set", *soon).exit_code == Exit.NOT_ALLOWED
    made = curators_terminal.run("freeze", "set", *soon)
    assert made.exit_code == 0, made.output
    window = Freeze.objects.get()
    assert window.uid in made.output
    [listed] = terminal.read("freeze", "list")
    assert (listed["uid"], listed["reason"]) == (window.uid, "holidays")
    ended = curators_terminal.run("freeze", "end", window.uid, "--reason", "back early")
    assert ended.exit_code == 0, ended.output
    assert AuditEvent.objects.get(act="freeze.ended").reason == "back early"
    again = curators_terminal.run("freeze", "end", window.uid)
    assert again.exit_code == Exit.CONFLICT


def _tomorrow() -> str:
    return (timezone.localtime() + timedelta(days=1)).strftime("%Y-%m-%d %H:%M")
