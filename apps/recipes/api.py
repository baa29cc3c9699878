from __future__ import annotations

from collections.abc import Callable

from django.http import HttpResponseBase
from rest_framework.request import Request
from rest_framework.response import Response

from apps.accounts.act_endpoint import act_endpoint
from apps.accounts.authentication import person, via
from apps.accounts.endpoint import Endpoint
from apps.accounts.policy import Act, may
from apps.accounts.visibility import everything
from apps.recipes.models import Launch
from apps.recipes.selectors import (
    branch_tree,
    launch_of_run,
    launches,
    log_page,
    recipes,
    stored_states,
    why_no_branch,
)
from apps.recipes.serializers import (
    BranchesOutput,
    BranchInput,
    LaunchDetailOutput,
    LaunchInput,
    LaunchOutput,
    LogOutput,
    RecipeOutput,
)
from apps.recipes.services import branch_run, resume_launch, start_recipe, stop_launch
from apps.rest.etag import cacheable_response
from apps.rest.fields import parse
from apps.rest.filters import (
    Lookup,
    apply_filters,
    many_of,
    one_of,
    parse_parameter,
    searching,
    text,
    whole_number,
)
from apps.rest.idempotency import idempotent
from apps.rest.pagination import PARAMETERS, page_response
from apps.rest.problems import not_found
from apps.rest.schema import documented, listing, page_of, query
from apps.rest.throttling import ActThrottle
from apps.runs.selectors import HUGE_COLUMNS, of_run_uid, visible_run
from esper.contracts import LaunchState

RECIPE_FILTERS: dict[str, Lookup] = {
    "host": ("host", text),
    "slug": ("slug", text),
    "q": searching("name", "slug", "host"),
}
LAUNCH_FILTERS: dict[str, Lookup] = {
    "state": ("state", one_of(LaunchState)),
    "state__in": ("state__in", many_of(LaunchState)),
    "host": ("recipe__host", text),
    "recipe": ("recipe__slug", text),
    "run": (of_run_uid, text),
    "project": ("project__uid", text),
}


class Recipes(Endpoint):
    parameters = PARAMETERS | frozenset(RECIPE_FILTERS)

    @documented(
        "list_recipes",
        answer=page_of(RecipeOutput),
        parameters=listing(RECIPE_FILTERS),
        summary="What may be started on which host, and with which parameters",
    )
    def get(self, request: Request) -> HttpResponseBase:
        rows = apply_filters(request, recipes(), RECIPE_FILTERS)
        return page_response(request, rows, lambda rows: RecipeOutput(rows, many=True).data)


class RecipeDetail(Endpoint):
    @documented("read_recipe", answer=RecipeOutput)
    def get(self, request: Request, uid: str) -> Response:
        found = recipes().filter(uid=uid).first()
        if found is None:
            raise not_found("recipe")
        return cacheable_response(request, RecipeOutput(found).data)


class Launches(Endpoint):
    throttle_classes = (ActThrottle,)
    parameters = PARAMETERS | frozenset(LAUNCH_FILTERS)

    @documented(
        "list_launches",
        answer=page_of(LaunchOutput),
        parameters=listing(LAUNCH_FILTERS),
    )
    def get(self, request: Request) -> HttpResponseBase:
        rows = apply_filters(request, launches(), LAUNCH_FILTERS)
        return page_response(request, rows, lambda rows: LaunchOutput(rows, many=True).data)

    @documented("start_recipe", body=LaunchInput, answer=LaunchDetailOutput, status=202, act=True)
    @idempotent
    def post(self, request: Request) -> Response:
        given = parse(LaunchInput, request.data)
        launch = start_recipe(
            host=given["host"],
            slug=given["recipe"],
            digest=given["digest"],
            parameters=given["parameters"],
            project=given["project"],
            user=person(request),
            via=via(request),
        )
        return Response(_answer(request, launch), status=202)


class LaunchDetail(Endpoint):
    @documented("read_launch", answer=LaunchDetailOutput)
    def get(self, request: Request, uid: str) -> Response:
        return Response(_answer(request, _launch(uid)))


def _act(name: str, service: Callable[..., Launch]) -> type[Endpoint]:
    return act_endpoint(
        name,
        service,
        subject="launch",
        find=lambda _, uid: _launch(uid),
        answer=lambda request, launch: Response(_answer(request, launch), status=202),
        output=LaunchDetailOutput,
        status=202,
    )


StopLaunch = _act("stop_launch", stop_launch)
ResumeLaunch = _act("resume_launch", resume_launch)


class Branches(Endpoint):
    throttle_classes = (ActThrottle,)

    @documented(
        "read_branches",
        answer=BranchesOutput,
        summary="The tree of a run's branches, and the stored states that a new one may begin from",
    )
    def get(self, request: Request, uid: str) -> Response:
        launch = launch_of_run(visible_run(uid, without=HUGE_COLUMNS).uid)
        tree = branch_tree(launch) if launch else []
        states = stored_states(launch) if launch else []
        answer = {"why_not": why_no_branch(launch), "states": states, "tree": tree}
        return Response(BranchesOutput(answer).data)

    @documented(
        "branch_run",
        body=BranchInput,
        answer=LaunchDetailOutput,
        status=202,
        act=True,
        summary="Start a new run of the same recipe from a stored state of this one",
    )
    @idempotent
    def post(self, request: Request, uid: str) -> Response:
        run = visible_run(uid, without=HUGE_COLUMNS)
        given = parse(BranchInput, request.data)
        with everything():  # the run was found within what this person sees
            launch = branch_run(run=run, user=person(request), via=via(request), **given)
        return Response(_answer(request, launch), status=202)


class LaunchLog(Endpoint):
    parameters = frozenset({"after"})

    @documented(
        "read_launch_log",
        answer=LogOutput,
        parameters=[
            query("after", whole_number, "The byte that is known already, `end` of the last page.")
        ],
        summary="What a launch has printed, from a byte on; the server keeps the last 256 KiB",
    )
    def get(self, request: Request, uid: str) -> Response:
        after = parse_parameter(request, "after", whole_number, default=0)
        return Response(LogOutput(log_page(_launch(uid), after=max(0, after))).data)


def _launch(uid: str) -> Launch:
    launch = launches().filter(uid=uid).first()
    if launch is None:
        raise not_found("launch")
    return launch


def _answer(request: Request, launch: Launch) -> dict[str, object]:
    user = person(request)
    permissions = {
        str(Act.STOP_LAUNCH): may(user, Act.STOP_LAUNCH, of=launch),
        str(Act.START_RECIPE): may(user, Act.START_RECIPE),
    }
    data: dict[str, object] = LaunchDetailOutput(launch, context={"permissions": permissions}).data
    return data
