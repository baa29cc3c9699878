"""Words, numbers and shapes for the templates."""

from __future__ import annotations

import math
import re
import unicodedata
from datetime import UTC, datetime
from typing import Any

from django import template
from django.conf import settings
from django.http import HttpRequest
from django.templatetags.static import static
from django.urls import reverse
from django.utils import timezone
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _
from django.utils.translation import gettext_noop

from apps.accounts.models import User
from apps.accounts.policy import Act, may
from apps.accounts.preferences import Preferences, preferences_of
from apps.accounts.step_up import SECOND_FACTOR, Passed
from apps.console.bar import switch_and_kills
from apps.console.language import as_written, html_language, in_words
from apps.console.sentences import delegation_words, in_sentence, in_value, title_of
from apps.console.status import BY_KIND, CERTIFICATE, RULES, TIERS, Status
from apps.console.vocabulary import FINDINGS
from apps.console.waiting import inbox_count
from apps.policies.selectors import present_freezes
from esper.contracts import Role
from esper.contracts.percent import percent as in_percent

register = template.Library()
_UNKNOWN = "—"


@register.filter
def visible(text: object) -> str:
    """Text from outside with its invisible characters made visible: ``\\u202e`` reverses a line.

    The template escapes the result; this filter only keeps a name from imitating another one, and
    a name that is written from right to left from reordering the numbers around it.
    """
    shown = str(text)
    if not shown.isprintable():
        shown = "".join(
            f"⟨U+{ord(char):04X}⟩" if unicodedata.category(char) in _HIDDEN else char
            for char in shown
        )
    return shown if shown.isascii() else _RIGHT_TO_LEFT.sub("\u2068\\g<0>\u2069", shown)


_HIDDEN = frozenset({"Cf", "Cc", "Co", "Cn"})
_LETTER = "[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]"
_RIGHT_TO_LEFT = re.compile(rf"{_LETTER}(?:[\d_. -]*{_LETTER})*")


@register.filter
def breakable(name: object) -> SafeString:
    """A name of code: a line breaks after a dot, an underscore or a hyphen, not within a word."""
    return format_html_join("", "{}<wbr>", ([part] for part in _PARTS.findall(visible(name))))


_PARTS = re.compile(r"[^._-]*[._-]+|[^._-]+$")


@register.filter
def without_run(text: str, run: Any) -> str:
    """A finding's sentence, where the run that it begins with stands beside it."""
    beginning = f"{run.name}: " if run is not None else ""
    if not beginning or not text.startswith(beginning):
        return text
    rest = text.removeprefix(beginning)
    return f"{rest[:1].upper()}{rest[1:]}"


@register.filter
def visible_lines(text: str) -> str:
    """Like ``visible``, for text with several lines."""
    return "\n".join(
        "\t".join(visible(part) for part in line.split("\t")) for line in text.split("\n")
    )


@register.simple_tag
def status(kind: str, value: str) -> SafeString:
    """Shape and word of a state, e.g. ``{% status "adaptation" adaptation.state %}``."""
    found = BY_KIND[kind].get(str(value)) or Status("standby", "question", str(value))
    return format_html(
        '<span class="status" data-tone="{}">{}{}</span>',
        found.tone,
        shape(found.shape),
        in_words(found.word),
    )


@register.simple_tag
def status_word(kind: str, value: str) -> str:
    """The word alone, for the middle of a sentence."""
    found = BY_KIND[kind].get(str(value))
    word = in_words(found.word) if found else ""
    return word[0].lower() + word[1:] if word else in_words(str(value))


@register.filter
def act_word(act: str) -> str:
    """``adaptation.compile_queued`` as the pages say it; other acts as plain words."""
    kind, _, done = act.partition(".")
    return status_word(kind, done) if done in BY_KIND.get(kind, {}) else words(done or act)


@register.filter
def rule_word(rule: object) -> str:
    """What a check or a violation is about."""
    known = RULES.get(str(rule))
    return in_words(known) if known else words(rule)


@register.filter
def certificate_word(name: str) -> str:
    """What an entry of a certificate means."""
    known = CERTIFICATE.get(name)
    return in_words(known) if known else words(name)


@register.filter
def tier_word(tier: int) -> str:
    """What was done to a kernel; its number for a tier without a word."""
    known = TIERS.get(tier)
    return in_words(known) if known else _("tier %(number)s") % {"number": tier}


@register.filter
def speed(value: float | None) -> str:
    """``1.31×``: how many times as fast."""
    return _UNKNOWN if value is None else as_written(f"{value:.2f}×")


