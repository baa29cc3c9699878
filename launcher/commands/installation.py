"""The installation that a command works on: its data directory, its settings, its database."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

VIA = "command line"  # what the audit log shows as the way of an act


def _choose(_context: click.Context, _option: click.Parameter, directory: Path | None) -> None:
    if directory is not None:
        os.environ["ESPER_DATA_DIR"] = str(directory.expanduser().resolve())


data_dir_option = click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="The installation's data directory. Default: ESPER_DATA_DIR, else var in a clone, else "
    "the user data directory of this platform.",
    callback=_choose,
    expose_value=False,
    is_eager=True,
)


@contextmanager
def installation() -> Iterator[None]:
    """Sets up Django; import apps inside. An error of theirs becomes one sentence and status 1."""
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "esper_web.settings.local")
    import django
    from django.core.exceptions import ImproperlyConfigured

    try:
        django.setup()
    except ImproperlyConfigured as error:
        raise click.ClickException(str(error)) from error
    from django.db import DatabaseError

    from apps.rest.problems import Problem

    try:
        yield
    except Problem as problem:
        raise click.ClickException(problem.detail) from problem
    except DatabaseError as error:
        raise click.ClickException(
            f"The database cannot be used: {error}. Prepare it with esper up --setup."
        ) from error
