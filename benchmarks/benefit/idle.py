"""What Esper costs where it only observes: paired blocks of steps, with it and without it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

import esper
from benchmarks.benefit.hosts import NARROW, digits, perceptron, rows_of
from benchmarks.benefit.narrow import attached
from benchmarks.benefit.training import Run, level
from esper.contracts import RunMode

BLOCK, FIRST, WARM = 10, 60, 300  # steps of a block; steps before the first; for the equality
SIZES = (("64-32-10, batch 32", 32, 32), ("64-1024-1024-10, batch 128", 1024, 128))


@dataclass
class Idle:
    """CPU time of a step with Esper over that without, one ratio for each pair of blocks."""

    name: str
    step_ms: float
    ratios: list[float]


class Plain:
    """A perceptron that learns digits."""

    def __init__(self, width: int, batch: int, *, observed: bool) -> None:
        torch.manual_seed(0)
        deep = (64, width, 10) if width < 100 else (64, width, width, 10)
        self.model = perceptron(*deep)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.batch = batch
        self.session = (
            esper.attach(self.model, self.optimizer, server="", verbose=False) if observed else None
        )

    def block(self, steps: int) -> float:
        """CPU seconds."""
        x, y = digits()
        started = time.process_time()
        for _ in range(steps):
            self.optimizer.zero_grad()
            output = self.model(x[: self.batch])
            loss = torch.nn.functional.cross_entropy(output, y[: self.batch])
            torch.autograd.backward(loss)
            self.optimizer.step()
            value = loss.item()
            if self.session is not None:
                self.session.step(value)
        return time.process_time() - started


def measure(pairs: int) -> list[Idle]:
    found = []
    for name, width, batch in SIZES:
        plain, watched = (Plain(width, batch, observed=seen) for seen in (False, True))
        plain.block(FIRST)
        watched.block(FIRST)
        ratios, seconds = [], []
        for pair in range(pairs):
            # Each comes first as often as the other.
            first, second = (plain, watched) if pair % 2 else (watched, plain)
            times = {id(one): one.block(BLOCK) for one in (first, second)}
            ratios.append(times[id(watched)] / times[id(plain)])
            seconds.append(times[id(plain)])
        if watched.session is not None:
            watched.session.close()
        found.append(Idle(name, 1e3 * sum(seconds) / pairs / BLOCK, ratios))
    return found


def same_to_the_bit(seed: int) -> bool:
    """A run that is observed ends with the loss of one that is not."""
    host = NARROW[0]
    ends = []
    for observed in (True, False):
        run = Run.new(host, rows_of(host, seed, WARM), seed, host.rate)
        if observed:
            with attached(run, RunMode.OBSERVE) as session:

                def on(loss: float, session: esper.Session = session) -> bool:
                    session.step(loss)
                    return False

                run.train(WARM, on)
        else:
            run.train(WARM)
        ends.append(level(run.curve))
    return ends[0] == ends[1]
