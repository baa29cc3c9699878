"""Tier 1: machine code that comes from a worker, is verified, tried, and swapped in beside."""

from __future__ import annotations

import copy
import math
import pickle
import random
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

import esper
from esper import blueprints, grafting
from esper.compilation import (
    CompiledGraft,
    KernelStore,
    Trial,
    build_compiled,
    compile_export,
    load_compiled,
    load_exported,
    native,
    open_compiled,
    open_kernel,
    try_compiled,
)
from esper.compilation.archive import pack_archive, unpack_archive
from esper.compilation.bundle import pack
from esper.compilation.inductor import compiled_key
from esper.compilation.instantiate import instantiate
from esper.contracts import KernelBundle, KernelDraft, KernelSpec, LayerInfo, signing
from esper.contracts.kernels import CODE_FILE
from esper.exceptions import (
    CompilerMissingError,
    ConfigurationError,
    KernelBuildError,
    KernelDigestError,
    KernelError,
    SignatureError,
)
from esper.grafting.slot import slot_of

PRIVATE_KEY = signing.generate_private_key()
TRUSTED_KEY = signing.public_key(PRIVATE_KEY)
ROWS, WIDTH = 8, 16
SLUG = "proj_ia3"  # the smallest there is to compile
LAYER = LayerInfo(
    name="fc",
    kind="Linear",
    in_shape=(ROWS, WIDTH),
    out_shape=(ROWS, WIDTH),
    dtype="float32",
    parameters=WIDTH * (WIDTH + 1),
    graftable=True,
    features_in=WIDTH,
    features_out=WIDTH,
)


@cache
def compiled_bundle() -> KernelBundle:
    """One real compilation for the whole file: it takes seconds."""
    return build_compiled(LAYER, SLUG, private_key=PRIVATE_KEY)


@cache
def compiled_graft() -> CompiledGraft:
    bundle = compiled_bundle()
    return load_compiled(bundle.files, bundle.digest, TRUSTED_KEY)


class Host(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before = nn.Linear(WIDTH, WIDTH)
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.tanh(self.before(x)))  # type: ignore[no-any-return]


