"""The message reference is what the structs say."""

from __future__ import annotations

from esper.contracts import protocol
from scripts.protocol_docs import TARGET, rendered


def test_the_reference_is_what_the_generator_writes() -> None:
    text = TARGET.read_text(encoding="utf-8")
    kinds = [kind for _, kinds in protocol.MESSAGES for kind in kinds]
    assert all(f"#### {kind.__name__}\n" in text for kind in kinds)
    assert text == rendered(text), "run python -m scripts.protocol_docs"
