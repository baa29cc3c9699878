"""The overhead of observing a training step: Esper, wandb and Lightning's monitor.

    python -m benchmarks.overhead [--quick] [--json FILE] [--host NAME …] [--watcher NAME …]
                                  [--device cuda] [--dtype bf16] [--compile]

Each host model is trained bare and observed in interleaved blocks of one run, so that drift of the
machine affects all equally; ratios are of neighbouring blocks. On a GPU the loop runs free: a block
is timed as a whole, from an idle device to an idle device. The mean ratio counts every step, and
stands with its 95 % interval, by bootstrap over the pairs of blocks. The observers:

- ``none``: the bare loop once more, so what differs is the machine's noise.
- ``esper``: observing, with telemetry to a server that does not answer, the busiest case for a
  trainer; a frame at most every 10 steps. ``supervised`` and ``automatic`` are its other modes in
  local mode, with nothing to do.
- ``wandb``: ``wandb.watch(log="all")`` offline, logging as often as Esper samples (every 10 steps).
- ``lightning``: ``DeviceStatsMonitor(cpu_stats=True)`` in a Lightning loop that logs every 10
  steps, against the same Lightning loop without it.

wandb and Lightning are not in Esper's requirements; missing ones are reported and skipped:
``pip install wandb==0.31.0 lightning==2.6.6 psutil``
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import esper
from benchmarks.place import Place, add_options, place_of
from esper.contracts import RunMode

LONG_STEP_MS = 10.0  # above, the budget is a ratio; below, it is absolute
BUDGET_RATIO = 1.01
BUDGET_ABSOLUTE_MS = 0.05
LOG_EVERY = 10  # steps; Esper's own shortest period of frames
OWN = ("esper", "supervised", "automatic")  # have Esper's budget
DRAWS = 2_000  # of the bootstrap
WARM_UP = 60  # steps: behind the first step at which Esper sets its periods by their cost


@dataclass(frozen=True)
class Host:
    """A model and a batch that it learns."""

    name: str
    about: str
    build: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]


class TokenModel(nn.Module):
    """Two transformer blocks over 256 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, 96)
        block = partial(nn.TransformerEncoderLayer, 96, 4, 384, dropout=0.0, batch_first=True)
        self.blocks = nn.Sequential(block(), block())
        self.head = nn.Linear(96, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.tokens(tokens)))
        return logits.flatten(0, 1)


class Block(nn.Module):
    """Pre-norm attention and feed-forward of GPT-2."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.attn_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.c_fc, self.mlp_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        batch, time_, width = x.shape
        shape = (batch, time_, self.heads, width // self.heads)
        parts = self.c_attn(self.ln_1(x)).chunk(3, -1)
        q, k, v = (part.view(shape).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_proj(mixed.transpose(1, 2).reshape(x.shape))
        y: Tensor = x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x))))
        return y


class Gpt(nn.Module):
    """GPT-2 without dropout; 124 M parameters with its own sizes."""

    def __init__(self, *, width: int, depth: int, heads: int, vocabulary: int, time_: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(time_, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.ln_f, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        logits: Tensor = self.head(self.ln_f(self.blocks(x)))
        return logits.flatten(0, 1)


class Thousand(nn.Module):
    """1,000 small layers with residual connections."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(1000))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + 0.03 * F.relu(layer(x))
        y: Tensor = self.head(x)
        return y


GPT_2 = {"width": 768, "depth": 12, "heads": 12, "vocabulary": 50257, "time_": 512}
GPT_SMALL = {"width": 192, "depth": 4, "heads": 4, "vocabulary": 1024, "time_": 64}


def gpt_host(device: str) -> Host:
    """GPT-2 as it is on a GPU; on a CPU scaled down to steps of some 60 ms."""
    sizes, rows = (GPT_2, 8) if device == "cuda" else (GPT_SMALL, 4)
    words, time_ = sizes["vocabulary"], sizes["time_"]
    return Host(
        "gpt",
        f"GPT-2, width {sizes['width']}, {sizes['depth']} blocks, {rows} x {time_} tokens",
        lambda: Gpt(**sizes),
        lambda: (torch.randint(words, (rows, time_)), torch.randint(words, (rows * time_,))),
    )


def perceptron() -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(128, 128), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(128, 10))


def convolutions() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 24, 3, padding=1), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Conv2d(24, 24, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))


