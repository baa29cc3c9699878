"""What a trainer calls, over real HTTP paths, with the shapes of docs/protocol.md."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from django.conf import settings
from django.utils import timezone

from apps.accounts.models import ApiToken, User
from apps.adaptations.models import Remedy
from apps.runs.models import Run
from apps.runs.services import issue_command
from apps.telemetry.metric_names import MOST_NAMES
from apps.telemetry.models import Frame, Metric
from apps.violations.models import Violation
from esper.compilation import KernelStore
from esper.contracts import (
    BUNDLE_FILES,
    SIGNALS,
    AdaptationState,
    Command,
    CommandAck,
    CommandKind,
    CommandState,
    KernelBundle,
    Role,
    RunState,
    TokenScope,
    signing,
    telemetry_body,
)
from tests.apps.callers import (
    LAYERS,
    Caller,
    Inbox,
    Trainer,
    frame,
    layer,
    metrics,
    register,
    registration,
)
from tests.apps.cast import force_state, token_of

pytestmark = pytest.mark.django_db


def test_registering_answers_with_everything_that_a_trainer_needs(trainer: Trainer) -> None:
    assert set(trainer.answer) == {
        "uid",
        "number",
        "epoch",
        "token",
        "resumed",
        "command_key",
        "kernel_key",
        "stream",
        "last_command_seq",
        "policy",
        "server_time",
        "telemetry_types",
    }
    assert (trainer.answer["epoch"], trainer.answer["resumed"]) == (1, False)
    assert trainer.answer["stream"] == f"/ws/v1/trainer/{trainer.run}"
    assert trainer.answer["command_key"] == signing.public_key(settings.ESPER_COMMAND_KEY)
    assert ApiToken.objects.get(run_uid=trainer.run).scopes == ["run:write"]
    assert [info.to_wire() for info in trainer.row().layer_infos()] == LAYERS


def test_the_same_name_again_is_a_restart_which_ends_the_old_token(
    trainer: Trainer, people: dict[Role, User]
) -> None:
    again = register(people[Role.RESEARCHER])
    assert (again.run, again.epoch, again.answer["resumed"]) == (trainer.run, 2, True)
    refused = trainer.send(metrics=[metrics(1, loss=1.0)])
    assert (refused.status, refused.code) == (401, "not-signed-in")
    old = again.post(f"{again.path}/hello", {"epoch": 1, "step": 0, "applied": []})
    assert (old.status, old.code) == (409, "old-epoch")
    hello = again.post(f"{again.path}/hello", {"epoch": 2, "step": 0, "applied": []})
    assert (hello.status, hello.data["settled"]) == (200, [])
    assert abs(hello.data["server_time"] - time.time()) < 60


def test_a_viewer_may_not_attach_a_trainer(people: dict[Role, User]) -> None:
    caller = Caller(token_of(people[Role.VIEWER], TokenScope.RUNS_CREATE))
    refused = caller.post("runs", registration())
    assert (refused.status, refused.code) == (403, "not-eligible")
    assert not Run.objects.exists()


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"mode": "wild"}, "/mode"),
        ({"name": "x" * 256}, "/name"),
        ({"name": 17}, "/name"),
        ({"model_parameters": True}, "/model_parameters"),
        ({"model_parameters": -1}, "/model_parameters"),
        ({"layers": "many"}, "/layers"),
        ({"layers": [layer("x" * 256)]}, "/layers"),
        ({"layers": [layer("fc", in_shape="8x64")]}, "/layers"),
        ({"layers": [layer("fc", parameters=1.5)]}, "/layers"),
        ({"layers": [{"name": "fc"}]}, "/layers"),
    ],
)
def test_a_malformed_registration_is_refused_with_a_pointer(
    people: dict[Role, User], changes: dict[str, Any], pointer: str
) -> None:
    caller = Caller(token_of(people[Role.RESEARCHER], TokenScope.RUNS_CREATE))
    refused = caller.post("runs", registration(**changes))
    assert (refused.status, refused.code) == (400, "invalid")
    assert refused.data["errors"][0]["pointer"].startswith(pointer)
    assert not Run.objects.exists()


def test_telemetry_is_stored_once_although_it_is_sent_twice(trainer: Trainer) -> None:
    batch = trainer.batch(
        frames=[frame(10, 0.25), frame(20, float("nan"))],
        metrics=[metrics(20, loss=0.7, grad_norm="inf"), metrics(21, loss="nan")],
    )
    first = trainer.post(f"{trainer.path}/telemetry", batch)
    assert (first.status, first.data["stored"], first.data["duplicate"]) == (202, 4, False)
    second = trainer.post(f"{trainer.path}/telemetry", batch)
    assert (second.status, second.data["stored"], second.data["duplicate"]) == (202, 0, True)

    run = trainer.row()
    assert Frame.objects.count() == 2
    assert np.array_equal(
        Frame.objects.get(step=10).matrix(2), np.full((2, len(SIGNALS)), 0.25, dtype=np.float32)
    )
    stored = {(row.step, row.name): (row.value, row.status) for row in Metric.objects.all()}
    assert stored == {
        (20, "loss"): (0.7, ""),
        (20, "grad_norm"): (None, "inf"),
        (21, "loss"): (None, "nan"),
    }
    assert (run.step, run.state, run.telemetry_seq) == (21, RunState.RUNNING, 4)
    assert (run.last_loss, run.last_loss_status) == (None, "nan")


def test_a_diverged_loss_is_a_word_in_every_answer(trainer: Trainer, viewer: Caller) -> None:
    trainer.send(metrics=[metrics(1, loss="inf")])
    assert viewer.get(trainer.path).data["last_loss"] == "inf"
    assert viewer.get("runs").data["results"][0]["last_loss"] == "inf"
    series = viewer.get(f"{trainer.path}/metrics?name=loss").data
    assert series["non_finite"] == [{"step": 1, "value": "inf"}]
    assert series["mean"] == [None]


def test_findings_become_violations_and_drops_are_counted(trainer: Trainer) -> None:
    finding = {
        "rule": "optimizer_ledger",
        "layer": "fc",
        "severity": "serious",
        "observed": "fc.weight is in no parameter group",
        "limit": "every trainable parameter is in one",
        "remedy": "Pass it to the optimizer.",
    }
    batch = {**trainer.batch(findings=[finding]), "dropped": 7}
    assert trainer.post(f"{trainer.path}/telemetry", batch).status == 202
    violation = Violation.objects.get()
    assert (violation.rule, violation.severity, violation.layer) == (
        "optimizer_ledger",
        "serious",
        "fc",
    )
    assert trainer.row().dropped_items == 7


def test_a_finding_of_the_diagnosis_is_written_once_and_closed_when_it_is_over(
    trainer: Trainer,
) -> None:
    finding = {
        "rule": "diagnosis",
        "layer": "fc",
        "severity": "serious",
        "observed": "80% of the units had a gradient of exactly zero",
        "limit": "less than 70%",
        "remedy": "Give the dead units a new start.",
        "slug": "dying_relu",
        "since_step": 10,
        "remedies": ["rewind", "recycle"],
    }
    worse = {**finding, "observed": "90% of the units", "severity": "critical"}
    over = {**worse, "resolved_step": 90}
    for batch in ([finding], [worse], [over]):
        assert trainer.send(findings=batch).status == 202
    violation = Violation.objects.get()
    assert (violation.severity, violation.observed) == ("critical", "90% of the units")
    assert (violation.finding, violation.since_step, violation.resolved_step) == (
        "dying_relu",
        10,
        90,
    )
    assert trainer.send(findings=[finding]).status == 202
    assert Violation.objects.filter(resolved_step=None).count() == 1


def test_tamiyo_reads_a_finding_until_it_is_over_also_when_a_person_has_seen_it(
    trainer: Trainer, tamiyo: Caller
) -> None:
    finding = {
        "rule": "diagnosis", "layer": "fc", "severity": "caution", "observed": "the loss is flat",
        "limit": "a loss that falls", "remedy": "Widen fc.", "slug": "capacity", "since_step": 10,
    }  # fmt: skip

    def read() -> list[tuple[str, str]]:
        snapshot = tamiyo.get(f"{trainer.path}/snapshot").data
        return [(found["slug"], found["layer"]) for found in snapshot["findings"]]

    assert read() == []
    assert trainer.send(findings=[finding]).status == 202
    assert read() == [("capacity", "fc")]
    Violation.objects.update(acknowledged_at=timezone.now())
    assert trainer.send(findings=[finding]).status == 202
    assert read() == [("capacity", "fc")]
    assert trainer.send(findings=[{**finding, "resolved_step": 90}]).status == 202
    assert read() == []


def test_the_findings_of_a_process_that_ended_are_not_answered(
    trainer: Trainer, tamiyo: Caller, people: dict[Role, User]
) -> None:
    finding = {
        "rule": "diagnosis", "layer": "fc", "severity": "caution", "observed": "the loss is flat",
        "limit": "a loss that falls", "remedy": "Widen fc.", "slug": "capacity", "since_step": 10,
    }  # fmt: skip
    assert trainer.send(findings=[finding]).status == 202
    again = register(people[Role.RESEARCHER], name=trainer.row().name)
    assert again.run == trainer.run
    assert tamiyo.get(f"{again.path}/snapshot").data["findings"] == []
    assert again.send(findings=[finding]).status == 202
    assert len(tamiyo.get(f"{again.path}/snapshot").data["findings"]) == 1


def test_metrics_beyond_the_limit_of_names_are_dropped_and_counted(trainer: Trainer) -> None:
    for start in range(0, 600, 60):
        names = {f"loss_at_{number}": 1.0 for number in range(start, start + 60)}
        assert trainer.send(metrics=[metrics(start, **names)]).status == 202
    assert Metric.objects.values("name").distinct().count() == MOST_NAMES
    assert trainer.row().dropped_items == 600 - MOST_NAMES
    assert trainer.send(metrics=[metrics(601, loss_at_0=2.0)]).status == 202
    assert Metric.objects.filter(name="loss_at_0").count() == 2  # known names go on


def test_a_batch_of_too_many_values_is_refused(trainer: Trainer) -> None:
    many = {f"m{number}": 1.0 for number in range(60)}
    answer = trainer.send(metrics=[metrics(step, **many) for step in range(334)])
    assert answer.status == 400
    assert "20000 values" in str(answer.data["errors"])


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"seq_to": 9}, "/seq_to"),
        ({"epoch": "1"}, "/epoch"),
        ({"frames": [frame(1, layers=3)]}, "/frames/0/values"),
        ({"frames": [{**frame(1), "values": "?"}]}, "/frames/0/values"),
        ({"frames": [{**frame(1), "step": -1}]}, "/frames/0/step"),
        ({"metrics": [metrics(1, loss="high")]}, "/metrics/0/values/loss"),
        ({"metrics": [metrics(1, loss=True)]}, "/metrics/0/values/loss"),
        ({"metrics": [{"step": 1, "wall_time": "now", "values": {}}]}, "/metrics/0/wall_time"),
        ({"metrics": [metrics(1, **{"x" * 81: 1.0})]}, "/metrics/0/values"),
        ({"findings": [{"rule": "taste"}]}, "/findings/0/rule"),
        ({"frames": {}}, "/frames"),
    ],
)
def test_a_malformed_batch_is_refused_with_a_pointer_and_stores_nothing(
    trainer: Trainer, changes: dict[str, Any], pointer: str
) -> None:
    items = sum(len(value) for value in changes.values() if isinstance(value, list))
    body = {"epoch": 1, "seq_from": 1, "seq_to": max(items, 1), **changes}
    refused = trainer.post(f"{trainer.path}/telemetry", body)
    assert (refused.status, refused.code) == (400, "invalid")
    assert refused.data["errors"][0]["pointer"] == pointer
    assert not Frame.objects.exists()
    assert not Metric.objects.exists()
    assert trainer.row().telemetry_seq == 0


RAW = telemetry_body.MEDIA_TYPE


def test_frames_may_come_as_bytes(trainer: Trainer) -> None:
    values = np.arange(2 * len(SIGNALS), dtype="<f4").reshape(2, -1)
    frames = [{"step": step, "wall_time": 1.0, "loss": "nan"} for step in (10, 20)]
    batch = trainer.batch(frames=frames, metrics=[metrics(20, loss=0.7)])
    body = telemetry_body.encode_body(batch, [values.tobytes(), (values + 1).tobytes()])
    for stored, duplicate in ((3, False), (0, True)):
        answer = trainer.post(f"{trainer.path}/telemetry", body, **{"Content-Type": RAW})
        assert (answer.status, answer.data["stored"]) == (202, stored)
        assert answer.data["duplicate"] is duplicate
    assert np.array_equal(Frame.objects.get(step=20).matrix(2), values + 1)
    row = Frame.objects.get(step=10)
    assert (row.epoch, row.wall_time, row.loss, row.loss_status) == (1, 1.0, None, "nan")


VALUES = np.zeros((2, len(SIGNALS)), dtype="<f4").tobytes()
ONE_FRAME: dict[str, Any] = {
    "epoch": 1,
    "seq_from": 1,
    "seq_to": 1,
    "frames": [{"step": 1, "wall_time": 1.0}],
}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"\x01\x00", 400),
        (b"\xff\xff\xff\xff{}", 400),
        (telemetry_body.encode_body(ONE_FRAME, [VALUES])[:-1], 400),
        (telemetry_body.encode_body(ONE_FRAME, [VALUES, VALUES]), 400),
        (telemetry_body.encode_body({**ONE_FRAME, "frames": []}, [VALUES]), 400),
        (telemetry_body.encode_body({**ONE_FRAME, "frames": [1]}, [VALUES]), 400),
        (telemetry_body.encode_body({**ONE_FRAME, "frames": {}}, [VALUES]), 400),
        ((4).to_bytes(4, "little") + b"[{}]", 400),
        ((7).to_bytes(4, "little") + b'{"a":NaN', 400),
        (bytes(telemetry_body.MAX_BYTES + 1), 413),
    ],
)
def test_malformed_bytes_are_refused_and_store_nothing(
    trainer: Trainer, body: bytes, status: int
) -> None:
    refused = trainer.post(f"{trainer.path}/telemetry", body, **{"Content-Type": RAW})
    assert refused.status == status
    assert not Frame.objects.exists()
    assert trainer.row().telemetry_seq == 0


def test_another_run_does_not_exist_for_a_run_token(
    trainer: Trainer, people: dict[Role, User]
) -> None:
    other = register(people[Role.OPERATOR], name="theirs")
    paths = ["", "/commands", "/metrics?name=loss"]
    answers = [trainer.get(f"{other.path}{path}") for path in paths]
    answers += [
        trainer.post(f"{other.path}/telemetry", trainer.batch(metrics=[metrics(1, loss=1.0)])),
        trainer.post(f"{other.path}/hello", {"epoch": 1, "step": 0, "applied": []}),
        trainer.post(f"{other.path}/commands/1/ack", {"epoch": 1, "state": "accepted"}),
        trainer.post(
            f"{other.path}/rollbacks",
            {
                "epoch": 1,
                "adaptation": "adp_x",
                "step": 1,
                "rule": "non_finite",
                "observed": "nan",
                "limit": "finite",
                "exact": True,
            },
        ),
        trainer.post(f"{other.path}/remedies", REMEDY),
        trainer.post(
            f"{other.path}/finish", {"epoch": 1, "state": "finished", "step": 1, "reason": ""}
        ),
    ]
    missing = trainer.get("runs/run_00000000000000000000000000")
    assert {answer.status for answer in answers} == {404}
    assert {answer.code for answer in answers} == {"not-found"}
    assert {answer.data["detail"] for answer in answers} == {missing.data["detail"]}
    assert Metric.objects.count() == 0
    assert Run.objects.get(uid=other.run).state == RunState.STARTING


def test_a_run_token_reads_its_own_run_and_nothing_of_the_rest(trainer: Trainer) -> None:
    assert trainer.get(trainer.path).data["uid"] == trainer.run
    for path in ("runs", "adaptations", "audit", "violations", "kernels", "me", "experience"):
        refused = trainer.get(path)
        assert (refused.status, refused.code) == (403, "insufficient-scope"), path
    assert trainer.post(f"{trainer.path}/stop").code == "insufficient-scope"


def test_commands_are_signed_in_order_and_answered_once(trainer: Trainer) -> None:
    for kind in (CommandKind.PAUSE_ADAPTATION, CommandKind.RESUME_ADAPTATION):
        issue_command(run=trainer.row(), kind=kind, payload={"reason": "a look"})
    entries = trainer.get(f"{trainer.path}/commands?after=0").data["results"]
    commands = [Command.from_wire(entry["command"]) for entry in entries]
    assert [command.seq for command in commands] == [1, 2]
    for command, entry in zip(commands, entries, strict=True):
        signing.verify(command.signing_bytes(), entry["signature"], trainer.answer["command_key"])

    ack = CommandAck(seq=1, state=CommandState.APPLIED, step=12).to_wire()
    for _ in range(2):  # a lost answer makes the trainer say it again
        answer = trainer.post(f"{trainer.path}/commands/1/ack", {**ack, "epoch": 1})
        assert (answer.status, answer.data) == (200, {"adaptation_state": ""})
    left = trainer.get(f"{trainer.path}/commands").data["results"]
    assert [entry["command"]["seq"] for entry in left] == [2]
    unknown = trainer.post(f"{trainer.path}/commands/99/ack", {**ack, "epoch": 1})
    assert (unknown.status, unknown.code) == (404, "not-found")


def test_a_local_rollback_is_reported_with_numbers_that_are_not_finite(
    inbox: Inbox, trainer: Trainer
) -> None:
    adaptation = inbox.waiting()
    force_state(adaptation, AdaptationState.PROBATION)
    body = {
        "epoch": 1,
        "adaptation": adaptation.uid,
        "step": 1010,
        "rule": "non_finite",
        "observed": "nan",
        "limit": 3.5,
        "pause_ms": 1.5,
        "exact": True,
        "digest_after": "a" * 64,
    }
    for _ in range(2):
        answer = trainer.post(f"{trainer.path}/rollbacks", body)
        assert (answer.status, answer.data) == (200, {"adaptation_state": "rolled_back"})
    violation = Violation.objects.get(rule="non_finite")
    assert (violation.observed, violation.limit) == ("nan", "3.5")


REMEDY: dict[str, Any] = {
    "epoch": 1,
    "key": "one",
    "remedy": "set_lr",
    "layer": "fc",
    "step": 400,
    "details": {"factor": 0.5},
    "pause_ms": 2.5,
    "digest_before": "a" * 64,
    "digest_after": "a" * 64,
}


def test_a_remedy_is_recorded_once_although_it_is_sent_twice(trainer: Trainer) -> None:
    for _ in range(2):
        answer = trainer.post(f"{trainer.path}/remedies", REMEDY)
        assert (answer.status, answer.data) == (200, {"adaptation_state": ""})
    remedy = Remedy.objects.get(run__uid=trainer.run)
    assert (remedy.kind, remedy.details, remedy.pause_ms) == ("set_lr", {"factor": 0.5}, 2.5)
    assert remedy.exact is None


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"epoch": 0}, 409),
        ({"remedy": "pray"}, 400),
        ({"details": {"units": [1.5] * 2000}}, 400),
        ({"adaptation": "adp_of_another_run"}, 404),
    ],
)
def test_a_remedy_that_makes_no_sense_is_refused(
    trainer: Trainer, change: dict[str, Any], status: int
) -> None:
    assert trainer.post(f"{trainer.path}/remedies", {**REMEDY, **change}).status == status
    assert not Remedy.objects.exists()


def test_the_end_may_be_reported_twice(trainer: Trainer) -> None:
    body = {"epoch": 1, "state": "finished", "step": 500, "reason": "all steps done"}
    for _ in range(2):
        assert trainer.post(f"{trainer.path}/finish", body).data["state"] == "finished"
    late = trainer.send(metrics=[metrics(501, loss=1.0)])
    assert (late.status, late.code) == (409, "run-ended")
    other = trainer.post(f"{trainer.path}/finish", {**body, "state": "failed"})
    assert (other.status, other.code) == (409, "run-ended")


def test_kernel_files_go_to_the_trainer_that_was_told_to_graft_them(
    trainer: Trainer, viewer: Caller, settings: Any, tmp_path: Any
) -> None:
    settings.ESPER_KERNEL_STORE_DIR = tmp_path
    files = {name: f"{name} of a kernel".encode() for name in BUNDLE_FILES}
    digest = KernelStore(tmp_path).put(KernelBundle(files))
    assert trainer.get(f"kernels/{digest}/recipe.json").code == "not-found"
    issue_command(run=trainer.row(), kind=CommandKind.GRAFT, layer="fc", kernel_digest=digest)
    for name, content in files.items():
        assert trainer.get(f"kernels/{digest}/{name}").response.content == content
    assert viewer.get(f"kernels/{digest}/manifest.sig").status == 200
    for path in (
        f"kernels/{digest}/secrets.json",
        f"kernels/{'0' * 64}/recipe.json",
        "kernels/..%2F..%2Fetc/recipe.json",
        f"kernels/{digest}/..%2Frecipe.json",
    ):
        assert viewer.get(path).code == "not-found", path
