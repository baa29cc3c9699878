"""A busy world: a run after twenty adaptations, one of 2,000 layers, and findings of each kind.

Like ``world.py``, larger, with long names: for looking at the pages, not for assertions.
"""

from __future__ import annotations

import math
import random
from datetime import timedelta
from typing import Any

import numpy as np
from django.utils import timezone

from apps.accounts.models import DEFAULT_PROJECT, Membership, Project
from apps.adaptations.models import Adaptation, Plan, ShadowTrial, Vote
from apps.blueprints.models import Blueprint
from apps.policies.models import Freeze, PolicyVersion, ProjectSwitch
from apps.policies.services import adaptation_switch, current_policy
from apps.recipes.models import Launch
from apps.runs.models import Command, Run
from apps.telemetry.models import Frame, Metric
from apps.violations.services import record_findings, record_violation
from esper.contracts import (
    ADAPTATION_ENDED,
    SIGNALS,
    AdaptationState,
    CommandKind,
    CommandState,
    Finding,
    LaunchState,
    LayerInfo,
    PlanState,
    RejectReason,
    RunState,
    Severity,
    VariantState,
    ViolationRule,
)
from esper.diagnosis import get_rule
from tests.apps.console.world import CERTIFICATE, FOUND, make_remedies_of_run
from tests.apps.console.world_runs import World, make_adaptation, make_run, tell

A = AdaptationState
MANY = 2_000
LONG_RUN = "llama-1b-pretrain-fineweb-edu-seed3-cosine-warmup2000-bf16-node14"
GIANT = "mixture-of-experts-2000-layers"
_TELL = {
    A.KEPT: (A.COMPILE_QUEUED, A.COMPILING, A.COMPILED, A.DISPATCHED, A.ACCEPTED, A.PROBATION),
    A.ROLLED_BACK: (A.COMPILE_QUEUED, A.COMPILED, A.DISPATCHED, A.ACCEPTED, A.PROBATION),
    A.PROBATION: (A.COMPILE_QUEUED, A.COMPILING, A.COMPILED, A.DISPATCHED, A.ACCEPTED),
}
# Twenty ends, as a day's work leaves them.
ENDS: tuple[AdaptationState, ...] = (
    *(A.KEPT, A.ROLLED_BACK, A.KEPT, A.KEPT, A.REJECTED, A.EXPIRED, A.KEPT, A.ROLLED_BACK),
    *(A.COMPILE_FAILED, A.DECLINED, A.KEPT, A.REVERTED, A.CANCELLED, A.KEPT, A.NOT_APPLIED),
    *(A.SUPERSEDED, A.ROLLBACK_FAILED, A.APPLY_FAILED, A.KEPT, A.PROBATION),
)
REASONS = {
    A.ROLLED_BACK: "the loss rose 8.2 % above its forecast, beyond the interval",
    A.EXPIRED: "nobody decided before the deadline",
    A.COMPILE_FAILED: "mat1 and mat2 shapes cannot be multiplied (512x2048 and 512x64)",
    A.DECLINED: "Measured latency is 12.4 ms; the limit is 10 ms.",
    A.NOT_APPLIED: "the optimizer holds fused parameter groups that cannot be extended",
    A.ROLLBACK_FAILED: "the trainer did not confirm the rollback before the deadline",
    A.APPLY_FAILED: "the output changed by 0.003, which is more than the tolerance",
    A.SUPERSEDED: "its finding was over at step 41,200",
    A.KEPT: "the gain's interval is above the smallest gain that matters",
}


def build_busy_world(world: World) -> None:
    """Add to a small world."""
    run = make_run(world, LONG_RUN, "rafi", steps=2_000, state=RunState.RUNNING)
    names = _transformer_names(24)
    _rename_layers(run, names)
    _make_twenty(world, run, names)
    make_remedies_of_run(world)
    _make_waiting(world, names)
    _make_incidents(world, names)
    _make_giant(world)
    make_plan(world, LONG_RUN, names[60:63])
    make_shadow(world, "high")
    make_variants(world, "mlp_gelu_2048")
    _make_many_findings(world)
    _make_project(world)
    _make_branches(world)
    _make_freezes(world)


def _make_branches(world: World) -> None:
    """A run that began from a stored state of another, and one that began from that."""
    launch = world.launches["branch"]
    names = {"topics-lm-linear": launch}
    names["topics-lm-again"] = Launch.objects.create(
        recipe=launch.recipe,
        digest=launch.digest,
        parameters={"steps": 20_000, "schedule": "linear"},
        requested_by=launch.requested_by,
        requested_at=timezone.now(),
        branch_of=launch,
        branch_step=300,
        branch_state="step-300.pt",
        state=LaunchState.RUNNING,
        seen_at=timezone.now(),
    )
    for (name, one), steps in zip(names.items(), (420, 380), strict=True):
        make_run(world, name, "olga", steps=50, state=RunState.RUNNING)
        Run.objects.filter(name=name).update(uid=one.run_uid, step=steps, target_steps=600)


