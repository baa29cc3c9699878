"""``esper rotate``: a new key for an installation that keeps its keys in the data directory."""

from __future__ import annotations

import secrets
from pathlib import Path

import click

from esper.contracts.signing import generate_private_key, public_key
from hosts.keyring import ensure_keyring, kernel_key_path, update_keyring, write_private
from hosts.paths import default_data_dir
from hosts.runtime import DataDirectoryBusyError, data_directory_lock
from launcher.commands.installation import VIA, data_dir_option, installation

SIGNING = ("command", "kernel")  # trainers check with their public halves


@click.command("rotate")
@data_dir_option
@click.argument("key", type=click.Choice(["secret", "redis", *SIGNING]))
def rotate_command(key: str) -> None:
    """Replace KEY by a new one. Stop Esper first.

    secret: everybody signs in again, with a recovery code where an authenticator app is set up,
    and adds webhooks and browser pushes again, whose keys are made from this one.
    redis: nothing else changes. command and kernel: trainers register again by themselves and get
    the new public key; adaptations that wait are cancelled.
    """
    directory = default_data_dir()
    try:
        with data_directory_lock(directory):
            _replace(key, directory)
            if key in SIGNING:
                _tell_trainers(key)
    except DataDirectoryBusyError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"The {key} key is new. It is used from the next start on.")


def _replace(key: str, directory: Path) -> None:
    ensure_keyring(directory)
    if key == "secret":
        update_keyring(directory, secret_key=secrets.token_urlsafe(50))
    elif key == "redis":
        update_keyring(directory, redis_password=secrets.token_urlsafe(32))
    elif key == "command":
        update_keyring(directory, command_key=generate_private_key())
    else:
        private = generate_private_key()
        write_private(kernel_key_path(directory), private)
        update_keyring(directory, kernel_public_key=public_key(private))


def _tell_trainers(key: str) -> None:
    with installation():
        from apps.accounts.actors import Actor, ActorKind
        from apps.adaptations.services import note_replaced_key

        told = note_replaced_key(key, actor=Actor(ActorKind.SYSTEM, "system", VIA))
    click.echo(
        f"{told.live_runs} live runs register again; {told.cancelled} adaptations that waited are "
        "cancelled."
    )
