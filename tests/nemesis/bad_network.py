"""A TCP proxy between trainers and server: it delays, cuts, loses answers, and duplicates.

HTTP requests are repeated whole, on a second connection, as a retry would repeat them. Of a
websocket, whole messages of the server are dropped or sent twice.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from contextlib import closing, suppress
from dataclasses import dataclass

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
_CLOSED = (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError)


@dataclass(frozen=True, kw_only=True)
class Weather:
    """What the network does, by chance; ``delay`` in seconds."""

    delay: float = 0.0
    cut: float = 0.0  # before a request is passed on
    lose_answer: float = 0.0  # the request was done, and the client does not learn it
    repeat: float = 0.0  # a request is done twice, or a message of the server comes twice
    drop: float = 0.0  # a message of the server


FAIR = Weather()
POOR = Weather(delay=0.05, cut=0.01, lose_answer=0.02, repeat=0.05, drop=0.1)
STORM = Weather(delay=0.5, cut=0.3, lose_answer=0.2, repeat=0.3, drop=0.5)


class BadNetwork:
    """Listens on ``port`` and passes on to ``target``, in a thread of its own."""

    def __init__(self, port: int, target: int, seed: int) -> None:
        self.port, self._target = port, target
        self.weather = FAIR
        self.done: Counter[str] = Counter()  # what it did, for the report
        self._random = random.Random(seed)
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bad-network", daemon=True)

    def start(self) -> None:
        self._thread.start()
        assert self._started.wait(300)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def cut_all(self) -> None:
        """Close every connection that is open."""
        self._loop.call_soon_threadsafe(self._cut_all)

    def _cut_all(self) -> None:
        self.done["connections cut"] += len(self._open)
        for writer in list(self._open):
            writer.transport.abort()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(
            asyncio.start_server(self._serve, "127.0.0.1", self.port)
        )
        self._started.set()
        self._loop.run_forever()
        server.close()
        self._cut_all()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0.1))
        self._loop.close()

    def _draw(self, chance: float, name: str) -> bool:
        happens = self._random.random() < chance
        self.done[name] += happens
        return happens

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            upstream = await asyncio.open_connection("127.0.0.1", self._target)
        except BaseException as error:
            writer.close()
            if isinstance(error, OSError):
                return
            raise
        self._open.add(writer)
        connection = _Connection(self, (reader, writer), upstream)
        try:
            await connection.live()
        except asyncio.CancelledError:
            pass
        finally:
            self._open.discard(writer)
            writer.close()
            upstream[1].close()

    async def repeat(self, request: bytes) -> None:
        """Do a request once more, and forget the answer."""
        with suppress(*_CLOSED, TimeoutError):
            reader, writer = await asyncio.open_connection("127.0.0.1", self._target)
            with closing(writer):
                writer.write(request)
                async with asyncio.timeout(20):
                    await reader.readuntil(b"\r\n\r\n")


class _Connection:
    def __init__(self, network: BadNetwork, client: Streams, server: Streams) -> None:
        self._network = network
        self._client, self._server = client, server
        self._loses_answer = False
        self._is_websocket = False
        self._repeats: set[asyncio.Task[None]] = set()

    async def live(self) -> None:
        tasks = [asyncio.create_task(self._upwards()), asyncio.create_task(self._downwards())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _upwards(self) -> None:
        with suppress(*_CLOSED):
            while not self._is_websocket:
                request = await _request(self._client[0])
                weather = self._network.weather
                await asyncio.sleep(weather.delay * self._network._random.random())
                if self._network._draw(weather.cut, "requests cut"):
                    return
                self._is_websocket = b"upgrade: websocket" in request.lower()
                if not self._is_websocket:
                    if self._network._draw(weather.repeat, "requests repeated"):
                        task = asyncio.create_task(self._network.repeat(request))
                        self._repeats.add(task)
                        task.add_done_callback(self._repeats.discard)
                    self._loses_answer = self._network._draw(weather.lose_answer, "answers lost")
                self._server[1].write(request)
            while data := await self._client[0].read(65536):
                self._server[1].write(data)

    async def _downwards(self) -> None:
        with suppress(*_CLOSED):
            while not self._is_websocket:
                data = await self._server[0].read(65536)
                if not data or self._loses_answer:
                    return
                self._client[1].write(data)
                if self._is_websocket:
                    # What came behind the head of the answer is the first message, passed on whole.
                    break
            while True:
                message = await _message(self._server[0])
                weather = self._network.weather
                await asyncio.sleep(weather.delay * self._network._random.random())
                if message[0] & 0x0F != 1:  # not text: a ping, a pong or a close
                    self._client[1].write(message)
                    continue
                if self._network._draw(weather.drop, "messages dropped"):
                    continue
                self._client[1].write(message)
                if self._network._draw(weather.repeat, "messages repeated"):
                    self._client[1].write(message)


async def _request(reader: asyncio.StreamReader) -> bytes:
    """One HTTP request with its body."""
    head = await reader.readuntil(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return head + await reader.readexactly(int(line.partition(b":")[2]))
    return head


async def _message(reader: asyncio.StreamReader) -> bytes:
    """One frame of a websocket, as a server sends it: without a mask."""
    head = await reader.readexactly(2)
    length = head[1] & 0x7F
    more = await reader.readexactly({126: 2, 127: 8}.get(length, 0))
    if more:
        length = int.from_bytes(more)
    return head + more + await reader.readexactly(length)