@register.simple_tag
def status_shape(kind: str, value: str) -> SafeString:
    """The shape alone, for a line that already has the word."""
    found = BY_KIND[kind].get(str(value)) or Status("standby", "question", str(value))
    return format_html(
        '<span class="status" data-tone="{}">{}</span>', found.tone, shape(found.shape)
    )


@register.simple_tag
def shape(name: str) -> SafeString:
    return format_html(
        '<svg class="shape" width="12" height="12" viewBox="0 0 12 12" aria-hidden="true">'
        '<use href="{}#{}"></use></svg>',
        static("console/shapes.svg"),
        name,
    )


@register.filter
def number(value: Any, digits: int = 3) -> str:
    """A float with ``digits`` significant digits; unknown is a dash, never zero."""
    if value in (None, "") or (isinstance(value, float) and math.isnan(value)):
        return _UNKNOWN
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return _("yes") if value else _("no")
    if isinstance(value, int):
        return as_written(f"{value:,}".replace("-", "−"))
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value and not 1e-4 <= abs(value) < 1e6:
        return as_written(f"{value:.{digits - 1}e}".replace("-", "−"))
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    return as_written(f"{value:,.{min(decimals, 6)}f}".replace("-", "−"))


# The first that fits: each of them names the later ones too.
_BROWSERS = (
    ("Edge", r"Edg(?:e|A|iOS)?/(\d+)"),
    ("Opera", r"OPR/(\d+)"),
    ("Firefox", r"(?:Firefox|FxiOS)/(\d+)"),
    ("Chrome", r"(?:Chrome|CriOS)/(\d+)"),
    ("Safari", r"Version/(\d+).*Safari/"),
)
_SYSTEMS = ("Android", "iPhone", "iPad", "Windows", "Mac OS", "Linux")


@register.filter
def browser_name(user_agent: str) -> str:
    """``Firefox 140, Linux``; what a program calls itself where it is no browser."""
    system = next((name for name in _SYSTEMS if name in user_agent), "")
    for name, pattern in _BROWSERS:
        if found := re.search(pattern, user_agent):
            return ", ".join(filter(None, (f"{name} {found[1]}", system)))
    return user_agent or _("unknown")


@register.filter
def setting(value: Any) -> str:
    """A setting's value: three digits as ``number`` writes them, without the zeros at the end."""
    if not isinstance(value, float) or not math.isfinite(value):
        return number(value)
    if value.is_integer() and abs(value) < 1e6:
        return number(int(value))
    return as_written(f"{value:,.3g}".replace("-", "−")) if abs(value) < 1e6 else number(value)


@register.filter
def told_details(details: dict[str, Any]) -> list[tuple[str, str]]:
    """What a remedy did, without its lists and without what it counts from 0 on."""
    counters = ("updates", "skipped", "later")
    return [
        (name, setting(value) if is_number(value) else number(value))
        for name, value in details.items()
        if isinstance(value, str | bool | int | float) and name not in counters
    ]


@register.filter
def threshold(value: Any) -> str:
    """A threshold's value to be read: a number of three digits, or a risk in words."""
    return setting(value) if is_number(value) else words(value)


@register.filter
def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@register.filter
def plain(value: Any) -> str:
    """A number as a form field takes it: ``1e-05`` and ``100``, neither ``100.0`` nor ``1,000``."""
    if not is_number(value):
        return str(value)
    return str(int(value)) if float(value).is_integer() else repr(float(value))


@register.filter
def grouped(digits: str) -> str:
    """Digits in groups of three: ``1,000,000``; other numbers as the language writes them."""
    whole = digits.removeprefix("-").isdigit()
    return as_written(f"{int(digits):,}" if whole else digits)


@register.filter
def signed(value: Any, digits: int = 3) -> str:
    """A number with its sign, also when it is positive."""
    text = number(value, digits)
    return text if text in (_UNKNOWN, "0") or text.startswith("−") else f"+{text}"


@register.filter
def of_the_model(share: float | None) -> str:
    """A share of the model's parameters: ``3.2% of the model``, ``10.2 × the model``."""
    if share is not None and 0 < share < 1e-4:
        return _("under %(share)s of the model") % {"share": as_written("0.01%")}
    if share is None or share < 1:
        return _("%(share)s of the model") % {"share": percent(share)}
    return _("%(times)s × the model") % {"times": as_written(f"{share:,.3g}")}


@register.filter
def percent(value: Any) -> str:
    return _UNKNOWN if value is None else as_written(in_percent(float(value)))


@register.filter
def count(value: Any) -> str:
    """Parameters and the like: 33 k, 1.2 M, 1.1 B."""
    if value is None:
        return _UNKNOWN
    amount = float(value)
    for limit, unit in ((1e9, _("B")), (1e6, "M"), (1e4, "k")):
        if abs(amount) >= limit:
            share = amount / (1e3 if unit == "k" else limit)
            return f"{as_written(f'{share:,.3g}')} {unit}"
    return as_written(f"{int(amount):,}")


