"""Lists, tables and ``esper watch`` over the API; and whose token goes to which server."""

from __future__ import annotations

from pathlib import Path

import pytest
from django.utils import timezone

from apps.blueprints.models import Blueprint
from apps.violations.services import record_violation
from apps.workers.services import Presence, heartbeat
from esper.contracts import Severity, ViolationRule, WorkerKind
from hosts.keyring import update_keyring
from launcher.commands import asking
from launcher.commands.watching import spark
from launcher.remote.client import Exit, RefusedError
from tests.apps.callers import Inbox
from tests.apps.cast import make_kernel
from tests.apps.commands.terminal import Terminal

pytestmark = pytest.mark.django_db


def test_each_collection_is_a_table_and_json(
    inbox: Inbox, terminal: Terminal, blueprint: Blueprint
) -> None:
    make_kernel()
    inbox.waiting()
    expected = {"runs": "digits", "adaptations": "proj_lora_64", "kernels": "d" * 64,
                "blueprints": "Low-rank", "policy": "min_gain_ratio"}  # fmt: skip
    for words, text in expected.items():
        assert text in terminal.run(words).output
        assert terminal.read(words)
    assert "adaptation.proposed" in terminal.run("audit", "log", "--act", "adaptation").output
    assert terminal.run("findings").output == "There are no such findings.\n"


def test_acts_on_workers_kernels_blueprints_and_policy(
    terminal: Terminal, blueprint: Blueprint
) -> None:
    kernel = make_kernel()
    heartbeat(
        Presence(
            name="compile@here",
            host="here",
            kind=WorkerKind.COMPILE,
            versions={},
            started_at=timezone.now(),
        )
    )
    drained = terminal.run("workers", "drain", "compile@here", "--reason", "maintenance")
    assert drained.output == "compile@here is draining\n"
    assert terminal.read("workers")[0]["mode"] == "draining"
    assert terminal.run("kernels", "pin", kernel.digest).exit_code == 0
    assert terminal.read("kernels")[0]["pinned_by"] == "olga"
    assert terminal.run("blueprints", "disable", blueprint.slug).exit_code == Exit.NOT_ALLOWED
    words = ("policy", "publish", "probation_looks=20", "--reason", "longer")
    assert terminal.run(*words).exit_code == Exit.NOT_ALLOWED


def test_watch_draws_the_run(inbox: Inbox, terminal: Terminal) -> None:
    inbox.waiting()
    shown = terminal.run("watch", "digits", "--once")
    assert shown.exit_code == 0, shown.output
    for part in ("R-", "digits", "step 1,000 of 5,000", "loss", "proj_lora_64"):
        assert part in shown.output
    assert spark([3.0, 2.0, 1.0]) == "█▅▁"
    assert (spark([1.0, 1.0]), spark([])) == ("▁▁", "")


@pytest.fixture
def data_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("ESPER_URL", "ESPER_TOKEN", "ESPER_ACCOUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ESPER_DATA_DIR", str(tmp_path))
    people = {"olga": {"role": "operator", "token": "esp_olga"},
              "rafi": {"role": "researcher", "token": "esp_rafi"}}  # fmt: skip
    update_keyring(tmp_path, people=people)
    return tmp_path


def test_a_local_token_is_for_the_local_server_only(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def token(**given: str) -> str:
        with asking.connect(**given) as client:
            return str(client._http.headers["Authorization"])

    assert token() == "Bearer esp_olga"
    assert token(account="rafi") == "Bearer esp_rafi"
    with pytest.raises(RefusedError, match="no token for http://elsewhere"):
        asking.connect(url="http://elsewhere:8080")
    with pytest.raises(RefusedError, match="no token of 'nobody'"):
        asking.connect(account="nobody")
    monkeypatch.setenv("ESPER_TOKEN", "esp_mine")
    assert token(url="http://elsewhere:8080") == "Bearer esp_mine"


def test_a_server_that_is_away_is_one_sentence_and_a_status(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ESPER_TOKEN", "esp_mine")
    with asking.connect(url="http://127.0.0.1:9") as client, pytest.raises(RefusedError) as raised:
        client.get("runs")
    assert raised.value.exit_code == Exit.UNAVAILABLE
    assert "does not answer" in str(raised.value)


def test_findings_are_acknowledged_together_and_each_refusal_is_told(
    inbox: Inbox, terminal: Terminal
) -> None:
    made = [
        record_violation(
            run=inbox.trainer.row(), rule=rule, severity=Severity.CAUTION,
            observed="1", limit="0", text=str(rule), action="none",
        )
        for rule in (ViolationRule.MEMORY, ViolationRule.LATENCY)
    ]  # fmt: skip
    first, second = (f"V-{one.number}" for one in made)
    assert terminal.run("findings", "acknowledge", first).output == "1 of 1 are acknowledged\n"
    again = terminal.run("findings", "acknowledge", first, second)
    assert again.exit_code == Exit.CONFLICT
    assert "1 of 2 are acknowledged" in again.output
    assert terminal.read("findings") == []
