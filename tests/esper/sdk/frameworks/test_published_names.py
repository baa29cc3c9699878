"""The import paths that users have been told keep working."""

from __future__ import annotations

import esper


def test_each_framework_has_a_short_import_path() -> None:
    import esper.sdk.accelerate
    import esper.sdk.huggingface
    import esper.sdk.lightning
    from esper.sdk.frameworks import accelerate, huggingface, lightning

    assert esper.sdk.lightning.EsperCallback is lightning.EsperCallback
    assert esper.sdk.huggingface.EsperCallback is huggingface.EsperCallback
    assert esper.sdk.accelerate.attach is accelerate.attach
    assert esper.sdk.accelerate.step is accelerate.step


def test_blueprints_are_listed_and_found_by_id_or_slug() -> None:
    assert len(esper.blueprints.all()) >= 18
    assert esper.blueprints.get("BP-PROJ-LoRA-64") is esper.blueprints.get("proj_lora_64")
