"""The texts of the pages: as they stand in templates, code and scripts, and in the catalogues."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from babel.messages.catalog import Catalog, Message
from babel.messages.extract import extract
from babel.messages.pofile import read_po
from django.utils.translation.template import templatize

from hosts.paths import ROOT

FOLDER = ROOT / "locale" / "de" / "LC_MESSAGES"
DOMAINS = ("django", "djangojs")
Key = tuple[str, str]  # context, and the text; of two forms the singular


@cache
def catalogue(domain: str) -> Catalog:
    with (FOLDER / f"{domain}.po").open("rb") as file:
        return read_po(file, locale="de", domain=domain)


def messages(domain: str) -> list[Message]:
    return [one for one in catalogue(domain) if one.id]


def key_of(message: Message) -> Key:
    forms = message.id if isinstance(message.id, tuple) else (message.id,)
    return message.context or "", forms[0]


def templates() -> list[Path]:
    return sorted((ROOT / "templates").rglob("*.html"))


_CALL = re.compile(r"\b(?:_|n?p?gettext)\(")


def keys_of_templates() -> Iterator[Key]:
    """As ``makemessages`` finds them, without the program xgettext."""
    for path in templates():
        code = templatize(path.read_text(), origin=str(path))
        for found in _CALL.finditer(code):
            call = _call_at(code, found.start())
            words = [str(part.value) for part in call.args if isinstance(part, ast.Constant)]
            yield (words[0], words[1]) if "pgettext" in found[0] else ("", words[0])


def _call_at(code: str, start: int) -> ast.Call:
    """The shortest whole call that begins there: what follows it is no Python."""
    end = start
    while True:
        end = code.index(")", end) + 1
        try:
            parsed = ast.parse(code[start:end], mode="eval").body
        except SyntaxError:
            continue
        assert isinstance(parsed, ast.Call)
        return parsed


_KEYWORDS = {"_": None, "gettext": None, "gettext_noop": None, "ngettext": (1, 2)}


_OPTIONS = {"parse_template_string": True}  # of scripts: also within `${…}`


def keys_of_files(folder: str, method: str, kind: str) -> Iterator[Key]:
    for path in sorted((ROOT / folder).rglob(f"*.{kind}")):
        with path.open("rb") as file:
            for _, found, _, _ in extract(method, file, keywords=_KEYWORDS, options=_OPTIONS):
                yield "", found[0] if isinstance(found, tuple) else found


# --- what a person reads in a template ------------------------------------------------------------

READ = ("aria-label", "title", "placeholder", "alt", "data-label", "data-doing", "data-done")
READ += ("data-confirm", "data-confirm-text", "data-confirm-verb", "data-needs-reason")
READ += ("data-needs-choice",)
_MARKED = re.compile(
    r"\{% blocktranslate.*?\{% endblocktranslate %\}|\{% translate .*?%\}"
    r"|\{% block \w*class %\}.*?\{% endblock %\}|\{#.*?#\}|<(code|kbd|script)\b.*?</\1>",
    re.DOTALL,
)
_UNMARKED_WORDS = re.compile(r"""(?:yesno|default):["']([^"']*[A-Za-z]{2}[^"']*)["']""")
_TAG = re.compile(r"""<[/!]?[a-zA-Z](?:[^<>"']|"[^"]*"|'[^']*')*>""", re.DOTALL)
_ATTRIBUTE = re.compile(r"""([a-z-]+)=(["'])(.*?)\2""", re.DOTALL)


def unmarked_texts(source: str) -> Iterator[str]:
    """Words that a page would show as they are, whatever its language."""
    kept: list[str] = []

    def hide(tag: re.Match[str]) -> str:
        kept.append(tag[0])
        return f"\ue000{len(kept) - 1}\ue001"

    hidden = re.sub(r"\{[{%].*?[%}]\}", hide, _MARKED.sub(" ", source), flags=re.DOTALL)
    shown = [_TAG.sub("\n", hidden)]
    for tag in _TAG.findall(hidden):
        shown += [value for name, _, value in _ATTRIBUTE.findall(tag) if name in READ]
    for text in shown:
        for place in re.findall("\ue000([0-9]+)\ue001", text):
            yield from _UNMARKED_WORDS.findall(kept[int(place)])
        bare = re.sub("\ue000[0-9]+\ue001", " ", text)
        yield from re.findall(r"&?\b[A-Za-z][A-Za-z-]+\b", bare)
