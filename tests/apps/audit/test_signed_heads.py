"""An audit log that was rewritten with all its hashes is still found out."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.db import connection, transaction
from django.utils import timezone

from apps.accounts.actors import SYSTEM
from apps.audit import chain, heads, triggers
from apps.audit.chain import GENESIS, event_hash
from apps.audit.models import AuditEvent, AuditHead
from apps.audit.services import record, set_heads_aside, sign_head, verify_chain
from esper.contracts import signing

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def places(settings: Any, tmp_path: Path) -> list[Path]:
    """Both places of heads."""
    settings.ESPER_AUDIT_DIR = tmp_path / "audit"
    settings.ESPER_AUDIT_COPY_DIR = str(tmp_path / "elsewhere")
    return [tmp_path / place / heads.FILE for place in ("audit", "elsewhere")]


def write(count: int, reason: str = "") -> None:
    for _ in range(count):
        with transaction.atomic():
            record(actor=SYSTEM, act="test", object_kind="test", object_uid="x", reason=reason)


def rehash() -> None:
    """What a thorough forger does: drop the triggers, and compute every hash anew."""
    previous = GENESIS
    for number, event in enumerate(AuditEvent.objects.order_by("id"), 1):
        old = event.pk
        event.id, event.previous_hash = number, previous
        event.hash = previous = event_hash(event)
        values = {name: getattr(event, name) for name in ("id", "previous_hash", "hash")}
        AuditEvent.objects.filter(pk=old).update(**values)
    count = AuditEvent.objects.count()
    AuditHead.objects.update(last_id=count, last_hash=previous)


def change_a_reason() -> None:
    AuditEvent.objects.filter(pk=2).update(reason="I never said that")


def change_who() -> None:
    AuditEvent.objects.filter(pk=3).update(actor="mallory")


def remove_one() -> None:
    AuditEvent.objects.filter(pk=2).delete()


def cut_the_end() -> None:
    AuditEvent.objects.filter(pk__gt=3).delete()


def empty_it() -> None:
    AuditEvent.objects.all().delete()


FORGERIES = [change_a_reason, change_who, remove_one, cut_the_end, empty_it]


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_log_that_was_rewritten_with_all_its_hashes_is_found(forgery: Any) -> None:
    write(5)
    assert sign_head()
    triggers.remove(connection)
    forgery()
    rehash()
    report = verify_chain()
    assert not report.verified
    assert "signed" in report.problem


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_log_that_was_rewritten_and_went_on_is_not_signed_again(forgery: Any) -> None:
    write(5)
    sign_head()
    triggers.remove(connection)
    forgery()
    rehash()
    write(9)
    assert sign_head() is None
    assert not verify_chain().verified


def test_a_log_that_was_not_touched_is_verified_and_says_how_much_is_signed(
    places: list[Path],
) -> None:
    write(3)
    assert verify_chain().signed_events == 0
    head = sign_head()
    assert head is not None
    assert sign_head() is None  # nothing is new
    write(2)
    report = verify_chain()
    assert (report.verified, report.events, report.signed_events) == (True, 5, 3)
    assert report.signed_at == head.at
    assert places[0].read_bytes() == places[1].read_bytes()
    assert places[0].stat().st_mode & 0o022 == 0


def test_events_that_are_written_meanwhile_are_no_problem(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(3)
    hash_of, late = chain.event_hash, [1]

    def slow(event: AuditEvent) -> str:
        if event.id == 3 and late:
            late.pop()
            write(1)
        return hash_of(event)

    monkeypatch.setattr(chain, "event_hash", slow)
    report = verify_chain()
    assert report.verified, report.problem


def test_a_forged_head_is_refused(places: list[Path]) -> None:
    write(2)
    sign_head()
    line = json.loads(places[0].read_text())
    for changes in ({"events": 1}, {"hash": "0" * 64}, {"signature": line["signature"][:-4]}):
        places[0].write_text(json.dumps({**line, **changes}) + "\n")
        assert "signature" in verify_chain().problem
    places[0].write_text("{}\n")
    assert "no signed head" in verify_chain().problem


def test_a_head_that_is_missing_here_is_found_in_the_other_place(places: list[Path]) -> None:
    write(5)
    sign_head()
    places[0].unlink()
    cut_the_end()
    rehash()
    assert "its end was cut" in verify_chain().problem


def test_a_log_whose_heads_are_gone_is_not_trusted(places: list[Path]) -> None:
    write(2)
    sign_head()
    for place in places:
        place.unlink()
    assert verify_chain().verified  # it might be that new
    AuditEvent.objects.update(at=timezone.now() - timedelta(hours=1))
    rehash()
    assert "no signed head" in verify_chain().problem


def test_a_place_that_cannot_be_written_does_not_keep_the_other_from_it(
    settings: Any, places: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    settings.ESPER_AUDIT_COPY_DIR = str(tmp_path / "file")
    write(1)
    assert sign_head()
    assert places[0].exists()


def test_a_line_that_a_crash_has_cut_is_replaced(places: list[Path]) -> None:
    write(1)
    sign_head()
    with places[0].open("a") as file:
        file.write('{"events":2,"ha')
    assert verify_chain().verified
    write(1)
    sign_head()
    assert verify_chain().signed_events == 2
    assert len(places[0].read_text().splitlines()) == 2


def test_the_file_does_not_grow_without_end(
    places: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "LINES_MAX", 8)
    for _ in range(40):
        write(1)
        sign_head()
    assert len(places[0].read_text().splitlines()) <= 9
    report = verify_chain()
    assert (report.verified, report.signed_events) == (True, 40)


def test_heads_of_a_replaced_key_still_count(settings: Any) -> None:
    write(1)
    sign_head()
    settings.ESPER_AUDIT_OLD_KEYS = [signing.public_key(settings.ESPER_AUDIT_KEY)]
    settings.ESPER_AUDIT_KEY = signing.generate_private_key()
    write(1)
    assert sign_head()
    assert verify_chain().verified
    settings.ESPER_AUDIT_OLD_KEYS = []
    assert not verify_chain().verified


def test_after_a_restore_a_person_sets_the_heads_aside(places: list[Path]) -> None:
    write(5)
    sign_head()
    cut_the_end()
    rehash()
    renamed = set_heads_aside()
    assert [path.exists() for path in (*places, *renamed)] == [False, False, True, True]
    write(1)
    assert sign_head()
    assert verify_chain().verified
