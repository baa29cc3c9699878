"""What a session keeps in a checkpoint, and how it takes it back: all of it, or nothing."""

from __future__ import annotations

from functools import partial
from typing import Any

from esper.exceptions import ConfigurationError
from esper.grafting import LossGuard
from esper.grafting.ranks.replicas import Call, Joint, jointly
from esper.health.pace import periods_of
from esper.sdk.evaluation_pace import pace_of
from esper.sdk.local import LocalMemory
from esper.sdk.parts import Parts
from esper.sdk.saving import losses_from_state, losses_to_state, reading_a_state

FORMAT = 1


def state_of(parts: Parts) -> dict[str, Any]:
    """See :meth:`esper.sdk.Session.state_dict`."""
    registration, states = parts.run.registration, parts.surgery.states
    return {
        "format": FORMAT,
        "run": registration.run if registration is not None else "",
        "epoch": registration.epoch if registration is not None else 0,
        "step": parts.run.step,
        "guard": parts.guard.losses.state_dict(),
        "losses": losses_to_state(parts.run.losses),
        "first_losses": losses_to_state(parts.run.beginning),
        "sampling": [[p.since, p.frame, p.deep] for p in parts.sampling.recorded],
        "evaluate_every": [list(entry) for entry in parts.evaluations.pace.recorded],
        "local": parts.local.memory.to_state() if parts.local is not None else None,
        "good_states": states.state_dict() if states is not None else None,
        "treatments": parts.remedies.server.state_dict() if parts.remedies is not None else [],
        **parts.surgery.loads.state_dict(),
    }


def load_state(parts: Parts, state: Any) -> None:
    """See :meth:`esper.sdk.Session.load_state_dict`."""
    parts.ranks.meet(Call.LOAD, parts.run.step, _identities(state))
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ConfigurationError("this is not the state of an Esper session")
    if parts.run.step:
        raise ConfigurationError("load a session's state before its first step")
    with reading_a_state(), jointly(parts.setup.surroundings.replicas) as joint:
        _load(parts, state, joint)
    parts.ledger.on_change(restored=True)


def _load(parts: Parts, state: dict[str, Any], joint: Joint) -> None:
    losses, guard = losses_from_state(state["losses"]), LossGuard()
    guard.load_state_dict(state["guard"])
    memory = LocalMemory.from_state(state["local"]) if state["local"] is not None else None
    sampling = periods_of(state.get("sampling"))  # absent from older states
    evaluated = pace_of(state.get("evaluate_every"))  # absent from older states
    beginning = state.get("first_losses")  # absent from older states
    step = int(state["step"])
    if step < 0:
        raise ConfigurationError(f"a session cannot have taken {step} steps")
    parts.surgery.loads.load_state_dict(state, joint)
    parts.guard.losses, parts.run.step = guard, step
    parts.run.losses.extend(losses)
    if beginning is not None:
        parts.run.beginning = losses_from_state(beginning)
    if sampling is not None:
        parts.sampling.resume(sampling)
    if evaluated is not None:
        parts.evaluations.pace.resume(evaluated)
    if parts.local is not None:
        parts.local.memory = memory or LocalMemory()
    kept = state.get("good_states")  # absent from older states
    if parts.surgery.states is not None and kept is not None:
        parts.failures.contain("good states", partial(parts.surgery.states.find_again, kept, step))
    if parts.remedies is not None:
        parts.remedies.server.load_state_dict(state.get("treatments", []))  # absent from older ones


def _identities(state: Any) -> list[Any] | None:
    """The part of a state that must be the same on all ranks; certificates are measured on each.

    None: it is not a state; the error is raised where it is read, on all ranks alike.
    """
    names = ("adaptation", "blueprint", "version", "config", "seed", "step")
    try:
        grafts = [
            [entry["layer"]["name"], *(entry[name] for name in names)]
            for entry in state["structure"]
        ]
        remedies_in = [[r["remedy"], r["layer"], r["details"]] for r in state["remedies"]]
        return [state["step"], grafts, remedies_in]
    except (LookupError, TypeError):
        return None
