"""Remedies: proposed by a trainer that has found a fault, or asked for by a person.

Every gate is checked in the transaction that writes. From then on a remedy lives as a graft does.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

from django.db import transaction
from django.db.models import Q, QuerySet

from apps.accounts.actors import SYSTEM, Actor, ActorKind
from apps.accounts.models import User
from apps.accounts.policy import Act, may
from apps.adaptations.binding import shown_hash
from apps.adaptations.delegations import covering, sentence
from apps.adaptations.dispatch import send_remedy
from apps.adaptations.history import freeze_asks, why_frozen
from apps.adaptations.lifecycle import transition
from apps.adaptations.models import Adaptation
from apps.adaptations.proposals import GateClosedError, announce_proposal, record_closed_gates
from apps.adaptations.votes import vote, votes_missing
from apps.blueprints.models import KnownRemedy
from apps.policies.services import current_policy
from apps.rest.clock import now as database_now
from apps.rest.problems import Problem
from apps.runs.models import Run
from apps.runs.services import check_epoch, lock_run
from apps.violations.services import record_findings
from esper.constraints import RemedyInputs, check_asked_for, check_remedy
from esper.contracts import (
    ADAPTATION_ENDED,
    AdaptationState,
    Check,
    Finding,
    Risk,
    RunMode,
    SafetyPolicy,
    Severity,
    wire,
)
from esper.contracts.protocol import RemedyProposal

S = AdaptationState
_UNDER_WAY = (S.DISPATCHED, S.ACCEPTED, S.PROBATION, S.ROLLING_BACK, S.IN_DOUBT)
# After these, the same remedy for the same kind of finding has a cooldown.
_DECLINED = Q(state__in=(S.REJECTED, S.EXPIRED)) | Q(taken_back_by__isnull=False)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A remedy with its settings, and why it is wanted.

    Attributes:
        finding: None where a person asks for it.
        asks: why a person must decide, beside what the gates ask for.
        user: who asks for it; None for a trainer.
    """

    remedy: KnownRemedy
    layer: str
    config: dict[str, Any]
    step: int
    key: str
    finding: Finding | None = None
    asks: Sequence[str] = field(default=())
    user: User | None = None
    reason: str = ""

    @property
    def slug(self) -> str:
        """Of the rule whose finding it answers."""
        return self.finding.slug if self.finding is not None else ""


def propose_remedy(*, run: Run, proposal: RemedyProposal, actor: Actor) -> Adaptation:
    """Write a remedy that answers a finding, then approve it by rule or ask a person.

    A repeated proposal, and one for a finding that is answered already, returns what is there.

    Raises:
        GateClosedError: a hard gate did not pass.
        Problem: old epoch, or unknown remedy, setting or layer.
    """
    try:
        with transaction.atomic():
            return _propose(run, proposal, actor)
    except GateClosedError as closed:
        record_closed_gates(
            run=run,
            layer=proposal.layer,
            step=proposal.step,
            checks=closed.checks,
            action="Nothing was changed.",
        )
        raise


def _propose(run: Run, proposal: RemedyProposal, actor: Actor) -> Adaptation:
    run = lock_run(run.pk)  # one proposal of a run at a time
    check_epoch(run, proposal.epoch)
    key = f"{run.uid}:remedy:{proposal.key}"
    slug = proposal.finding.slug
    own = Adaptation.objects.filter(run=run)
    known = own.filter(idempotency_key=key).first()
    known = known or own.filter(finding=slug).exclude(state__in=ADAPTATION_ENDED).first()
    if known is not None:
        return known
    record_findings(run=run, findings=[proposal.finding])  # telemetry may bring it later
    remedy = known_remedy(run, proposal.remedy, proposal.layer, proposal.config)
    wanted = _Wanted(
        remedy=remedy,
        layer=proposal.layer,
        config=proposal.config,
        step=proposal.step,
        key=key,
        finding=proposal.finding,
        # Not answered ahead: a delegation does not go through a freeze.
        asks=(*proposal.asks, *(() if remedy.changes_nothing else freeze_asks(run))),
    )
    policy = current_policy(run).safety_policy()
    checks = check_remedy(_inputs(run, wanted), policy)
    adaptation = _write(run, wanted, checks)
    announce_proposal(adaptation, actor)
    if adaptation.asks:
        return _ask_or_delegate(adaptation, wanted, checks, policy)
    rule = Actor(ActorKind.RULE, f"policy v{adaptation.safety_policy.version}")
    why = f"risk {adaptation.risk} needs no person, and it can be taken back"
    return _approve_by_rule(adaptation, rule, why, decided_rule=f"{rule.name}: {why}")


