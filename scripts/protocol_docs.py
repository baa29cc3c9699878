"""Write the message reference of ``docs/protocol.md`` from the structs of the protocol.

python -m scripts.protocol_docs            write
python -m scripts.protocol_docs --check    exit 1 where the file differs

What stands between the two marks is generated; everything else is written by hand.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msgspec import NODEFAULT, inspect

from esper.contracts import protocol, wire

TARGET = Path(__file__).resolve().parents[1] / "docs" / "protocol.md"
BEGIN, END = "<!-- messages: generated -->", "<!-- messages: end -->"
_PLAIN = {
    inspect.AnyType: "any JSON",
    inspect.NoneType: "null",
    inspect.BoolType: "boolean",
    inspect.BytesType: "base64",
    inspect.DateTimeType: "RFC 3339 time",
    inspect.CustomType: "number, `nan`, `inf` or `-inf`",
}


def render() -> str:
    """The message reference."""
    return "\n".join(line for title, kinds in protocol.MESSAGES for line in _group(title, kinds))


def _group(title: str, kinds: tuple[type, ...]) -> Iterator[str]:
    yield f"### {title}: messages\n"
    for kind in kinds:
        yield from _message(kind)


def _message(kind: type) -> Iterator[str]:
    known = wire.meanings(kind)
    info: Any = inspect.type_info(kind)
    introduction = wire.introduction(kind).replace("\n", " ")
    yield f"#### {kind.__name__}\n\n{introduction}\n"
    yield "| member | type | meaning |"
    yield "|---|---|---|"
    for field in info.fields:
        default = "" if field.required else f", default {_default(field)}"
        meaning = _escaped(re.sub(r":class:`(\w+)`", r"\1", known.get(field.name, "")))
        meaning = meaning.replace("``", "`")
        yield f"| `{field.encode_name}` | {_escaped(_type(field.type))}{default} | {meaning} |"
    yield ""


def _type(info: Any) -> str:
    match info:
        case inspect.Metadata():
            return _type(info.type)
        case inspect.IntType():
            return "integer" + _range(info)
        case inspect.FloatType():
            return "number" + _range(info)
        case inspect.StrType():
            most = f", at most {info.max_length:,} characters" if info.max_length else ""
            return f"text{', not empty' if info.min_length else ''}{most}"
        case inspect.EnumType():
            return " | ".join(f"`{member.value}`" for member in info.cls)
        case inspect.LiteralType():
            return " | ".join(f"`{value}`" for value in info.values)
        case inspect.VarTupleType() | inspect.ListType():
            return f"list of {_type(info.item_type)}{_most(info)}"
        case inspect.DictType():
            return f"object of {_type(info.value_type)}{_most(info)}"
        case inspect.UnionType():
            return " or ".join(_type(part) for part in info.types)
        case inspect.StructType() | inspect.DataclassType():
            return info.cls.__name__
    return _PLAIN[type(info)]


def _range(info: Any) -> str:
    if info.ge is None or info.ge < -1:
        return ""
    return f" ≥ {info.ge:g}"


def _most(info: Any) -> str:
    return f" (at most {info.max_length:,})" if info.max_length else ""


def _default(field: Any) -> str:
    if field.default is NODEFAULT:
        return "empty"
    if field.default in ("", (), None):
        return "null" if field.default is None else "empty"
    return f"`{str(field.default).lower()}`"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def rendered(document: str) -> str:
    """The document with its reference as it must be."""
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{render()}{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    check = parser.parse_args().check
    old = TARGET.read_text(encoding="utf-8")
    new = rendered(old)
    if check:
        return int(new != old)
    TARGET.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