def _make_freezes(world: World) -> None:
    """One over, one in effect in a project, and one to come everywhere."""
    now, day, carl = timezone.now(), timedelta(days=1), world.people["carl"]
    common = {"set_by": carl, "reason": "the evaluation for the paper"}
    Freeze.objects.create(
        **common, starts_at=now - 2 * day, ends_at=now - day / 2, ended_at=now - day, ended_by=carl
    )
    vision = Project.objects.exclude(pk=DEFAULT_PROJECT).first()
    Freeze.objects.create(**common, project=vision, starts_at=now - day / 9, ends_at=now + day / 7)
    holidays = {"starts_at": now + 9 * day, "ends_at": now + 12 * day}
    Freeze.objects.create(**holidays, set_by=carl, reason="holidays, nobody is on duty")


def _transformer_names(blocks: int) -> list[str]:
    parts = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    return [f"model.layers.{block}.{part}" for block in range(blocks) for part in parts]


def _rename_layers(run: Run, names: list[str]) -> None:
    run.layers = [
        LayerInfo(
            name=name,
            kind="Linear",
            in_shape=(8, 512),
            out_shape=(8, 512),
            dtype="bfloat16",
            parameters=512 * 512,
            graftable=True,
            features_in=512,
            features_out=512,
            order=order,
            feeds=tuple(names[order + 1 : order + 2]),
        ).to_wire()
        for order, name in enumerate(names)
    ]
    run.model_parameters = 1_100_048_384
    run.target_steps = 100_000
    run.save()
    Frame.objects.filter(run=run).delete()
    _make_frames(run, len(names), range(0, run.step, 20))


