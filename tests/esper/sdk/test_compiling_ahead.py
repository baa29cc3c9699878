"""A graft into compiled code: its code is compiled beside the training, or it comes as without."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import esper
from esper import blueprints
from esper.compilation import ahead
from esper.compilation.ahead import NotPreparedError, Preparation, RegionCall
from esper.grafting.compiled import Compilation
from esper.sdk import compiling_ahead
from tests.esper.sdk.test_local_loop import EAGER, Bottleneck

FAILS = "#!/bin/sh\necho 'no compiler here' >&2\nexit 3\n"
HANGS = "#!/bin/sh\nexec sleep 1000\n"
ANSWERS = """#!/bin/sh
echo '{"cold_seconds": 3.0, "warm_seconds": 0.25}'
"""
# The process itself, changed: on the machine of the tests no processor may be idle for long.
BUSY_TOO = """
from esper.compilation import ahead_child, confinement
confinement.run_when_idle = lambda: None
ahead_child.main()
"""
TELLS_ITS_PRIORITY = f"""#!{sys.executable}
import os, sys
from esper.compilation import ahead_child, confinement
def look():
    child = os.fork()
    if not child:
        os._exit(os.sched_getscheduler(0))
    of_child = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(f"it: {{os.sched_getscheduler(0)}} {{os.nice(0)}}; child: {{of_child}}.", flush=True)
    os._exit(3)  # before anything that takes long: no processor of the tests is idle