class Counted:
    """A compiled graft that counts its calls."""

    def __init__(self, compiled: CompiledGraft) -> None:
        self.compiled, self.calls = compiled, 0

    def fits(self, x: torch.Tensor, y: torch.Tensor) -> bool:
        return self.compiled.fits(x, y)

    def __call__(self, graft: object, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.compiled(graft, x, y)  # type: ignore[arg-type]


@pytest.fixture
def host() -> nn.Module:
    return Host()


def grafted(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> grafting.Receipt:
    spec = open_compiled(compiled_bundle().files, compiled_bundle().digest, TRUSTED_KEY)[1]
    receipt = grafting.apply_graft(
        model,
        LAYER,
        blueprints.get_blueprint(SLUG),
        config=spec.config,
        graft=instantiate(spec, LAYER),
        surroundings=grafting.Surroundings((optimizer,) if optimizer else ()),
        seed=spec.seed,
    )
    with torch.no_grad():  # as after some training: no longer the identity
        for parameter in receipt.graft.parameters():
            parameter.add_(torch.linspace(-0.5, 0.5, parameter.numel()).reshape(parameter.shape))
    return receipt


def speed_up(model: nn.Module) -> Counted:
    counted = Counted(compiled_graft())
    slot = slot_of(model.get_submodule("fc"))
    assert slot is not None
    slot.speed_up(SLUG, counted)
    return counted


def batch() -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(3))


def losses(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(batch()).square().mean()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


def test_a_compiled_kernel_is_signed_says_its_tier_and_what_was_measured() -> None:
    bundle = compiled_bundle()

    key, spec, report, code = open_compiled(bundle.files, bundle.digest, TRUSTED_KEY)

    assert key == compiled_key(LAYER, SLUG, None)
    assert (key.tier, report.tier) == (1, 1)
    assert spec.blueprint == SLUG
    assert 0.01 < report.speedup < 100
    assert report.stage_ms["inductor"] > 0
    assert any(name.endswith(".so") for name in unpack_archive(code))


def test_the_compiled_graft_computes_what_the_eager_one_does_forward_and_backward() -> None:
    spec = open_compiled(compiled_bundle().files, compiled_bundle().digest, TRUSTED_KEY)[1]
    graft = instantiate(spec, LAYER)
    before = copy.deepcopy(graft.state_dict())
    rng, python_rng = torch.get_rng_state(), random.getstate()

    trial = try_compiled(graft, compiled_graft(), LAYER)

    assert trial.equal
    assert trial.max_difference <= trial.tolerance == 1e-4
    assert trial.speedup == pytest.approx(trial.eager_ms / trial.compiled_ms)
    assert torch.equal(torch.get_rng_state(), rng)
    assert random.getstate() == python_rng
    assert all(torch.equal(before[name], tensor) for name, tensor in graft.state_dict().items())
    assert all(parameter.grad is None for parameter in graft.parameters())


class Wrong(CompiledGraft):
    """Right forward; a gradient that is one part in a hundred off."""

    def __call__(self, graft: object, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        out = super().__call__(graft, x, y)  # type: ignore[arg-type]
        return out * 1.01 - (out * 0.01).detach()


def test_a_kernel_with_a_wrong_gradient_is_not_equal_however_fast() -> None:
    spec = open_compiled(compiled_bundle().files, compiled_bundle().digest, TRUSTED_KEY)[1]
    wrong = Wrong(compiled_graft()._code, compiled_graft().key)

    trial = try_compiled(instantiate(spec, LAYER), wrong, LAYER)

    assert not trial.equal
    assert not trial.faster
    assert "differs" in trial.text


@pytest.mark.parametrize(
    ("speedup", "swapped"), [(0.94, False), (1.0, False), (1.049, False), (1.05, True), (2.0, True)]
)
def test_it_takes_over_only_from_one_twentieth_faster(speedup: float, swapped: bool) -> None:
    trial = Trial(speedup, max_difference=1e-7, tolerance=1e-4)

    assert trial.faster is swapped
    assert ("kept eager" in trial.text) is not swapped
    assert not Trial(speedup, max_difference=math.inf, tolerance=1e-4).faster


def test_a_swapped_in_kernel_trains_the_same_parameters(host: nn.Module) -> None:
    eager, compiled = host, copy.deepcopy(host)
    runs = []
    for model in (eager, compiled):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        receipt = grafted(model, optimizer)
        counted = speed_up(model) if model is compiled else None
        runs.append((losses(model, optimizer, 5), list(receipt.graft.parameters()), counted))

    (eager_losses, eager_weights, _), (fast_losses, fast_weights, counted) = runs

    assert counted is not None
    assert counted.calls == 5
    assert fast_losses == pytest.approx(eager_losses, rel=1e-5)
    for mine, theirs in zip(fast_weights, eager_weights, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model(batch()[:3]).sum().backward(),  # the last, smaller batch
        lambda model: torch.no_grad()(model)(batch()),  # evaluation
        lambda model: model.double()(batch().double()).sum().backward(),
        lambda model: torch.autocast("cpu", torch.bfloat16)(model)(batch()).sum().backward(),
    ],
)
def test_a_call_that_it_was_not_compiled_for_runs_eagerly(host: nn.Module, call: object) -> None:
    grafted(host)
    counted = speed_up(host)

    call(host)  # type: ignore[operator]

    assert counted.calls == 0


def test_compiled_code_that_fails_is_dropped_and_the_step_goes_on(
    host: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    grafted(host)
    expected = host(batch())

    class Broken(Counted):
        def __call__(self, graft: object, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("GuardManager check failed")

    slot = slot_of(host.get_submodule("fc"))
    assert slot is not None
    slot.speed_up(SLUG, Broken(compiled_graft()))

    assert torch.equal(host(batch()), expected)
    assert SLUG not in slot._compiled
    assert "not used any more" in caplog.text


def test_hard_undo_is_exact_with_a_kernel_swapped_in(host: nn.Module) -> None:
    optimizer = torch.optim.AdamW(host.parameters())
    losses(host, optimizer, 2)
    expected = {name: tensor.clone() for name, tensor in host.state_dict().items()}
    receipt = grafted(host, optimizer)
    counted = speed_up(host)
    losses(host, optimizer, 3)

    report = receipt.undo()

    assert report.exact
    assert host.state_dict().keys() == expected.keys()
    assert all(torch.equal(expected[name], t) for name, t in host.state_dict().items())
    host(batch())
    assert counted.calls == 3


def test_a_graft_that_comes_after_an_undo_does_not_inherit_old_code(host: nn.Module) -> None:
    receipt = grafted(host)
    counted = speed_up(host)
    receipt.undo(hard=False)

    grafted(host)
    host(batch())

    assert counted.calls == 0


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))  # type: ignore[no-any-return]  # noqa: S301 (our own)


@pytest.mark.parametrize("how", [copy.deepcopy, pickled])
def test_a_copy_carries_the_graft_and_no_machine_code(host: nn.Module, how: object) -> None:
    grafted(host)
    counted = speed_up(host)

    copied = how(host)  # type: ignore[operator]
    slot = slot_of(copied.get_submodule("fc"))

    assert slot is not None
    assert SLUG not in slot._compiled
    torch.testing.assert_close(copied(batch()), host(batch()), rtol=1e-5, atol=1e-6)
    assert counted.calls == 1


def test_a_checkpoint_and_an_export_are_those_of_the_eager_graft(host: nn.Module) -> None:
    grafted(host)
    names = list(host.state_dict())
    with torch.no_grad():
        expected = host(batch())
    speed_up(host)

    exported = esper.export(host)

    assert list(host.state_dict()) == names
    assert [entry["blueprint"] for entry in grafting.structure(host)] == [SLUG]
    torch.testing.assert_close(exported(batch()), expected, rtol=1e-5, atol=1e-6)


def test_a_store_keeps_a_compiled_kernel_with_its_code(tmp_path: Path) -> None:
    store = KernelStore(tmp_path)

    digest = store.put(compiled_bundle())

    assert store.get(digest) == compiled_bundle().files


def test_tiers_are_not_taken_for_one_another() -> None:
    bundle = compiled_bundle()
    without = {name: data for name, data in bundle.files.items() if name != CODE_FILE}
    with pytest.raises(KernelDigestError):
        open_kernel(bundle.files, bundle.digest, TRUSTED_KEY)
    with pytest.raises(KernelDigestError):
        open_kernel(without, bundle.digest, TRUSTED_KEY)
    with pytest.raises(KernelDigestError):
        open_compiled(without, bundle.digest, TRUSTED_KEY)

    key, spec, report, code = open_compiled(bundle.files, bundle.digest, TRUSTED_KEY)
    for other in (replace(report, tier=0), report):
        changed = replace(key, tier=0) if other is report else key
        mixed = pack(KernelDraft(changed, spec, other), private_key=PRIVATE_KEY, code=code)
        with pytest.raises(KernelDigestError, match="different tiers"):
            open_compiled(mixed.files, mixed.digest, TRUSTED_KEY)


def test_code_by_another_signer_or_for_another_machine_is_not_opened() -> None:
    key, spec, report, code = open_compiled(
        compiled_bundle().files, compiled_bundle().digest, TRUSTED_KEY
    )
    foreign = pack(
        KernelDraft(key, spec, report), private_key=signing.generate_private_key(), code=code
    )
    with pytest.raises(SignatureError):
        load_compiled(foreign.files, foreign.digest, TRUSTED_KEY)

    for elsewhere in (
        replace(key, device_name="x86_64 AVX1024"),
        replace(key, torch_version="2.12.0"),
        replace(key, python_version="3.10.1"),
    ):
        moved = pack(KernelDraft(elsewhere, spec, report), private_key=PRIVATE_KEY, code=code)
        with pytest.raises(KernelError, match="compiled for"):
            load_compiled(moved.files, moved.digest, TRUSTED_KEY)


def test_without_a_compiler_tier_1_is_unavailable_and_nothing_has_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)

    with pytest.raises(CompilerMissingError, match="unavailable on this machine"):
        build_compiled(LAYER, SLUG, private_key=PRIVATE_KEY)


def test_what_computes_nothing_is_not_compiled_and_a_slow_compiler_is_ended() -> None:
    with pytest.raises(KernelBuildError, match="nothing that could be faster"):
        build_compiled(LAYER, "mon_act_stats", private_key=PRIVATE_KEY)
    with pytest.raises(KernelBuildError, match="compiling took"):
        build_compiled(LAYER, SLUG, private_key=PRIVATE_KEY, timeout_seconds=0.1)


def test_the_compiler_s_process_is_not_given_the_signing_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from esper.compilation.inductor import _child_environment

    monkeypatch.setenv("ESPER_KERNEL_KEY_FILE", "/keys/kernel")

    assert "ESPER_KERNEL_KEY_FILE" not in _child_environment(Path("/x"))


# PyTorch's own exporter uses what it warns of.
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_finished_model_becomes_a_signed_package_that_computes_the_same() -> None:
    model = Host().eval()
    grafted(model)
    package = compile_export(esper.export(model), (batch(),), private_key=PRIVATE_KEY)

    run = load_exported(package.files, package.digest, TRUSTED_KEY)

    with torch.no_grad():
        torch.testing.assert_close(run(batch()), model(batch()), rtol=1e-5, atol=1e-6)
    assert not run(batch()).requires_grad  # inference only
    assert package.size_bytes > 10_000
    assert package.build_seconds > 0
    with pytest.raises(ConfigurationError, match="still has slots"):
        compile_export(model, (batch(),), private_key=PRIVATE_KEY)


def test_an_archive_without_a_function_is_refused() -> None:
    key, _, report, _ = open_compiled(
        compiled_bundle().files, compiled_bundle().digest, TRUSTED_KEY
    )
    spec = KernelSpec(key.blueprint, key.blueprint_version, key.config, 7)
    empty = pack(
        KernelDraft(key, spec, report), private_key=PRIVATE_KEY, code=pack_archive({"a.so": b"x"})
    )

    with pytest.raises(KernelError, match="no compiled function"):
        load_compiled(empty.files, empty.digest, TRUSTED_KEY)


def test_a_torch_without_a_setting_for_the_instruction_set_compiles_as_it_is_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """2.10 to 2.12 have no ``cpp.march``, and refuse to patch what they do not know."""
    from torch._inductor import config

    with native.portable_code():
        assert config.cpp.march.startswith("x86-64") or config.cpp.march is None
    monkeypatch.setattr(native, "MARCH", "no_such_setting")
    with native.portable_code():
        pass
