"""A recipe file: what a host's owner allows to be started on that host, and with which parameters.

    name = "Digits"                                  # the name that pages show
    description = "A small convolutional net."
    argv = ["{python}", "examples/digits_cnn.py", "--steps", "{steps}", "--run", "{run}"]
    resume_argv = ["{python}", …]                    # without it, a launch cannot be resumed
    branch_argv = ["{python}", …, "--from", "{state}"]   # without it, a run cannot be branched
    directory = ".."                                 # where it runs, beside the file
    checkpoints = "/big/disk"                        # default: in the launch's own folder
    environment = ["CUDA_VISIBLE_DEVICES"]           # what it gets of the worker's environment
    grace_seconds = 20                               # between SIGTERM and SIGKILL

    [parameters.steps]
    type = "integer"                                 # integer number text choice flag path
    default = 10000
    minimum = 100
    maximum = 1000000

No shell is involved: each item of ``argv`` becomes one argument, whatever its text. Besides
the parameters an item may name ``{python}``, ``{run}`` (the run's name) and ``{checkpoints}`` (this
launch's own folder), and in ``branch_argv`` ``{state}``, the copy of the stored state that the run
begins from. The first item names the program and takes no parameter.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import stat
import tomllib
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import Any

MAX_FILE_BYTES = 64 * 1024
MAX_TEXT_LENGTH = 500
MAX_ARGUMENTS = 200
MAX_PARAMETERS = 40
LONGEST_GRACE_SECONDS = 300
SUFFIX = ".toml"
GIVEN = frozenset({"python", "run", "checkpoints"})  # placeholders that the host fills
STATE = "state"  # the same, of a branch alone
_SLUG = re.compile(r"[a-z0-9][a-z0-9_-]{0,59}")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
# A training script must not get the server's own secrets.
_SECRET = re.compile(
    r"SECRET|PASSWORD|TOKEN|CREDENTIAL|PRIVATE|DATABASE_URL|REDIS_URL|ESPER_.*KEY|DJANGO_"
)


class RecipeError(ValueError):
    """A recipe file or a parameter is not valid; the text says what to change."""


class ParameterKind(StrEnum):
    INTEGER = "integer"
    NUMBER = "number"
    TEXT = "text"
    CHOICE = "choice"
    FLAG = "flag"
    PATH = "path"


Value = int | float | str | bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """One thing that an operator may choose.

    Attributes:
        minimum: of a number, both ends included.
        choices: of a choice.
        option: what a flag that is on adds to the command; off, its item is left out.
        under: the folder, on the host, that a path must lie in.
    """

    name: str
    kind: ParameterKind
    default: Value | None = None  # None: it must be given
    description: str = ""
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    option: str = ""
    under: str = ""

    def to_wire(self) -> dict[str, Any]:
        return {**asdict(self), "kind": str(self.kind), "choices": list(self.choices)}

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Parameter:
        return cls(
            **{
                **wire,
                "kind": ParameterKind(wire["kind"]),
                "choices": tuple(wire["choices"]),
            }
        )

    def check(self, value: object) -> Value:
        """The value as it goes into the command; raises ``RecipeError``."""
        match self.kind:
            case ParameterKind.FLAG:
                return self._expect(isinstance(value, bool), value, "true or false")
            case ParameterKind.INTEGER:
                whole = type(value) is int
                return self._in_range(self._expect(whole, value, "a whole number"))
            case ParameterKind.NUMBER:
                finite = type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
                return self._in_range(self._expect(finite, value, "a number"))
            case ParameterKind.CHOICE:
                known = isinstance(value, str) and value in self.choices
                return self._expect(known, value, f"one of {', '.join(self.choices)}")
            case ParameterKind.TEXT:
                return self._plain_text(value)
            case ParameterKind.PATH:
                return self._path(value)

    def _expect(self, right: bool, value: Any, what: str) -> Value:
        if not right:
            raise RecipeError(f"{self.name} must be {what}.")
        checked: Value = value
        return checked

    def _in_range(self, value: Value) -> Value:
        low, high = self.minimum, self.maximum
        number = float(value)
        if (low is not None and number < low) or (high is not None and number > high):
            ends = "…".join("any" if end is None else f"{end:g}" for end in (low, high))
            raise RecipeError(f"{self.name} must lie in {ends}, not {value}.")
        return value

    def _plain_text(self, value: object) -> str:
        if not isinstance(value, str) or not 0 < len(value) <= MAX_TEXT_LENGTH:
            raise RecipeError(f"{self.name} must be a text of 1…{MAX_TEXT_LENGTH} characters.")
        if any(unicodedata.category(char).startswith("C") for char in value):
            raise RecipeError(f"{self.name} must not hold control characters.")
        if value.startswith("-"):  # the program would take it for an option
            raise RecipeError(f"{self.name} must not begin with a dash.")
        return value

    def _path(self, value: object) -> str:
        text = self._plain_text(value)
        parts = PurePosixPath(text).parts
        if text.startswith(("/", "~")) or ".." in parts or "\\" in text:
            raise RecipeError(f"{self.name} must be a path inside its folder, without '..'.")
        return text


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeFile:
    """One file, read and checked. ``digest`` is the SHA-256 of its bytes."""

    slug: str
    digest: str
    name: str
    argv: tuple[str, ...]
    directory: Path
    description: str = ""
    resume_argv: tuple[str, ...] = ()
    branch_argv: tuple[str, ...] = ()
    checkpoints: Path | None = None
    environment: tuple[str, ...] = ()
    grace_seconds: int = 20
    parameters: tuple[Parameter, ...] = field(default=())

    @property
    def resumable(self) -> bool:
        return bool(self.resume_argv)

    def to_wire(self) -> dict[str, Any]:
        """What the server keeps of it, and people are shown."""
        return {
            "slug": self.slug,
            "digest": self.digest,
            "name": self.name,
            "description": self.description,
            "argv": list(self.argv),
            "resume_argv": list(self.resume_argv),
            "branch_argv": list(self.branch_argv),
            "directory": str(self.directory),
            "environment": list(self.environment),
            "grace_seconds": self.grace_seconds,
            "parameters": [parameter.to_wire() for parameter in self.parameters],
        }

    def command(
        self, values: Mapping[str, Value], given: Mapping[str, str], *, resume: bool = False
    ) -> list[str]:
        """The command as the host starts it.

        Args:
            values: as ``check_parameters`` returns them.
            given: what stands for ``GIVEN``; with ``STATE`` it is a branch, whichever attempt.

        Raises:
            RecipeError: a path leaves its folder.
        """
        known = {parameter.name: parameter for parameter in self.parameters}
        texts = {name: _text_of(known[name], value) for name, value in values.items()}
        template = self.resume_argv if resume else self.argv
        if STATE in given:
            template = self.branch_argv
        items = [_PLACEHOLDER.sub(lambda m: ({**texts, **given})[m[1]], item) for item in template]
        off = {f"{{{name}}}" for name, value in values.items() if value is False}
        return [item for item, shape in zip(items, template, strict=True) if shape not in off]


def _text_of(parameter: Parameter, value: Value) -> str:
    if parameter.kind is ParameterKind.FLAG:
        return parameter.option if value else ""
    if parameter.kind is ParameterKind.PATH:
        folder = Path(parameter.under).resolve()
        target = (folder / str(value)).resolve()  # follows links: they may lead out
        if not target.is_relative_to(folder):
            raise RecipeError(f"{parameter.name} leads out of {folder}.")
        return str(target)
    return str(value)


def check_parameters(
    parameters: tuple[Parameter, ...], given: Mapping[str, object]
) -> dict[str, Value]:
    """Every parameter's value, defaults filled in.

    Raises:
        RecipeError: one is unknown, missing, or not as the recipe allows it.
    """
    unknown = sorted(set(given) - {parameter.name for parameter in parameters})
    if unknown:
        raise RecipeError(f"There is no parameter {unknown[0]!r}.")
    values: dict[str, Value] = {}
    for parameter in parameters:
        value = given.get(parameter.name, parameter.default)
        if value is None:
            raise RecipeError(f"{parameter.name} must be given.")
        values[parameter.name] = parameter.check(value)
    return values


@dataclass(frozen=True, slots=True)
class Folder:
    """The content of a recipes folder: usable recipes, and the problems of the others."""

    recipes: dict[str, RecipeFile]
    problems: dict[str, str]


def read_folder(folder: Path) -> Folder:
    """All recipes of a host; none when the folder does not exist."""
    recipes, problems = {}, {}
    for path in sorted(folder.glob(f"*{SUFFIX}")) if folder.is_dir() else ():
        try:
            recipe = read_recipe(path)
            recipes[recipe.slug] = recipe
        except RecipeError as error:
            problems[path.name[:80]] = str(error)
    return Folder(recipes, problems)


def read_recipe(path: Path) -> RecipeFile:
    """One file; raises ``RecipeError`` for one that cannot be used."""
    slug = path.name.removesuffix(SUFFIX)
    if not _SLUG.fullmatch(slug):
        raise RecipeError("The file's name must be small letters, digits, '-' and '_'.")
    content = _read(path)
    try:
        data = tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RecipeError(f"The file is not valid TOML: {error}") from error
    return _parse(data, slug=slug, digest=hashlib.sha256(content).hexdigest(), beside=path.parent)


def _read(path: Path) -> bytes:
    """The bytes of a regular file that only the worker's user or root may write."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise RecipeError(f"The file cannot be read: {error.strerror}.") from error
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise RecipeError("It is not a regular file.")
        if status.st_uid not in (0, os.getuid()) or status.st_mode & stat.S_IWOTH:
            raise RecipeError("Other users may write it: it must belong to this worker's user.")
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise RecipeError(f"The file is longer than {MAX_FILE_BYTES} bytes.")
    return content


