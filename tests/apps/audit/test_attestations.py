"""A decision can be proven without the server."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from django.conf import settings

from apps.adaptations.models import Adaptation
from esper.contracts import codec, signing
from esper.contracts.attestation import attest, verify_attestation
from esper.exceptions import AttestationError
from launcher.command import cli
from tests.apps.callers import Caller, Inbox, shown

pytestmark = pytest.mark.django_db
KEY = signing.public_key(settings.ESPER_AUDIT_KEY)


@pytest.fixture
def decided(inbox: Inbox, operator: Caller) -> Adaptation:
    adaptation = inbox.waiting()
    path = f"adaptations/{adaptation.uid}/approve"
    body = {"reason": "flat for an hour", **shown(adaptation)}
    assert operator.act(path, body, version=adaptation.version).status == 200
    return adaptation


def test_it_names_who_decided_what_and_is_verified_by_the_public_key(
    decided: Adaptation, viewer: Caller
) -> None:
    answer = viewer.get(f"adaptations/{decided.uid}/attestation")
    assert answer.status == 200
    verify_attestation(answer.data, [KEY])
    event, what = answer.data["event"], answer.data["shown"]
    assert (event["actor"], event["act"]) == ("olga", "adaptation.approved")
    assert event["reason"] == "flat for an hour"
    assert (what["layer"], what["slug"]) == ("fc", "proj_lora_64")


def test_every_change_to_it_is_found(decided: Adaptation, viewer: Caller) -> None:
    true = viewer.get(f"adaptations/{decided.uid}/attestation").data
    changes: list[tuple[Any, ...]] = [
        ("event", "actor", "mallory"),
        ("event", "hash", "0" * 64),
        ("shown", "slug", "attn_std"),
        ("shown", "epoch", 7),
        ("signature", None, signing.sign(b"else", settings.ESPER_AUDIT_KEY)),
    ]
    for part, member, value in changes:
        forged = copy.deepcopy(true)
        if member:
            forged[part][member] = value
        else:
            forged[part] = value
        with pytest.raises(AttestationError, match="signature"):
            verify_attestation(forged, [KEY])
    with pytest.raises(AttestationError, match="signature"):
        verify_attestation(true, [signing.public_key(signing.generate_private_key())])
    # Signed, but not what was decided on: the server itself would have to lie.
    other = attest(true["event"], {**true["shown"], "layer": "head"}, settings.ESPER_AUDIT_KEY)
    with pytest.raises(AttestationError, match="not on what"):
        verify_attestation(other, [KEY])
    for rubbish in (None, {}, {"event": [], "shown": [], "signature": ""}):
        with pytest.raises(AttestationError):
            verify_attestation(rubbish, [KEY])


def test_nothing_is_attested_that_nobody_decided_or_that_was_changed_since(
    inbox: Inbox, viewer: Caller, operator: Caller
) -> None:
    adaptation = inbox.waiting()
    path = f"adaptations/{adaptation.uid}"
    assert viewer.get(f"{path}/attestation").code == "not-found"
    body = {"reason": "yes", **shown(adaptation)}
    assert operator.act(f"{path}/approve", body, version=adaptation.version).status == 200
    Adaptation.objects.filter(pk=adaptation.pk).update(config={"rank": 64})
    assert viewer.get(f"{path}/attestation").code == "payload-changed"


def test_the_command_line_checks_it_without_a_server(
    decided: Adaptation, viewer: Caller, tmp_path: Path
) -> None:
    true = viewer.get(f"adaptations/{decided.uid}/attestation").data
    file = tmp_path / "attestation.json"
    file.write_bytes(codec.encode(true))
    good = CliRunner().invoke(cli, ["audit", "check", str(file), "--key", KEY])
    assert good.exit_code == 0, good.output
    assert "olga" in good.output
    file.write_bytes(codec.encode({**true, "shown": {**true["shown"], "layer": "head"}}))
    bad = CliRunner().invoke(cli, ["audit", "check", str(file), "--key", KEY])
    assert bad.exit_code == 1
    assert "no valid attestation" in bad.output
