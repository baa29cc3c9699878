"""Real processes with a gloo group, which run one function after the other, all the same."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

GROUP_TIMEOUT_S = 300.0
# Imported once for all ranks of this process, which are forked from the server that has done it: a
# rank that imports torch by itself takes three seconds of a processor.
PRELOADED = [
    "pytest",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch._dynamo",
    "esper.sdk.attaching",
    "tests.esper.distributed.rank_pool",
]


class RankPool:
    """``size`` processes. A call that raises on a rank raises here, with that rank's traceback."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []

    def start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        port = free_port()
        for rank in range(self.size):
            mine, theirs = context.Pipe()
            arguments = (rank, self.size, port, theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 500.0) -> list[Any]:
        """What ``function(rank, *args)`` answers on each rank; None for a rank that has died."""
        if not self.pipes:
            self.start()
        for pipe in self.pipes:
            pipe.send((function, args))
        answers = [self._answer(rank, timeout) for rank in range(self.size)]
        wrong = [
            f"rank {rank}:\n{answer}" for rank, (fine, answer) in enumerate(answers) if not fine
        ]
        if wrong:
            self.close()  # who knows what they wait for: the next call gets new ones
            raise AssertionError("\n".join(wrong))
        return [answer for _, answer in answers]

    def _answer(self, rank: int, timeout: float) -> tuple[bool, Any]:
        pipe = self.pipes[rank]
        if not pipe.poll(timeout):
            self.close()
            raise TimeoutError(f"rank {rank} did not answer within {timeout:.0f} s")
        try:
            answer: tuple[bool, Any] = pipe.recv()
        except EOFError:
            return True, None  # the rank is gone, on purpose
        return answer

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.kill()
            process.join(300)
        self.pipes.clear()
        self.processes.clear()


def _serve(rank: int, size: int, port: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    timeout = timedelta(seconds=GROUP_TIMEOUT_S)
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=timeout)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(rank, *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