_MEMBERS = frozenset(
    {
        *("name", "description", "argv", "resume_argv", "branch_argv", "directory"),
        *("checkpoints", "environment", "grace_seconds", "parameters"),
    }
)


def _parse(data: dict[str, Any], *, slug: str, digest: str, beside: Path) -> RecipeFile:
    _refuse_unknown(data, _MEMBERS, "the recipe")
    tables = data.get("parameters", {})
    if not isinstance(tables, dict) or len(tables) > MAX_PARAMETERS:
        raise RecipeError(f"parameters must be at most {MAX_PARAMETERS} tables.")
    parameters = tuple(_parameter(name, table, beside) for name, table in tables.items())
    names = {parameter.name for parameter in parameters}
    checkpoints = _text(data, "checkpoints", "")
    directory = (beside / _text(data, "directory", ".")).resolve()
    if not directory.is_dir():
        raise RecipeError(f"directory: there is no {directory}.")
    return RecipeFile(
        slug=slug,
        digest=digest,
        name=_text(data, "name", slug)[:80],
        description=_text(data, "description", ""),
        argv=_argv(data, "argv", names),
        resume_argv=_argv(data, "resume_argv", names) if "resume_argv" in data else (),
        branch_argv=_argv(data, "branch_argv", names | {STATE}) if "branch_argv" in data else (),
        directory=directory,
        checkpoints=(beside / checkpoints).resolve() if checkpoints else None,
        environment=_environment(data),
        grace_seconds=_grace(data),
        parameters=parameters,
    )


