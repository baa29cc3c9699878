"""Pages: parse the address, ask the selectors, choose the panels. Acts go through the REST API."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import StrEnum
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from django.contrib.auth.decorators import login_required
from django.contrib.auth.views import LoginView, LogoutView
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import render
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_safe

from apps.accounts.models import User
from apps.accounts.policy import Act, Permission, may
from apps.adaptations import services as adaptations
from apps.adaptations.models import Adaptation
from apps.audit.services import verify_chain
from apps.console.drawing import confidence_band
from apps.console.panels import Panel, render_page
from apps.console.selectors import adaptation as decision
from apps.console.selectors import inbox as inbox_rows
from apps.console.selectors import kernels as kernel_rows
from apps.console.selectors import overview as summary
from apps.console.selectors import recipes as recipe_rows
from apps.console.selectors import reference
from apps.console.selectors import runs as run_rows
from apps.console.selectors import workers as worker_rows
from apps.console.selectors.inbox import InboxFilter, InboxTab
from apps.console.selectors.kernels import KernelFilter
from apps.console.selectors.reference import AuditFilter, ViolationFilter
from apps.kernels.selectors import cache_stats, speed_up_of
from apps.notifications.services import launch_topic, run_topic
from apps.policies.services import current_policy
from apps.runs.models import Run
from esper.contracts import (
    AdaptationState,
    Risk,
    RunState,
    Severity,
    Signal,
    TokenScope,
    ViolationRule,
)

P = ParamSpec("P")
E = TypeVar("E", bound=StrEnum)
_View = Callable[Concatenate[HttpRequest, P], HttpResponse]


class SignIn(LoginView):
    template_name = "console/sign_in.html"
    redirect_authenticated_user = True


class SignOut(LogoutView):
    http_method_names = ["post", "options"]


def page(view: _View[P]) -> _View[P]:
    """Signed in, GET only, never from a cache: a page is a live picture."""

    @wraps(view)
    def shown(request: HttpRequest, /, *args: P.args, **kwargs: P.kwargs) -> HttpResponse:
        return view(request, *args, **kwargs)

    return login_required(require_safe(never_cache(shown)))


def _person(request: HttpRequest) -> User:
    if not isinstance(request.user, User):
        raise TypeError("pages are for people who are signed in")
    return request.user


def _choice(request: HttpRequest, name: str, words: type[E], default: E | None = None) -> str:
    """A filter of the address; a word that we do not know is a page that does not exist."""
    value = request.GET.get(name, "")
    if not value:
        return str(default) if default else ""
    if value not in set(words):
        raise Http404(f"there is no {name} {value!r}")
    return value


def _page_number(request: HttpRequest) -> int:
    text = request.GET.get("page", "1")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 7 else 1


@page
def bar(request: HttpRequest) -> HttpResponse:
    """The top bar alone, so that its badge can change without the page."""
    return render(request, "console/bar.html", {"section": request.GET.get("section", "")})


@page
def overview(request: HttpRequest) -> HttpResponse:
    wakes = ("adaptation", "run", "violation", "switch")
    panels = [
        Panel(
            "attention",
            "Needs a person",
            "console/overview/attention.html",
            lambda: {"attention": summary.attention()},
            wakes,
            every=15,
        ),
        Panel(
            "runs",
            "Runs",
            "console/overview/runs.html",
            lambda: {"rows": run_rows.run_rows(run_rows.recent_runs())},
            wakes,
            every=5,
        ),
        Panel(
            "system",
            "System, last 24 hours",
            "console/overview/system.html",
            lambda: {"system": summary.system_health()},
            ("adaptation", "job"),
            every=10,
        ),
    ]
    return render_page(request, "console/overview.html", title="Overview", panels=panels)


@page
def inbox(request: HttpRequest) -> HttpResponse:
    user = _person(request)
    chosen = InboxFilter(
        tab=InboxTab(_choice(request, "state", InboxTab, InboxTab.PENDING)),
        run=request.GET.get("run", ""),
        risk=_choice(request, "risk", Risk),
    )

    def rows() -> dict[str, Any]:
        found = inbox_rows.inbox(chosen, user)
        return {"rows": found, "last": None if found else inbox_rows.last_decided()}

    panels = [
        Panel(
            "tabs",
            "Filters",
            "console/inbox/tabs.html",
            lambda: {"counts": inbox_rows.tab_counts(user), "tabs": list(InboxTab)},
            ("adaptation",),
            every=30,
        ),
        Panel("list", "Inbox", "console/inbox/list.html", rows, ("adaptation",), every=30),
    ]
    return render_page(
        request,
        "console/inbox.html",
        title="Inbox",
        panels=panels,
        chosen=chosen,
        whole=lambda: {
            "live_runs": list(run_rows.live_runs().values_list("uid", "name")),
            "risks": list(Risk),
        },
    )


@page
def runs(request: HttpRequest) -> HttpResponse:
    state = _choice(request, "state", RunState)
    mine = request.GET.get("mine") == "1"

    def rows() -> dict[str, Any]:
        found = Run.objects.filter(state=state) if state else Run.objects.all()
        if mine:
            found = found.filter(owner=_person(request))
        return {"rows": run_rows.run_rows(found.order_by("-id"))}

    panels = [
        Panel("runs", "Runs", "console/overview/runs.html", rows, ("run", "adaptation"), every=5)
    ]
    return render_page(
        request,
        "console/runs.html",
        title="Runs",
        panels=panels,
        state=state,
        mine=mine,
        states=list(RunState),
    )


@page
def run(request: HttpRequest, uid: str) -> HttpResponse:
    found = run_rows.get_run(uid)
    if found is None:
        raise Http404("there is no such run")
    return render_page(
        request,
        "console/run.html",
        title=found.name,
        panels=_run_panels(request, found),
        topics=[run_topic(found.uid)],
        run=found,
        whole=lambda: {"markers": run_rows.chart_markers(found), "signals": list(Signal)},
    )


def _run_panels(request: HttpRequest, run: Run) -> list[Panel]:
    user = _person(request)
    only_poor = request.GET.get("layers") == "poor"

    def head() -> dict[str, Any]:
        return {
            "pause": run_rows.pause_state(run),
            "stop": run_rows.stop_command(run),
            "launch": recipe_rows.launch_of(run),
            "metrics": run_rows.latest_metrics(run, ("step_ms", "lr")),
            "may_pause": may(user, Act.PAUSE_ADAPTATION, owner_id=run.owner_id),
            "may_stop": may(user, Act.STOP_RUN, owner_id=run.owner_id),
        }

    def layers() -> dict[str, Any]:
        rows = run_rows.layer_rows(run, only_poor=only_poor)
        return {"rows": rows, "shown_signals": run_rows.SHOWN_SIGNALS, "only_poor": only_poor}

    return [
        Panel("head", "Run", "console/run/head.html", head, ("run", "switch"), every=5),
        Panel(
            "timeline",
            "Adaptations, compiled kernels, remedies and violations",
            "console/run/timeline.html",
            lambda: {"entries": run_rows.timeline(run)},
            ("adaptation", "remedy", "violation", "kernel"),
        ),
        Panel("layers", "Layers", "console/run/layers.html", layers, ("adaptation",), every=10),
        Panel(
            "commands",
            "Commands to the trainer",
            "console/run/commands.html",
            lambda: {"commands": run_rows.commands(run)},
            ("run", "adaptation"),
        ),
    ]


@page
def adaptation(request: HttpRequest, uid: str) -> HttpResponse:
    found = decision.get_adaptation(uid)
    if found is None:
        raise Http404("there is no such adaptation")
    return render_page(
        request,
        "console/adaptation.html",
        title=f"A-{found.number}",
        panels=_adaptation_panels(_person(request), found),
        topics=[run_topic(found.run.uid)],
        adaptation=found,
        run=found.run,
    )


def _adaptation_panels(user: User, found: Adaptation) -> list[Panel]:
    wakes = ("adaptation", "run.command", "switch", "remedy", "kernel")

    def part(
        name: str, title: str, build: Callable[[], dict[str, Any]] = dict, every: int = 0
    ) -> Panel:
        return Panel(name, title, f"console/adaptation/{name}.html", build, wakes, every)

    def evidence() -> dict[str, Any]:
        now = adaptations.evidence_now(found)
        drift = adaptations.evidence_drift(found)
        if drift is not None and math.isinf(drift):  # the loss is not a number any more
            drift = 99.0
        return {
            "rows": decision.evidence_rows(found.evidence, now),
            "derived": decision.derived_numbers(found.evidence),
            "drift": drift,
            "drift_width": 0 if drift is None else min(100, round(100 * drift)),
            "now_step": now.get("step"),
        }

    def way() -> dict[str, Any]:
        events = decision.history(found)
        return {
            "stages": decision.stages(found, events),
            "events": events,
            "remedies": decision.remedies_of(found),
            "speed_up": speed_up_of(found.uid),
        }

    def change() -> dict[str, Any]:
        return {
            "sketch": decision.graft_sketch(found),
            "policy": found.safety_policy.safety_policy(),
            "record": decision.track_record(found.blueprint_id),
            "parameter_share": _share(found.forecast_parameters, found.run.model_parameters),
        }

    live = 0 if found.ended else 5
    return [
        part("head", "Adaptation", lambda: {"steps_ago": _steps_ago(found)}, every=live),
        part("why", "Why it was proposed", lambda: {"rows": decision.reason_rows(found.reasons)}),
        part("change", "What will change", change),
        part("evidence", "Evidence then → now", evidence, every=live),
        part("checks", "Checks", lambda: {"rows": decision.check_rows(found.checks)}),
        part("whynot", "Why not another blueprint"),
        part("undo", "Undo plan", lambda: {"plan": adaptations.undo_plan(found)}),
        part("way", "Way and history", way),
        part("outcome", "Outcome", lambda: _outcome(found)),
        part("acts", "Your decision", lambda: _acts(found, user), every=live),
    ]


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _steps_ago(found: Adaptation) -> int:
    return max(0, found.run.step - found.proposed_step)


def _outcome(found: Adaptation) -> dict[str, Any]:
    return {
        "commands": decision.command_log(found),
        "falls": decision.reward_falls(found),
        "speed_up": speed_up_of(found.uid),
    }


_WHILE_PENDING = ("approve", "reject", "claim", "extend")
_AFTERWARDS = ("cancel", "rollback")


def _acts(found: Adaptation, user: User) -> dict[str, Any]:
    """Which buttons there are, and in words why others are not."""
    answers = adaptations.permissions(found, user)
    pending = found.state == AdaptationState.AWAITING_APPROVAL
    shown = _WHILE_PENDING if pending else _AFTERWARDS
    refusals = [
        answers[name].why
        for name in shown
        if not answers[name].allowed and answers[name].code != "decision-not-pending"
    ]
    return {
        "may": {name: permission.allowed for name, permission in answers.items()},
        "whys": _joined(refusals),
        "pending": pending,
        "claimed_by_me": found.claimed_by_id == user.pk,
    }


def _joined(refusals: list[str]) -> list[str]:
    """ "Only x may approve." and "Only x may reject." as one sentence."""
    verbs: dict[str, list[str]] = {}
    for sentence in refusals:
        start, _, verb = sentence.rpartition(" may ")
        verbs.setdefault(start, []).append(verb.removesuffix(".") if start else sentence)
    return [
        f"{start} may {', '.join(words)}." if start else " ".join(words)
        for start, words in verbs.items()
    ]


@page
def blueprints(request: HttpRequest) -> HttpResponse:
    panels = [
        Panel(
            "list",
            "Blueprints",
            "console/blueprints/list.html",
            lambda: {"rows": list(reference.blueprints())},
            ("blueprint", "adaptation"),
        )
    ]
    return render_page(request, "console/simple.html", title="Blueprints", panels=panels)


@page
def blueprint(request: HttpRequest, slug: str) -> HttpResponse:
    found = reference.blueprints().filter(slug=slug).first()
    if found is None:
        raise Http404("there is no such blueprint")

    def uses() -> dict[str, Any]:
        return {"uses": reference.blueprint_uses(found), "kernels": reference.kernels_of(slug)}

    panels = [
        Panel(
            "about",
            found.title,
            "console/blueprints/about.html",
            lambda: {"may_switch": may(_person(request), Act.SWITCH_BLUEPRINT)},
            ("blueprint",),
        ),
        Panel("uses", "Uses", "console/blueprints/uses.html", uses, ("adaptation",)),
    ]
    return render_page(
        request, "console/simple.html", title=found.title, panels=panels, blueprint=found
    )


@page
def violations(request: HttpRequest) -> HttpResponse:
    state = request.GET.get("state", "open")
    if state not in ("open", "acknowledged", "all"):
        raise Http404("there is no such filter")
    chosen = ViolationFilter(
        state=state,
        severity=_choice(request, "severity", Severity),
        rule=_choice(request, "rule", ViolationRule),
        run=request.GET.get("run", ""),
    )

    def rows() -> dict[str, Any]:
        return {
            "page": reference.violations(chosen, _page_number(request)),
            "may_acknowledge": may(_person(request), Act.ACKNOWLEDGE_VIOLATION),
        }

    panels = [
        Panel("list", "Violations", "console/violations/list.html", rows, ("violation",), every=30)
    ]
    return render_page(
        request,
        "console/violations.html",
        title="Violations",
        panels=panels,
        chosen=chosen,
        severities=list(Severity),
        rules=list(ViolationRule),
    )


@page
def policy(request: HttpRequest) -> HttpResponse:
    may_edit: Permission = may(_person(request), Act.EDIT_POLICY)

    def current() -> dict[str, Any]:
        version = current_policy()
        values = version.safety_policy()
        return {
            "version": version,
            "policy": values,
            "thresholds": reference.thresholds(values),
            "may_edit": may_edit,
            "risks": list(Risk),
            "band": confidence_band(values),
        }

    panels = [
        Panel("current", "In force", "console/policy/current.html", current, ("policy",)),
        Panel(
            "history",
            "Versions",
            "console/policy/history.html",
            lambda: {"history": reference.policy_history()},
            ("policy",),
        ),
    ]
    return render_page(request, "console/simple.html", title="Policy", panels=panels)


@page
def workers(request: HttpRequest) -> HttpResponse:
    may_manage = may(_person(request), Act.MANAGE_WORKERS)
    panels = [
        Panel(
            "workers",
            "Compile workers",
            "console/kernels/workers.html",
            lambda: {"rows": worker_rows.compile_workers(), "may_manage": may_manage},
            ("worker", "job"),
            every=5,
        ),
        Panel(
            "queue",
            "Queue",
            "console/kernels/queue.html",
            lambda: {"queue": worker_rows.queue()},
            ("job",),
            every=5,
        ),
        Panel(
            "jobs",
            "Ended jobs",
            "console/kernels/jobs.html",
            lambda: {"jobs": worker_rows.ended_jobs()},
            ("job",),
            every=15,
        ),
        Panel(
            "others",
            "Control workers and Tamiyo",
            "console/kernels/others.html",
            lambda: {"workers": worker_rows.other_workers()},
            ("worker",),
            every=15,
        ),
    ]
    return render_page(request, "console/simple.html", title="Workers", panels=panels)


@page
def kernels(request: HttpRequest) -> HttpResponse:
    chosen = KernelFilter(
        blueprint=request.GET.get("blueprint", ""),
        capability=request.GET.get("capability", ""),
        tier=request.GET.get("tier", ""),
    )
    may_manage = may(_person(request), Act.MANAGE_CACHE)

    def cache() -> dict[str, Any]:
        scrub = kernel_rows.scrub_state()
        return {"cache": cache_stats(), "scrub": scrub, "may_manage": may_manage}

    def rows() -> dict[str, Any]:
        found, shown = kernel_rows.kernels(chosen, _page_number(request))
        return {"page": found, "rows": shown}

    wakes = ("job", "kernel")
    panels = [
        Panel("cache", "Cache", "console/kernels/cache.html", cache, wakes, every=15),
        Panel("kernels", "Kernels", "console/kernels/kernels.html", rows, wakes),
    ]
    return render_page(
        request,
        "console/kernels.html",
        title="Kernels",
        panels=panels,
        chosen=chosen,
        whole=kernel_rows.kernel_choices,
    )


@page
def kernel(request: HttpRequest, digest: str) -> HttpResponse:
    found = kernel_rows.get_kernel(digest)
    if found is None:
        raise Http404("there is no such kernel")
    may_manage = may(_person(request), Act.MANAGE_CACHE)

    def part(name: str, title: str, build: Callable[[], dict[str, Any]], *wakes: str) -> Panel:
        return Panel(name, title, f"console/kernels/{name}.html", build, wakes)

    def kept() -> dict[str, Any]:
        fresh = kernel_rows.get_kernel(digest) or found
        why = kernel_rows.why_not_evictable(fresh)
        return {"kernel": fresh, "why_not_evict": why, "may_manage": may_manage}

    panels = [
        part("kept", "In the cache", kept, "kernel", "job", "adaptation"),
        part("about", "What it is", lambda: {"times": kernel_rows.stage_times(found)}),
        part("costs", "Forecast and measured", lambda: {"costs": kernel_rows.costs(found)}),
        part("certificate", "Certificate", lambda: {"certificate": found.certificate}),
        part(
            "speed_ups",
            "Compiled kernels",
            lambda: {"rows": kernel_rows.speed_ups_of(found)},
            "kernel",
        ),
        part(
            "users",
            "Adaptations that used it",
            lambda: {"users": kernel_rows.users_of(found)},
            "adaptation",
            "job",
        ),
        Panel(
            "builds",
            "Builds",
            "console/kernels/jobs.html",
            lambda: {"jobs": worker_rows.jobs_of(found)},
            ("job",),
        ),
    ]
    title = f"{found.blueprint_slug} {found.digest[:12]}"
    return render_page(request, "console/kernel.html", title=title, panels=panels, kernel=found)


@page
def recipes(request: HttpRequest) -> HttpResponse:
    wakes = ("recipe", "launch.changed")
    panels = [
        Panel(
            "recipes",
            "What may be started",
            "console/recipes/list.html",
            lambda: {"rows": recipe_rows.recipe_rows()},
            wakes,
            every=15,
        ),
        Panel(
            "launches",
            "Launches",
            "console/recipes/launches.html",
            lambda: {"launches": recipe_rows.recent_launches()},
            wakes,
            every=30,
        ),
    ]
    return render_page(request, "console/simple.html", title="Recipes", panels=panels)


@page
def recipe(request: HttpRequest, uid: str) -> HttpResponse:
    found = recipe_rows.get_recipe(uid)
    if found is None:
        raise Http404("there is no such recipe")
    may_start = may(_person(request), Act.START_RECIPE)

    def about() -> dict[str, Any]:
        fresh = recipe_rows.get_recipe(uid)
        return {"recipe": fresh, "row": fresh and recipe_rows.row_of(fresh), "may_start": may_start}

    panels = [
        Panel("about", found.name, "console/recipes/about.html", about, ("recipe",), every=15),
        Panel(
            "launches",
            "Launches of it",
            "console/recipes/launches.html",
            lambda: {"launches": recipe_rows.recent_launches(found)},
            ("launch.changed",),
            every=30,
        ),
    ]
    return render_page(request, "console/simple.html", title=found.name, panels=panels)


@page
def launch(request: HttpRequest, uid: str) -> HttpResponse:
    found = recipe_rows.get_launch(uid)
    if found is None:
        raise Http404("there is no such launch")
    user = _person(request)

    def head() -> dict[str, Any]:
        return {
            "run": recipe_rows.run_of(found),
            "may_stop": may(user, Act.STOP_LAUNCH, owner_id=found.requested_by_id),
            "may_start": may(user, Act.START_RECIPE),
        }

    panels = [
        Panel("head", "Launch", "console/recipes/launch.html", head, ("launch.changed",), every=5),
        Panel(
            "log",
            "Log",
            "console/recipes/log.html",
            lambda: {"log": recipe_rows.last_lines(found)},
        ),
    ]
    return render_page(
        request,
        "console/launch.html",
        title=f"L-{found.number} {found.recipe.name}",
        panels=panels,
        topics=[launch_topic(found.uid)],
        launch=found,
    )


@page
def audit(request: HttpRequest) -> HttpResponse:
    chosen = AuditFilter(
        actor=request.GET.get("actor", ""),
        act=request.GET.get("act", ""),
        object_uid=request.GET.get("object", ""),
        run=request.GET.get("run", ""),
    )

    def rows() -> dict[str, Any]:
        return {"page": reference.audit_events(chosen, _page_number(request))}

    panels = [
        Panel("list", "Audit log", "console/audit/list.html", rows),
        Panel(
            "chain",
            "Verification",
            "console/audit/chain.html",
            lambda: {"report": verify_chain() if request.GET.get("verify") == "1" else None},
        ),
    ]
    return render_page(request, "console/audit.html", title="Audit", panels=panels, chosen=chosen)


_TOKEN_SCOPES = {
    TokenScope.RUNS_CREATE: "attach trainers: register runs and send their telemetry",
    TokenScope.READ: "read everything that you may read",
    TokenScope.ACT: "do everything that you may do",
}


@page
def me(request: HttpRequest) -> HttpResponse:
    user = _person(request)
    panels = [
        Panel(
            "tokens",
            "Tokens",
            "console/me/tokens.html",
            lambda: {"tokens": reference.tokens_of(user), "scopes": _TOKEN_SCOPES.items()},
        ),
        Panel(
            "rights",
            "What you may do",
            "console/me/rights.html",
            lambda: {"rights": reference.rights(user)},
        ),
    ]
    return render_page(request, "console/simple.html", title="Tokens and rights", panels=panels)
