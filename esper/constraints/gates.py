"""The gates that every adaptation must pass, in this order.

    frozen -> run mode -> in flight -> cooldown -> budgets -> risk class -> evidence -> confidence

``decide`` calls them on a snapshot, the server again on plain numbers in the transaction that
writes. Each is ``(GateInputs, SafetyPolicy) -> Check``. A number that is NaN is unknown, its check
has ``passed=None``, and that never counts as passed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from esper.contracts import (
    AdaptationDecision,
    Check,
    CostForecast,
    LayerHistory,
    Risk,
    RunMode,
    RunSnapshot,
    SafetyPolicy,
    Signal,
    ViolationRule,
    risk_rank,
)


@dataclass(frozen=True, slots=True)
class GateInputs:
    """All inputs of the gates; the defaults are the cautious ones.

    Attributes:
        frozen: why adaptation is switched off; empty when it is on.
        layer_refused_seconds: time since a proposal for the layer was refused; inf never.
        layer_last_step, run_last_step: step of the last adaptation, -1 never.
        new_parameters: parameters that the graft would add.
        memory_mib, latency_ms: forecast of the graft; NaN unknown.
        category_cases: closed cases of the blueprint's category.
        missing_evidence: unmeasured signals that a decision of this risk requires.
        age_seconds: age of the newest evidence; NaN unknown.
        confidence: probability that the graft really helps; NaN unknown.
    """

    mode: RunMode
    step: int
    frozen: str = ""
    layer_in_flight: bool = False
    run_in_flight: int = 0
    layer_last_step: int = -1
    layer_rolled_back: bool = False
    layer_refused_seconds: float = math.inf
    run_last_step: int = -1
    run_rolled_back: bool = False
    adaptations_today: int = 0
    model_parameters: int = 0
    added_parameters: int = 0
    new_parameters: int = 0
    memory_mib: float = math.nan
    latency_ms: float = math.nan
    risk: Risk = Risk.HIGH
    category_cases: int = 0
    missing_evidence: tuple[str, ...] = ()
    age_seconds: float = math.nan
    confidence: float = math.nan


Gate = Callable[[GateInputs, SafetyPolicy], Check]


def check_gates(inputs: GateInputs, policy: SafetyPolicy) -> tuple[Check, ...]:
    """All gates in order."""
    return check_run(inputs, policy) + check_blueprint(inputs, policy)


def check_run(inputs: GateInputs, policy: SafetyPolicy) -> tuple[Check, ...]:
    """The gates that need no blueprint: whether this run and layer may be changed now."""
    return tuple(gate(inputs, policy) for gate in RUN_GATES)


def check_blueprint(inputs: GateInputs, policy: SafetyPolicy) -> tuple[Check, ...]:
    """The gates that need the chosen blueprint's cost, risk and confidence."""
    return tuple(gate(inputs, policy) for gate in BLUEPRINT_GATES)


def gate_inputs(
    snapshot: RunSnapshot,
    decision: AdaptationDecision,
    forecast: CostForecast | None = None,
    risk: Risk = Risk.HIGH,
    *,
    category_cases: int = 0,
    missing_evidence: Iterable[str] = (),
) -> GateInputs:
    """Reads a snapshot into the gates' numbers; ``forecast`` None before a blueprint is chosen."""
    history = snapshot.history.get(decision.layer_name, LayerHistory())
    return GateInputs(
        mode=snapshot.mode,
        step=snapshot.step,
        frozen=snapshot.frozen,
        layer_in_flight=history.in_flight,
        run_in_flight=snapshot.in_flight,
        layer_last_step=history.last_adaptation_step,
        layer_rolled_back=history.last_rolled_back,
        layer_refused_seconds=history.refused_seconds,
        run_last_step=snapshot.last_adaptation_step,
        run_rolled_back=_last_of_run_rolled_back(snapshot),
        adaptations_today=snapshot.adaptations_today,
        model_parameters=snapshot.model_parameters,
        added_parameters=snapshot.added_parameters,
        new_parameters=forecast.parameters if forecast else 0,
        memory_mib=forecast.memory_mib if forecast else math.nan,
        latency_ms=forecast.latency_ms if forecast else math.nan,
        risk=risk,
        category_cases=category_cases,
        missing_evidence=tuple(missing_evidence),
        age_seconds=snapshot.age_seconds,
        confidence=decision.confidence,
    )


def required_evidence(risk: Risk) -> tuple[str, ...]:
    """Signals that a decision of this risk requires.

    A graft that only observes needs none, because it provides evidence.
    """
    if risk is Risk.NONE:
        return ()
    return ("loss", str(Signal.GRAD_NORM), str(Signal.WEIGHT_NORM))


def _last_of_run_rolled_back(snapshot: RunSnapshot) -> bool:
    last = snapshot.last_adaptation_step
    return last >= 0 and any(
        history.last_rolled_back and history.last_adaptation_step == last
        for history in snapshot.history.values()
    )


def check_frozen(inputs: GateInputs, policy: SafetyPolicy) -> Check:
    return Check(
        rule=ViolationRule.FROZEN,
        passed=not inputs.frozen,
        hard=True,
        observed=inputs.frozen or "on",
        limit="on",
        text=f"Nothing may be changed now: {inputs.frozen}."
        if inputs.frozen
        else "Adaptation is switched on.",
    )


