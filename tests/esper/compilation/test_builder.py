"""A builder child that fails affects only itself, and nothing is signed unchecked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from esper.compilation.builder import Builder, BuilderPool, BuildLimits, BuildOrder
from esper.contracts import KernelDraft, LayerInfo
from esper.exceptions import BuilderLostError, KernelBuildError

LAYER = LayerInfo(
    name="fc",
    kind="Linear",
    in_shape=(4, 32),
    out_shape=(4, 32),
    dtype="float32",
    parameters=33 * 32,
    graftable=True,
    features_in=32,
    features_out=32,
)
ORDER = BuildOrder(LAYER, "proj_lora_64", {"rank": 4}, "cpu")
ODD = (sys.executable, str(Path(__file__).with_name("odd_builder.py")))
# Seconds end a build that would not end by itself; others have as long as a busy machine takes.
SECONDS, SHORT_SECONDS, MEMORY_MIB = 300.0, 1.0, 256


@pytest.fixture(scope="module")
def pool() -> Iterator[BuilderPool]:
    """Children that go wrong where the ordered layer is named for it, else real ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ESPER_KERNEL_KEY_FILE", "/somewhere/kernel.key")
        patch.setenv("SECRET_KEY", "secret")
        pool = BuilderPool(BuildLimits(SECONDS, MEMORY_MIB), size=2, argv=ODD)
        yield pool
        pool.close()


@pytest.fixture
def builder(pool: BuilderPool) -> Builder:
    return pool.ready()


def wrong(behaviour: str) -> BuildOrder:
    """An order for a layer that ``odd_builder.py`` goes wrong at."""
    return replace(ORDER, layer=replace(LAYER, name=behaviour))


def drafted(builder: Builder, order: BuildOrder = ORDER) -> KernelDraft:
    return builder.draft(order, on_step=lambda *_: None, stopped=lambda: False)


def test_a_warm_child_drafts_a_kernel_tells_its_steps_and_takes_the_next_order(
    builder: Builder,
) -> None:
    steps: list[str] = []
    description = builder.wait_ready()

    key, forecast = builder.specify(ORDER)
    draft = builder.draft(ORDER, on_step=lambda step, _: steps.append(step), stopped=lambda: False)
    again = drafted(builder, replace(ORDER, blueprint="proj_ia3", config={}))

    assert steps == ["forecast", "built", "certified", "measured"]
    assert draft.key == key
    assert draft.report.forecast.to_wire() == forecast.to_wire()  # NaN is not equal to itself
    assert draft.report.certificate.passed
    assert draft.report.measured.forward_p50_ms > 0
    assert draft.report.measured.backward_p95_ms >= draft.report.measured.backward_p50_ms > 0
    assert draft.report.measured.peak_memory_mib > 0
    assert again.spec.blueprint == "proj_ia3"
    assert description.devices[0]["capability"] == "cpu"
    assert description.versions["torch"]
    assert description.network == "seccomp"


@pytest.mark.parametrize(
    ("behaviour", "says"),
    [
        ("segfault", "killed by SIGSEGV"),
        ("frozen", "did not finish within 1 s"),
        ("garbage", "files that are not a kernel"),
        ("linked", "files that are not a kernel"),
    ],
)
def test_a_failed_child_is_ended_and_its_end_is_described(
    builder: Builder, behaviour: str, says: str
) -> None:
    if "within" in says:
        builder.limits = replace(builder.limits, seconds=SHORT_SECONDS)
    with pytest.raises(BuilderLostError, match=says) as lost:
        drafted(builder, wrong(behaviour))

    assert not lost.value.permanent
    assert not lost.value.wanted
    assert not builder.alive
    if behaviour == "segfault":
        assert "the last words" in lost.value.log
        assert "Segmentation fault" in lost.value.log


@pytest.mark.parametrize("behaviour", ["forged_certificate", "other_blueprint", "other_capability"])
def test_what_was_not_ordered_or_not_certified_is_never_signed(
    builder: Builder, behaviour: str
) -> None:
    with pytest.raises(KernelBuildError, match=r"certificate|blueprint|another layer"):
        drafted(builder, wrong(behaviour))


