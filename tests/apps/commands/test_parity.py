"""Every act of the API has a command and a control on a page, or a written reason for none."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click
import pytest

from hosts.paths import ROOT
from launcher.command import cli

# What no person does: the callers are a trainer and Tamiyo, whose code is the only client.
SERVICES = {
    "register_run": "a trainer does it when it starts",
    "say_hello": "a trainer does it when it starts",
    "send_telemetry": "a trainer's stream",
    "acknowledge_command": "a trainer's answer",
    "report_rollback": "a trainer's report",
    "report_remedy": "a trainer's report",
    "propose_remedy": "a trainer's proposal",
    "judge_remedy": "a trainer's verdict",
    "finish_run": "a trainer's last report",
    "propose_adaptation": "Tamiyo's proposal",
    "propose_plan": "Tamiyo's proposal",
    "record_decline": "Tamiyo's report",
    "judge_adaptation": "Tamiyo's verdict",
    "issue_socket_ticket": "a client of the socket asks for it before it connects",
    "report_tamiyo_heartbeat": "Tamiyo's report",
    "suggest_variant": "Tamiyo's suggestion",
}
VERBS = {
    "approve_plan": "plans approve",
    "reject_plan": "plans reject",
    "undo_plan": "plans undo",
    "remove_second_factor": "people remove-second-factor",
    "create_project": "projects create",
    "set_member": "projects member",
    "create_service_account": "projects add-service",
    "end_service_account": "projects end-service",
    "move_run": "projects move",
    "add_duty": "duty add",
    "remove_duty": "duty remove",
    "grant_delegation": "delegations grant",
    "revoke_delegation": "delegations revoke",
    "set_freeze": "freeze set",
    "end_freeze": "freeze end",
    "approve_policy": "policy agree",
    "withdraw_policy": "policy withdraw",
    "add_channel": "channels add",
    "remove_channel": "channels remove",
    "replay_delivery": "channels replay",
    "approve_adaptation": "approve",
    "reject_adaptation": "reject",
    "shadow_adaptation": "shadow",
    "claim_adaptation": "claim",
    "release_adaptation": "release",
    "extend_adaptation": "extend",
    "cancel_adaptation": "cancel",
    "assign_adaptation": "assign",
    "escalate_adaptation": "escalate",
    "snooze_adaptation": "snooze",
    "reject_adaptations": "reject",
    "roll_back_adaptation": "rollback",
    "pause_adaptation": "pause",
    "resume_adaptation": "resume",
    "stop_run": "stop",
    "ask_for_remedy": "remedy",
    "set_adaptation_switch": "kill",
    "set_project_switch": "kill",
    "acknowledge_violation": "findings acknowledge",
    "acknowledge_violations": "findings acknowledge",
    "drain_worker": "workers drain",
    "quarantine_worker": "workers quarantine",
    "release_worker": "workers release",
    "pin_kernel": "kernels pin",
    "unpin_kernel": "kernels unpin",
    "evict_kernel": "kernels evict",
    "scrub_kernel_cache": "kernels scrub",
    "enable_blueprint": "blueprints enable",
    "disable_blueprint": "blueprints disable",
    "admit_variant": "variants admit",
    "withdraw_variant": "variants withdraw",
    "publish_policy": "policy publish",
    "start_recipe": "recipe start",
    "branch_run": "branch",
    "stop_launch": "recipe stop",
    "resume_launch": "recipe resume",
    "issue_token": "token issue",
    "revoke_token": "token revoke",
}
# With their reasons; an act leaves this list when its command comes.
WITHOUT_A_VERB: dict[str, str] = {
    "end_other_sessions": "a terminal is no browser; people end sessions on their page",
}
WITHOUT_A_CONTROL: dict[str, str] = {}
# Where a control does not name the last part of the act's path.
CONTROLS = {
    "set_adaptation_switch": "adaptation-switch",
    "set_freeze": "/freezes",
    "publish_policy": "/policies",
    "start_recipe": "/launches",
    "issue_token": "/tokens",
    "revoke_token": "/tokens/",
    "remove_channel": "/channels/",
    "create_project": "/projects",
    "remove_duty": "/duty/",
    "reject_adaptations": "/adaptations/reject",
    "pause_adaptation": "pause' }}-adaptation",
    "resume_adaptation": "'resume,",
    "enable_blueprint": "enable' }}",
    "disable_blueprint": "'disable,",
}
_CONTROL = re.compile(r"""data-(?:act|url|path|api)=("[^"]*"|'[^']*')""")


def _acts() -> dict[str, str]:
    """Operation → path, of everything that is not read."""
    document = json.loads((ROOT / "docs/reference/openapi.json").read_text())
    return {
        operation["operationId"]: path
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        if method != "get"
    }


def _controls() -> list[str]:
    pages = sorted(Path(ROOT / "templates").rglob("*.html"))
    return [found for page in pages for found in _CONTROL.findall(page.read_text())]


PEOPLES = {name: path for name, path in _acts().items() if name not in SERVICES}


def test_the_lists_name_no_act_that_does_not_exist() -> None:
    listed = {*SERVICES, *VERBS, *WITHOUT_A_VERB, *WITHOUT_A_CONTROL, *CONTROLS}
    assert listed - set(_acts()) == set()
    assert set(VERBS) & set(WITHOUT_A_VERB) == set()


def test_every_act_of_people_has_a_command() -> None:
    assert set(PEOPLES) - set(VERBS) - set(WITHOUT_A_VERB) == set()


@pytest.mark.parametrize("words", sorted(set(VERBS.values())))
def test_each_of_these_commands_exists(words: str) -> None:
    command: click.Command | None = cli
    for word in words.split():
        assert isinstance(command, click.Group), words
        command = command.commands.get(word)
    assert command is not None, words
    assert command.help


def test_every_act_of_people_has_a_control_on_a_page() -> None:
    controls = _controls()
    missing = [
        name
        for name, path in PEOPLES.items()
        if name not in WITHOUT_A_CONTROL
        and not any(CONTROLS.get(name, path.rsplit("/", 1)[-1]) in control for control in controls)
    ]
    assert missing == []