HOSTS = (
    Host(
        "perceptron",
        "short steps: 5 linear layers",
        perceptron,
        lambda: (torch.randn(64, 128), torch.randint(10, (64,))),
    ),
    Host(
        "transformer",
        "long steps: 2 transformer blocks",
        TokenModel,
        lambda: (torch.randint(256, (8, 64)), torch.randint(256, (8 * 64,))),
    ),
    Host(
        "convolutions",
        "20 ms steps: 4 convolutions",
        convolutions,
        lambda: (torch.randn(10, 3, 32, 32), torch.randint(10, (10,))),
    ),
    Host(
        "thousand",
        "1,000 layers of width 32",
        Thousand,
        lambda: (torch.randn(64, 32), torch.randint(10, (64,))),
    ),
)


def hosts_for(device: str) -> tuple[Host, ...]:
    return (*HOSTS, gpt_host(device))


class Watcher(Protocol):
    """An observer of a plain loop."""

    def step(self, loss: Tensor) -> None: ...

    def close(self) -> None: ...


class EsperWatcher:
    """Observes, with a server address that does not answer."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        unreachable = "http://127.0.0.1:9"
        self._session = esper.attach(
            model,
            optimizer,
            run="overhead",
            server=unreachable,
            token="esp_x",  # noqa: S106 - never checked
            verbose=False,
        )
        self.step = self._session.step

    def close(self) -> None:
        self._session.close(timeout=0.1)


class ActingWatcher:
    """May change the model; without held-out losses and findings it does not."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, mode: RunMode
    ) -> None:
        self._session = esper.attach(model, optimizer, run="overhead", mode=mode, verbose=False)
        self.step = self._session.step

    def close(self) -> None:
        if self._session.adaptations or self._session.remedies:
            raise AssertionError(f"the model was changed: {self._session}")
        self._session.close()