def test_a_build_beyond_its_memory_fails_and_the_child_lives_on(builder: Builder) -> None:
    with pytest.raises(KernelBuildError, match="memory") as failed:
        drafted(builder, wrong("greedy"))

    assert not failed.value.permanent
    assert builder.alive


def test_a_child_without_a_limit_on_addresses_is_killed_when_it_grows_too_large() -> None:
    builder = Builder(BuildLimits(SECONDS, MEMORY_MIB), (*ODD, "--unlimited"))

    with pytest.raises(BuilderLostError, match=r"took .* MiB, at most 256 MiB"):
        drafted(builder, wrong("hoarding"))

    assert not builder.alive


def test_a_child_has_no_key_no_network_and_a_directory_of_its_own(builder: Builder) -> None:
    with pytest.raises(KernelBuildError, match=r"found \[\], in .*esper-builder-"):
        drafted(builder, wrong("curious"))


def test_what_a_blueprint_prints_is_no_answer(builder: Builder) -> None:
    assert drafted(builder, wrong("chatty")).spec.blueprint == "proj_lora_64"


def test_a_cancelled_build_ends_with_its_child(builder: Builder) -> None:
    started = time.monotonic()

    with pytest.raises(BuilderLostError, match="no longer needed") as stopped:
        builder.draft(
            wrong("endless"),
            on_step=lambda *_: None,
            stopped=lambda: time.monotonic() > started + 0.5,
        )

    assert stopped.value.wanted
    assert not builder.alive


def test_what_cannot_be_built_is_refused_by_a_child_that_lives_on(builder: Builder) -> None:

    for order, permanent in (
        (replace(ORDER, blueprint="no_such"), True),
        (replace(ORDER, config={"rank": -1}), True),
        (replace(ORDER, layer=replace(LAYER, device="cuda:97")), False),
        (replace(ORDER, layer=replace(LAYER, device="no device")), False),
        (replace(ORDER, capability="cuda.sm90"), False),
    ):
        with pytest.raises(KernelBuildError) as refused:
            builder.specify(order)
        assert refused.value.permanent is permanent, order

    assert drafted(builder).report.certificate.passed


def test_one_cpu_may_serve_several_capabilities_and_their_kernels_stay_apart(
    builder: Builder,
) -> None:

    one, _ = builder.specify(ORDER)
    other, _ = builder.specify(replace(ORDER, capability="cpu.avx2"))

    assert (one.capability, other.capability) == ("cpu", "cpu.avx2")
    assert one.hash != other.hash


def test_the_next_warm_child_takes_over_when_one_is_lost(pool: BuilderPool) -> None:
    first = pool.ready()
    waiting = pool._builders[1]
    waiting.wait_ready()
    os.kill(first.process.pid, signal.SIGKILL)
    with pytest.raises(BuilderLostError, match="killed by SIGKILL"):
        drafted(first)
    second = pool.ready()
    assert second is waiting  # a new child would have to import torch first
    assert drafted(second).report.certificate.passed
    assert len(pool._builders) == 2


def test_a_child_dies_with_the_worker_that_was_killed() -> None:
    program = (
        "from esper.compilation.builder import Builder, BuildLimits\n"
        "builder = Builder(BuildLimits())\n"
        "print(builder.process.pid, flush=True)\n"
        "builder.wait_ready()\nprint('ready', flush=True)\ninput()\n"
    )
    worker = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with worker:
        assert worker.stdout is not None
        child = int(worker.stdout.readline())
        assert worker.stdout.readline() == "ready\n"
        worker.kill()
    deadline = time.monotonic() + 120
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        if ") Z " in Path(f"/proc/{child}/stat").read_text():
            return  # dead; whoever adopted it has yet to look
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()


def test_a_worker_that_has_kernels_built_does_not_import_torch_itself() -> None:
    program = (
        "import sys\nfrom esper.compilation import BuilderPool\nfrom esper.compilation import "
        "bundle, store, verify\nprint('torch' in sys.modules)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=600, check=True
    )
    assert answer.stdout.strip() == "False"
