"""The thresholds in force, and their changes by people.

    draft -> a second person agrees -> in force -> replaced
          -> withdrawn

A change that only makes thresholds stricter needs no second person. Of a run's three scopes, all
runs, its project and the run itself, the strictest value of each threshold counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from django.db import transaction
from django.db.models import Exists, Max, Q
from django.utils import timezone

from apps.accounts.actors import Actor
from apps.accounts.models import DEFAULT_PROJECT, Project, User
from apps.accounts.policy import ALLOWED, Act, OfProject, may
from apps.accounts.projects import people_with
from apps.accounts.visibility import everything
from apps.audit.services import record
from apps.notifications.services import SYSTEM_TOPIC, publish
from apps.policies.models import (
    AdaptationSwitch,
    PolicyState,
    PolicyVersion,
    ProjectSwitch,
    Scope,
    Switch,
)
from apps.rest.problems import Problem
from esper.constraints.strictness import laxer, strictest, thresholds
from esper.contracts import SafetyPolicy
from esper.exceptions import CodecError

Backtest = Callable[[SafetyPolicy, SafetyPolicy], dict[str, Any]]  # (before, after)


_backtest: Backtest | None = None


def register_backtest(backtest: Backtest) -> None:
    """The app that knows past cases says how two policies are compared on them."""
    global _backtest
    _backtest = backtest


class PlaceOfRun(Protocol):
    """What a scope needs of a run."""

    @property
    def uid(self) -> str: ...

    @property
    def owner_id(self) -> int | None: ...

    @property
    def project_id(self) -> int | None: ...


def current_policy(run: PlaceOfRun | None = None) -> PolicyVersion:
    """The version in force for a run, or for all; the first one is made from the defaults."""
    wanted = Q(scope=Scope.GLOBAL, target="")
    if run is not None:
        wanted |= Q(scope=Scope.RUN, target=run.uid) | Q(scope=Scope.PROJECT, target=run.project_id)
    in_force = PolicyVersion.objects.filter(wanted, state=PolicyState.IN_FORCE)
    newest = {version.scope: version for version in in_force.order_by("version")}
    for scope in (Scope.RUN, Scope.PROJECT, Scope.GLOBAL):
        if scope in newest:
            return newest[scope]
    created, _ = PolicyVersion.objects.get_or_create(
        version=1,
        defaults={
            "own": _values(SafetyPolicy()),
            "values": _values(SafetyPolicy()),
            "reason": "defaults of Esper",
        },
    )
    return created


def _in_force(scope: str, target: str) -> PolicyVersion | None:
    return PolicyVersion.objects.filter(
        scope=scope, target=target, state=PolicyState.IN_FORCE
    ).first()


@everything()  # the numbers of versions are everybody's
@transaction.atomic
def publish_policy(
    *,
    changes: dict[str, Any],
    reason: str,
    user: User,
    via: str,
    scope: str = Scope.GLOBAL,
    run: PlaceOfRun | None = None,
) -> PolicyVersion:
    """Write a new version with some thresholds changed.

    It is in force at once where every change is stricter; else it is a draft for a second person.

    Args:
        run: the run, or one of the project; none for all runs.

    Raises:
        Problem: not allowed, no reason, an unknown threshold, or invalid values.
    """
    _check_may(user, None if scope == Scope.GLOBAL else run)
    if not reason.strip():
        raise Problem(422, "reason-required", "Say why the thresholds change.")
    target = _target(scope, run)
    current = current_policy(None if scope == Scope.GLOBAL else run)
    unknown = sorted(set(changes) - thresholds())
    if unknown:
        raise Problem(422, "invalid", f"There is no threshold called {', '.join(unknown)}.")
    known = _in_force(scope, target)
    own = {**(known.own if known is not None else {}), **changes}
    policy, sources = _merged(scope, own, _project(run))
    values = _values(policy)
    if values == {**_values(SafetyPolicy()), **current.values} and scope == current.scope:
        raise Problem(422, "invalid", f"All values are the same as in policy v{current.version}.")
    _check_reachable(policy.approvals_for_high_risk, scope, run)
    before = current.safety_policy()
    more = laxer(before, policy)
    created = PolicyVersion.objects.create(
        version=_next_version(),
        scope=scope,
        target=target,
        project=_project(run) if scope == Scope.RUN else "",
        state=PolicyState.DRAFT,
        own=own,
        values=values,
        sources=sources,
        laxer=list(more),
        backtest={} if _backtest is None else _backtest(before, policy),
        reason=reason.strip(),
        author=user,
    )
    old = {name: current.values.get(name) for name in changes}
    _tell(created, "policy.drafted", user, via, reason, {"before": old, "after": changes})
    return created if more else _put_in_force(created, user, via)


@transaction.atomic
def approve_policy(
    *, version: PolicyVersion, user: User, via: str, reason: str = ""
) -> PolicyVersion:
    """A second person agrees with a draft, which is in force from now on.

    Raises:
        Problem: not allowed, one's own draft, no draft any more, or made before another version.
    """
    _check_may(user, _place_of(version))
    version = _draft(version)
    if version.author_id == user.pk:
        raise Problem(
            403, "self-approval", "You wrote this version: another curator or admin has to agree."
        )
    newer = _in_force(version.scope, version.target)
    if newer is not None and newer.version > version.version:
        raise Problem(
            409, "stale", f"Policy v{newer.version} came into force meanwhile: write a new draft."
        )
    return _put_in_force(version, user, via, reason)


@transaction.atomic
def withdraw_policy(
    *, version: PolicyVersion, user: User, via: str, reason: str = ""
) -> PolicyVersion:
    """Give a draft up.

    Raises:
        Problem: not allowed, or no draft any more.
    """
    _check_may(user, _place_of(version))
    version = _draft(version)
    version.state, version.decided_by = PolicyState.WITHDRAWN, user
    version.decided_at = timezone.now()
    version.save(update_fields=["state", "decided_by", "decided_at"])
    _tell(version, "policy.withdrawn", user, via, reason, {})
    return version


# --- parts ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Place:
    project_id: int
    owner_id: None = None


def _place_of(version: PolicyVersion) -> OfProject | None:
    """Whose curators and admins may change it; None: those of the server."""
    if version.scope == Scope.GLOBAL:
        return None
    return _Place(int(version.target if version.scope == Scope.PROJECT else version.project))


def _check_may(user: User, of: OfProject | None) -> None:
    permission = may(user, Act.EDIT_POLICY, of=of)
    if not permission.allowed:
        raise Problem(403, permission.code, permission.why)


def _target(scope: str, run: PlaceOfRun | None) -> str:
    if scope == Scope.GLOBAL:
        return ""
    if run is None:
        raise Problem(422, "invalid", f"Name the run of the {scope}.")
    return run.uid if scope == Scope.RUN else _project(run)


def _project(run: PlaceOfRun | None) -> str:
    return "" if run is None else str(run.project_id)


def _merged(scope: str, own: dict[str, Any], project: str) -> tuple[SafetyPolicy, dict[str, str]]:
    """The strictest of a scope's own thresholds and the wider scopes', and whose each is."""
    base = _in_force(Scope.GLOBAL, "") or current_policy()
    parents = {str(Scope.GLOBAL): SafetyPolicy.from_wire(base.values)}
    if scope == Scope.RUN:
        wider = _in_force(Scope.PROJECT, project)
        if wider is not None:
            parents[str(Scope.PROJECT)] = SafetyPolicy.from_wire(wider.values)
    try:
        if scope == Scope.GLOBAL:
            return SafetyPolicy.from_wire({**base.values, **own}), {}
        merged, _ = strictest(parents)
        parents[str(scope)] = SafetyPolicy.from_wire({**_values(merged), **own})
    except CodecError as error:
        raise Problem(422, "invalid", str(error)) from error
    return strictest(parents)


def _draft(version: PolicyVersion) -> PolicyVersion:
    version = PolicyVersion.objects.select_for_update().get(pk=version.pk)
    if version.state != PolicyState.DRAFT:
        raise Problem(
            409, "decision-not-pending", f"Policy v{version.version} is no draft any more."
        )
    return version


def _put_in_force(version: PolicyVersion, user: User, via: str, reason: str = "") -> PolicyVersion:
    same = PolicyVersion.objects.filter(scope=version.scope, target=version.target)
    same.filter(state=PolicyState.IN_FORCE).update(state=PolicyState.REPLACED)
    if version.scope != Scope.GLOBAL:
        # A wider scope may have become stricter since the draft was written.
        policy, version.sources = _merged(version.scope, version.own, version.project)
        version.values = _values(policy)
    version.state, version.decided_at = PolicyState.IN_FORCE, timezone.now()
    version.decided_by = None if version.author_id == user.pk else user
    version.save()
    _tell(version, "policy.published", user, via, reason or version.reason, {"after": version.own})
    if version.scope != Scope.RUN:
        _follow(version)
    return version


def _follow(wider: PolicyVersion) -> None:
    """New versions of the narrower scopes, so that none allows more than the wider one."""
    narrower = PolicyVersion.objects.filter(state=PolicyState.IN_FORCE).exclude(scope=Scope.GLOBAL)
    if wider.scope == Scope.PROJECT:
        narrower = narrower.filter(scope=Scope.RUN, project=wider.target)
    for old in list(narrower.order_by("scope")):  # projects before runs
        merged, sources = _merged(old.scope, old.own, old.project)
        if _values(merged) == old.values:
            continue
        old.state = PolicyState.REPLACED
        old.save(update_fields=["state"])
        PolicyVersion.objects.create(
            version=_next_version(),
            scope=old.scope,
            target=old.target,
            project=old.project,
            own=old.own,
            values=_values(merged),
            sources=sources,
            reason=f"follows policy v{wider.version}",
            author=wider.author,
            decided_at=timezone.now(),
        )


def _next_version() -> int:
    current_policy()  # the first one is that of the defaults
    return int(PolicyVersion.objects.aggregate(newest=Max("version"))["newest"]) + 1


def _tell(
    version: PolicyVersion, act: str, user: User, via: str, reason: str, data: dict[str, Any]
) -> None:
    of_project = version.scope == Scope.PROJECT  # its events are for those who see the project
    record(
        actor=Actor.person(user, via=via),
        act=act,
        object_kind="project" if of_project else "policy",
        object_uid=_project_uid(version.target) if of_project else f"v{version.version}",
        run_uid=version.target if version.scope == Scope.RUN else "",
        reason=reason,
        data={"version": version.version, "scope": version.where, **data},
    )
    place = _place_of(version)
    publish(
        topic=SYSTEM_TOPIC,
        type=act,
        data={"version": version.version},
        project_id=None if place is None else place.project_id,
    )


def _project_uid(key: str) -> str:
    return Project.objects.values_list("uid", flat=True).get(pk=key)


def _approvers(project_id: int, *, besides: int | None) -> int:
    people = people_with(ALLOWED[Act.APPROVE], project_id)
    return (people if besides is None else people.exclude(pk=besides)).count()


def _check_reachable(approvals: int, scope: str, run: PlaceOfRun | None) -> None:
    """A policy that no set of people can satisfy would let every such adaptation expire.

    Approvers are counted in each project in which the version would hold: that of the run, or the
    default one and all with live runs. Nobody approves for a run of their own.
    """
    if scope == Scope.GLOBAL or run is None:
        live = Project.objects.filter(runs__isnull=False, runs__ended_at=None)
        places = {DEFAULT_PROJECT, *live.values_list("pk", flat=True)}
    else:
        places = {run.project_id or DEFAULT_PROJECT}
    owner = run.owner_id if run is not None and scope == Scope.RUN else None
    for place in sorted(places):
        approvers = _approvers(place, besides=owner)
        if approvals > max(1, approvers):
            name = Project.objects.values_list("name", flat=True).get(pk=place)
            raise Problem(
                422,
                "quorum-unreachable",
                f"{approvals} people would have to approve a high risk; in project {name} there "
                f"{'is' if approvers == 1 else 'are'} {approvers} who may.",
            )


def _values(policy: SafetyPolicy) -> dict[str, Any]:
    values = policy.to_wire()
    del values["version"]
    return values


def adaptation_switch() -> AdaptationSwitch:
    switch, _ = AdaptationSwitch.objects.get_or_create(pk=1)
    return switch


def project_switch(project: Project) -> ProjectSwitch:
    """The switch of one project, locked; it is made where it was never used."""
    adaptation_switch()  # whose row tells that there are switches at all
    ProjectSwitch.objects.get_or_create(project=project)
    return ProjectSwitch.objects.select_for_update().get(project=project)


@dataclass(frozen=True, slots=True)
class Kill:
    """A switch that is off; ``where``: "everywhere" or "in project vision"."""

    switch: Switch
    where: str

    @property
    def in_words(self) -> str:
        return f"{self.switch.changed_by} has switched adaptation off {self.where}"


def kill_over(project_id: int | None) -> Kill | None:
    """What keeps the runs of a project from being changed: the widest switch that is off."""
    own = ProjectSwitch.objects.filter(project=project_id, on=False)
    # One query in nearly every case: the lists ask for each of their runs.
    everywhere = AdaptationSwitch.objects.filter(pk=1).annotate(narrower=Exists(own)).first()
    if everywhere is None:  # no switch was ever used
        return None
    if not everywhere.on:
        return Kill(everywhere, "everywhere")
    switch = own.select_related("project").first() if everywhere.narrower else None
    return None if switch is None else Kill(switch, f"in project {switch.project.name}")
