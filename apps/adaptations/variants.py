"""Variants of blueprints: suggested from experience, tried in shadow, admitted by a curator.

    suggested   Tamiyo has drawn it from closed grafts and trials; it is used nowhere
    tried       a trial in shadow, on a copy of a run, beside one of the size that was proposed
    admitted    by a curator, after a trial; from the next decision on it may be proposed
    withdrawn   by a curator; what is in models stays, and it is never suggested again

What a variant changes is a closed grammar, :mod:`esper.contracts.variants`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django.db import IntegrityError, transaction
from django.db.models import F, QuerySet
from django.utils import timezone

from apps.accounts.actors import Actor
from apps.accounts.models import User
from apps.accounts.policy import Act, Permission, may
from apps.adaptations.models import RECOVERED, Adaptation, ShadowTrial
from apps.audit.services import record
from apps.blueprints.models import Blueprint, Variant
from apps.notifications.services import SYSTEM_TOPIC, publish
from apps.rest.numbers import finite_or_none
from apps.rest.problems import Problem
from esper.contracts import AdaptationState, CommandState, VariantState
from esper.contracts import variants as grammar
from esper.contracts.protocol import TriedSize, TriedSizes, VariantSuggestion
from esper.reward.terms import NOT_YET

MOST_CASES = 300  # of each kind, the newest
_CLOSED = (AdaptationState.KEPT, AdaptationState.ROLLED_BACK, AdaptationState.REVERTED)


# --- what Tamiyo reads and writes -----------------------------------------------------------------


def tried_sizes(blueprint: Blueprint) -> TriedSizes:
    """What each size of a blueprint has gained, and which variants were suggested."""
    known = Variant.objects.filter(blueprint=blueprint)
    return TriedSizes(
        cases=(*_closed(blueprint), *_tried(blueprint)),
        taken=tuple(variant.factors for variant in known.order_by("id")),
        waiting=known.filter(state=VariantState.SUGGESTED).exists(),
    )


def _closed(blueprint: Blueprint) -> list[TriedSize]:
    rows = (
        Adaptation.objects.filter(blueprint=blueprint, state__in=_CLOSED)
        .exclude(reward=None)
        .exclude(policy=RECOVERED)
        .select_related("run")[:MOST_CASES]
    )
    found = [_case(row, row.uid, None, _shown(row)) for row in reversed(rows)]
    return [case for case in found if case is not None]


def _shown(adaptation: Adaptation) -> float | None:
    """The reward as if all of it were earned: sizes are compared, however long each was in use."""
    if adaptation.reward is None:
        return None
    terms: dict[str, float] = adaptation.reward_terms or {}
    return adaptation.reward - terms.get(NOT_YET, 0.0)


def _tried(blueprint: Blueprint) -> list[TriedSize]:
    rows = _finished().filter(adaptation__blueprint=blueprint)[:MOST_CASES]
    found = [
        _case(row.adaptation, row.uid, row.variant.factors if row.variant else None, row.gain)
        for row in reversed(rows)
    ]
    return [case for case in found if case is not None]


def _case(
    adaptation: Adaptation, uid: str, factors: dict[str, float] | None, gain: float | None
) -> TriedSize | None:
    """None where the run has another layer of that name by now."""
    place = adaptation.run.place_of(adaptation.layer, adaptation.since)
    if isinstance(place, str) or gain is None:
        return None
    return TriedSize(
        uid=uid,
        decision=adaptation.uid,
        layer=place,
        config=adaptation.config,
        factors=factors,
        gain=gain,
    )


@transaction.atomic
def suggest_variant(*, blueprint: Blueprint, told: VariantSuggestion, actor: Actor) -> Variant:
    """Write down a variant that should be tried.

    Raises:
        Problem: the grammar has no such variant (422); it was suggested before, or another one of
            this blueprint waits (409).
    """
    reason = grammar.why_no_variant(told.factors, blueprint.tunes)
    if reason:
        raise Problem(422, "invalid", reason)
    if Variant.objects.filter(blueprint=blueprint, state=VariantState.SUGGESTED).exists():
        raise Problem(409, "variant-known", f"Another variant of {blueprint.slug} waits.")
    key = grammar.key_of(told.factors)
    try:
        with transaction.atomic():
            made = Variant.objects.create(
                blueprint=blueprint,
                factors=dict(told.factors),
                key=key,
                policy=told.policy,
                chance=finite_or_none(told.chance),
                expected=finite_or_none(told.expected),
                error=finite_or_none(told.error),
                learned_from=list(told.cases),
            )
    except IntegrityError:
        raise Problem(
            409, "variant-known", f"{blueprint.slug} with {key} was suggested before."
        ) from None
    _tell(made, actor, "suggested", data={"cases": len(told.cases)})
    return made


# --- use ------------------------------------------------------------------------------------------


def admitted() -> tuple[grammar.Variant, ...]:
    """What decisions may use, with what its trials have shown."""
    rows = Variant.objects.filter(
        state=VariantState.ADMITTED, blueprint__enabled=True, blueprint__present=True
    )
    found = []
    for row in rows.select_related("blueprint").order_by("id"):
        gains = advantages(row)
        mean = sum(gains) / len(gains) if gains else float("nan")
        found.append(
            grammar.Variant(row.uid, row.blueprint.slug, dict(row.factors), mean, len(gains))
        )
    return tuple(found)


def check_admitted(uid: str, blueprint: Blueprint) -> Variant | None:
    """The variant that a proposal names; None: it names none. Locked, so that it stays admitted.

    Raises:
        Problem: 409, it is not admitted for this blueprint.
    """
    if not uid:
        return None
    found = Variant.objects.select_for_update().filter(uid=uid, blueprint=blueprint).first()
    if found is None or found.state != VariantState.ADMITTED:
        state = found.state if found else "unknown"
        raise Problem(
            409, "variant-not-admitted", f"The variant {uid} of {blueprint.slug} is {state}."
        )
    return found


def check_still_admitted(adaptation: Adaptation) -> None:
    """Raises ``Problem`` 409 where the variant was withdrawn while the adaptation waited."""
    if adaptation.variant is not None:
        check_admitted(adaptation.variant.uid, adaptation.grafted_blueprint)


# --- curators -------------------------------------------------------------------------------------


def may_admit(variant: Variant, user: User) -> Permission:
    """Whether this person may admit it now."""
    permission = may(user, Act.ADMIT_VARIANT)
    if not permission.allowed:
        return permission
    if variant.state != VariantState.SUGGESTED:
        return Permission(False, "variant-decided", f"The variant is {variant.state}.")
    if not trials_of(variant, finished=True):
        return Permission(
            False, "not-tried", "It was not tried in shadow yet: only what was tried is admitted."
        )
    return permission


def may_withdraw(variant: Variant, user: User) -> Permission:
    permission = may(user, Act.ADMIT_VARIANT)
    if permission.allowed and variant.state == VariantState.WITHDRAWN:
        return Permission(False, "variant-decided", "The variant is withdrawn.")
    return permission


@transaction.atomic
def admit_variant(*, variant: Variant, user: User, via: str, reason: str) -> Variant:
    """From the next decision on it may be proposed.

    Raises:
        Problem: not allowed (403), decided already or not tried (409).
    """
    variant = _locked(variant)
    _require(may_admit(variant, user))
    return _decide(variant, VariantState.ADMITTED, user, via, reason)


@transaction.atomic
def withdraw_variant(*, variant: Variant, user: User, via: str, reason: str) -> Variant:
    """It is not proposed and not suggested any more; what waits with it cannot be approved.

    Raises:
        Problem: not allowed (403), withdrawn already (409), or no reason (422).
    """
    variant = _locked(variant)
    _require(may_withdraw(variant, user))
    if not reason.strip():
        raise Problem(422, "reason-required", "Say why this variant must not be used.")
    return _decide(variant, VariantState.WITHDRAWN, user, via, reason)


def _decide(variant: Variant, state: VariantState, user: User, via: str, reason: str) -> Variant:
    Variant.objects.filter(pk=variant.pk).update(
        state=state,
        decided_by=user,
        decided_at=timezone.now(),
        reason=reason.strip(),
        revision=F("revision") + 1,
    )
    variant.refresh_from_db()
    _tell(variant, Actor.person(user, via=via), str(state), reason=reason)
    return variant


def _locked(variant: Variant) -> Variant:
    return Variant.objects.select_for_update().select_related("blueprint").get(pk=variant.pk)


def _require(permission: Permission) -> None:
    if not permission.allowed:
        status = 409 if permission.code in {"variant-decided", "not-tried"} else 403
        raise Problem(status, permission.code, permission.why)


def _tell(variant: Variant, actor: Actor, word: str, *, reason: str = "", data: Any = None) -> None:
    record(
        actor=actor,
        act=f"variant.{word}",
        object_kind="variant",
        object_uid=variant.uid,
        reason=reason,
        data={"blueprint": variant.blueprint.slug, "change": variant.key, **(data or {})},
    )
    publish(
        topic=SYSTEM_TOPIC,
        type=f"blueprint.variant_{word}",
        data={"blueprint": variant.blueprint.slug, "variant": variant.uid},
    )


# --- lineage --------------------------------------------------------------------------------------


def variants_of(blueprint: Blueprint) -> QuerySet[Variant]:
    """Newest first."""
    rows = Variant.objects.filter(blueprint=blueprint)
    return rows.select_related("blueprint", "decided_by")


def trials_of(variant: Variant, *, finished: bool = False) -> Sequence[ShadowTrial]:
    """Newest first, of the runs that the caller sees; ``finished``: those with a result."""
    rows = _finished() if finished else ShadowTrial.objects.all()
    return list(rows.filter(variant=variant).select_related("adaptation", "command", "asked_by"))


def cases_of(variant: Variant) -> tuple[list[Adaptation], list[ShadowTrial], int]:
    """(closed grafts, trials, how many it was learned from that the caller does not see)."""
    uids = variant.learned_from
    grafts = list(Adaptation.objects.filter(uid__in=uids).select_related("run"))
    trials = list(ShadowTrial.objects.filter(uid__in=uids).select_related("adaptation"))
    return grafts, trials, len(uids) - len(grafts) - len(trials)


def advantages(variant: Variant) -> list[float]:
    """Its gain over the proposed size, of each decision at which both were tried, newest first."""
    tried = _finished().filter(variant=variant)
    plain = {
        trial.adaptation_id: trial.gain
        for trial in _finished()
        .filter(variant=None, adaptation__in=tried.values("adaptation"))
        .order_by("id")
    }
    return [
        trial.gain - base
        for trial in tried
        if (base := plain.get(trial.adaptation_id)) is not None and trial.gain is not None
    ]


def waiting_variants(adaptation: Adaptation) -> QuerySet[Variant]:
    """What may be tried in shadow beside the proposed size."""
    rows = Variant.objects.filter(blueprint=adaptation.blueprint_id)
    return rows.exclude(state=VariantState.WITHDRAWN).order_by("id")


def _finished() -> QuerySet[ShadowTrial]:
    """Trials with a result."""
    done = ShadowTrial.objects.filter(command__state=CommandState.APPLIED).exclude(gain=None)
    return done.select_related("adaptation__run", "variant")