def _ask_or_delegate(
    adaptation: Adaptation, wanted: _Wanted, checks: Sequence[Check], policy: SafetyPolicy
) -> Adaptation:
    """Wait for a person, unless one has approved just this ahead."""
    delegation = None
    if not wanted.asks:  # what the trainer itself asks is never answered ahead
        delegation = covering(adaptation.run, wanted.remedy, adaptation.config, checks, policy)
    if delegation is None:
        rule = Actor(ActorKind.RULE, f"policy v{adaptation.safety_policy.version}")
        reason = " ".join(adaptation.asks)
        return transition(adaptation, S.AWAITING_APPROVAL, actor=rule, reason=reason)
    rule = Actor(ActorKind.RULE, f"delegation of {delegation.granted_by.get_username()}"[:150])
    why = sentence(delegation)
    return _approve_by_rule(adaptation, rule, why, decided_rule=why[:200], delegation=delegation)


def _approve_by_rule(
    adaptation: Adaptation, rule: Actor, reason: str, **changes: Any
) -> Adaptation:
    transition(
        adaptation, S.APPROVED, actor=rule, reason=reason, decided_at=database_now(), **changes
    )
    return send_remedy(adaptation, actor=rule)


@transaction.atomic
def ask_for_remedy(
    *,
    run: Run,
    user: User,
    via: str,
    remedy: str,
    layer: str,
    config: dict[str, Any],
    reason: str,
    only_ask: bool = False,
) -> Adaptation:
    """A person asks for a remedy. It is approved by that where they may approve for this run, and
    where it changes nothing.

    Args:
        only_ask: it waits for a person whoever asks, and no vote is given: a program asks.

    Raises:
        GateClosedError: changes are switched off, or the run only observes.
        Problem: not allowed, the run has ended, or unknown remedy, setting or layer.
    """
    run = lock_run(run.pk)
    permission = may(user, Act.PROPOSE_REMEDY, of=run)
    if not permission.allowed:
        raise Problem(403, permission.code, permission.why)
    if run.ended:
        raise Problem(409, "run-ended", f"This run has ended: it is {run.state}.", state=run.state)
    known = known_remedy(run, remedy, layer, config)
    frozen = () if known.changes_nothing else freeze_asks(run)
    only_ask = only_ask or bool(frozen)  # in a freeze it waits, whoever asks
    wanted = _Wanted(
        remedy=known,
        layer=layer,
        config=config,
        step=run.step,
        key=f"{run.uid}:asked:{uuid.uuid4()}",
        asks=(f"{user.get_username()} asks for it.", *frozen),
        user=user,
        reason=reason,
    )
    checks = check_asked_for(_inputs(run, wanted), current_policy(run).safety_policy())
    adaptation = _write(run, wanted, checks)
    actor = Actor.person(user, via=via)
    announce_proposal(adaptation, actor)
    if only_ask:
        return transition(adaptation, S.AWAITING_APPROVAL, actor=actor, reason=reason)
    return _decide_asked_for(adaptation, known, user, actor=actor, reason=reason)


def _decide_asked_for(
    adaptation: Adaptation, remedy: KnownRemedy, user: User, *, actor: Actor, reason: str
) -> Adaptation:
    """Approves what changes nothing, and what the person who asks for it may approve alone."""
    by_rule = "it changes nothing, so nobody must approve it" if remedy.changes_nothing else ""
    if not by_rule:
        may_approve = may(user, Act.APPROVE, of=adaptation.run).allowed
        if not may_approve or votes_missing(adaptation, with_vote_of=user):
            if may_approve:  # to ask for it is the first vote
                vote(adaptation, user, reason=reason)
            return transition(adaptation, S.AWAITING_APPROVAL, actor=actor, reason=reason)
    transition(
        adaptation,
        S.APPROVED,
        actor=actor,
        reason=reason or by_rule,
        decided_by=None if by_rule else user,
        decided_rule=by_rule,
        decided_at=database_now(),
        decision_reason=reason,
    )
    return send_remedy(adaptation, actor=actor)


def remedy_checks_now(adaptation: Adaptation) -> tuple[Check, ...]:
    """The gates that its proposal passed, with what holds now.

    Raises:
        Problem: 422, this server does not know the remedy any more.
    """
    run = adaptation.run
    wanted = _Wanted(
        remedy=known_remedy(run, adaptation.remedy, adaptation.layer, adaptation.config),
        layer=adaptation.layer,
        config=adaptation.config,
        step=run.step,
        key=adaptation.idempotency_key,
        finding=None if adaptation.found is None else wire.from_wire(Finding, adaptation.found),
        user=adaptation.proposed_by,
    )
    check = check_remedy if adaptation.proposed_by is None else check_asked_for
    return check(_inputs(run, wanted), current_policy(run).safety_policy())


