"""What a supervisor claims for itself: a directory, ports, secrets."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from esper.contracts import signing
from hosts.keyring import ensure_keyring, kernel_key_path, read_keyring, update_keyring
from hosts.runtime import (
    DataDirectoryBusyError,
    data_directory_lock,
    read_runtime,
    remove_runtime,
    running_redis_port,
    write_runtime,
)
from launcher.supervisor.ports import PortBusyError, demand_port, is_free, prefer_port
from tests.another_python import esper, python


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_a_busy_port_that_was_asked_for_is_refused_by_name(busy_port: int) -> None:
    with pytest.raises(PortBusyError, match=rf"Port {busy_port} is taken.*--port"):
        demand_port(busy_port)


def test_a_busy_default_port_gives_another_one(busy_port: int) -> None:
    port = prefer_port(busy_port)
    assert port != busy_port
    assert is_free(port)


def test_port_zero_gives_a_free_port_that_no_client_is_lent() -> None:
    """While a server is restarted, a connection of any client could take its port for good."""
    ports = {demand_port(0) for _ in range(20)}
    assert len(ports) > 1, "two that start at once"
    assert all(map(is_free, ports))
    with socket.socket() as client:
        client.bind(("127.0.0.1", 0))
        lent = client.getsockname()[1]
    assert max(ports) < 32_768 <= lent


def test_up_refuses_a_busy_port_with_a_sentence(busy_port: int, tmp_path: Path) -> None:
    answer = esper("up", "--data-dir", str(tmp_path), "--port", str(busy_port))
    assert answer.returncode == 1
    assert f"Port {busy_port} is taken by another program" in answer.stdout
    assert "Traceback" not in answer.stdout + answer.stderr


def test_up_refuses_a_data_directory_that_it_cannot_make() -> None:
    answer = esper("up", "--data-dir", "/proc/esper")
    assert answer.returncode == 1
    assert "/proc/esper cannot be used: " in answer.stderr
    assert "--data-dir" in answer.stderr
    assert "Traceback" not in answer.stdout + answer.stderr


def test_two_supervisors_cannot_share_a_data_directory(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; "
        "from hosts.runtime import data_directory_lock, DataDirectoryBusyError\n"
        "try:\n with data_directory_lock(Path(sys.argv[1])): pass\n"
        "except DataDirectoryBusyError as error: print(error)"
    )
    with data_directory_lock(tmp_path):
        answer = python("-c", program, str(tmp_path))
        assert "already runs on" in answer.stdout
        assert "--data-dir" in answer.stdout
    with data_directory_lock(tmp_path):  # free again
        pass


def test_the_lock_names_the_process_that_holds_it(tmp_path: Path) -> None:
    with (
        data_directory_lock(tmp_path),
        pytest.raises(DataDirectoryBusyError, match=str(os.getpid())),
        data_directory_lock(tmp_path),
    ):
        pass


def test_secrets_are_made_once_and_only_their_owner_reads_them(tmp_path: Path) -> None:
    first = ensure_keyring(tmp_path)
    assert ensure_keyring(tmp_path) == first
    for name in ("secrets.json", "kernel.key"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    assert len(first["secret_key"]) >= 50


def test_the_private_kernel_key_lies_apart_and_fits_the_public_one(tmp_path: Path) -> None:
    keyring = ensure_keyring(tmp_path)
    private = kernel_key_path(tmp_path).read_text()
    assert signing.public_key(private) == keyring["kernel_public_key"]
    assert private not in (tmp_path / "secrets.json").read_text()


def test_tokens_are_added_to_those_that_are_there(tmp_path: Path) -> None:
    update_keyring(tmp_path, tokens={"tamiyo": "esp_one"})
    update_keyring(tmp_path, tokens={"trainer": "esp_two"})
    assert read_keyring(tmp_path)["tokens"] == {"tamiyo": "esp_one", "trainer": "esp_two"}


def test_the_runtime_file_tells_where_valkey_listens(tmp_path: Path) -> None:
    assert running_redis_port(tmp_path) is None
    write_runtime(tmp_path, {"redis_port": 6400})
    assert running_redis_port(tmp_path) == 6400
    remove_runtime(tmp_path)
    assert read_runtime(tmp_path) == {}


def test_a_half_written_runtime_file_counts_as_none(tmp_path: Path) -> None:
    (tmp_path / "runtime.json").write_text(json.dumps({"redis_port": 1})[:5])
    assert read_runtime(tmp_path) == {}


@pytest.mark.parametrize("state", ["full", "read-only"])
def test_a_start_on_a_disk_that_cannot_be_written_is_refused_in_a_sentence(
    small_disk: Path, state: str
) -> None:
    if state == "full":
        (small_disk / "filler").write_bytes(b"x" * 256 * 1024)
        why = "No space left on device"
    else:
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        why = "Read-only file system"
    answer = esper("up", "--no-demo", "--data-dir", str(small_disk))
    assert answer.returncode == 1
    assert "Esper cannot start on" in answer.stdout
    assert why in answer.stdout
    assert "Traceback" not in answer.stdout + answer.stderr
