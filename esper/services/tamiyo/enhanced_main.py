"""The Tamiyo service: reads health frames, decides, judges, and sends heartbeats.

Its state is only a cache. Kill it at any moment: entries that it had not acknowledged come back,
runs are read again from the server, and idempotency keys keep a decision from being made twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Coroutine, Sequence
from typing import Any

from redis.exceptions import RedisError

from esper import blueprints
from esper.exceptions import TransportError
from esper.policy import HeuristicPolicy, Policy
from esper.selection import SelectableBlueprint
from esper.services.tamiyo.blueprint_integration import Phase2IntegrationOrchestrator
from esper.services.tamiyo.inbox import Inbox, backoff_seconds
from esper.services.tamiyo.loop import DecisionLoop
from esper.services.tamiyo.status_page import serve_status
from esper.services.tamiyo.stream import HealthStream
from esper.services.tamiyo.urza import Urza
from esper.utils.config import ServiceConfig

logger = logging.getLogger("esper.tamiyo")

_STOP_SECONDS = 2.5


class EnhancedTamiyoService:
    """One instance of Tamiyo; many may share the runs of a server.

    Args:
        config: without ``urza_url`` the service is in-process only: ``orchestrator`` adapts models
            of this process, and nothing is listened to.
        policy: default: the heuristic one.
        catalog: default: every blueprint that is installed.
    """

    def __init__(
        self,
        config: ServiceConfig,
        *,
        policy: Policy | None = None,
        catalog: Sequence[SelectableBlueprint] | None = None,
    ) -> None:
        self.config = config
        self.policy = policy or HeuristicPolicy()
        self.catalog = tuple(catalog if catalog is not None else blueprints.list_blueprints())
        self.orchestrator = Phase2IntegrationOrchestrator()
        self._urza = self._make_urza()
        self._loop = self._make_loop(self._urza) if self._urza else None
        self._tasks: list[asyncio.Task[None]] = []
        self._page: asyncio.Server | None = None
        self._stream: HealthStream | None = None
        self._inbox = Inbox()
        self._started_at = 0.0
        self._running = False
        self._asked_to_end = asyncio.Event()
        self._redis_state = "connecting" if self._listens else "not configured"
        self._urza_state = "connecting" if self._urza else "not configured"

    @property
    def _listens(self) -> bool:
        return bool(self.config.redis_url and self.config.urza_url)

    async def start(self) -> None:
        """Returns as soon as the service runs; the work goes on in the background.

        Neither Redis nor the server needs to be there: both are waited for.

        Raises:
            OSError: the port of the status page is taken.
        """
        if self._running:
            return
        if self.config.port:
            self._page = await serve_status(self.config.host, self.config.port, self.get_status)
        self._running, self._started_at = True, time.monotonic()
        if self._urza:
            self._spawn(self._tick())
            self._spawn(self._beat())
        if self._listens:
            self._spawn(self._listen())
        logger.info("%s runs as %s", self.config.name, self.config.instance)

    async def stop(self) -> None:
        """Stop within seconds; another instance claims what was not finished."""
        self._running = False
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_STOP_SECONDS)
        self._tasks.clear()
        if self._page:
            self._page.close()
        if self._urza:
            await self._urza.close()

    async def run_forever(self) -> None:
        """Start, and stop on SIGTERM or SIGINT.

        Raises:
            RuntimeError: a part of it died; the supervisor should start the service again.
        """
        running_loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            running_loop.add_signal_handler(number, self._asked_to_end.set)
        await self.start()
        await self._asked_to_end.wait()
        died = not self._running
        await self.stop()
        if died:
            raise RuntimeError("a part of the service died, see above")

    def get_status(self) -> dict[str, Any]:
        """Strict JSON; numbers of this instance only."""
        known = self._loop.status() if self._loop else {"runs": {}, "decisions": {}}
        here = self.orchestrator.get_integration_status()["active_adaptations"]
        return {
            "service": self.config.name,
            "instance": self.config.instance,
            "state": "running" if self._running else "stopped",
            "uptime_seconds": round(time.monotonic() - self._started_at, 1)
            if self._running
            else 0.0,
            "policy": self.policy.name,
            "learning": self.config.learning,
            "blueprints_loaded": len(self.catalog),
            "active_adaptations": len(here)
            + sum(run["active_adaptations"] for run in known["runs"].values()),
            **known,
            "connections": {"redis": self._redis_state, "urza": self._urza_state},
        }

    def _make_urza(self) -> Urza | None:
        if not self.config.urza_url:
            if self.config.redis_url:
                logger.warning("no server is configured, so the health stream is not listened to")
            return None
        return Urza(
            self.config.urza_url,
            self.config.token,
            timeout_seconds=self.config.request_timeout_seconds,
        )

    def _make_loop(self, urza: Urza) -> DecisionLoop:
        return DecisionLoop(
            urza,
            policy=self.policy,
            catalog=self.catalog,
            learning=self.config.learning,
            refresh_seconds=self.config.refresh_seconds,
            decline_quiet_seconds=self.config.decline_quiet_seconds,
        )

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        task.add_done_callback(self._on_end)
        self._tasks.append(task)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or task.exception() is None:
            return
        logger.critical("a part of the service died", exc_info=task.exception())
        self._running = False
        self._asked_to_end.set()

    async def _listen(self) -> None:
        """Read the stream until the service stops; wait for a Redis that is away."""
        assert self.config.redis_url is not None
        self._stream = HealthStream(
            self.config.redis_url,
            consumer=self.config.instance,
            claim_seconds=self.config.claim_seconds,
        )
        attempts = 0
        try:
            while True:
                try:
                    wait = 0.2 if len(self._inbox) else 1.0
                    self._inbox.add(await self._stream.read(wait_seconds=wait))
                    self._redis_state, attempts = "connected", 0
                except (RedisError, OSError) as error:
                    self._say_redis_is_away(error)
                    await asyncio.sleep(backoff_seconds(attempts))
                    attempts += 1
                await self._work_off()
        finally:
            await self._stream.close()

    def _say_redis_is_away(self, error: Exception) -> None:
        if self._redis_state != "reconnecting":
            logger.warning("the health stream is away, runs are polled: %s", error)
        self._redis_state = "reconnecting"

    async def _work_off(self) -> None:
        assert self._loop is not None
        for run, entries in self._inbox.due(time.monotonic()):
            try:
                await self._loop.attend(run, entries)
            except TransportError as error:
                self._say_urza_is_away(error)
                replaced = self._inbox.failed(run, time.monotonic(), error.retry_after)
                await self._acknowledge(replaced)
            else:
                self._urza_state = "connected"
                self._inbox.done(run)
                await self._acknowledge(entries)

    def _say_urza_is_away(self, error: TransportError) -> None:
        if self._urza_state != "reconnecting":
            logger.warning("the server has to be asked again: %s", error)
        self._urza_state = "reconnecting"

    async def _acknowledge(self, entries: Sequence[Any]) -> None:
        assert self._stream is not None
        # An entry whose acknowledgement is lost comes back, and is seen to be old.
        with contextlib.suppress(RedisError, OSError):
            await self._stream.ack(list(entries))

    async def _tick(self) -> None:
        """Attend every live run at intervals: telemetry may stop, notifications may get lost."""
        assert self._loop is not None
        attempts = 0
        while True:
            try:
                await self._loop.attend_live_runs(deciding=self._redis_state != "connected")
                self._urza_state, attempts = "connected", 0
                await asyncio.sleep(self.config.refresh_seconds)
            except TransportError as error:
                self._say_urza_is_away(error)
                await asyncio.sleep(error.retry_after or backoff_seconds(attempts))
                attempts += 1

    async def _beat(self) -> None:
        assert self._urza is not None
        while True:
            with contextlib.suppress(TransportError):  # _tick says that the server is away
                await self._urza.heartbeat(self.config.instance, self.get_status())
            await asyncio.sleep(self.config.heartbeat_seconds)