def withdraw_answered(run: Run, findings: Sequence[Finding]) -> None:
    """A remedy that waits for a person is not needed any more where its finding is over."""
    over = {finding.slug: finding for finding in findings if finding.resolved_step >= 0}
    if not over:
        return
    waiting = Adaptation.objects.filter(
        run=run, finding__in=[slug for slug in over if slug], state=S.AWAITING_APPROVAL
    )
    for adaptation in waiting:
        step = over[adaptation.finding].resolved_step
        transition(
            adaptation,
            S.SUPERSEDED,
            actor=SYSTEM,
            reason=f"its finding was over at step {step:,}",
        )


def known_remedy(run: Run, slug: str, layer: str, config: Mapping[str, Any]) -> KnownRemedy:
    """The remedy of the catalogue; raises ``Problem`` 422 where it, or a setting, does not fit."""
    remedy = KnownRemedy.objects.filter(slug=slug, present=True).first()
    if remedy is None:
        raise Problem(422, "unknown-remedy", f"There is no remedy called {slug!r}.")
    if layer and run.layer_info(layer) is None:
        raise Problem(422, "unknown-layer", f"Run {run.name} has no layer called {layer!r}.")
    if layer and remedy.scope == "run":
        raise Problem(422, "invalid", f"{slug} is for the whole run, not for one layer.")
    if not layer and remedy.scope == "layer":
        raise Problem(422, "invalid", f"{slug} needs the name of a layer.")
    for name, value in config.items():
        _check_setting(remedy, name, value)
    return remedy


def _check_setting(remedy: KnownRemedy, name: str, value: Any) -> None:
    """Its range is checked by the trainer."""
    if name not in remedy.settings:
        known = ", ".join(sorted(remedy.settings)) or "none"
        raise Problem(
            422, "invalid", f"{remedy.slug} has no setting {name!r}; its settings are: {known}."
        )
    default = remedy.settings[name]
    fits = type(value) is type(default) or (type(default), type(value)) == (float, int)
    if not fits:
        raise Problem(422, "invalid", f"{name} of {remedy.slug} cannot be {value!r}.")


def _inputs(run: Run, wanted: _Wanted) -> RemedyInputs:
    own = Adaptation.objects.filter(run=run).exclude(remedy="")
    same = own.filter(remedy=wanted.remedy.slug, finding=wanted.slug)
    under_way = own.filter(state__in=_UNDER_WAY).order_by("id").first()
    seen = run.last_seen_at
    return RemedyInputs(
        mode=RunMode(run.mode),
        step=wanted.step,
        remedy=wanted.remedy.slug,
        frozen=why_frozen(run),
        under_way=under_way.number if under_way else 0,
        urgent=wanted.finding is not None and wanted.finding.severity is Severity.CRITICAL,
        declined_step=_declined_step(same),
        given=same.exclude(graft_step=None).exclude(decided_rule="").count(),
        always_asks=wanted.remedy.asks,
        changes_nothing=wanted.remedy.changes_nothing,
        adaptations_today=own.filter(grafted_at__gt=database_now() - timedelta(days=1)).count(),
        risk=Risk(wanted.remedy.risk),
        age_seconds=(database_now() - seen).total_seconds() if seen else math.nan,
    )


def _declined_step(same: QuerySet[Adaptation]) -> int:
    """When a person, or nobody in time, said no to this remedy last; -1: never."""
    declined = same.filter(_DECLINED).order_by("-id")
    step = declined.values_list("ended_step", flat=True).first()
    return -1 if step is None else step


def _write(run: Run, wanted: _Wanted, checks: Sequence[Check]) -> Adaptation:
    closed = [check for check in checks if check.blocks]
    if closed:
        raise GateClosedError(closed)
    asks = [check.text for check in checks if check.asks]
    asks += [line for line in wanted.asks if line not in asks]
    config = {**wanted.remedy.settings, **wanted.config}
    found = None if wanted.finding is None else wire.to_wire(wanted.finding)
    adaptation = Adaptation(
        run=run,
        run_epoch=run.epoch,
        idempotency_key=wanted.key,
        layer=wanted.layer,
        remedy=wanted.remedy.slug,
        in_words=wanted.remedy.in_words(config),
        config=config,
        risk=wanted.remedy.risk,
        finding=wanted.slug,
        found=found,
        proposed_by=wanted.user,
        safety_policy=current_policy(run),
        proposed_step=wanted.step,
        evidence={"loss": run.last_loss},
        checks=[asdict(check) for check in checks],
        asks=asks,
    )
    adaptation.evidence_hash = shown_hash(adaptation)
    adaptation.save()
    return adaptation