confinement.close_network = look
sys.argv = sys.argv[2:]
ahead_child.main()
"""


class Net(nn.Module):
    """Its class cannot be imported by another process, as those of a script."""

    __module__ = "__main__"

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 16)
        self.fc2 = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


class Run:
    """A compiled model in training."""

    def __init__(self, backend: str = "eager", *, in_place: bool = False) -> None:
        torch.manual_seed(0)
        torch.compiler.reset()
        self.model = Net()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.session = esper.attach(
            self.model, self.optimizer, mode="supervised", verbose=False, server=""
        )
        if in_place:
            self.model.compile(backend=backend)
            self.compiled: Callable[..., Tensor] = self.model
        else:
            self.compiled = torch.compile(self.model, backend=backend)
        self.x = torch.randn(4, 8)

    def train(self, steps: int = 2) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            loss = self.compiled(self.x).square().mean()
            torch.autograd.backward(loss)
            self.optimizer.step()
            self.session.step(loss)

    def train_until(self, ready: Callable[[], bool]) -> None:
        while not ready():
            time.sleep(0.05)  # the processor is needed for what is waited for
            self.train(1)

    def prepare(self) -> bool:
        return self.session.prepare("fc1", "proj_lora_64")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], list[Any]]:
    """Puts a script in the place of the process that compiles; returns what was started."""

    def put(script: str) -> list[Any]:
        program, started = tmp_path / "program", []
        program.write_text(script)
        program.chmod(0o755)
        monkeypatch.setattr(ahead.sys, "executable", str(program))
        # The backend of these tests compiles nothing, so that they are quick.
        settings = {"in_place": False, "dynamic": None, "options": None}
        monkeypatch.setattr(ahead, "_settings_of", lambda region: settings)

        class Watched(Preparation):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                started.append(self._process)

        monkeypatch.setattr(compiling_ahead, "Preparation", Watched)
        return started

    return put


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(
        "esper.sdk.announcing.Announcer._say", lambda self, line, **kwargs: lines.append(line)
    )
    return lines


@pytest.mark.process
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit, inside of Inductor
@pytest.mark.parametrize("in_place", [False, True])
def test_the_trainer_finds_the_code_in_the_cache(
    in_place: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    program = tmp_path / "program.py"
    program.write_text(BUSY_TOO)
    monkeypatch.setattr(ahead, "PROGRAM", (str(program),))
    run = Run("inductor", in_place=in_place)
    run.train()
    assert not run.prepare()
    run.train_until(run.prepare)
    forecast = run.session.forecast_pause("fc1", "proj_lora_64")
    assert forecast is not None
    assert forecast.prepared, forecast
    assert forecast.seconds < forecast.unprepared_seconds
    libraries = set(tmp_path.rglob("*.so"))
    assert libraries
    counters.clear()
    receipt = run.session.graft("fc1", "proj_lora_64")
    run.train()
    assert counters["aot_autograd"]["autograd_cache_hit"] == 1
    assert counters["inductor"]["fxgraph_cache_miss"] == 0
    assert set(tmp_path.rglob("*.so")) == libraries, "no C++ was compiled"
    run.session.undo(receipt)
    counters.clear()
    run.train()
    assert not counters["aot_autograd"], "the code without the graft runs again"


def test_a_process_that_fails_leaves_the_graft_as_it_was_before(
    stand_in: Callable[[str], list[Any]], said: list[str]
) -> None:
    started = stand_in(FAILS)
    run = Run()
    run.train()
    run.train_until(run.prepare)
    assert [process.returncode for process in started] == [3]
    assert any("expected pause" in line and "no compiler here" in line for line in said), said
    assert run.session.graft("fc1", "proj_lora_64").present
    run.train()


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="the system has no idle policy")
def test_the_process_and_its_compilers_take_only_idle_processors(
    stand_in: Callable[[str], list[Any]], said: list[str]
) -> None:
    started = stand_in(TELLS_ITS_PRIORITY)
    run = Run()
    run.train()
    run.train_until(lambda: run.prepare() or bool(started))
    # Linux shares the processors among sessions first, whatever the priorities inside of them.
    assert os.getsid(started[0].pid) == os.getsid(0)
    assert os.getpgid(started[0].pid) == started[0].pid
    started[0].wait()
    run.train_until(run.prepare)
    idle = os.SCHED_IDLE
    assert any(f"it: {idle} 19; child: {idle}." in line for line in said), said


def test_the_forecast_learns_from_the_pauses_of_the_run(
    stand_in: Callable[[str], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(ANSWERS)
    run = Run()
    run.train()
    assert compiling_ahead._compiling_seconds() > 0
    seconds = [10.0]
    monkeypatch.setattr(compiling_ahead, "_compiling_seconds", lambda: seconds[0])

    def forecast(layer: str) -> float:
        run.train_until(lambda: run.session.prepare(layer, "proj_lora_64"))
        found = run.session.forecast_pause(layer, "proj_lora_64")
        assert found is not None
        assert found.prepared
        return found.seconds

    assert forecast("fc1") == 0.25
    receipt = run.session.graft("fc1", "proj_lora_64")
    seconds[0] += 0.75
    run.train(1)
    assert forecast("fc2") == 0.75
    seconds[0] += 9.0  # another compilation, later
    run.train(1)
    run.session.undo(receipt)
    run.train(1)
    assert forecast("fc2") == 0.75


def test_a_process_that_hangs_is_ended_at_the_limit(
    stand_in: Callable[[str], list[Any]], said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = stand_in(HANGS)
    run = Run()
    run.train()
    run.train_until(lambda: run.prepare() or bool(started))
    assert started[0].poll() is None
    monkeypatch.setattr(compiling_ahead, "LIMIT_SECONDS", 0.0)
    run.train(1)
    assert run.prepare()
    assert started[0].returncode is not None, "it was ended, and waited for"
    assert any("expected pause" in line for line in said)


@pytest.mark.parametrize("end", ["close", "detach"])
def test_no_process_outlives_the_session(stand_in: Callable[[str], list[Any]], end: str) -> None:
    started = stand_in(HANGS)
    run = Run()
    run.train()
    run.train_until(lambda: run.prepare() or bool(started))
    getattr(run.session, end)()
    with pytest.raises(ProcessLookupError):
        os.kill(started[0].pid, 0)


def test_a_graft_that_cannot_wait_ends_the_process_and_comes(
    stand_in: Callable[[str], list[Any]], said: list[str]
) -> None:
    started = stand_in(HANGS)
    run = Run()
    run.train()
    run.train_until(lambda: run.prepare() or bool(started))
    assert run.session.graft("fc1", "proj_lora_64").present
    assert started[0].returncode is not None
    assert any("the graft came before that had ended" in line for line in said)


def _holds_a_lock(run: Run) -> None:
    run.model.lock = threading.Lock()


def _has_a_hook(run: Run) -> None:
    run.model.fc1.register_forward_hook(lambda *args: None)


def _has_no_cache(run: Run) -> None:
    torch._inductor.config.fx_graph_cache = False


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_holds_a_lock, "cannot be sent"),
        (_has_a_hook, "a hook of the program"),
        (_has_no_cache, "cache on disk is switched off"),
        (lambda run: None, "keeps no compiled code on disk"),
    ],
)
def test_what_cannot_be_prepared_is_grafted_as_before(
    spoil: Callable[[Run], None], reason: str, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if spoil is _holds_a_lock:
        settings = {"in_place": False, "dynamic": None, "options": None}
        monkeypatch.setattr(ahead, "_settings_of", lambda region: settings)
    run = Run()
    run.train()
    spoil(run)
    run.train_until(run.prepare)
    assert any(reason in line for line in said), said
    assert run.session.graft("fc1", "proj_lora_64").present


def test_too_little_memory_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_free_memory", lambda: 1 << 20)
    settings = {"in_place": False, "dynamic": None, "options": None}
    monkeypatch.setattr(ahead, "_settings_of", lambda region: settings)
    run = Run()
    run.train()
    region = Compilation(run.model, run.compiled).region_of("fc1")
    assert region is not None
    call = RegionCall.of(region, (run.x,), {})
    layer = next(layer for layer in run.session.layers if layer.name == "fc1")
    with pytest.raises(NotPreparedError, match="MiB free"):
        Preparation(region, call, layer, "proj_lora_64", {})


def test_an_eager_model_needs_no_preparation() -> None:
    host = Bottleneck()
    with esper.attach(host.model, host.optimizer, mode="supervised", verbose=False) as session:
        host.run(2, session)
        assert session.prepare("0", "proj_lora_64")
        assert session.forecast_pause("0", "proj_lora_64") is None


class Compiler:
    """In the place of :class:`CompilingAhead`: the code is there when it is told so."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.done = False

    def waits(self, operation: Any, **_: Any) -> bool:
        self.asked.append(operation)
        return not self.done

    def begin(self, operation: Any) -> None:
        self.asked.append(operation)

    def tell(self, operation: Any) -> None: ...

    def forecast(self, operation: Any) -> None: ...


