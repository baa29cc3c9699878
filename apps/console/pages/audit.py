"""The audit log and its verification."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from django.core.paginator import Page, Paginator
from django.http import HttpRequest, HttpResponse

from apps.audit.models import AuditEvent
from apps.audit.services import verify_chain
from apps.console.panels import Panel, render_page
from apps.console.request import page, page_number

PAGE_LENGTH = 50


@dataclass(frozen=True, slots=True)
class AuditFilter:
    actor: str = ""
    act: str = ""
    object_uid: str = ""
    run: str = ""


@page
def audit(request: HttpRequest) -> HttpResponse:
    chosen = AuditFilter(
        actor=request.GET.get("actor", ""),
        act=request.GET.get("act", ""),
        object_uid=request.GET.get("object", ""),
        run=request.GET.get("run", ""),
    )

    def rows() -> dict[str, Any]:
        return {"page": audit_events(chosen, page_number(request))}

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


def audit_events(chosen: AuditFilter, page: int) -> Page[AuditEvent]:
    """Audit events, newest first."""
    rows = AuditEvent.objects.all()
    if chosen.actor:
        rows = rows.filter(actor__icontains=chosen.actor)
    if chosen.act:
        rows = rows.filter(act__startswith=chosen.act)
    if chosen.object_uid:
        rows = rows.filter(object_uid=chosen.object_uid)
    if chosen.run:
        rows = rows.filter(run_uid=chosen.run)
    return Paginator(rows, PAGE_LENGTH).get_page(page)
