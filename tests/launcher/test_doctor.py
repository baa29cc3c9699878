"""``esper doctor``: what is missing is named, and only what is required fails."""

from __future__ import annotations

import socket
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
from click.testing import CliRunner

from launcher import doctor
from launcher.command import cli
from launcher.doctor import Finding, Result

Usage = namedtuple("Usage", ["total", "used", "free"])


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def test_this_machine_is_examined_and_nothing_required_is_missing(tmp_path: Path) -> None:
    findings = list(doctor.examine(tmp_path / "data"))
    names = [finding.name for finding in findings]
    assert names[:4] == ["Python", "torch", "data", "disk"]
    assert [finding for finding in findings if finding.result is Result.MISSING] == []
    assert not (tmp_path / "data").exists()  # it looks, and makes nothing


def test_the_exit_status_is_1_when_something_required_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    missing = Finding(Result.MISSING, "torch", "it cannot be imported")
    note = Finding(Result.NOTE, "compiler", "none")
    monkeypatch.setattr(doctor, "examine", lambda _directory: iter([missing, note]))
    answer = CliRunner().invoke(cli, ["doctor"])
    assert answer.exit_code == 1
    assert "MISSING  torch" in answer.output
    assert "1 required things are missing" in answer.output
    monkeypatch.setattr(doctor, "examine", lambda _directory: iter([note]))
    assert CliRunner().invoke(cli, ["doctor"]).exit_code == 0


def test_an_old_python_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 1))
    assert doctor.check_python().result is Result.MISSING


def test_a_torch_that_cannot_be_imported_is_named_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "TORCH_PROGRAM", "raise ImportError('libcudart.so is missing')")
    finding = doctor.check_torch()
    assert finding.result is Result.MISSING
    assert "libcudart.so is missing" in finding.text


def test_a_data_directory_that_is_a_file_cannot_be_written(tmp_path: Path) -> None:
    assert doctor.check_data_directory(tmp_path / "data").result is Result.FINE
    blocked = doctor.check_data_directory(Path("/proc/esper"))
    assert blocked.result is Result.MISSING
    assert "--data-dir" in blocked.text


@pytest.mark.parametrize(
    ("free_mib", "result"),
    [(100, Result.MISSING), (1000, Result.NOTE), (50_000, Result.FINE)],
)
def test_little_disk_is_a_note_and_hardly_any_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free_mib: int, result: Result
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _path: Usage(0, 0, free_mib * 2**20))
    assert doctor.check_disk(tmp_path).result is result


def test_a_taken_web_port_is_a_note() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        finding = doctor.check_web_port(server.getsockname()[1])
    assert finding.result is Result.NOTE
    assert "--port" in finding.text


@pytest.mark.parametrize(
    ("variable", "url", "check"),
    [
        ("DATABASE_URL", "postgresql://esper:hunter2@127.0.0.1:{port}/esper", "check_database"),
        ("REDIS_URL", "redis://:hunter2@127.0.0.1:{port}/0", "check_redis"),
    ],
)
def test_a_server_that_cannot_be_reached_is_named_without_its_password(
    monkeypatch: pytest.MonkeyPatch, closed_port: int, variable: str, url: str, check: str
) -> None:
    monkeypatch.setenv(variable, url.format(port=closed_port))
    finding: Finding = getattr(doctor, check)()
    assert finding.result is Result.MISSING
    assert f"127.0.0.1:{closed_port} cannot be reached" in finding.text
    assert "hunter2" not in finding.text
    with socket.socket() as server:
        server.bind(("127.0.0.1", closed_port))
        server.listen()
        assert getattr(doctor, check)().result is Result.FINE


def test_without_a_compiler_grafts_stay_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    assert doctor.check_compiler(lambda _name: None).result is Result.NOTE
    found = doctor.check_compiler({"clang++": "/usr/bin/clang++"}.get)
    assert (found.result, found.text) == (Result.FINE, "/usr/bin/clang++")


def test_little_shared_memory_is_a_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _path: Usage(0, 0, 8 * 2**20))
    assert doctor.check_shared_memory(tmp_path).result is Result.NOTE
    assert doctor.check_shared_memory(tmp_path / "none").result is Result.NOTE


def test_a_clock_before_the_installation_is_wrong() -> None:
    assert doctor.check_clock(time.time()).result is Result.FINE
    finding = doctor.check_clock(0.0)
    assert finding.result is Result.MISSING
    assert "1970-01-01" in finding.text