def test_preparing_changes_nothing_in_the_training(stand_in: Callable[[str], list[Any]]) -> None:
    started = stand_in(FAILS)

    def weights(*, prepares: bool) -> tuple[list[Tensor], Tensor]:
        run = Run()
        run.train()
        if prepares:
            run.prepare()
        run.train(4)
        run.session.close()
        return [p.detach().clone() for p in run.model.parameters()], torch.get_rng_state()

    (alone, dice), (prepared, same_dice) = weights(prepares=False), weights(prepares=True)
    assert len(started) == 1
    assert all(map(torch.equal, alone, prepared))
    assert torch.equal(dice, same_dice)


def test_an_automatic_run_trains_on_while_the_code_is_compiled() -> None:
    from tests.esper.sdk.test_local_loop import attached

    host, compiler = Bottleneck(), Compiler()
    with attached(host, "automatic", EAGER) as session:
        session._parts.local._ahead = compiler
        host.run_until(lambda: len(compiler.asked) >= 3, session)
        assert session.adaptations == ()
        assert len({id(operation) for operation in compiler.asked}) == 1, "one decision"
        compiler.done = True
        host.run_until(lambda: session.adaptations, session)
        assert session.adaptations[0].blueprint == compiler.asked[0].blueprint.slug


def test_a_supervised_run_compiles_while_the_person_thinks() -> None:
    from tests.esper.sdk.test_local_loop import attached

    host, compiler = Bottleneck(), Compiler()
    with attached(host, "supervised", EAGER) as session:
        session._parts.local._ahead = compiler
        host.run_until(lambda: session.waiting, session)
        assert compiler.asked[0].blueprint is blueprints.get_blueprint(session.waiting[0].blueprint)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    script = sys.modules["__main__"]
    script.Net = Net  # type: ignore[attr-defined]
    with torch._inductor.config.patch(fx_graph_cache=True):  # some tests switch it off
        yield
    del script.Net  # type: ignore[attr-defined]
    torch.compiler.reset()
