"""The shared cast: a temporary PostgreSQL, a running Esper, and the keys of the tests."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from playwright.sync_api import Browser, Page
from xdist.scheduler import LoadFileScheduling

from launcher.supervisor.ports import any_free_port
from tests.browser import WAIT_MS, open_chromium
from tests.covers import mark_the_rest
from tests.postgres import NO_POSTGRES, Cluster, postgres_programs
from tests.running import RunningEsper, launch_esper

# A machine that is busy with other work is slow; that is no fault of a test.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


@pytest.hookimpl(tryfirst=True)  # before -m chooses by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    refuse_hidden_markers(items)
    mark_the_rest(items)
    # The last one would run alone. Stable: inside of a file nothing moves.
    items.sort(key=lambda item: LONGEST.get(item.path.name, len(LONGEST)))


def refuse_hidden_markers(items: list[pytest.Item]) -> None:
    """``./check`` collects only the files whose text names the marker of its stage.

    Raises:
        pytest.UsageError: a test has such a marker, and its file does not name it.
    """
    texts: dict[Path, str] = {}
    for item in items:
        for name in ("postgres", "process", "browser"):
            if item.get_closest_marker(name) is None:
                continue
            text = texts.setdefault(item.path, item.path.read_text(encoding="utf-8"))
            if f"mark.{name}" not in text:
                raise pytest.UsageError(
                    f"{item.nodeid} is marked {name}, which {item.path.name} does not name. "
                    f"./check would not find it: write pytest.mark.{name} in that file."
                )


# Files of processes whose tests take long, the longest first.
LONGEST = {
    name: place
    for place, name in enumerate(
        [
            "test_killed_processes.py",
            "test_restored_backup.py",  # with it all that share its Esper
            "test_worker_pool_under_attack.py",
            "test_recipes_on_a_host.py",
            "test_console_in_a_browser.py",
            "test_nemesis.py",
            "test_up.py",
            "test_stopping.py",
            "test_compiling_ahead.py",
            "test_backup.py",
            "test_sharded_observed.py",
            "test_sharded_grafts.py",
        ]
    )
}
# Files whose tests share an Esper that takes long to start and is there once for a session.
TOGETHER = {
    # Not with test_killed_processes.py, whose own tests take as long: it has an Esper to itself.
    "installation": {
        "test_approval_in_a_browser.py",
        "test_plan_on_a_real_run.py",
        "test_remedies_on_a_real_run.py",
        "test_restored_backup.py",
    },
    "running_esper": {"test_front_door_in_a_browser.py", "test_up.py", "test_with_a_server.py"},
}


class FilesTogether(LoadFileScheduling):
    """A file stays in one process, and so do all files that share an Esper."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        name = file.rpartition("/")[2]
        return next((group for group, files in TOGETHER.items() if name in files), file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> FilesTogether | None:
    return FilesTogether(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Between two files: what is imported by now is no longer looked at by each ``gc.collect``."""
    if nextitem is not None and nextitem.path != item.path:
        gc.collect()
        gc.freeze()


# --- keys ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def kernel_private_key() -> str:
    """Signs kernels that the test settings trust."""
    from django.conf import settings

    return str(settings.KERNEL_PRIVATE_KEY_OF_TESTS)


# --- PostgreSQL ---------------------------------------------------------------------------------
# A session that holds a test marked ``postgres`` runs all its database tests on PostgreSQL: Django
# has one default database, and a second one beside it would not be what the code under test uses.


def pytest_collection_finish(session: pytest.Session) -> None:
    marked = any(item.get_closest_marker("postgres") for item in session.items)
    session.config.stash[_WANTS_POSTGRES] = marked
    gc.freeze()


_WANTS_POSTGRES = pytest.StashKey[bool]()


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A fresh PostgreSQL cluster on a free port, gone at the end."""
    programs = postgres_programs()
    if programs is None:
        pytest.fail(NO_POSTGRES)
    # Not under pytest's own directory: another session of the same user would close it to postgres.
    with tempfile.TemporaryDirectory(prefix="esper-postgres-") as base:
        cluster = Cluster(programs, Path(base), any_free_port())
        cluster.start()
        yield cluster.url
        cluster.stop()


@pytest.fixture(autouse=True)
def _postgres_is_there(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("postgres"):
        request.getfixturevalue("postgres_url")


@pytest.fixture(scope="session")
def django_db_modify_db_settings(
    request: pytest.FixtureRequest, django_db_modify_db_settings_parallel_suffix: None
) -> None:
    """pytest-django's hook: which database the tests get."""
    wanted = request.config.stash.get(_WANTS_POSTGRES, False)
    if wanted and postgres_programs() is not None and "DATABASE_URL" not in os.environ:
        _use_database(request.getfixturevalue("postgres_url"))


def _use_database(url: str) -> None:
    from django.db import connections

    from esper_web.env import database_from_url

    config = database_from_url(url)
    config["OPTIONS"].pop("pool", None)  # it would hold connections while the database is dropped
    connections.settings["default"] = connections.configure_settings({"default": config})["default"]
    del connections["default"]


# --- a running Esper ----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def running_esper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEsper]:
    """One for the whole session, without demo trainers."""
    esper = launch_esper(Path(tmp_path_factory.mktemp("esper")), "--no-demo")
    yield esper
    esper.end()


@pytest.fixture
def start_esper() -> Iterator[Callable[..., RunningEsper]]:
    """``start_esper(data_dir, *arguments, environment=None)``: more, ended after the test."""
    started: list[RunningEsper] = []

    def start(
        data_dir: Path, *arguments: str, environment: dict[str, str] | None = None
    ) -> RunningEsper:
        started.append(launch_esper(data_dir, *arguments, environment=environment))
        return started[-1]

    yield start
    for esper in started:
        esper.end()


# --- a browser ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """One for each module. A module that uses it can have no asynchronous test."""
    with open_chromium() as browser:
        yield browser


@pytest.fixture
def page(chromium: Browser) -> Iterator[Page]:
    """A page with cookies of its own."""
    context = chromium.new_context()
    context.set_default_timeout(WAIT_MS)
    yield context.new_page()
    context.close()
