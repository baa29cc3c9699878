"""The control plane's REST API as Tamiyo sees it; ``docs/protocol.md`` is the contract."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import httpx

from esper import tracing
from esper.contracts import codec, protocol, wire
from esper.exceptions import CodecError, TransportError

# A snapshot of 2,000 layers holds dozens of frames of 88 kB.
MAX_ANSWER_BYTES = 64 * 1024 * 1024
# Worth another attempt: time-outs and rate limits, and a token that somebody is about to renew.
_PASSING = frozenset({401, 403, 408, 425, 429})


class Urza:
    """Calls of a service with scope ``decide``. Every failure is a ``TransportError``.

    Args:
        url: of the server, without ``/api/v1``.
        token: bearer token; None: send none.
    """

    def __init__(self, url: str, token: str | None, *, timeout_seconds: float = 10.0) -> None:
        headers = {"Accept": "application/json", "User-Agent": "esper-tamiyo"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        self._http = httpx.AsyncClient(
            base_url=url.rstrip("/") + "/api/v1/", headers=headers, timeout=timeout_seconds
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def live_runs(self) -> list[dict[str, Any]]:
        return [run async for run in self._pages("runs", {"state__in": "starting,running"})]

    async def snapshot(self, run: str) -> dict[str, Any]:
        return await self._get(f"runs/{_segment(run)}/snapshot")

    async def experience(self) -> list[dict[str, Any]]:
        return list((await self._get("experience"))["results"])

    async def adaptation(self, uid: str) -> dict[str, Any]:
        return await self._get(f"adaptations/{_segment(uid)}")

    async def adaptation_etag(self, uid: str) -> str:
        """The version that an act on this adaptation must name."""
        answer = await self._send("GET", f"adaptations/{_segment(uid)}")
        return str(answer.headers.get("ETag", ""))

    async def propose(self, run: str, body: protocol.Proposal) -> dict[str, Any]:
        """The adaptation that was written, also when this very proposal was made before."""
        return _object(
            await self._send(
                "POST", f"runs/{_segment(run)}/adaptations", body=body, key=body.key(run)
            )
        )

    async def propose_plan(self, run: str, body: protocol.PlanProposal) -> dict[str, Any]:
        """The plan that was written, also when this very plan was proposed before."""
        return _object(
            await self._send("POST", f"runs/{_segment(run)}/plans", body=body, key=body.key(run))
        )

    async def tried_sizes(self, blueprint: str) -> protocol.TriedSizes:
        """Raises ``CodecError`` where the server is of another version."""
        data = await self._get(f"blueprints/{_segment(blueprint)}/tried-sizes")
        return wire.from_wire(protocol.TriedSizes, data)

    async def suggest_variant(self, blueprint: str, body: protocol.VariantSuggestion) -> None:
        path = f"blueprints/{_segment(blueprint)}/variants"
        factors = ",".join(f"{name}={factor:g}" for name, factor in sorted(body.factors.items()))
        key = f"{blueprint}:{factors}:{len(body.cases)}"
        await self._send("POST", path, body=body, key=key)

    async def decline(self, run: str, body: protocol.Decline) -> None:
        await self._send("POST", f"runs/{_segment(run)}/declines", body=body)

    async def judge(self, adaptation: str, body: protocol.Verdict, *, key: str) -> None:
        """Post a verdict on the adaptation's present version."""
        path = f"adaptations/{_segment(adaptation)}/verdict"
        try:
            await self._send("POST", path, body=body, key=key)
        except TransportError as error:
            if error.status != 428:
                raise
            etag = await self.adaptation_etag(adaptation)
            await self._send("POST", path, body=body, key=key, if_match=etag)

    async def heartbeat(self, instance: str, status: dict[str, Any]) -> None:
        beat = protocol.Heartbeat(instance=instance, status=status)
        await self._send("POST", "services/tamiyo/heartbeat", body=beat)

    async def integration_status(self) -> dict[str, Any]:
        return await self._get("integration-status")

    async def blueprints(self) -> list[dict[str, Any]]:
        return [blueprint async for blueprint in self._pages("blueprints", {})]

    async def _pages(self, path: str, params: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        answer = await self._get(path, params)
        while True:
            for item in answer["results"]:
                yield item
            following = answer.get("next")
            if not following:
                return
            # Only the query of the link: the token never follows a link to another host.
            answer = await self._get(path, dict(httpx.URL(following).params))

    async def _get(self, path: str, params: dict[str, Any] | None = None) -> dict[str, Any]:
        return _object(await self._send("GET", path, params=params))

    async def _send(
        self,
        method: str,
        path: str,
        *,
        params: dict[str, Any] | None = None,
        body: protocol.Message | None = None,
        key: str = "",
        if_match: str = "",
    ) -> httpx.Response:
        headers = tracing.headers()
        if body is not None:
            headers["Content-Type"] = "application/json"
        if key:
            headers["Idempotency-Key"] = key
        if if_match:
            headers["If-Match"] = if_match
        content = codec.encode(wire.to_wire(body)) if body is not None else None
        try:
            answer = await self._http.request(
                method, path, params=params, content=content, headers=headers
            )
        except httpx.HTTPError as error:
            raise TransportError(
                f"{method} {path}: no answer ({type(error).__name__})", permanent=False
            ) from error
        if answer.is_success:
            return answer
        raise _refusal(f"{method} {path}", answer)


def _segment(text: str) -> str:
    """One path segment: an id that came from outside cannot leave its place in the path."""
    return quote(text, safe="")


def _object(answer: httpx.Response) -> dict[str, Any]:
    try:
        value = codec.decode(answer.content, max_bytes=MAX_ANSWER_BYTES)
    except CodecError as error:
        raise TransportError(
            f"{answer.request.url.path}: {error}", permanent=False, status=answer.status_code
        ) from error
    if not isinstance(value, dict):
        raise TransportError(
            f"{answer.request.url.path}: not an object", permanent=False, status=answer.status_code
        )
    return value


def _refusal(what: str, answer: httpx.Response) -> TransportError:
    problem: dict[str, Any] = {}
    with contextlib.suppress(CodecError):
        value = codec.decode(answer.content)
        problem = value if isinstance(value, dict) else {}
    status = answer.status_code
    return TransportError(
        f"{what}: {status} {problem.get('detail') or problem.get('title') or ''}".rstrip(),
        permanent=400 <= status < 500 and status not in _PASSING,
        retry_after=_retry_after(answer),
        status=status,
        code=str(problem.get("code", "")),
    )


def _retry_after(answer: httpx.Response) -> float | None:
    try:
        return min(max(float(answer.headers["Retry-After"]), 0.0), 60.0)
    except (KeyError, ValueError):
        return None