def _argv(data: Mapping[str, Any], member: str, names: set[str]) -> tuple[str, ...]:
    items = data.get(member)
    if not (isinstance(items, list) and 0 < len(items) <= MAX_ARGUMENTS):
        raise RecipeError(f"{member} must be a list of 1…{MAX_ARGUMENTS} texts.")
    for item in items:
        if not isinstance(item, str) or "\0" in item:
            raise RecipeError(f"{member} must hold texts only.")
        _check_placeholders(item, member, names | GIVEN)
    if set(_PLACEHOLDER.findall(items[0])) - {"python"}:
        raise RecipeError(f"{member}: no parameter may choose the program.")
    return tuple(items)


def _check_placeholders(item: str, member: str, known: set[str] | frozenset[str]) -> None:
    unknown = sorted(set(_PLACEHOLDER.findall(item)) - known)
    if unknown:
        raise RecipeError(f"{member} names {{{unknown[0]}}}, which is not a parameter.")
    rest = _PLACEHOLDER.sub("", item)
    if "{" in rest or "}" in rest:
        raise RecipeError(f"{member} has a brace that belongs to no placeholder: {item!r}.")


def _environment(data: Mapping[str, Any]) -> tuple[str, ...]:
    names = data.get("environment", [])
    if not isinstance(names, list) or len(names) > MAX_ARGUMENTS:
        raise RecipeError("environment must be a list of names.")
    for name in names:
        if not isinstance(name, str) or not _VARIABLE.fullmatch(name):
            raise RecipeError(f"environment: {name!r} is no variable's name.")
        if _SECRET.search(name.upper()):
            raise RecipeError(f"environment: {name} may hold a secret of the server.")
    return tuple(names)


