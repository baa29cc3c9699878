"""The users that docker/ creates in Valkey and PostgreSQL can do their work, and no more."""

from __future__ import annotations

import os
import runpy
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import kombu
import psycopg
import pytest
import redis
from channels_redis.pubsub import RedisPubSubChannelLayer
from django.conf import settings
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError
from redis.retry import Retry

from hosts.paths import ROOT
from launcher.supervisor.ports import any_free_port
from launcher.supervisor.valkey import valkey_program

DOCKER = ROOT / "docker"
SECRETS = runpy.run_path(str(DOCKER / "make-secrets"))["contents"]()
STREAM = "esper:health"


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A Valkey with the users of the file that docker/make-secrets writes."""
    directory, number = tmp_path_factory.mktemp("valkey"), any_free_port()
    (directory / "acl").write_text(SECRETS["valkey_acl"])
    arguments = ("--port", str(number), "--bind", "127.0.0.1", "--dir", str(directory))
    server = subprocess.Popen([valkey_program(), *arguments, "--aclfile", str(directory / "acl")])
    try:
        _wait_for(number)
        yield number
    finally:
        server.terminate()
        server.wait(timeout=300)


def _wait_for(port: int) -> None:
    # Without tries of the client: to it an AuthenticationError is a ConnectionError, too.
    client = redis.Redis(port=port, retry=Retry(NoBackoff(), 0))
    deadline = time.monotonic() + 300
    while True:
        try:
            client.ping()
        except AuthenticationError:  # there it is, and does not let strangers in
            return
        except redis.exceptions.ConnectionError:
            assert time.monotonic() < deadline, "Valkey does not answer"
            time.sleep(0.05)
        else:
            raise AssertionError("Valkey lets strangers in")


def url(port: int, secret: str) -> str:
    return SECRETS[secret].replace("@redis:6379", f"@127.0.0.1:{port}")


def client(port: int, secret: str) -> redis.Redis:
    return redis.Redis.from_url(url(port, secret))


async def test_web_and_workers_can_do_their_work(port: int) -> None:
    options = settings.CELERY_BROKER_TRANSPORT_OPTIONS
    with kombu.Connection(url(port, "redis_url"), transport_options=options) as connection:
        queue = connection.SimpleQueue("control")
        queue.put({"n": 1})
        message = queue.get(timeout=300)
        assert message.payload == {"n": 1}
        message.ack()
        queue.close()
    layer = RedisPubSubChannelLayer(hosts=[url(port, "redis_url")], prefix="esper:layer")
    channel = await layer.new_channel()
    await layer.group_add("inbox", channel)
    await layer.group_send("inbox", {"type": "x"})
    assert await layer.receive(channel) == {"type": "x"}
    await layer.flush()
    assert client(port, "redis_url").xadd(STREAM, {"run": "r"})
    assert client(port, "redis_url").ping()


def test_tamiyo_reads_the_stream_and_nothing_else(port: int) -> None:
    client(port, "redis_url").xadd(STREAM, {"run": "r"})
    tamiyo = client(port, "redis_tamiyo_url")
    tamiyo.xgroup_create(STREAM, "tamiyo", id="0", mkstream=True)
    assert tamiyo.xreadgroup("tamiyo", "one", {STREAM: ">"})
    for forbidden in (
        lambda: tamiyo.get("esper:celery:control"),
        lambda: tamiyo.lpush("esper:celery:control", "a task"),
        lambda: tamiyo.publish("esper:layer", "x"),
    ):
        with pytest.raises(NoPermissionError):
            forbidden()


def test_a_compile_worker_does_not_reach_the_stream_from_which_tamiyo_decides(port: int) -> None:
    client(port, "redis_url").xadd(STREAM, {"run": "r"})
    worker = client(port, "redis_compile_url")
    assert worker.lpush("esper:celery:control", "a task")
    for forbidden in (
        lambda: worker.xadd(STREAM, {"run": "r"}),
        lambda: worker.xrange(STREAM),
        lambda: worker.delete(STREAM),
        lambda: worker.publish("of-another-application", "x"),
    ):
        with pytest.raises(NoPermissionError):
            forbidden()


@pytest.mark.parametrize("secret", ["redis_url", "redis_compile_url", "redis_tamiyo_url"])
def test_nobody_configures_or_empties_it(port: int, secret: str) -> None:
    someone = client(port, secret)
    for command in ("FLUSHALL", "CONFIG GET *", "ACL LIST", "KEYS *", "SHUTDOWN"):
        with pytest.raises(NoPermissionError):
            someone.execute_command(*command.split())
    with pytest.raises(NoPermissionError):
        someone.get("of-another-application")


@pytest.mark.postgres
def test_the_roles_of_postgresql_are_the_owner_the_application_and_the_compile_workers(
    postgres_url: str, tmp_path: Path
) -> None:
    parts = urlsplit(postgres_url)
    names = ("database_owner_password", "database_password", "compile_database_password")
    for name in names:
        (tmp_path / name).write_text(SECRETS[name])
    environment = {
        **os.environ,
        "PGHOST": str(parts.hostname),
        "PGPORT": str(parts.port),
        **{f"{name.upper()}_FILE": str(tmp_path / name) for name in names},
    }
    script = str(DOCKER / "postgres-roles.sh")
    subprocess.run(["sh", script], env=environment, check=True, timeout=600)
    address = f"host={parts.hostname} port={parts.port} dbname=esper"
    with psycopg.connect(f"{address} user=esper_owner") as owner:
        owner.execute("CREATE TABLE thing (n int)")
        owner.execute("GRANT SELECT ON thing TO esper")
        owner.commit()
        with psycopg.connect(f"{address} user=esper") as application:
            assert application.execute("SELECT count(*) FROM thing").fetchone() == (0,)
            for statement in ("CREATE TABLE another (n int)", "DROP TABLE thing"):
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    application.execute(statement)
                application.rollback()
        with (
            psycopg.connect(f"{address} user=esper_compile") as worker,
            pytest.raises(psycopg.errors.InsufficientPrivilege),
        ):
            worker.execute("SELECT count(*) FROM thing")  # until grant_compile_role
