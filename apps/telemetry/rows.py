"""Writes many rows of telemetry by one prepared statement.

Django's ``bulk_create`` makes an object of each row, and one statement whose text grows with the
rows: for the 500 small frames of a batch, ten times the work of the database itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from django.db import connection
from django.db.models import Model

Row = tuple[Any, ...]

FRAME_COLUMNS = ("run", "epoch", "step", "wall_time", "values", "loss", "loss_status")
METRIC_COLUMNS = ("run", "epoch", "step", "wall_time", "name", "value", "status")


def insert_rows(model: type[Model], columns: tuple[str, ...], rows: Sequence[Row]) -> None:
    """Insert rows whose values have the order of ``columns``, in the caller's transaction."""
    if rows:
        with connection.cursor() as cursor:
            cursor.executemany(_statement(model, columns), rows)


@cache
def _statement(model: type[Model], columns: tuple[str, ...]) -> str:
    quote = connection.ops.quote_name
    known = {field.name: field.attname for field in model._meta.concrete_fields}
    names = ", ".join(quote(known[name]) for name in columns)
    places = ", ".join(["%s"] * len(columns))
    table = quote(model._meta.db_table)
    return f"INSERT INTO {table} ({names}) VALUES ({places})"  # noqa: S608 (names of the model)