def check_mode(inputs: GateInputs, policy: SafetyPolicy) -> Check:
    texts = {
        RunMode.OBSERVE: "This run is only observed; nothing may be changed.",
        RunMode.SUPERVISED: "This run is supervised; a person decides.",
        RunMode.AUTOMATIC: "This run may be adapted without a person.",
    }
    return Check(
        rule=ViolationRule.RUN_MODE,
        passed=inputs.mode is RunMode.AUTOMATIC,
        hard=inputs.mode is not RunMode.SUPERVISED,
        observed=str(inputs.mode),
        limit=str(RunMode.AUTOMATIC),
        text=texts[inputs.mode],
    )


def check_layer_in_flight(inputs: GateInputs, policy: SafetyPolicy) -> Check:
    return Check(
        rule=ViolationRule.ONE_IN_FLIGHT,
        passed=not inputs.layer_in_flight,
        hard=True,
        observed="1" if inputs.layer_in_flight else "0",
        limit="0 on this layer",
        text="Another adaptation of this layer is in progress."
        if inputs.layer_in_flight
        else "No other adaptation of this layer is in progress.",
    )


def check_run_in_flight(inputs: GateInputs, policy: SafetyPolicy) -> Check:
    return Check(
        rule=ViolationRule.ONE_IN_FLIGHT,
        passed=inputs.run_in_flight < policy.max_in_flight_per_run,
        hard=True,
        observed=str(inputs.run_in_flight),
        limit=f"< {policy.max_in_flight_per_run} in this run",
        text=f"{inputs.run_in_flight} of at most {policy.max_in_flight_per_run} adaptations "
        "of this run are in progress.",
    )


def check_layer_cooldown(inputs: GateInputs, policy: SafetyPolicy) -> Check:
    needed = _cooldown(policy.cooldown_layer_steps, inputs.layer_rolled_back, policy)
    if not inputs.layer_refused_seconds >= policy.cooldown_refused_seconds:  # NaN: unknown
        return _refused_check(inputs.layer_refused_seconds, policy.cooldown_refused_seconds)
    return cooldown_check("layer", inputs.step, inputs.layer_last_step, needed)


def check_run_cooldown(inputs: GateInputs, policy: SafetyPolicy) -> Check:
    needed = _cooldown(policy.cooldown_run_steps, inputs.run_rolled_back, policy)
    return cooldown_check("run", inputs.step, inputs.run_last_step, needed)


def check_daily_budget(inputs: GateInputs, policy: SafetyPolicy) -> Check:
    return Check(
        rule=ViolationRule.DAILY_BUDGET,
        passed=inputs.adaptations_today < policy.max_adaptations_per_day,
        hard=True,
        observed=str(inputs.adaptations_today),
        limit=f"< {policy.max_adaptations_per_day}",
        text=f"{inputs.adaptations_today} of at most {policy.max_adaptations_per_day} "
        "adaptations today.",
    )


def check_parameter_budget(inputs: GateInputs, policy: SafetyPolicy) -> Check:
    total = inputs.added_parameters + inputs.new_parameters
    limit = policy.most_added_parameters(inputs.model_parameters)
    return Check(
        rule=ViolationRule.PARAMETER_BUDGET,
        passed=total <= limit,
        hard=True,
        observed=f"{total:,}",
        limit=f"{limit:,}",
        text=f"Grafts would have {total:,} of at most {limit:,} added parameters.",
    )


def check_memory(inputs: GateInputs, policy: SafetyPolicy) -> Check:
    return _cost_check(
        ViolationRule.MEMORY, inputs.memory_mib, policy.max_memory_mib, "MiB", unknown_is_hard=True
    )


def check_latency(inputs: GateInputs, policy: SafetyPolicy) -> Check:
    # Latency is often unknown before it was measured, so this check asks a person instead of
    # blocking; check_measured is a hard check before dispatch.
    return _cost_check(
        ViolationRule.LATENCY, inputs.latency_ms, policy.max_latency_ms, "ms", unknown_is_hard=False
    )


def check_risk(inputs: GateInputs, policy: SafetyPolicy) -> Check:
    passed, text = _risk_answer(inputs, policy)
    return Check(
        rule=ViolationRule.RISK_CLASS,
        passed=passed,
        hard=False,
        observed=f"{inputs.risk}, {inputs.category_cases} closed cases",
        limit=f"{policy.auto_max_risk}; from medium on {policy.min_cases_for_auto} closed cases",
        text=text,
    )


def check_evidence_complete(inputs: GateInputs, policy: SafetyPolicy) -> Check:
    missing = ", ".join(inputs.missing_evidence)
    return Check(
        rule=ViolationRule.EVIDENCE,
        passed=None if missing else True,
        hard=True,
        observed=f"not measured: {missing}" if missing else "complete",
        limit="complete",
        text=f"The decision depends on signals that were not measured: {missing}."
        if missing
        else "Every signal that the decision depends on was measured.",
    )


