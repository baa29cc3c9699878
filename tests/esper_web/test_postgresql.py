"""The temporary PostgreSQL of the tests, and Esper's settings on a real one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from django.db import connection

from hosts.paths import ROOT

pytestmark = pytest.mark.postgres


@pytest.mark.django_db
def test_tests_marked_postgres_run_on_postgresql() -> None:
    assert connection.vendor == "postgresql"
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
        assert cursor.fetchone() == (1,)


def test_all_tables_are_made_on_postgresql_with_the_pool_of_the_settings(
    postgres_url: str, tmp_path: Path
) -> None:
    program = (
        "import django; django.setup()\n"
        "from django.core.management import call_command\n"
        "from django.db import connection\n"
        "call_command('migrate', verbosity=0)\n"
        "tables = connection.introspection.table_names()\n"
        "print(connection.vendor, connection.pool is not None, tables)\n"
        "connection.close_pool()"
    )
    environment = os.environ | {
        "DJANGO_SETTINGS_MODULE": "esper_web.settings.local",
        "DATABASE_URL": postgres_url,
        "ESPER_DATA_DIR": str(tmp_path),
    }
    answer = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert answer.stdout.startswith("postgresql True"), answer.stderr
    assert "adaptations_adaptation" in answer.stdout