@register.filter
def duration(milliseconds: float) -> str:
    """Milliseconds up to a second, then seconds, then minutes."""
    if milliseconds < 1000:
        return as_written(
            f"{milliseconds:.3g} ms" if milliseconds < 10 else f"{milliseconds:.0f} ms"
        )
    seconds = milliseconds / 1000
    return as_written(f"{seconds:.1f} s") if seconds < 90 else f"{seconds / 60:.0f} min"


@register.filter
def words(value: object) -> str:
    """``cooldown_layer_steps`` as plain words; those of ``vocabulary.py`` are translated."""
    return in_words(visible(value).replace("_", " ").replace(".", " "))


@register.filter
def sentence(text: str) -> str:
    """A stored sentence (``sentences.py``), in the page's language where it is known."""
    return in_sentence(str(text))


register.filter("adaptation_title", title_of)
register.filter("stored_value", in_value)
register.filter("delegation_words", delegation_words)


@register.filter
def quoted(text: object) -> str:
    """In the quotation marks of the page's language."""
    return f"„{text}“" if html_language() == "de" else f"“{text}”"


@register.filter
def finding_title(slug: object) -> str:
    """The title of the rule of a finding: ``update_ratio_high`` is "Updates are too large"."""
    title = FINDINGS.get(str(slug))
    return in_words(title) if title else words(slug).capitalize()


@register.filter
def get(mapping: dict[str, Any], key: str) -> Any:
    return mapping.get(key)


@register.filter
def may_do(user: Any, act: str) -> bool:
    """``{% if user|may_do:"edit_policy" %}``; the answer comes from the one policy table."""
    return may(user, Act(act)).allowed


@register.simple_tag
def moment(value: datetime | None) -> SafeString | str:
    """A time that the browser shows as "3 min ago", with the full time on hover."""
    if value is None:
        return _UNKNOWN
    return format_html(
        '<time datetime="{}" title="{}" data-ago>{}</time>',
        value.isoformat(),
        value.strftime("%Y-%m-%d %H:%M:%S UTC"),
        ago(value),
    )


@register.filter
def ago(value: datetime) -> str:
    seconds = (timezone.now() - value).total_seconds()
    if abs(seconds) < 5:
        return _("just now")
    if seconds < 0:
        return _("in %(time)s") % {"time": _length(-seconds)}
    return _("%(time)s ago") % {"time": _length(seconds)}


@register.filter
def until(value: datetime | None) -> str:
    """``m:ss`` left until a deadline; the browser counts on from there."""
    if value is None:
        return _UNKNOWN
    seconds = max(0, int((value - timezone.now()).total_seconds()))
    return f"{seconds // 60}:{seconds % 60:02d}"


def _length(seconds: float) -> str:
    for size, unit in ((86_400, _("d")), (3_600, _("h")), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds)} s"


@register.inclusion_tag("console/topbar.html", takes_context=True)
def topbar(context: template.RequestContext) -> dict[str, Any]:
    """The bar on every page: the current section, the inbox count, the adaptation switch."""
    request = context["request"]
    switch, killed = switch_and_kills()
    return {
        "request": request,
        "user": request.user,
        "role": in_words(Role(request.user.role).capitalize()),
        "section": context.get("section") or request.resolver_match.url_name,
        "waiting": inbox_count(request.user),
        "switch": switch,
        "killed_projects": killed,
        "kill": may(request.user, Act.KILL),
        "links": [(name, _(word), sections) for name, word, sections in _LINKS],
        "csrf_token": context.get("csrf_token"),
    }


@register.inclusion_tag("console/freezes.html", takes_context=True)
def freezes(context: template.RequestContext) -> dict[str, Any]:
    """The freezes in effect now, above every page. One of a project is for those who see it."""
    if not context["request"].user.is_authenticated:
        return {"freezes": []}
    now = timezone.now()
    return {
        "freezes": [
            {
                "project": one.project.name if one.project else "",
                "ends_at": one.ends_at,
                "until": f"{one.ends_at.astimezone(UTC):%Y-%m-%d %H:%M} UTC",
                "reason": one.reason,
                "set_by": one.set_by.get_username(),
            }
            for one in present_freezes().filter(starts_at__lte=now).order_by("ends_at")
        ]
    }


