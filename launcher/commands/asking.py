"""Which server a command asks, and as whom: the options of every command over the REST API."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import click

from hosts.keyring import read_keyring
from hosts.paths import default_data_dir
from hosts.runtime import read_runtime
from launcher.commands.installation import data_dir_option
from launcher.remote.client import Client, Exit, RefusedError

LOCAL_URL = "http://127.0.0.1:8080"

_P = ParamSpec("_P")
_R = TypeVar("_R")


def asks_server(command: Callable[Concatenate[Client, _P], _R]) -> Callable[_P, _R]:
    """Decorates a command of click: it gets a :class:`Client` as its first argument.

    Adds ``--url``, ``--as`` and ``--data-dir``.
    """

    @click.option(
        "--url", metavar="URL", help="The server. Default: ESPER_URL, else the local one."
    )
    @click.option(
        "--as",
        "account",
        metavar="ACCOUNT",
        help="Whose token in the local data directory is used where ESPER_TOKEN is not set. "
        "Default: ESPER_ACCOUNT, else its operator's.",
    )
    @data_dir_option
    @wraps(command)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        url, account = kwargs.pop("url"), kwargs.pop("account")
        with connect(url=_word(url), account=_word(account)) as client:
            return command(client, *args, **kwargs)

    return run


def json_option(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """Adds ``--json``, given to the command as ``as_json``."""
    return click.option(
        "--json", "as_json", is_flag=True, help="Print JSON as the API returns it."
    )(command)


def confirm(question: str) -> None:
    """Goes on when the person at the terminal says yes.

    Raises:
        click.Abort: the answer is no.
        click.UsageError: there is no terminal.
    """
    if not sys.stdin.isatty():
        raise click.UsageError("There is no terminal to ask on. Give --yes.")
    click.confirm(question, abort=True, err=True)


def connect(*, url: str = "", account: str = "") -> Client:
    """A client of the server that the options and the environment name.

    Raises:
        RefusedError: there is no token.
    """
    directory = default_data_dir()
    here = _local_url(directory)
    server = (url or os.environ.get("ESPER_URL") or here).rstrip("/")
    token = os.environ.get("ESPER_TOKEN", "")
    if not token and server != here:  # a local token must not be sent to another server
        raise RefusedError(
            f"There is no token for {server}. Set ESPER_TOKEN: make one on its page Account and "
            "settings.",
            Exit.NOT_ALLOWED,
        )
    account = account or os.environ.get("ESPER_ACCOUNT", "")
    return Client.at(server, token or _local_token(directory, account))


def _local_url(directory: Path) -> str:
    return str(read_runtime(directory).get("url") or LOCAL_URL).rstrip("/")


def _local_token(directory: Path, account: str) -> str:
    """The token that ``esper up`` made for an account of this data directory."""
    people: dict[str, dict[str, Any]] = read_keyring(directory).get("people", {})
    operators = sorted(name for name, who in people.items() if who.get("role") == "operator")
    name = account or (operators[0] if operators else "")
    token = people.get(name, {}).get("token", "")
    if not token:
        whose = f"of {account!r} " if account else ""
        raise RefusedError(
            f"There is no token {whose}in {directory}. Set ESPER_TOKEN: make one on the page "
            "Account and settings, or with esper token issue ACCOUNT --scope read --scope act.",
            Exit.NOT_ALLOWED,
        )
    return str(token)


def _word(value: object) -> str:
    return value if isinstance(value, str) else ""
