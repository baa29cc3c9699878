"""A trainer runs machine code only of workers that it names itself; a server cannot name one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from esper.compilation import build_kernel, compiled_key
from esper.compilation.archive import pack_archive
from esper.compilation.bundle import pack, report_from_wire, spec_from_wire
from esper.contracts import CommandKind, KernelBundle, KernelDraft, codec, signing
from tests.esper.sdk.tiny_training import Training
from tests.esper.sdk.transport.attached import (
    ended,
    final_ack,
    graft_command,
    kernel_for,
    listening,
)
from tests.esper.sdk.transport.control_plane import ControlPlane


def code_bundle(session: Any, plane: ControlPlane, private_key: str) -> KernelBundle:
    """A well-formed compiled kernel of the graft at layer 3; what would be opened is noise."""
    layer = next(layer for layer in session.layers if layer.name == "3")
    first = build_kernel(layer, "proj_lora_64", private_key=plane.kernel_key)
    spec = spec_from_wire(codec.decode(first.files["recipe.json"]))
    report = report_from_wire(codec.decode(first.files["report.json"]))
    key = compiled_key(layer, spec.blueprint, spec.config)
    code = pack_archive({"fn.aotc": b"not a pickle"})
    return pack(KernelDraft(key, spec, replace(report, tier=1)), private_key=private_key, code=code)


@pytest.mark.parametrize(
    ("trusted", "signer", "code"),
    [
        ("nobody", "worker", "no_foreign_code"),
        ("worker", "unknown", "bad_signature"),
        ("another", "worker", "bad_signature"),
        ("worker", "worker", "unavailable"),  # verified, and then PyTorch cannot read it
    ],
)
def test_code_is_refused_with_its_reason_and_training_goes_on(
    training: Training, plane: ControlPlane, monkeypatch: pytest.MonkeyPatch,
    trusted: str, signer: str, code: str,
) -> None:  # fmt: skip
    keys = {"worker": plane.kernel_key, "unknown": signing.generate_private_key()}
    named = {
        "nobody": "",
        "worker": signing.public_key(plane.kernel_key),
        "another": signing.public_key(signing.generate_private_key()),
    }
    monkeypatch.setenv("ESPER_COMPILED_KERNEL_KEY", named[trusted])
    with listening(training, plane) as session:
        assert ("machine_code" in plane.registrations[0]["versions"]) is (trusted != "nobody")
        plane.send(graft_command(plane, 1, kernel_for(session, plane)))
        training.until(lambda: ended(plane, 1), session)
        digest = plane.add_kernel(code_bundle(session, plane, keys[signer]))

        plane.send(
            plane.command(CommandKind.SPEED_UP, 2, adaptation="a1", layer="3", kernel_digest=digest)
        )
        training.until(lambda: ended(plane, 2), session)

        assert (final_ack(plane, 2)["state"], final_ack(plane, 2)["code"]) == ("refused", code)
        assert len(session.adaptations) == 1
