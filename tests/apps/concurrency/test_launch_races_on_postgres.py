"""Two at once at one launch. SQLite has one writer and proves nothing, so this is PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from django.db import transaction

from apps.accounts.actors import SYSTEM
from apps.accounts.models import User
from apps.audit.models import AuditEvent
from apps.audit.services import verify_chain
from apps.recipes import services
from apps.recipes.lifecycle import transition
from apps.recipes.models import Launch
from esper.contracts import LaunchState
from tests.apps.cast import make_person
from tests.apps.concurrency.at_once import THREADS, count_at_once
from tests.apps.recipes.rows import make_launch

pytestmark = [pytest.mark.postgres, pytest.mark.django_db(transaction=True)]

ROUNDS = 10
S = LaunchState


@pytest.fixture
def olga(db: None) -> User:
    return make_person("olga")


def test_of_a_stop_and_an_end_at_once_exactly_one_moves_the_launch(olga: User) -> None:
    for _ in range(ROUNDS):
        launch = make_launch(olga, state=S.RUNNING)

        def work(index: int, pk: int = launch.pk) -> str:
            mine = Launch.objects.get(pk=pk)
            if index % 2:
                return services.stop_launch(launch=mine, user=olga, via="t", reason="").state
            with transaction.atomic():
                return transition(mine, S.FINISHED, actor=SYSTEM).state

        # A thread that reads late may find it stopping, from where finished is no step.
        answers = count_at_once(lambda index: _or_late(lambda: work(index)))
        won = answers[str(S.STOPPING)] + answers[str(S.FINISHED)]
        assert won == 1, answers
        assert AuditEvent.objects.filter(object_uid=launch.uid).count() == 1
    assert verify_chain().verified


def _or_late(work: Callable[[], str]) -> str:
    try:
        return work()
    except ValueError:
        return "late"


def test_a_launch_resumed_by_many_at_once_gets_one_next_attempt(olga: User) -> None:
    for _ in range(ROUNDS):
        launch = make_launch(olga, state=S.STOPPED)

        def work(_: int, pk: int = launch.pk) -> str:
            mine = Launch.objects.get(pk=pk)
            return services.resume_launch(launch=mine, user=olga, via="t", reason="").state

        answers = count_at_once(work)
        assert answers == {"requested": 1, "409 launch-moved": THREADS - 1}
        launch.refresh_from_db()
        assert launch.attempt == 2
        launch.delete()


def test_a_host_never_gets_more_launches_than_its_limit(olga: User) -> None:
    recipe = make_launch(olga, state=S.STOPPED).recipe

    def work(_: int) -> str:
        return services.start_recipe(
            host=recipe.host,
            slug=recipe.slug,
            digest=recipe.digest,
            parameters={},
            user=olga,
            via="t",
        ).state

    answers = count_at_once(work)
    assert answers == {"requested": 4, "409 host-full": THREADS - 4}
