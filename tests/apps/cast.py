"""What the Django tests share: people, tokens, a layer, a run, a blueprint, a kernel.

The people are the demo's, one for each role, and Oscar, because some acts need a second operator.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
from django.db import connection

from apps.accounts.actors import Actor, ActorKind
from apps.accounts.management.commands.create_demo_people import PEOPLE as DEMO_PEOPLE
from apps.accounts.models import User
from apps.accounts.services import issue_token
from apps.adaptations import triggers
from apps.adaptations.models import Adaptation
from apps.blueprints.models import Blueprint
from apps.blueprints.services import sync_remedies
from apps.kernels.models import Kernel
from apps.runs.models import Run
from apps.trainers.services import register_run
from esper.contracts import AdaptationState, Certificate, LayerInfo, Role, RunMode, TokenScope
from esper.contracts.protocol import Registration

PASSWORD = "a-long-password-for-tests"
PEOPLE: dict[str, Role] = {**DEMO_PEOPLE, "oscar": Role.OPERATOR}
NAMES: dict[Role, str] = {role: name for name, role in DEMO_PEOPLE.items()}

TAMIYO = Actor(ActorKind.TAMIYO, "tamiyo")
TRAINER = Actor(ActorKind.TRAINER, "digits")
WORKER = Actor(ActorKind.WORKER, "compile@here")


def make_person(name: str, role: Role | None = None) -> User:
    """One of ``PEOPLE``, or anybody else with a role."""
    return User.objects.create_user(name, password=PASSWORD, role=role or PEOPLE[name])


def make_tamiyo() -> User:
    """Tamiyo's account, which has no password."""
    return User.objects.create_user("tamiyo", role=Role.VIEWER)


def token_of(user: User, *scopes: TokenScope, run_uid: str = "") -> str:
    return issue_token(owner=user, name="test", scopes=list(scopes), run_uid=run_uid)[1]


def make_layer(name: str = "fc", **changes: Any) -> LayerInfo:
    info = LayerInfo(
        name=name,
        kind="Linear",
        in_shape=(8, 64),
        out_shape=(8, 64),
        dtype="float32",
        parameters=64 * 65,
        graftable=True,
        features_in=64,
        features_out=64,
    )
    return replace(info, **changes)


def make_registration(**changes: Any) -> Registration:
    registration = Registration(
        name="digits",
        mode=RunMode.AUTOMATIC,
        host="elsewhere",
        capability="cpu",
        model_parameters=100_000,
        layers=(
            make_layer("fc"),
            make_layer("head"),
            make_layer("frozen", graftable=False, reason="a container"),
        ),
    )
    return msgspec.structs.replace(registration, **changes)


def make_run(owner: User, **changes: Any) -> Run:
    """A run as its trainer registers it."""
    return register_run(owner=owner, actor=TRAINER, spec=make_registration(**changes)).run


def force_state(adaptation: Adaptation, state: AdaptationState, **changes: Any) -> None:
    """Set a state past the lifecycle, which the database refuses otherwise."""
    triggers.remove(connection)
    Adaptation.objects.filter(pk=adaptation.pk).update(state=state, **changes)
    triggers.install(connection)


def make_blueprint(slug: str = "proj_lora_64", **changes: Any) -> Blueprint:
    values: dict[str, Any] = {
        "ident": "BP-PROJ-LoRA-64",
        "title": "Low-rank update",
        "category": "efficiency",
        "kind": "parallel",
        "adaptation_type": "add_efficiency",
        "risk": "low",
        "idea": "A low-rank path beside the layer; its last projection starts at zero.",
        "version": "0" * 16,
    }
    return Blueprint.objects.create(slug=slug, **{**values, **changes})


def make_remedies() -> None:
    """The whole catalogue."""
    sync_remedies()


CERTIFICATE = Certificate(
    max_abs_diff=0.0,
    tolerance=0.0,
    preserving=True,
    live=True,
    rng_neutral=True,
    parameters=2048,
    parameters_declared=2048,
    latency_ms=0.1,
    memory_mib=0.1,
)


def make_kernel(digest: str = "d" * 64, **changes: Any) -> Kernel:
    """The kernel with that digest; made where it does not exist yet."""
    values: dict[str, Any] = {
        "key_hash": "e" * 64,
        "blueprint_slug": "proj_lora_64",
        "layer_kind": "Linear",
        "dtype": "float32",
        "capability": "cpu",
        "device_name": "cpu",
        "parameters": 2048,
        "latency_ms": 0.1,
        "memory_mib": 0.1,
        "certificate": CERTIFICATE.to_wire(),
        "build_ms": 20.0,
        "size_bytes": 2000,
        "built_by": "compile@here",
    }
    kernel, _ = Kernel.objects.get_or_create(digest=digest, defaults={**values, **changes})
    return kernel
