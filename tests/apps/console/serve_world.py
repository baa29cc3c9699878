"""A web process over the small world of ``world.py``, for the browser tests.

python serve_world.py PORT [busy]        with DATABASE_URL and DJANGO_SETTINGS_MODULE set
"""

from __future__ import annotations

import sys

import django
import uvicorn
from django.core.management import call_command

from esper.contracts import PlanState

HOSTILE = '"><img src=x onerror="document.title=\'pwned\'">\u202e'


def main(port: int, *, busy: bool) -> None:
    django.setup()
    call_command("migrate", verbosity=0)
    _build(busy=busy)
    from esper_web.asgi import application

    uvicorn.run(application, host="127.0.0.1", port=port, log_level="error", lifespan="off")


def _build(*, busy: bool) -> None:
    from tests.apps.console.world import build_world  # models need django.setup()

    world = build_world(steps=300)
    run = world.runs["baseline"]
    run.name = HOSTILE
    run.layers = [{**layer, "name": HOSTILE + layer["name"]} for layer in run.layers]
    run.save()
    from tests.apps.console.world_busy import build_busy_world, make_plan, make_shadow

    if busy:
        build_busy_world(world)
        return
    make_shadow(world, "waiting")
    # Over: what waits is counted in these tests.
    make_plan(world, "topics-lm", ["classifier.0", "classifier.4"], state=PlanState.REJECTED)


if __name__ == "__main__":
    main(int(sys.argv[1]), busy="busy" in sys.argv[2:])