class WandbWatcher:
    """``wandb.watch(log="all")``, offline."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._wandb: Any = importlib.import_module("wandb")
        self._directory = tempfile.TemporaryDirectory(prefix="esper-wandb-")
        settings = self._wandb.Settings(silent=True, console="off")
        self._run = self._wandb.init(
            project="overhead", mode="offline", dir=self._directory.name, settings=settings
        )
        self._wandb.watch(model, log="all", log_freq=LOG_EVERY)

    def step(self, loss: Tensor) -> None:
        self._wandb.log({"loss": loss})

    def close(self) -> None:
        self._run.finish()
        self._directory.cleanup()


class PlainLoop:
    """One loop as a user writes it; without an observer it is bare."""

    def __init__(
        self, host: Host, place: Place, watch: Callable[..., Watcher] | None = None
    ) -> None:
        torch.manual_seed(0)
        self.model = place.put(host.build())
        self.call = place.call(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.batch = place.batch(host.batch())
        self.place = place
        self.watcher = watch(self.call, self.optimizer) if watch else None
        self.in_calls: list[float] = []  # milliseconds in the watcher's own call

    def block(self, steps: int) -> list[float]:
        """Milliseconds of each step; on a GPU, their mean in the block."""
        if not self.place.is_gpu:
            return [self._step() for _ in range(steps)]
        self.place.finish()
        started = time.perf_counter()
        for _ in range(steps):
            self._step()
        self.place.finish()
        return [(time.perf_counter() - started) * 1e3 / steps]

    def close(self) -> None:
        if self.watcher is not None:
            self.watcher.close()

    def _step(self) -> float:
        started = self.place.now()
        with self.place.precision():
            loss = F.cross_entropy(self.call(self.batch[0]), self.batch[1])
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()
        if self.watcher is not None:
            called = self.place.now()
            self.watcher.step(loss)
            self.in_calls.append((self.place.now() - called) * 1e3)
        return (self.place.now() - started) * 1e3


class LightningLoop:
    """The same training by a Lightning Trainer; a step lasts from one batch's start to the next."""

    def __init__(self, host: Host, *, monitored: bool) -> None:
        lightning = importlib.import_module("lightning.pytorch")
        callbacks = importlib.import_module("lightning.pytorch.callbacks")
        loggers = importlib.import_module("lightning.pytorch.loggers")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        self._directory = tempfile.TemporaryDirectory(prefix="esper-lightning-")
        torch.manual_seed(0)
        self._module, self._starts = _lightning_module(lightning, host)
        self._batch = host.batch()
        self._trainer = lightning.Trainer(
            max_epochs=0,
            accelerator="cpu",
            logger=loggers.CSVLogger(self._directory.name),
            log_every_n_steps=LOG_EVERY,
            callbacks=[callbacks.DeviceStatsMonitor(cpu_stats=True)] if monitored else [],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    def block(self, steps: int) -> list[float]:
        """Milliseconds of each step."""
        self._starts.clear()
        self._trainer.fit_loop.max_epochs += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of data workers and the like
            # A plain list would be taken for a list of loaders.
            loader: Any = DataLoader([self._batch] * (steps + 1), batch_size=None)  # type: ignore[arg-type]
            self._trainer.fit(self._module, loader)
        pairs = zip(self._starts, self._starts[1:], strict=False)
        return [(later - earlier) * 1e3 for earlier, later in pairs]

    def close(self) -> None:
        self._directory.cleanup()


def _lightning_module(lightning: Any, host: Host) -> tuple[Any, list[float]]:
    starts: list[float] = []

    class Trained(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = host.build()

        def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
            starts.append(time.perf_counter())
            loss = F.cross_entropy(self.model(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-4)

    return Trained(), starts


class Loop(Protocol):
    """Trains a number of steps and returns the time of each."""

    def block(self, steps: int) -> list[float]: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Timing:
    """Milliseconds of single steps, in blocks, bare and observed in turns."""

    bare: list[list[float]]
    watched: list[list[float]]
    calls: list[float] = field(default_factory=list)  # in the watcher's own call, each step

    def mean_ratio(self) -> tuple[float, float, float]:
        """Time of all steps, watched / bare, and the ends of its interval.

        Means, not medians, because work in every tenth step counts too.
        """
        times_B2 = np.array(
            [
                (statistics.fmean(watched), statistics.fmean(bare))
                for bare, watched in zip(self.bare, self.watched, strict=True)
            ]
        )
        blocks = len(times_B2)
        draws_DB = np.random.default_rng(0).integers(blocks, size=(DRAWS, blocks))
        sums_D2 = times_B2[draws_DB].sum(axis=1)
        low, high = np.quantile(sums_D2[:, 0] / sums_D2[:, 1], (0.025, 0.975))
        watched, bare = times_B2.sum(axis=0)
        return float(watched / bare), float(low), float(high)

    @property
    def typical_ratios(self) -> list[float]:
        """Watched / bare median of each pair: the overhead of a step without a sample."""
        return [
            statistics.median(watched) / statistics.median(bare)
            for bare, watched in zip(self.bare, self.watched, strict=True)
        ]


def acting(mode: RunMode) -> Make:
    return lambda host, place: PlainLoop(host, place, partial(ActingWatcher, mode=mode))


Make = Callable[[Host, Place], Loop]
WATCHERS: dict[str, tuple[str, Make, Make]] = {
    "none": ("", PlainLoop, PlainLoop),
    "esper": ("", PlainLoop, lambda host, place: PlainLoop(host, place, EsperWatcher)),
    "supervised": ("", PlainLoop, acting(RunMode.SUPERVISED)),
    "automatic": ("", PlainLoop, acting(RunMode.AUTOMATIC)),
    "wandb": ("wandb", PlainLoop, lambda host, place: PlainLoop(host, place, WandbWatcher)),
    "lightning": (
        "lightning",
        lambda host, place: LightningLoop(host, monitored=False),
        lambda host, place: LightningLoop(host, monitored=True),
    ),
}
CPU = Place()


def measure(
    *,
    quick: bool = False,
    watchers: Sequence[str] = tuple(WATCHERS),
    hosts: Sequence[Host] = HOSTS,
    place: Place = CPU,
) -> list[dict[str, Any]]:
    """One row for each host and watcher: step times, ratio to the bare loop, and the budget."""
    rows = []
    for host in hosts:
        for watcher in watchers:
            needs, bare, watched = WATCHERS[watcher]
            if needs and importlib.util.find_spec(needs) is None:
                rows.append({"host": host.name, "watcher": watcher, "missing": needs})
                continue
            if watcher == "lightning" and place != CPU:
                continue  # its Trainer would choose device and precision itself
            seconds = 12.0 if quick else 60.0
            timing = _time(bare(host, place), watched(host, place), seconds=seconds)
            rows.append({"host": host.name, "watcher": watcher, **_summary(timing)})
    return rows


def _time(bare: Loop, watched: Loop, *, seconds: float) -> Timing:
    torch.set_num_threads(1)
    bare.block(WARM_UP)
    watched.block(WARM_UP)
    steps = max(10, int(200 / statistics.median(bare.block(10))))
    timing = Timing([], [])
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        timing.bare.append(bare.block(steps))
        timing.watched.append(watched.block(steps))
    bare.close()
    watched.close()
    timing.calls.extend(getattr(watched, "in_calls", [])[WARM_UP:])
    return timing


def _summary(timing: Timing) -> dict[str, Any]:
    bare_ms = [step for block in timing.bare for step in block]
    watched_ms = [step for block in timing.watched for step in block]
    bare = statistics.median(bare_ms)
    is_long = bare >= LONG_STEP_MS
    # Pairs of neighbouring blocks cancel slow drift of the machine.
    typical = statistics.median(timing.typical_ratios)
    mean, low, high = timing.mean_ratio()
    return {
        "p50": statistics.median(watched_ms),
        "p95": _percentile(watched_ms, 0.95),
        "p99": _percentile(watched_ms, 0.99),
        "bare_p50": bare,
        "ratio": typical,
        "mean_ratio": mean,
        "mean_ratio_low": low,
        "mean_ratio_high": high,
        "absolute_ms": bare * (typical - 1.0),
        "mean_absolute_ms": statistics.fmean(bare_ms) * (mean - 1.0),
        "call_p50": statistics.median(timing.calls) if timing.calls else None,
        "call_mean": statistics.fmean(timing.calls) if timing.calls else None,
        "unit": "ms",
        "budget": f"<= {BUDGET_RATIO} x bare" if is_long else f"<= {BUDGET_ABSOLUTE_MS} ms more",
        "kept": typical <= BUDGET_RATIO
        if is_long
        else bare * (typical - 1.0) <= BUDGET_ABSOLUTE_MS,
        "n": len(watched_ms),
    }


def _percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def show(rows: Sequence[dict[str, Any]]) -> str:
    """A table for a terminal."""
    lines = [
        f"{'host':14}{'watcher':11}{'bare p50':>10}{'watched':>9}{'p50 ratio':>11}"
        f"{'mean ratio':>28}{'more':>9}{'mean more':>11}{'call p50':>10}{'call mean':>11}  budget"
    ]
    for row in rows:
        head = f"{row['host']:14}{row['watcher']:11}"
        if "missing" in row:
            lines.append(f"{head}{row['missing']} is not installed")
            continue
        mean = (
            f"{row['mean_ratio']:.4f} ({row['mean_ratio_low']:.4f} to {row['mean_ratio_high']:.4f})"
        )
        budget = f"{row['budget']}: {'kept' if row['kept'] else 'NOT KEPT'}"
        lines.append(
            f"{head}{row['bare_p50']:>10.3f}{row['p50']:>9.3f}{row['ratio']:>11.4f}"
            f"{mean:>28}{row['absolute_ms']:>9.3f}{row['mean_absolute_ms']:>11.3f}"
            f"{_known(row['call_p50']):>10}{_known(row['call_mean']):>11}"
            f"  {budget if row['watcher'] in OWN else '-'}"
        )
    return "\n".join([*lines, "milliseconds a step; one torch thread"])


def _known(milliseconds: float | None) -> str:
    return "-" if milliseconds is None else f"{milliseconds:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--host", nargs="+", choices=[host.name for host in hosts_for("cpu")])
    parser.add_argument("--watcher", nargs="+", choices=WATCHERS, default=list(WATCHERS))
    add_options(parser)
    args = parser.parse_args()
    os.environ.setdefault("WANDB_SILENT", "true")
    place = place_of(args)
    hosts = [h for h in hosts_for(place.device) if args.host is None or h.name in args.host]
    rows = measure(quick=args.quick, watchers=args.watcher, hosts=hosts, place=place)
    print(show(rows), place, sep="\n")
    if args.json:
        named = {f"{row['host']}, {row['watcher']}": row for row in rows}
        args.json.write_text(json.dumps({"machine": str(place), **named}, indent=2))


if __name__ == "__main__":
    main()
