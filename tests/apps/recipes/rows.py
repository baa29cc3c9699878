"""A recipe, its host's worker, and launches of it, as rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from django.utils import timezone

from apps.accounts.models import User
from apps.recipes.models import Launch, Recipe
from apps.workers.models import Worker
from esper.contracts import LaunchState, WorkerKind

TEXT = """
name = "Counter"
argv = ["{python}", "count.py", "--steps", "{steps}", "--note", "{note}", "{fast}", "{data}"]
resume_argv = ["{python}", "count.py", "--resume", "{checkpoints}"]
environment = ["CUDA_VISIBLE_DEVICES"]

[parameters.steps]
type = "integer"
default = 100
minimum = 1
maximum = 1000

[parameters.rate]
type = "number"
default = 0.1
maximum = 1

[parameters.note]
type = "text"
default = "none"

[parameters.schedule]
type = "choice"
choices = ["cosine", "linear"]
default = "cosine"

[parameters.fast]
type = "flag"
option = "--fast"
default = false

[parameters.data]
type = "path"
under = "data"
default = "digits.npz"
"""
HOST = "host-r"


def write_recipe(folder: Path, text: str = TEXT, name: str = "counter.toml") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text)
    return path


def make_worker(host: str = HOST, **changes: Any) -> Worker:
    now = timezone.now()
    values: dict[str, Any] = {
        "host": host,
        "kind": WorkerKind.COMPILE,
        "capabilities": ["cpu"],
        "queues": ["compile.cpu", f"host.{host}"],
        "state": "idle",
        "started_at": now,
        "heartbeat_at": now,
    }
    worker, _ = Worker.objects.update_or_create(
        name=f"compile@{host}", defaults={**values, **changes}
    )
    return worker


def make_recipe(host: str = HOST, folder: Path | None = None) -> Recipe:
    """Registered by a worker that is up; the folder is any that is there."""
    make_worker(host)
    folder = folder or Path(__file__).parent
    values: dict[str, Any] = {
        "digest": "0f" * 32,
        "name": "Counter",
        "argv": ["{python}", "count.py", "{steps}"],
        "resume_argv": ["{python}", "count.py"],
        "parameters": [
            {
                "name": "steps",
                "kind": "integer",
                "default": 100,
                "description": "",
                "minimum": 1.0,
                "maximum": 1000.0,
                "choices": [],
                "option": "",
                "under": "",
            }
        ],
        "registered_at": timezone.now(),
    }
    recipe, _ = Recipe.objects.update_or_create(host=host, slug="counter", defaults=values)
    return recipe


def make_launch(
    owner: User, *, state: LaunchState = LaunchState.REQUESTED, **changes: Any
) -> Launch:
    recipe = changes.pop("recipe", None) or make_recipe()
    values = {
        "recipe": recipe,
        "digest": recipe.digest,
        "parameters": {"steps": 100},
        "requested_by": owner,
        "requested_at": timezone.now(),
        "seen_at": timezone.now(),
    }
    return Launch.objects.create(**{**values, "state": state, **changes})
