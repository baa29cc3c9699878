"""Objects by the names that people use: R-3, A-17, V-88, the name of a run, or a uid."""

from __future__ import annotations

from launcher.remote.client import Client, Exit, RefusedError, segment

_RUN = ("number", "name", "state", "mode", "owner", "host", "step", "target_steps", "last_loss",
        "model_parameters", "adaptation_paused_by", "quarantined_reason", "last_seen_at",
        "ended_at", "end_reason", "uid")  # fmt: skip
_ADAPTATION = ("number", "title", "run_name", "state", "risk", "confidence", "asks", "deadline_at",
               "claimed_by", "decided_by", "decided_rule", "decision_reason", "graft_step",
               "running_test", "reward", "end_reason", "created_at", "uid")  # fmt: skip
_FINDING = ("number", "severity", "rule", "finding", "text", "layer", "step", "observed", "limit",
            "action", "advice", "acknowledged_by", "note", "created_at", "uid")  # fmt: skip
# By the letter of the number, and by the prefix of the uid.
_KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "R-": ("runs", _RUN),
    "run_": ("runs", _RUN),
    "A-": ("adaptations", _ADAPTATION),
    "adp_": ("adaptations", _ADAPTATION),
    "V-": ("violations", _FINDING),
    "vio_": ("violations", _FINDING),
}


def resource_of(client: Client, name: str) -> tuple[str, tuple[str, ...]]:
    """The path of an object, and the members to show of it. Another name is a run's.

    Raises:
        RefusedError: there is no run of that name.
    """
    for prefix, (collection, members) in _KINDS.items():
        if name.startswith(prefix):
            return f"{collection}/{segment(name)}", members
    return f"runs/{run_uid(client, name)}", _RUN


def run_uid(client: Client, name: str) -> str:
    """The uid of a run: R-3, its uid, or its name, the newest where several have it.

    Raises:
        RefusedError: there is no such run.
    """
    if name.startswith("run_"):
        return name
    if name.startswith("R-"):
        return str(client.get(f"runs/{segment(name)}").data["uid"])
    found = next(client.every("runs", limit=1, name=name), None)
    if found is None:
        raise RefusedError(f"There is no run {name!r}. esper runs lists them.", Exit.NOT_FOUND)
    return str(found["uid"])
