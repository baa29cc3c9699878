from __future__ import annotations

import json
import time
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from apps.accounts.models import User
from apps.recipes.models import Launch, Recipe
from apps.recipes.selectors import launches, log_page, recipes
from apps.recipes.services import resume_launch, start_recipe, stop_launch
from apps.rest.problems import Problem

VIA = "manage.py"
LOOK_SECONDS = 1.0


class Command(BaseCommand):
    """Acts are a person's: ``--as`` names the account, and its role decides as on the pages."""

    help = "List, start, stop and resume recipes on their hosts, and follow their logs."

    def add_arguments(self, parser: CommandParser) -> None:
        verbs = parser.add_subparsers(dest="verb", required=True)
        verbs.add_parser("list", help="recipes by host, and the launches of each that live")
        start = verbs.add_parser(
            "start", help="start a recipe: recipe start gpu-1/digits steps=500"
        )
        start.add_argument("recipe", help="host/slug, or the slug where one host has it")
        start.add_argument("parameters", nargs="*", metavar="NAME=VALUE", help="JSON, or a text")
        _add_person(start)
        for verb, words in (("stop", "end a launch"), ("resume", "go on from its checkpoint")):
            act = verbs.add_parser(verb, help=words)
            act.add_argument("launch", help="its uid, or its number")
            act.add_argument("--reason", default="")
            _add_person(act)
        logs = verbs.add_parser("logs", help="print what a launch has printed")
        logs.add_argument("launch", help="its uid, or its number")
        logs.add_argument("--follow", action="store_true", help="until it has ended")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            getattr(self, f"_{options['verb']}")(options)
        except Problem as problem:
            raise CommandError(problem.detail) from problem

    def _list(self, _options: dict[str, Any]) -> None:
        for recipe in recipes():
            state = "" if recipe.usable else f"  cannot be used: {recipe.problem}"
            self.stdout.write(f"{recipe}  {recipe.digest[:12]}  {recipe.name}{state}")
            for launch in recipe.launches.filter(ended_at=None):
                self.stdout.write(f"    L-{launch.number}  {launch.state}  {launch.uid}")

    def _start(self, options: dict[str, Any]) -> None:
        recipe = _recipe(options["recipe"])
        launch = start_recipe(
            host=recipe.host,
            slug=recipe.slug,
            digest=recipe.digest,
            parameters=dict(_parameter(text) for text in options["parameters"]),
            user=_person(options),
            via=VIA,
        )
        self.stdout.write(f"L-{launch.number}  {launch.uid}  {launch.state}")

    def _stop(self, options: dict[str, Any]) -> None:
        self._act(stop_launch, options)

    def _resume(self, options: dict[str, Any]) -> None:
        self._act(resume_launch, options)

    def _act(self, act: Any, options: dict[str, Any]) -> None:
        launch = act(
            launch=_launch(options["launch"]),
            user=_person(options),
            via=VIA,
            reason=options["reason"],
        )
        self.stdout.write(f"L-{launch.number}  {launch.state}")

    def _logs(self, options: dict[str, Any]) -> None:
        launch, after = _launch(options["launch"]), 0
        while True:
            launch.refresh_from_db()
            page = log_page(launch, after=after)
            self.stdout.write(page.text, ending="")
            after = page.end
            if page.more:
                continue
            if not options["follow"] or launch.ended:
                return
            time.sleep(LOOK_SECONDS)


def _add_person(parser: CommandParser) -> None:
    parser.add_argument("--as", dest="person", required=True, help="the account that does it")


def _person(options: dict[str, Any]) -> User:
    found = User.objects.filter(username=options["person"], is_active=True).first()
    if found is None:
        raise CommandError(f"There is no account {options['person']!r}.")
    return found


def _recipe(text: str) -> Recipe:
    host, _, slug = text.rpartition("/")
    found = recipes().filter(slug=slug, **({"host": host} if host else {}))
    if len(found) != 1:
        raise CommandError(f"{len(found)} hosts have {slug!r}: name one as host/{slug}.")
    return found[0]


def _launch(text: str) -> Launch:
    number = text.removeprefix("L-")
    wanted = {"pk": int(number)} if number.isascii() and number.isdigit() else {"uid": text}
    found = launches().filter(**wanted).first()
    if found is None:
        raise CommandError(f"There is no launch {text!r}.")
    return found


def _parameter(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals:
        raise CommandError(f"{text!r} is not NAME=VALUE.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