_LINKS = (
    ("overview", gettext_noop("Overview"), ("overview",)),
    ("inbox", gettext_noop("Inbox"), ("inbox", "adaptation")),
    ("runs", gettext_noop("Runs"), ("runs", "run", "compare")),
    ("blueprints", gettext_noop("Blueprints"), ("blueprints", "blueprint")),
    ("incidents", gettext_noop("Incidents"), ("incidents", "violations")),
    ("policy", gettext_noop("Policy"), ("policy",)),
    ("kernels", gettext_noop("Kernels"), ("kernels", "kernel")),
    ("workers", gettext_noop("Workers"), ("workers",)),
    ("recipes", gettext_noop("Recipes"), ("recipes", "recipe", "launch")),
    ("audit", gettext_noop("Audit"), ("audit",)),
)


@register.simple_tag
def languages() -> list[tuple[str, str, bool]]:
    """Code and own name of each language, and whether the page is in it."""
    present = html_language()
    return [(code, name, code.split("-")[0] == present) for code, name in settings.LANGUAGES]


register.simple_tag(html_language)


@register.simple_tag(takes_context=True)
def theme(context: template.RequestContext) -> str:
    """The theme this browser chose; empty leaves it to the system."""
    chosen = context["request"].COOKIES.get("theme", "") or _preferences(context).theme
    return chosen if chosen in {"light", "dark"} else ""


@register.simple_tag(takes_context=True)
def page_choices(context: template.RequestContext) -> SafeString:
    """Attributes of the page for the scripts and the style: density, keys, zone, notifications."""
    chosen = _preferences(context)
    named = {
        "data-density": chosen.density,
        "data-keys": "" if chosen.keys else "off",
        "data-zone": chosen.zone,
        "data-notify": "on" if chosen.notify else "",
        "data-proof": " ".join(_ways_to_prove(context.get("request"))),
    }
    return format_html_join("", ' {}="{}"', [(k, v) for k, v in named.items() if v])


@register.inclusion_tag("console/saved_views.html", takes_context=True)
def saved_views(context: template.RequestContext) -> dict[str, Any]:
    """The views of this list that the person has saved, and a form to save the present one."""
    request = context["request"]
    query = request.GET.copy()
    for own in ("panel", "page"):
        query.pop(own, None)
    return {
        "views": [view for view in _preferences(context).views if view.path == request.path],
        "path": request.path,
        "query": query.urlencode(),
        "csrf_token": context.get("csrf_token"),
    }


def _preferences(context: template.RequestContext) -> Preferences:
    """Of the person; an error page may have none."""
    user = getattr(context.get("request"), "user", None)
    return preferences_of(user) if isinstance(user, User) else Preferences()


@register.simple_tag
def provider_name() -> str:
    """Of the OpenID provider through which people may sign in; empty: there is none."""
    return str(settings.ESPER_OIDC_NAME) if settings.ESPER_OIDC_ISSUER else ""


def _ways_to_prove(request: HttpRequest | None) -> list[str]:
    """What the dialog before a dangerous act asks for, where it is not the password alone."""
    user = getattr(request, "user", None)
    if request is None or not isinstance(user, User):
        return []
    given_here = request.session.get(SECOND_FACTOR) == Passed.HERE
    ways = {"password": user.has_usable_password(), "code": given_here}
    found = [way for way, there in ways.items() if there] or ["provider"]
    return [] if found == ["password"] else found


# The admin's list, or one row of it by a variable of the page, of what a page shows.
_IN_THE_ADMIN = {
    "blueprints": ("blueprints_blueprint", ""),
    "blueprint": ("blueprints_blueprint", "blueprint"),
    "policy": ("policies_policyversion", ""),
    "projects": ("accounts_project", ""),
    "runs": ("runs_run", ""),
    "run": ("runs_run", "run"),
    "adaptation": ("adaptations_adaptation", "adaptation"),
    "plan": ("adaptations_plan", "plan"),
    "kernels": ("kernels_kernel", ""),
    "kernel": ("kernels_kernel", "kernel"),
    "workers": ("workers_worker", ""),
    "recipes": ("recipes_recipe", ""),
    "recipe": ("recipes_recipe", "recipe"),
    "launch": ("recipes_launch", "launch"),
    "violations": ("violations_violation", ""),
    "audit": ("audit_auditevent", ""),
}


@register.simple_tag(takes_context=True)
def admin_address(context: template.RequestContext) -> str:
    """Of the same rows in the admin; empty where the person or the page has none."""
    user, match = context["request"].user, context["request"].resolver_match
    if match is None or not user.is_staff or match.url_name not in _IN_THE_ADMIN:
        return ""
    model, variable = _IN_THE_ADMIN[match.url_name]
    row = context.get(variable) if variable else None
    if row is None:
        return reverse(f"admin:{model}_changelist")
    return reverse(f"admin:{model}_change", args=[row.pk])
