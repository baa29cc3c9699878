"""``esper recipe``: list, start, stop and resume recipes, and follow their logs.

An act needs a person: ``--as`` names the account, and its role decides as on the pages.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from launcher.commands.installation import VIA, data_dir_option, installation

if TYPE_CHECKING:
    from apps.accounts.models import User
    from apps.recipes.models import Launch, Recipe

POLL_SECONDS = 1.0

person_option = click.option(
    "--as", "username", required=True, metavar="ACCOUNT", help="The account that acts."
)
reason_option = click.option("--reason", default="", help="Why; it is kept in the audit log.")


@click.group("recipe")
@data_dir_option
def recipe_group() -> None:
    """List, start, stop and resume recipes on their hosts, and follow their logs."""


@recipe_group.command("list")
def list_recipes() -> None:
    """Print the recipes by host, and the launches of each that run."""
    with installation():
        from apps.recipes.selectors import recipes

        for recipe in recipes():
            state = "" if recipe.usable else f"  cannot be used: {recipe.problem}"
            click.echo(f"{recipe}  {recipe.digest[:12]}  {recipe.name}{state}")
            for launch in recipe.launches.filter(ended_at=None):
                click.echo(f"    L-{launch.number}  {launch.state}  {launch.uid}")


@recipe_group.command("start")
@click.argument("recipe")
@click.argument("parameters", nargs=-1, metavar="[NAME=VALUE]...")
@click.option("--project", default="", help="The new run belongs to this project (prj_…).")
@person_option
def start(recipe: str, parameters: tuple[str, ...], project: str, username: str) -> None:
    """Start RECIPE, named host/slug, or slug where one host has it.

    A VALUE is JSON, or a text: esper recipe start gpu-1/digits steps=500 --as olga
    """
    with installation():
        from apps.recipes.services import start_recipe

        found = _recipe(recipe)
        launch = start_recipe(
            host=found.host,
            slug=found.slug,
            digest=found.digest,
            parameters=dict(_parameter(text) for text in parameters),
            user=_person(username),
            via=VIA,
            project=project,
        )
        click.echo(f"L-{launch.number}  {launch.uid}  {launch.state}")


@recipe_group.command("stop")
@click.argument("launch")
@reason_option
@person_option
def stop(launch: str, reason: str, username: str) -> None:
    """Stop LAUNCH, named by its number or its uid."""
    with installation():
        from apps.recipes.services import stop_launch

        _act(stop_launch, launch, reason, username)


@recipe_group.command("resume")
@click.argument("launch")
@reason_option
@person_option
def resume(launch: str, reason: str, username: str) -> None:
    """Continue LAUNCH from its checkpoint."""
    with installation():
        from apps.recipes.services import resume_launch

        _act(resume_launch, launch, reason, username)


@recipe_group.command("logs")
@click.argument("launch")
@click.option("--follow", is_flag=True, help="Go on until the launch has ended.")
def logs(launch: str, follow: bool) -> None:
    """Print what LAUNCH has printed."""
    with installation():
        from apps.recipes.selectors import log_page

        found, after = _launch(launch), 0
        while True:
            found.refresh_from_db()
            page = log_page(found, after=after)
            click.echo(page.text, nl=False)
            after = page.end
            if page.more:
                continue
            if not follow or found.ended:
                return
            time.sleep(POLL_SECONDS)


def _act(act: Callable[..., Launch], launch: str, reason: str, username: str) -> None:
    done = act(launch=_launch(launch), user=_person(username), via=VIA, reason=reason)
    click.echo(f"L-{done.number}  {done.state}")


def _person(username: str) -> User:
    from apps.accounts.models import User

    found = User.objects.filter(username=username, is_active=True).first()
    if found is None:
        raise click.ClickException(f"There is no account {username!r}.")
    return found


def _recipe(text: str) -> Recipe:
    from apps.recipes.selectors import recipes

    host, _, slug = text.rpartition("/")
    found = recipes().filter(slug=slug, **({"host": host} if host else {}))
    if len(found) != 1:
        raise click.ClickException(
            f"{len(found)} hosts have the recipe {slug!r}. Name one as host/{slug}; "
            "esper recipe list prints them."
        )
    return found[0]


def _launch(text: str) -> Launch:
    from apps.recipes.selectors import launches

    number = text.removeprefix("L-")
    wanted: dict[str, Any] = (
        {"pk": int(number)} if number.isascii() and number.isdigit() else {"uid": text}
    )
    found = launches().filter(**wanted).first()
    if found is None:
        raise click.ClickException(f"There is no launch {text!r}.")
    return found


def _parameter(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals:
        raise click.ClickException(f"{text!r} is not NAME=VALUE.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
