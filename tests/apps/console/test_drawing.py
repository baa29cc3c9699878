"""Pictures, words, and lists that must match other lists."""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from dataclasses import fields
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from types import ModuleType

import pytest
from django.utils import timezone

from apps.console import status
from apps.console.drawing import health_cells, shade, shorten, sketch, sparkline, waterfall
from apps.console.pages.adaptation import (
    check_rows,
    evidence_rows,
    reason_rows,
    reasons_context,
)
from apps.console.pages.policy import THRESHOLD_NOTES, thresholds
from apps.console.templatetags.console import ago, count, number, signed
from esper.contracts import (
    AdaptationState,
    Certificate,
    CommandState,
    GraftKind,
    JobState,
    RunState,
    SafetyPolicy,
    Severity,
    SpeedUpState,
    ViolationRule,
    WorkerMode,
    WorkerState,
)

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("words", "states"),
    [
        (status.ADAPTATION, AdaptationState),
        (status.RUN, RunState),
        (status.COMMAND, CommandState),
        (status.JOB, JobState),
        (status.WORKER, WorkerState),
        (status.MODE, WorkerMode),
        (status.SPEED_UP, SpeedUpState),
        (status.SEVERITY, Severity),
    ],
)
def test_every_state_has_a_shape_a_word_and_a_tone(
    words: dict[str, status.Status], states: type[StrEnum]
) -> None:
    assert set(words) == set(states)
    symbols = re.findall(r'symbol id="(\w+)"', (ROOT / "static/console/shapes.svg").read_text())
    style = (ROOT / "static/console/console.css").read_text()
    for found in words.values():
        assert found.shape in symbols
        assert found.word
        assert f'[data-tone="{found.tone}"]' in style


def test_every_threshold_of_the_policy_is_on_its_page() -> None:
    names = {field.name for field in fields(SafetyPolicy)} - {"name", "version"}
    assert set(THRESHOLD_NOTES) == names
    kinds = {threshold.name: threshold.kind for threshold in thresholds(SafetyPolicy())}
    assert kinds["cooldown_layer_steps"] == "whole"
    assert kinds["confidence_auto"] == "number"
    assert kinds["auto_max_risk"] == "risk"


def test_a_sparkline_spans_its_box_and_marks_what_was_not_finite() -> None:
    line = sparkline([3.0, None, 1.0])
    assert line is not None
    assert line.points == "0.0,2.0 150.0,28.0"
    assert line.marks == (75.0,)


def test_no_values_give_no_sparkline() -> None:
    assert sparkline([]) is None
    assert sparkline([None, None]) is None


def test_many_layers_share_cells_that_show_the_lowest_health() -> None:
    health = {f"layer.{i}": 0.9 for i in range(100)} | {"layer.57": 0.1}
    cells = health_cells(health)
    assert len(cells) <= 24
    assert [cell.shade for cell in cells].count("h1") == 1
    assert sum(cell.poor for cell in cells) == 1


def test_unknown_health_has_no_colour() -> None:
    assert shade(math.nan) == "hx"
    assert shade(0.0) == "h0"
    assert shade(1.0) == "h9"


def test_a_waterfall_ends_at_the_sum() -> None:
    falls = waterfall({"gain": 0.5, "cost": -0.2})
    assert [round(fall.total, 6) for fall in falls] == [0.5, 0.3]
    assert falls[0].x == 0.0
    assert falls[1].x == pytest.approx(180.0)


@pytest.mark.parametrize("kind", list(GraftKind))
def test_every_kind_of_graft_can_be_sketched(kind: GraftKind) -> None:
    drawn = sketch("encoder.4", "attn_std", str(kind), before="encoder.3", after="head")
    assert "encoder.4" in drawn.words
    assert "attn_std" in drawn.words


def test_long_names_are_cut_in_the_middle() -> None:
    assert shorten("transformer.h.11.mlp.c_proj", 11) == "trans…_proj"


def test_unknown_numbers_are_a_dash_and_signs_are_typographic() -> None:
    assert number(None) == number(math.nan) == "—"
    assert number(0.000012) == "1.20e−05"
    assert signed(0.34) == "+0.340"
    assert signed(-2) == "−2"
    assert count(33_280) == "33.3 k"


def test_unknown_numbers_of_the_wire_stay_unknown() -> None:
    rows = reason_rows([{"signal": "x", "observed": "nan", "weight": 0.1, "text": "t"}])
    assert rows[0].observed is None
    row = evidence_rows({"health": 0.3, "loss": None}, {"health": 0.5})[0]
    assert row.change == pytest.approx(0.2)


def test_an_unknown_check_is_not_shown_as_passed() -> None:
    unknown = {"rule": "latency", "passed": None, "hard": True}
    rows = check_rows([{"rule": "memory", "passed": True}, unknown])
    verdicts = [(row.rule, row.verdict) for row in rows]
    assert verdicts == [("latency", "unknown"), ("memory", "passed")]


def _vendor() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vendor", ROOT / "scripts/vendor.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["vendor"] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


def test_the_vendored_libraries_are_as_they_were_fetched() -> None:
    assert _vendor().check(ROOT / "static/vendor") == []


def test_a_changed_or_unlisted_library_is_reported(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"files": [{"path": "a.js", "sha256": "00"}]}')
    (tmp_path / "a.js").write_text("changed")
    (tmp_path / "b.js").write_text("unlisted")
    assert _vendor().check(tmp_path) == ["b.js: not in the manifest", "a.js: was changed"]


def test_templates_name_only_files_that_exist() -> None:
    for template in (ROOT / "templates").rglob("*.html"):
        for path in re.findall(r"static '([^']+)'", template.read_text()):
            assert (ROOT / "static" / path).is_file(), f"{template.name}: {path}"


def test_every_rule_has_words_for_people() -> None:
    assert set(status.RULES) == set(ViolationRule)
    assert not any("_" in words for words in status.RULES.values())


def test_every_entry_of_a_certificate_has_words() -> None:
    names = {field.name for field in fields(Certificate)} - {"failures"}
    assert set(status.CERTIFICATE) == names


def test_a_recent_event_is_never_in_the_future() -> None:
    assert ago(timezone.now() + timedelta(seconds=2)) == "just now"
    assert ago(timezone.now() + timedelta(minutes=2, seconds=30)) == "in 2 min"
    assert ago(timezone.now() - timedelta(minutes=2, seconds=30)) == "2 min ago"


def test_what_was_seen_stands_apart_from_what_the_confidence_is_made_of() -> None:
    seen = {"signal": "capacity", "observed": 0.4, "weight": 0.0, "text": "the loss is stuck"}
    base = {"signal": "base_rate", "observed": 0.5, "weight": 0.45, "text": "the base rate"}
    added = {"signal": "choice", "observed": "nan", "weight": -0.15, "text": "12 cases"}
    found = reasons_context([seen, added, base])

    assert [row.signal for row in found["because"]] == ["capacity"]
    assert [row.signal for row in found["rows"]] == ["base_rate", "choice"]
    assert found["total"] == pytest.approx(0.3)
