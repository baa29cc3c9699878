"""The base of every view: the scopes that a token needs, and the run that it is for."""

from __future__ import annotations

from typing import Any, ClassVar

from django.http import Http404
from rest_framework.permissions import SAFE_METHODS, BasePermission
from rest_framework.renderers import BaseRenderer
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from apps.accounts.models import DEFAULT_PROJECT, ApiToken, User
from apps.accounts.policy import Act, OfProject, may
from apps.accounts.visibility import Find, limit_to
from apps.rest.exports import EXPORTS
from apps.rest.filters import refuse_unknown_parameters
from apps.rest.idempotency import DRY_RUN
from apps.rest.problems import Problem
from apps.rest.sparse import FIELDS, named_fields, sparse
from esper.contracts import TokenScope

# A browser's session stands for the person, as a token of these two scopes does.
_SESSION_SCOPES = frozenset({TokenScope.READ, TokenScope.ACT})
READERS = frozenset({TokenScope.READ, TokenScope.ACT, TokenScope.DECIDE})
TRAINERS = frozenset({TokenScope.RUN_WRITE})
_WHOLE_SERVER = frozenset({TokenScope.DECIDE})


class ScopePermission(BasePermission):
    """A token must have one of the scopes that the view names for reading or for writing."""

    def has_permission(self, request: Request, view: APIView) -> bool:
        assert isinstance(view, Endpoint)
        if not request.user.is_authenticated:
            return False
        wanted = view.readers if request.method in SAFE_METHODS else view.writers
        scopes = scopes_of(request)
        if not scopes & wanted:
            raise Problem(
                403,
                "insufficient-scope",
                f"This request needs a token with the scope {' or '.join(sorted(wanted))}.",
            )
        return True


def scopes_of(request: Request) -> frozenset[str]:
    if isinstance(request.auth, ApiToken):
        return frozenset(request.auth.scopes)
    return _SESSION_SCOPES


class Endpoint(APIView):
    """The base of all views. Subclasses parse, call one service, and shape the answer.

    Attributes:
        readers: scopes that may GET.
        writers: scopes that may do anything else.
        parameters: known query parameters of GET; any other is refused. Acts know ``dry_run``.
    """

    permission_classes = (ScopePermission,)
    readers: ClassVar[frozenset[TokenScope]] = READERS
    writers: ClassVar[frozenset[TokenScope]] = frozenset({TokenScope.ACT})
    parameters: ClassVar[frozenset[str]] = frozenset()

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super().initial(request, *args, **kwargs)
        limit_to(_sight(request))
        acts = request.method == "POST" and getattr(getattr(self, "post", None), "is_act", False)
        known = frozenset({DRY_RUN}) if acts else self.parameters
        reads = frozenset({FIELDS}) if request.method == "GET" else frozenset()
        refuse_unknown_parameters(request, known | reads)
        named_fields(request)  # a malformed list is refused before anything is looked up

    def get_renderers(self) -> list[BaseRenderer]:
        """Lists can be exported too. What answers an act is JSON."""
        reads = self.request.method in SAFE_METHODS
        exports = EXPORTS if reads and "cursor" in self.parameters else ()
        return [*super().get_renderers(), *(renderer() for renderer in exports)]

    def perform_content_negotiation(self, request: Request, force: bool = False) -> Any:
        try:
            return super().perform_content_negotiation(request, force)
        except Http404 as error:
            names = ", ".join(renderer.format for renderer in self.get_renderers())
            raise Problem(400, "invalid", f"format must be one of {names}.") from error

    def finalize_response(
        self, request: Request, response: Any, *args: Any, **kwargs: Any
    ) -> Response:
        if isinstance(response, Response) and FIELDS in request.query_params:
            response = self._with_named_fields(request, response)
        finished = super().finalize_response(request, response, *args, **kwargs)
        for name, value in getattr(request, "rate_limit", {}).items():
            finished.headers[name] = value
        return finished

    def _with_named_fields(self, request: Request, response: Response) -> Response:
        if response.status_code != 200 or not isinstance(response.data, dict):
            return response
        try:
            if isinstance(rows := response.data.get("results"), list):
                response.data = {**response.data, "results": sparse(request, rows)}
            else:
                (response.data,) = sparse(request, [response.data])
        except Problem as problem:
            return self.handle_exception(problem)
        return response


def _sight(request: Request) -> Find | None:
    """What the caller sees. A run's own token and Tamiyo's are limited by their scopes alone."""
    token, user = request.auth, request.user
    if isinstance(token, ApiToken) and (token.run_uid or _WHOLE_SERVER & set(token.scopes)):
        return None
    if not isinstance(user, User):
        return frozenset
    return lambda: user.access.limit


def require(user: User, act: Act, *, of: OfProject | None = None) -> None:
    """Raises ``Problem`` 403 with the reason that the policy gives."""
    permission = may(user, act, of=of)
    if not permission.allowed:
        raise Problem(403, permission.code, permission.why)


def project_of_token(request: Request) -> int:
    """The project in which the caller's token makes runs: its own, else the default one."""
    token = request.auth
    return (isinstance(token, ApiToken) and token.project_id) or DEFAULT_PROJECT


def run_of_token(request: Request) -> str:
    """The run that the caller's token is restricted to, empty for other callers."""
    return request.auth.run_uid if isinstance(request.auth, ApiToken) else ""
