"""The audit log and its verification."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlencode

from django.core.cache import cache
from django.core.paginator import Page, Paginator
from django.http import HttpRequest, HttpResponse
from django.utils.translation import gettext as _

from apps.audit.models import AuditEvent
from apps.audit.selectors import FILTERS
from apps.audit.services import ChainReport, verify_chain
from apps.console.panels import Panel, render_page
from apps.console.request import page, page_number, person, project_choices
from apps.rest.filters import narrowed

PAGE_LENGTH = 50
REPORT, REPORT_SECONDS = "console.audit.report", 5


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """As the API names them."""

    actor: str = ""
    act: str = ""
    object: str = ""
    run: str = ""
    project: str = ""

    @property
    def given(self) -> dict[str, str]:
        return {name: value for name, value in asdict(self).items() if value}

    @property
    def query(self) -> str:
        """For the address of the export, which then holds what the page shows."""
        return urlencode(self.given)


@page
def audit(request: HttpRequest) -> HttpResponse:
    chosen = AuditFilter(
        actor=request.GET.get("actor", ""),
        act=request.GET.get("act", ""),
        object=request.GET.get("object", ""),
        run=request.GET.get("run", ""),
        project=request.GET.get("project", ""),
    )

    def rows() -> dict[str, Any]:
        return {"page": audit_events(chosen, page_number(request))}

    panels = [
        Panel("list", _("Audit"), "console/audit/list.html", rows),
        Panel(
            "chain",
            _("Verification"),
            "console/audit/chain.html",
            lambda: {"report": _report() if request.GET.get("verify") == "1" else None},
        ),
    ]
    return render_page(
        request,
        "console/audit.html",
        title=_("Audit"),
        panels=panels,
        chosen=chosen,
        whole=lambda: {"projects": project_choices(person(request))},
    )


def _report() -> ChainReport:
    """One pass over the log serves everybody who asks within a few seconds."""
    report: ChainReport | None = cache.get(REPORT)
    if report is None:
        report = verify_chain()
        cache.set(REPORT, report, REPORT_SECONDS)
    return report


def audit_events(chosen: AuditFilter, page: int) -> Page[AuditEvent]:
    """Audit events, newest first."""
    rows = narrowed(AuditEvent.objects.all(), FILTERS, chosen.given)
    return Paginator(rows, PAGE_LENGTH).get_page(page)
