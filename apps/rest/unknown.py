"""Unknown paths answer with a problem document, not with a page."""

from __future__ import annotations

from typing import Any

from django.utils.encoding import escape_uri_path
from drf_spectacular.utils import extend_schema
from rest_framework.request import Request
from rest_framework.views import APIView

from apps.rest.problems import Problem


@extend_schema(exclude=True)
class UnknownPath(APIView):
    permission_classes = ()
    authentication_classes = ()

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        raise Problem(404, "not-found", f"There is no resource at {escape_uri_path(request.path)}.")
