"""The five figures of a smoke run, in ms, all from the run itself.

decision, selection   the run's own snapshot decided again here, median of some repetitions
compile_cold          what the worker measured when it built a kernel
compile_cached        the stored kernel looked up, verified and made a module here, median
end_to_end            triggering frame leaves the trainer → the trainer has grafted, by rule
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

import httpx

from launcher.smoke.person import Person
from launcher.supervisor.plan import Site

REPEATS = 20
Json = dict[str, Any]


async def measure_timings(
    operator: Person, site: Site, run: str, adaptations: Sequence[Json]
) -> dict[str, float | None]:
    """The figures; None where nothing in the run was measured."""
    jobs = await operator.all("jobs")
    # Only Tamiyo may read snapshots and frames, so this uses its token.
    headers = {"Authorization": f"Bearer {site.token('tamiyo')}"}
    async with httpx.AsyncClient(base_url=site.url, headers=headers, timeout=120.0) as tamiyo:
        snapshot = await _read(tamiyo, f"runs/{run}/snapshot")
        reactions = [await _reaction_ms(tamiyo, item) for item in adaptations if _by_rule(item)]
    return {
        **_deciding(snapshot),
        "compile_cold": _median([job["build_ms"] for job in jobs if _was_built(job)]),
        "compile_cached": _loading(site, snapshot, adaptations),
        "end_to_end": _median(reactions),
    }


async def _read(client: httpx.AsyncClient, path: str, **parameters: int) -> Json:
    answer = await client.get(f"/api/v1/{path}", params=parameters)
    answer.raise_for_status()
    found: Json = answer.json()
    return found


async def _reaction_ms(tamiyo: httpx.AsyncClient, adaptation: Json) -> float:
    after = adaptation["proposed_step"] - 1
    page = await _read(tamiyo, f"runs/{adaptation['run']}/frames", after_step=after, limit=1)
    grafted = datetime.fromisoformat(adaptation["grafted_at"]).timestamp()
    return float((grafted - page["results"][0]["wall_time"]) * 1e3)


def _by_rule(adaptation: Json) -> bool:
    return adaptation["grafted_at"] is not None and adaptation["decided_by"] is None


def _was_built(job: Json) -> bool:
    return job["build_ms"] is not None and not job["cached"]


def _deciding(snapshot: Json) -> dict[str, float | None]:
    import numpy as np

    from esper import blueprints
    from esper.contracts import AdaptationType, SafetyPolicy
    from esper.pipeline import decide
    from esper.policy import HeuristicPolicy
    from esper.replay import snapshot_from_wire
    from esper.selection import BlueprintSelector

    seen = replace(snapshot_from_wire(snapshot), age_seconds=0.0)
    policy, limits = HeuristicPolicy(), SafetyPolicy()
    selector = BlueprintSelector(blueprints.list_blueprints())
    layer = next((layer for layer in seen.layers if layer.graftable), None)
    decision = _time(lambda: decide(seen, policy, selector, limits, np.random.default_rng(0)))
    if layer is None:
        return {"decision": decision, "selection": None}
    return {
        "decision": decision,
        "selection": _time(
            lambda: selector.select(layer, AdaptationType.ADD_EFFICIENCY, seen, limits)
        ),
    }


def _loading(site: Site, snapshot: Json, adaptations: Sequence[Json]) -> float | None:
    from esper.compilation import KernelStore, open_kernel
    from esper.compilation.instantiate import instantiate
    from esper.contracts import LayerInfo
    from esper.contracts.spans import place_of

    grafted = [item for item in adaptations if item["kernel"] and item["graft_step"] is not None]
    if not grafted:
        return None
    layers = {layer["name"]: LayerInfo.from_wire(layer) for layer in snapshot["layers"]}
    digest = str(grafted[0]["kernel"])
    place = place_of(layers.get, grafted[0]["layer"], grafted[0]["since"])
    if place is None:
        return None
    store = KernelStore(site.data_dir / "kernels")
    trusted_key = str(site.keyring["kernel_public_key"])

    def load() -> None:
        _, spec, _ = open_kernel(store.get(digest), digest, trusted_key)
        instantiate(spec, place)

    return _time(load)


def _time(work: Callable[[], object]) -> float:
    """Median in ms; the first repetition warms up and does not count."""
    work()
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        times.append((time.perf_counter() - began) * 1e3)
    return round(statistics.median(times), 3)


def _median(times: Sequence[float]) -> float | None:
    return round(statistics.median(times), 3) if times else None
