"""A finding that grows from a note to a warning is said and sent then."""

from __future__ import annotations

from dataclasses import replace

from esper.contracts import Finding, Severity, ViolationRule
from esper.diagnosis import Change
from esper.sdk.findings import Findings

NOTE = Finding(
    rule=ViolationRule.DIAGNOSIS, layer="", severity=Severity.INFO, observed="10% above its best",
    limit="at most 10%", remedy="Stop here.", slug="over_fitting",
)  # fmt: skip


def test_a_finding_is_said_again_when_it_becomes_more_severe_and_only_then() -> None:
    said: list[Finding] = []
    sent: list[Finding] = []
    findings = Findings(sent.append, said.append)
    caution = replace(NOTE, severity=Severity.CAUTION, observed="30% above its best")
    findings.report(Change.OPENED, NOTE)
    findings.report(Change.UPDATED, replace(NOTE, observed="12% above its best"))
    assert said == sent == [NOTE]
    findings.report(Change.UPDATED, caution)
    assert said == sent == [NOTE, caution]
    findings.report(Change.UPDATED, NOTE)
    assert said == [NOTE, caution]
    assert findings.all() == [NOTE]
