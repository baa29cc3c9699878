"""Who may do what: the one table that pages, API, sockets and admin use.

Researchers run trainers and manage their own runs. Operators decide. Curators maintain the
catalogue and the thresholds, and do not decide on single adaptations. Nobody approves an
adaptation of their own run (four eyes).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from django.utils.translation import gettext as _

from apps.accounts.models import DEFAULT_PROJECT
from esper.contracts import Role

if TYPE_CHECKING:
    from django.contrib.auth.models import AnonymousUser

    from apps.accounts.models import User


class Act(StrEnum):
    VIEW = "view"
    CREATE_RUN = "create_run"
    PAUSE_ADAPTATION = "pause_adaptation"
    STOP_RUN = "stop_run"
    PROPOSE_REMEDY = "propose_remedy"
    APPROVE = "approve"
    REJECT = "reject"
    CLAIM = "claim"
    EXTEND = "extend"
    SHADOW = "shadow"
    CANCEL = "cancel"
    ROLL_BACK = "roll_back"
    KILL = "kill"
    ACKNOWLEDGE_VIOLATION = "acknowledge_violation"
    MANAGE_WORKERS = "manage_workers"
    SWITCH_BLUEPRINT = "switch_blueprint"
    ADMIT_VARIANT = "admit_variant"
    EDIT_POLICY = "edit_policy"
    MANAGE_CACHE = "manage_cache"
    VIEW_AUDIT = "view_audit"
    START_RECIPE = "start_recipe"
    STOP_LAUNCH = "stop_launch"
    MANAGE_PEOPLE = "manage_people"


_EVERYBODY = frozenset(Role)
_ON_DUTY = frozenset({Role.OPERATOR, Role.ADMIN})
_KEEPERS = frozenset({Role.CURATOR, Role.ADMIN})

ALLOWED: dict[Act, frozenset[Role]] = {
    Act.VIEW: _EVERYBODY,
    Act.CREATE_RUN: frozenset({Role.RESEARCHER, Role.OPERATOR, Role.ADMIN}),
    Act.PAUSE_ADAPTATION: _ON_DUTY,
    Act.STOP_RUN: _ON_DUTY,
    Act.PROPOSE_REMEDY: _ON_DUTY,
    Act.APPROVE: _ON_DUTY,
    Act.REJECT: _ON_DUTY,
    Act.CLAIM: _ON_DUTY,
    Act.EXTEND: _ON_DUTY,
    Act.SHADOW: _ON_DUTY,
    Act.CANCEL: _ON_DUTY,
    Act.ROLL_BACK: _ON_DUTY,
    Act.KILL: _ON_DUTY,
    Act.ACKNOWLEDGE_VIOLATION: _ON_DUTY,
    Act.MANAGE_WORKERS: _ON_DUTY,
    Act.SWITCH_BLUEPRINT: _KEEPERS,
    Act.ADMIT_VARIANT: _KEEPERS,
    Act.EDIT_POLICY: _KEEPERS,
    Act.MANAGE_CACHE: _ON_DUTY,
    Act.VIEW_AUDIT: _EVERYBODY,
    Act.START_RECIPE: _ON_DUTY,
    Act.STOP_LAUNCH: _ON_DUTY,
    Act.MANAGE_PEOPLE: frozenset({Role.ADMIN}),
}
# Acts that the owner of a run may do whatever their role: those that make it safer, and to ask.
OWNER_MAY = frozenset(
    {
        *(Act.PAUSE_ADAPTATION, Act.STOP_RUN, Act.STOP_LAUNCH, Act.PROPOSE_REMEDY),
        *(Act.CANCEL, Act.ROLL_BACK, Act.REJECT, Act.SHADOW),
    }
)

# What only a person does: a service account asks and makes runs safer, and never decides.
NEEDS_A_PERSON = frozenset(
    {
        *(Act.APPROVE, Act.CLAIM, Act.EXTEND, Act.EDIT_POLICY, Act.SWITCH_BLUEPRINT),
        *(Act.MANAGE_PEOPLE, Act.MANAGE_CACHE, Act.ACKNOWLEDGE_VIOLATION),
    }
)

IN_WORDS: dict[Act, str] = {
    Act.VIEW: "view everything",
    Act.CREATE_RUN: "attach runs",
    Act.PAUSE_ADAPTATION: "pause adaptation",
    Act.STOP_RUN: "stop runs",
    Act.PROPOSE_REMEDY: "ask for remedies",
    Act.APPROVE: "approve",
    Act.REJECT: "reject",
    Act.CLAIM: "claim",
    Act.EXTEND: "extend",
    Act.SHADOW: "try grafts in shadow",
    Act.CANCEL: "cancel",
    Act.ROLL_BACK: "roll back",
    Act.KILL: "kill all adaptation",
    Act.ACKNOWLEDGE_VIOLATION: "acknowledge violations",
    Act.MANAGE_WORKERS: "drain, quarantine and release workers",
    Act.SWITCH_BLUEPRINT: "enable and disable blueprints",
    Act.ADMIT_VARIANT: "admit and withdraw variants of blueprints",
    Act.EDIT_POLICY: "publish policies",
    Act.MANAGE_CACHE: "manage the kernel cache",
    Act.VIEW_AUDIT: "read the audit log",
    Act.START_RECIPE: "start and resume recipes",
    Act.STOP_LAUNCH: "stop launches",
    Act.MANAGE_PEOPLE: "manage people",
}


@dataclass(frozen=True, slots=True)
class Permission:
    """The answer, with the reason for a refusal."""

    allowed: bool
    code: str = ""
    why: str = ""


class OfProject(Protocol):
    """A run, a launch, or a project itself."""

    @property
    def owner_id(self) -> int | None: ...

    @property
    def project_id(self) -> int | None: ...


_YES = Permission(True)


def may(user: User | AnonymousUser, act: Act, *, of: OfProject | None = None) -> Permission:
    """May ``user`` do ``act``?

    Args:
        of: the run that the act is about, whose project has a role of its own for this person; None
            where it is about the whole server.
    """
    if not user.is_authenticated or not user.is_active:
        return Permission(False, "not-signed-in", _("You are not signed in."))
    if user.is_service and act in NEEDS_A_PERSON:
        return Permission(
            False,
            "service-account",
            _("A service account may not %(act)s: a person has to.") % {"act": _(IN_WORDS[act])},
        )
    role = Role(user.role) if of is None else user.access.role_in(of.project_id)
    if role is None:
        return Permission(False, "not-a-member", _("You are not a member of this project."))
    owns = of is not None and of.owner_id == user.pk
    if act is Act.APPROVE and owns:
        return Permission(
            False, "self-approval", _("This is your own run: another operator has to approve.")
        )
    if role in ALLOWED[act] or (owns and act in OWNER_MAY and role != Role.VIEWER):
        return _YES
    who = _(" or ").join(_(roles) for roles in sorted(f"{role}s" for role in ALLOWED[act]))
    where = "" if of is None or of.project_id == DEFAULT_PROJECT else _(" of this project")
    said = {"who": who, "where": where, "act": _(IN_WORDS[act])}
    return Permission(False, "not-eligible", _("Only %(who)s%(where)s may %(act)s.") % said)