def check_evidence_fresh(inputs: GateInputs, policy: SafetyPolicy) -> Check:
    limit = policy.evidence_max_age_seconds
    known = math.isfinite(inputs.age_seconds)
    return Check(
        rule=ViolationRule.EVIDENCE,
        passed=inputs.age_seconds <= limit if known else None,
        hard=True,
        observed=f"{inputs.age_seconds:.0f} s" if known else "unknown",
        limit=f"{limit:.0f} s",
        text=f"The evidence is {inputs.age_seconds:.0f} s old; the limit is {limit:.0f} s."
        if known
        else "The age of the evidence is unknown.",
    )


def check_confidence(inputs: GateInputs, policy: SafetyPolicy) -> Check:
    """Refuse < **ask** < auto. NaN never counts as high: it asks."""
    confidence = inputs.confidence
    known = math.isfinite(confidence)
    refused = known and confidence < policy.confidence_refuse
    return Check(
        rule=ViolationRule.CONFIDENCE,
        passed=confidence >= policy.confidence_auto if known else None,
        hard=refused,
        observed=f"{confidence:.3f}" if known else "unknown",
        limit=f"{policy.confidence_refuse if refused else policy.confidence_auto:.3f}",
        text=_confidence_text(confidence, policy),
    )


RUN_GATES: tuple[Gate, ...] = (
    check_frozen,
    check_mode,
    check_layer_in_flight,
    check_run_in_flight,
    check_layer_cooldown,
    check_run_cooldown,
    check_daily_budget,
)
BLUEPRINT_GATES: tuple[Gate, ...] = (
    check_parameter_budget,
    check_memory,
    check_latency,
    check_risk,
    check_evidence_complete,
    check_evidence_fresh,
    check_confidence,
)


def _cooldown(steps: int, rolled_back: bool, policy: SafetyPolicy) -> int:
    return math.ceil(steps * policy.cooldown_rollback_factor) if rolled_back else steps


def _refused_check(seconds: float, needed: int) -> Check:
    known = math.isfinite(seconds)
    return Check(
        rule=ViolationRule.COOLDOWN,
        passed=False if known else None,
        hard=True,
        observed=f"refused {seconds:.0f} s ago" if known else "unknown",
        limit=f">= {needed} s",
        text=f"A proposal for this layer was rejected or expired {seconds:.0f} s ago; the next one "
        f"is made after {needed} s."
        if known
        else "The time since the last refusal for this layer is unknown.",
    )


def cooldown_check(scope: str, step: int, last: int, needed: int) -> Check:
    waited = max(0, step - last)  # a trainer that resumed a checkpoint is at an earlier step
    return Check(
        rule=ViolationRule.COOLDOWN,
        passed=last < 0 or waited >= needed,
        hard=True,
        observed="never" if last < 0 else f"{waited} steps",
        limit=f">= {needed} steps",
        text=f"This {scope} has not been adapted before."
        if last < 0
        else f"This {scope} was adapted {waited} steps ago; the cooldown is {needed} steps.",
    )


def _amount(value: float) -> str:
    """Three significant digits: 0.201, 12.5, 1,024."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _cost_check(
    rule: ViolationRule, value: float, limit: float, unit: str, *, unknown_is_hard: bool
) -> Check:
    known = math.isfinite(value)
    return Check(
        rule=rule,
        passed=value <= limit if known else None,
        hard=known or unknown_is_hard,
        observed=f"{_amount(value)} {unit}" if known else "unknown",
        limit=f"{_amount(limit)} {unit}",
        text=f"The graft's forecast {rule} is {_amount(value)} {unit}; the limit is "
        f"{_amount(limit)} {unit}."
        if known
        else f"The graft's {rule} cannot be forecast; the limit is {_amount(limit)} {unit}.",
    )


def _risk_answer(inputs: GateInputs, policy: SafetyPolicy) -> tuple[bool, str]:
    rank = risk_rank(inputs.risk)
    if inputs.risk is Risk.HIGH:
        return False, "It changes what the model computes; this always needs a person."
    if rank > risk_rank(policy.auto_max_risk):
        return (
            False,
            f"Risk is {inputs.risk}; only risk up to {policy.auto_max_risk} needs no person.",
        )
    if rank >= risk_rank(Risk.MEDIUM) and inputs.category_cases < policy.min_cases_for_auto:
        return False, (
            f"{inputs.category_cases} closed cases of its category are too few to trust; "
            f"{policy.min_cases_for_auto} are needed."
        )
    return True, f"Risk {inputs.risk} needs no person."


def _confidence_text(confidence: float, policy: SafetyPolicy) -> str:
    if not math.isfinite(confidence):
        return "Its confidence is unknown, which never counts as high."
    if confidence < policy.confidence_refuse:
        return f"Confidence {confidence:.2f} is below {policy.confidence_refuse:.2f}."
    if confidence < policy.confidence_auto:
        return (
            f"Confidence {confidence:.2f} is between {policy.confidence_refuse:.2f} and "
            f"{policy.confidence_auto:.2f}; a person decides."
        )
    return f"Confidence {confidence:.2f} reaches {policy.confidence_auto:.2f}."
