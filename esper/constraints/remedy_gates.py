"""The gates of a remedy, which the server checks in the transaction that writes.

    frozen -> run mode -> one at a time -> cooldown -> budget -> repeats -> risk -> evidence

A remedy that a person asks for passes those that protect the run, not those that pace a rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from esper.constraints.gates import (
    GateInputs,
    check_daily_budget,
    check_evidence_fresh,
    check_frozen,
    check_mode,
    cooldown_check,
)
from esper.contracts import (
    Check,
    Risk,
    RunMode,
    SafetyPolicy,
    ViolationRule,
    risk_rank,
)

BY_RULE = 2  # how often one remedy answers one kind of finding without a person


@dataclass(frozen=True, slots=True)
class RemedyInputs:
    """All inputs of the gates; the defaults are the cautious ones.

    Attributes:
        frozen: why changes are switched off; empty when they are on.
        remedy: slug.
        under_way: number of another remedy whose result is not known yet, 0: none.
        urgent: a critical finding, which does not wait for another remedy's result.
        declined_step: when this remedy for this finding was last declined or taken back, -1 never.
        given: how often it was applied by rule for this finding.
        changes_nothing: it only measures or saves, which a run that is observed allows too.
        always_asks: the catalogue says that a person decides, in every mode.
        adaptations_today: of the last 24 hours.
        age_seconds: since the trainer's last report; NaN unknown.
    """

    mode: RunMode
    step: int
    remedy: str
    frozen: str = ""
    under_way: int = 0
    urgent: bool = False
    declined_step: int = -1
    given: int = 0
    always_asks: bool = False
    changes_nothing: bool = False
    adaptations_today: int = 0
    risk: Risk = Risk.HIGH
    age_seconds: float = math.nan

    @property
    def of_run(self) -> GateInputs:
        """For the gates that grafts have too."""
        return GateInputs(
            mode=self.mode,
            step=self.step,
            frozen=self.frozen,
            adaptations_today=self.adaptations_today,
            age_seconds=self.age_seconds,
        )


RemedyGate = Callable[[RemedyInputs, SafetyPolicy], Check]


def check_remedy(inputs: RemedyInputs, policy: SafetyPolicy) -> tuple[Check, ...]:
    """All gates in order, for a remedy that a rule proposes."""
    return tuple(gate(inputs, policy) for gate in (*RUN_GATES, *PACE_GATES, *LAST_GATES))


def check_asked_for(inputs: RemedyInputs, policy: SafetyPolicy) -> tuple[Check, ...]:
    """The gates of a remedy that a person asks for."""
    return tuple(gate(inputs, policy) for gate in (*RUN_GATES, *LAST_GATES))


def _frozen(inputs: RemedyInputs, policy: SafetyPolicy) -> Check:
    return check_frozen(inputs.of_run, policy)


def _mode(inputs: RemedyInputs, policy: SafetyPolicy) -> Check:
    check = check_mode(inputs.of_run, policy)
    if check.passed or not inputs.changes_nothing:
        return check
    return replace(check, passed=True, text="It changes nothing, so the mode of the run allows it.")


def check_one_at_a_time(inputs: RemedyInputs, policy: SafetyPolicy) -> Check:
    """So that it is known what helped."""
    waits = bool(inputs.under_way) and not inputs.urgent
    if waits:
        text = f"The result of A-{inputs.under_way} is not known yet."
    elif inputs.under_way:
        text = (
            f"The finding is critical, so it does not wait for the result of A-{inputs.under_way}."
        )
    else:
        text = "No other remedy is on probation in this run."
    return Check(
        rule=ViolationRule.ONE_IN_FLIGHT,
        passed=not waits,
        hard=True,
        observed=f"A-{inputs.under_way}" if inputs.under_way else "0",
        limit="0 on probation, unless the finding is critical",
        text=text,
    )


def check_not_declined(inputs: RemedyInputs, policy: SafetyPolicy) -> Check:
    """A remedy that was declined or taken back does not come back at once."""
    check = cooldown_check("remedy", inputs.step, inputs.declined_step, policy.cooldown_layer_steps)
    if inputs.declined_step < 0:
        return replace(check, text="It has not been declined for this finding.")
    waited = max(0, inputs.step - inputs.declined_step)
    return replace(
        check,
        text=f"{inputs.remedy} was declined or taken back for this finding {waited} steps ago; "
        f"the cooldown is {policy.cooldown_layer_steps} steps.",
    )


def check_budget(inputs: RemedyInputs, policy: SafetyPolicy) -> Check:
    """Soft: a run that is sick every day is a person's concern, and must not be left alone."""
    return replace(check_daily_budget(inputs.of_run, policy), hard=False)


def check_remedy_risk(inputs: RemedyInputs, policy: SafetyPolicy) -> Check:
    above = risk_rank(inputs.risk) > risk_rank(policy.auto_max_risk)
    if inputs.always_asks:
        text = "It may undo what the script wants, so a person decides."
    elif above:
        text = f"Risk is {inputs.risk}; only risk up to {policy.auto_max_risk} needs no person."
    else:
        text = f"Risk {inputs.risk} needs no person."
    return Check(
        rule=ViolationRule.RISK_CLASS,
        passed=not above and not inputs.always_asks,
        hard=False,
        observed=str(inputs.risk),
        limit=str(policy.auto_max_risk),
        text=text,
    )


def check_repeats(inputs: RemedyInputs, policy: SafetyPolicy) -> Check:
    times = f"{inputs.given} time{'' if inputs.given == 1 else 's'}"
    return Check(
        rule=ViolationRule.COOLDOWN,
        passed=inputs.given < BY_RULE,
        hard=False,
        observed=str(inputs.given),
        limit=f"< {BY_RULE} by rule for one kind of finding",
        text=f"{inputs.remedy} was applied {times} by rule for this kind of finding, which came "
        "back."
        if inputs.given >= BY_RULE
        else f"{inputs.remedy} was applied {times} by rule for this kind of finding.",
    )


def _fresh(inputs: RemedyInputs, policy: SafetyPolicy) -> Check:
    return check_evidence_fresh(inputs.of_run, policy)


RUN_GATES: tuple[RemedyGate, ...] = (_frozen, _mode)
PACE_GATES: tuple[RemedyGate, ...] = (
    check_one_at_a_time,
    check_not_declined,
    check_budget,
    check_repeats,
)
LAST_GATES: tuple[RemedyGate, ...] = (check_remedy_risk, _fresh)