def _grace(data: Mapping[str, Any]) -> int:
    grace = data.get("grace_seconds", 20)
    if type(grace) is not int or not 1 <= grace <= LONGEST_GRACE_SECONDS:
        raise RecipeError(f"grace_seconds must lie in 1…{LONGEST_GRACE_SECONDS}.")
    return grace


_PARAMETER_MEMBERS = frozenset(
    {"type", "default", "description", "minimum", "maximum", "choices", "option", "under"}
)


def _parameter(name: str, table: object, beside: Path) -> Parameter:
    if not _NAME.fullmatch(name) or name in GIVEN | {STATE}:
        raise RecipeError(f"{name!r} cannot be a parameter's name.")
    if not isinstance(table, dict):
        raise RecipeError(f"parameters.{name} must be a table.")
    _refuse_unknown(table, _PARAMETER_MEMBERS, f"parameters.{name}")
    if table.get("type") not in set(ParameterKind):
        kinds = ", ".join(ParameterKind)
        raise RecipeError(f"parameters.{name}: type must be one of {kinds}.")
    kind = ParameterKind(table["type"])
    under = _text(table, "under", "")
    parameter = Parameter(
        name=name,
        kind=kind,
        description=_text(table, "description", "")[:300],
        minimum=_limit(table, name, "minimum"),
        maximum=_limit(table, name, "maximum"),
        choices=_choices(table, name),
        option=_text(table, "option", ""),
        under=str((beside / under).resolve()) if under else "",
        default=table.get("default"),
    )
    _check_parameter(parameter)
    return parameter


def _check_parameter(parameter: Parameter) -> None:
    needed = {
        ParameterKind.CHOICE: ("choices", bool(parameter.choices)),
        ParameterKind.FLAG: ("option", bool(parameter.option)),
        ParameterKind.PATH: ("under", bool(parameter.under)),
    }
    member, there = needed.get(parameter.kind, ("", True))
    if not there:
        raise RecipeError(f"parameters.{parameter.name}: a {parameter.kind} needs {member}.")
    if parameter.default is not None:
        parameter.check(parameter.default)


def _limit(table: Mapping[str, Any], name: str, member: str) -> float | None:
    value = table.get(member)
    if value is None:
        return None
    if type(value) not in (int, float) or not math.isfinite(value):
        raise RecipeError(f"parameters.{name}: {member} must be a number.")
    return float(value)


def _choices(table: Mapping[str, Any], name: str) -> tuple[str, ...]:
    choices = table.get("choices", [])
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise RecipeError(f"parameters.{name}: choices must be a list of texts.")
    return tuple(choices)


def _text(data: Mapping[str, Any], member: str, default: str) -> str:
    value = data.get(member, default)
    if not isinstance(value, str) or len(value) > 2000 or "\0" in value:
        raise RecipeError(f"{member} must be a text.")
    return value


def _refuse_unknown(data: Mapping[str, Any], known: frozenset[str], where: str) -> None:
    unknown = sorted(set(data) - known)
    if unknown:
        raise RecipeError(
            f"{where} has no member {unknown[0]!r}; known: {', '.join(sorted(known))}."
        )