def _make_frames(run: Run, layers: int, steps: range) -> None:
    chance = np.random.default_rng(run.pk)
    now = timezone.now().timestamp()
    base = chance.uniform(0.55, 0.95, size=(layers, 1))
    frames = []
    for step in steps:
        values = np.abs(chance.normal(base, 0.03, size=(layers, len(SIGNALS))))
        values[layers // 3 : layers // 3 + 3] *= 1.0 - 0.6 * step / max(steps)
        frames.append(
            Frame(
                run=run,
                epoch=1,
                step=step,
                wall_time=now - run.step + step,
                values=np.clip(values, 0, 1).astype("<f4").tobytes(),
                loss=2.3 * math.exp(-step / 600) + 1.9,
            )
        )
    Frame.objects.bulk_create(frames)


def _make_twenty(world: World, run: Run, names: list[str]) -> None:
    chance = random.Random(20)
    slugs = [slug for slug in world.blueprints if slug != "mon_act_stats"]
    for number, end in enumerate(ENDS):
        step = 90 * (number + 1)
        grafted = end in (A.KEPT, A.ROLLED_BACK, A.REVERTED, A.PROBATION, A.ROLLBACK_FAILED)
        by_person = number % 3 == 0 or end == A.REJECTED
        made = make_adaptation(
            world,
            f"twenty-{number}",
            LONG_RUN,
            end,
            layer=names[(number * 7) % len(names)],
            blueprint=world.blueprints[slugs[number % len(slugs)]],
            risk=world.blueprints[slugs[number % len(slugs)]].risk,
            proposed_step=step,
            confidence=0.55 + 0.4 * chance.random(),
            graft_step=step + 12 if grafted else None,
            grafted_at=timezone.now() - timedelta(minutes=200 - 9 * number) if grafted else None,
            pause_ms=chance.uniform(1.2, 31.0) if grafted else None,
            certificate=CERTIFICATE if grafted else None,
            decided_by=world.people["olga"] if by_person else None,
            decided_rule="" if by_person else "policy v2: confidence 0.86 ≥ 0.80 and risk low",
            decided_at=timezone.now() - timedelta(minutes=201 - 9 * number),
            decision_reason="the layer has been flat for an hour" if by_person else "",
            rejected_for=RejectReason.TOO_COSTLY if end == A.REJECTED else "",
            ablation_gain=0.004 + 0.03 * chance.random() if end == A.KEPT else None,
            ablation_low=0.002 if end == A.KEPT else None,
            ablation_high=0.041 if end == A.KEPT else None,
            reward=chance.uniform(-0.2, 0.7) if end in (A.KEPT, A.ROLLED_BACK) else None,
            reward_terms={"gain": 0.62, "parameters": -0.08, "latency": -0.05},
            steps_observed=600 if grafted else None,
            ended_at=timezone.now() if end in ADAPTATION_ENDED else None,
            ended_step=step + 70,
            end_reason=REASONS.get(end, ""),
            asks=["Confidence is between 0.55 and 0.80; a person decides."] if by_person else [],
        )
        Adaptation.objects.filter(pk=made.pk).update(
            created_at=timezone.now() - timedelta(minutes=202 - 9 * number)
        )
        tell(made, A.PROPOSED, A.APPROVED, *_TELL.get(end, ()), end)


def _make_waiting(world: World, names: list[str]) -> None:
    """One of high risk with one vote of two, one that is escalated, one that is assigned."""
    values = {**current_policy().values, "approvals_for_high_risk": 2}
    PolicyVersion.objects.create(
        version=3, values=values, reason="two people for high risk", author=world.people["carl"]
    )
    high = make_adaptation(
        world, "high", LONG_RUN, A.AWAITING_APPROVAL, layer=names[40], risk="high"
    )
    Vote.objects.create(
        adaptation=high,
        user=world.people["oscar"],
        evidence_hash=high.evidence_hash,
        reason="the layer is dead",
    )
    make_adaptation(
        world,
        "escalated",
        LONG_RUN,
        A.AWAITING_APPROVAL,
        layer=names[51],
        assigned_to=world.people["ada"],
        escalated_by=world.people["oscar"],
        escalated_reason="I do not know this architecture well enough",
    )


def _make_incidents(world: World, names: list[str]) -> None:
    run = world.runs[LONG_RUN]
    for number in range(7):
        record_violation(
            run=run,
            rule=ViolationRule.LATENCY,
            severity=Severity.CAUTION,
            observed="75.33 ms",
            limit="10 ms",
            text=f"mlp_gelu_2048 in {names[number]}: measured latency is 75.33 ms, at most 10 ms.",
            action="The kernel was not sent to the run.",
            layer=names[number],
            step=300 * number,
        )
    spike = {**FOUND, "rule": ViolationRule.DIAGNOSIS, "severity": Severity.CRITICAL}
    spike |= {"layer": "", "remedies": ("rewind", "set_lr", "clip_layer")}
    common: dict[str, Any] = {"rule": ViolationRule.DIAGNOSIS, "severity": Severity.SERIOUS}
    common |= {"since_step": 1_480, "remedies": ("recycle", "rewind")}
    dying = Finding(
        layer=names[32],
        observed=f"61% of the units of {names[32]} had a gradient of exactly zero in 8 "
        "readings in a row",
        limit="less than 50%",
        remedy=get_rule("dying_relu").advice,
        slug="dying_relu",
        **common,
    )
    record_findings(run=run, findings=[Finding(**spike), dying])
    record_findings(run=world.runs["topics-lm"], findings=[Finding(**spike)])
    record_findings(
        run=world.runs["topics-lm"], findings=[Finding(**{**spike, "resolved_step": 6_120})]
    )


def _make_giant(world: World) -> None:
    run = make_run(world, GIANT, "olga", steps=400, state=RunState.RUNNING)
    names = [f"decoder.block.{at // 8}.experts.{at % 8}.down_proj" for at in range(MANY)]
    _rename_layers(run, names)
    Metric.objects.filter(run=run, name="step_ms").update(value=812.0)
    make_adaptation(world, "giant", GIANT, A.AWAITING_APPROVAL, layer=names[700], risk="low")


def make_plan(world: World, run_name: str, layers: list[str], **changes: Any) -> Plan:
    """Changes that wait for one approval, or are what ``changes`` says."""
    run = world.runs[run_name]
    values: dict[str, Any] = {
        "policy": "heuristic-3",
        "safety_policy": current_policy(),
        "proposed_step": run.step - 40,
        "value": 0.031,
        "limits": {"parameters": 2.2e9, "memory_mib": 1024.0, "latency_ms": 10.0},
        "reasons": ["The best 3 of 9 possible changes within the limits of this run."],
        "asks": ["A plan of several changes always needs a person."],
        "deadline_at": timezone.now() + timedelta(minutes=11),
        **changes,
    }
    plan = Plan.objects.create(run=run, run_epoch=1, idempotency_key=f"{run_name}:plan", **values)
    waits = plan.state == PlanState.AWAITING_APPROVAL
    of_member: dict[str, Any] = {} if waits else {"asks": [], "ended_at": timezone.now()}
    for place, name in enumerate(layers):
        make_adaptation(
            world,
            f"plan-{place}",
            run_name,
            A.AWAITING_APPROVAL if waits else A.NOT_APPLIED,
            layer=name,
            plan=plan,
            plan_place=place,
            **of_member,
        )
    return plan


def make_shadow(world: World, name: str) -> None:
    """An adaptation was tried on a copy, and it helps."""
    tried = world.adaptations[name]
    command = Command.objects.create(
        run=tried.run,
        epoch=1,
        seq=900,
        kind=CommandKind.SHADOW,
        adaptation_uid=tried.uid,
        layer=tried.layer,
        issued_at=timezone.now() - timedelta(minutes=2),
        expires_at=timezone.now(),
        signature="s",
        state=CommandState.APPLIED,
        step=1_990,
        acknowledged_at=timezone.now() - timedelta(minutes=1),
    )
    ShadowTrial.objects.create(
        adaptation=tried,
        command=command,
        asked_by=world.people["oscar"],
        most_steps=300,
        most_seconds=30,
        gain=0.031,
        low=0.012,
        high=0.05,
        steps=200,
        looks=12,
        seconds=4.5,
    )


def _make_many_findings(world: World) -> None:
    """Forty findings of one run: five rules in eight layers."""
    run = make_run(world, "forty-findings", "olga", steps=900, state=RunState.RUNNING)
    names = _transformer_names(2)
    _rename_layers(run, names)
    seen = {
        "dying_relu": "{share}% of the units of {name} had a gradient of exactly zero in 8 "
        "readings in a row",
        "frozen_part": "1,048,576 of 1,064,960 parameters are frozen; no weight matrix learns",
        "saturation": "{share}% of what enters {name} is saturated; the same is true of 3 of 8 "
        "layers in all",
        "update_ratio_low": "up to step 900 the median update is at most 4.2e-06 of its weight, "
        "and the loss is {share}% of the first",
        "exploding_gradient": "the gradient norm is 31,000 in {name} and 290 in lm_head, a "
        "ratio of 110",
    }
    record_findings(
        run=run,
        findings=[
            Finding(
                rule=ViolationRule.DIAGNOSIS,
                severity=list(Severity)[1 + (place + number) % (len(Severity) - 1)],
                layer=name,
                observed=observed.format(share=60 + place, name=name),
                limit="less than 50%",
                remedy=get_rule(slug).advice,
                slug=slug,
                since_step=100 * place,
                remedies=("recycle", "rewind"),
            )
            for number, (slug, observed) in enumerate(seen.items())
            for place, name in enumerate(names)
        ],
    )


def _make_project(world: World) -> None:
    """A second project, in which adaptation is killed; its run has been stopped by a person."""
    vision = Project.objects.create(name="vision")
    for name, role in (("olga", "operator"), ("rafi", "researcher"), ("carl", "curator")):
        Membership.objects.create(project=vision, user=world.people[name], role=role)
    run = make_run(world, "killed-run", "rafi", steps=300, state=RunState.RUNNING)
    Run.objects.filter(pk=run.pk).update(project=vision)
    adaptation_switch()
    ProjectSwitch.objects.create(
        project=vision, on=False, changed_by="olga", reason="losses rise in two of its runs"
    )
    now = timezone.now()
    Command.objects.create(
        run=run,
        epoch=1,
        seq=1,
        kind=CommandKind.PAUSE_ADAPTATION,
        issued_at=now - timedelta(seconds=40),
        expires_at=now,
        signature="s",
        state=CommandState.APPLIED,
        step=280,
        acknowledged_at=now - timedelta(seconds=38.6),
    )
    ended = make_run(world, "ended-in-vision", "rafi", steps=300, state=RunState.FAILED)
    Run.objects.filter(pk=ended.pk).update(
        project=vision, ended_at=now, end_reason="ValueError: the loss is not finite"
    )


def make_variants(world: World, slug: str) -> None:
    """Two sizes of a blueprint: one waits for a curator, one was admitted."""
    blueprint = Blueprint.objects.get(slug=slug)
    for factor in (0.5, 2.0):
        blueprint.variants.create(
            key=f"hidden x{factor:g}",
            factors={"hidden": factor},
            policy="sizes-1",
            chance=0.4,
            expected=0.012,
            error=0.02,
            learned_from=[world.adaptations["kept"].uid],
        )
    blueprint.variants.filter(key="hidden x2").update(
        state=VariantState.ADMITTED,
        decided_by=world.people["carl"],
        decided_at=timezone.now(),
        reason="better in both trials",
    )
    Blueprint.objects.filter(slug=slug).update(tunes=["hidden"])
