"""``esper mcp``: neither a tool nor its token can approve; what it proposes waits for a person."""

from __future__ import annotations

import asyncio

import pytest
from mcp import Client as McpClient
from mcp.types import CallToolResult

from apps.accounts.models import User
from apps.adaptations.models import Adaptation
from esper.contracts import AdaptationState, Role, TokenScope
from launcher.remote.agent import check_token, make_server, tools
from launcher.remote.client import Exit, RefusedError
from tests.apps.callers import Caller, Inbox
from tests.apps.cast import make_remedies, token_of
from tests.apps.commands.terminal import Terminal
from tests.apps.commands.test_parity import PEOPLES

pytestmark = pytest.mark.django_db


@pytest.fixture
def secret(people: dict[Role, User]) -> str:
    """Of the operator, who may approve: the token is all that keeps the assistant from it."""
    return token_of(people[Role.OPERATOR], TokenScope.READ, TokenScope.PROPOSE)


def test_what_it_proposes_waits_and_its_address_is_returned(inbox: Inbox, secret: str) -> None:
    make_remedies()
    with Terminal(secret)._connect() as client:
        check_token(client)
        offered = tools(client)
        made = offered["propose_remedy"](
            run=inbox.trainer.run, remedy="rewind", reason="the loss jumped"
        )
        asked = Adaptation.objects.get(remedy="rewind")
        assert asked.state == AdaptationState.AWAITING_APPROVAL
        assert made["decision_url"] == f"http://testserver/adaptations/{asked.uid}"
        assert asked.decided_by is None
        assert offered["read_evidence"](f"A-{asked.number}")["votes"]["by"] == []
        assert [row["name"] for row in offered["list_runs"]()] == ["digits"]
        assert offered["read_metric"](inbox.trainer.run)["mean"] == [1.0]
        assert offered["list_findings"]() == []
        assert len(offered["list_remedies"]()) > 5


def test_its_token_is_refused_by_every_act_but_asking(inbox: Inbox, secret: str) -> None:
    waiting = inbox.waiting()
    caller = Caller(secret)
    refused = caller.act(
        f"adaptations/{waiting.uid}/approve",
        {"evidence_hash": waiting.evidence_hash},
        version=waiting.version,
    )
    assert refused.code == "insufficient-scope"
    for name, path in PEOPLES.items():
        address = path.replace("{uid}", waiting.uid).replace("{", "").replace("}", "")
        if name in {"ask_for_remedy", "revoke_token"}:
            continue
        answer = caller.post(address)
        assert (answer.status, answer.code) == (403, "insufficient-scope"), name
    token = caller.get("tokens").data["results"][0]["uid"]
    assert caller.delete(f"tokens/{token}").code == "insufficient-scope"
    waiting.refresh_from_db()
    assert waiting.state == AdaptationState.AWAITING_APPROVAL


def test_a_token_that_could_decide_is_refused_before_anything_is_served(
    terminal: Terminal, secret: str
) -> None:
    refused = terminal.run("mcp")
    assert refused.exit_code == Exit.NOT_ALLOWED
    assert "must not be able to decide" in refused.output
    with terminal._connect() as client, pytest.raises(RefusedError):
        check_token(client)


def test_the_protocol_offers_reading_and_proposing_only(secret: str) -> None:
    async def ask() -> tuple[list[str], CallToolResult]:
        with Terminal(secret)._connect() as client:
            async with McpClient(make_server(client)) as assistant:
                names = [tool.name for tool in (await assistant.list_tools()).tools]
                return names, await assistant.call_tool("approve_adaptation", {"uid": "A-1"})

    names, answer = asyncio.run(ask())
    assert sorted(names) == sorted(
        ["list_runs", "read_run", "list_findings", "list_adaptations", "read_evidence",
         "read_metric", "list_remedies", "propose_remedy"]
    )  # fmt: skip
    assert answer.is_error
