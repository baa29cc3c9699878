"""Each command of the pages is one that exists, with options that it takes.

What a command does is tested where it lives. Here each word of a shell block is held to the program
that it is given to, so that a renamed option or file is found.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import click
import pytest
import yaml
from django.core.management import get_commands, load_command_class

import esper
from launcher.command import cli
from tests.docs.pages import DOCS, ROOT, commands, name_of, pages

BENCHMARKS = sorted(
    set(re.findall(r"python -m (benchmarks\.\w+)", (DOCS / "performance.md").read_text()))
)
PRINT_HELPS = """
import contextlib, io, json, runpy, sys
helps = {}
for name in sys.argv[1:]:
    is_file = name.endswith(".py")
    sys.argv = [name, "--help"]
    sys.path[0] = "examples" if is_file else ""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            (runpy.run_path if is_file else runpy.run_module)(name, run_name="__main__")
        except SystemExit as end:
            assert not end.code, (name, end.code)
    helps[name] = said.getvalue()
print(json.dumps(helps))
"""
COMMANDS = [(name_of(page), words) for page in pages() for words in commands(page)]


@pytest.mark.parametrize(
    ("page", "words"), COMMANDS, ids=[f"{page}: {' '.join(words)[:60]}" for page, words in COMMANDS]
)
def test_a_command_exists_and_takes_its_options(page: str, words: list[str]) -> None:
    program = words[0].removeprefix(".venv/bin/")
    assert program in PROGRAMS, f"{page}: no test knows {program!r}; teach test_commands.py"
    PROGRAMS[program](words[1:])


@pytest.mark.parametrize("module", BENCHMARKS)
def test_every_benchmark_that_is_named_has_a_help_text(module: str) -> None:
    assert _help(("-m", module)).startswith("usage:")


def test_the_pages_have_commands() -> None:
    assert len(COMMANDS) > 20


def _python(words: list[str]) -> None:
    if words[0] == "-m":
        _module(words[1], words[2:])
    elif words[0] == "manage.py":
        _manage(words[1], words[2:])
    elif words[0].startswith("examples/"):
        _takes_options([words[0]], words[1:])
    elif words[0].startswith("docker/"):
        assert (ROOT / words[0]).is_file()
    elif words[0] == "-c":
        compile(words[1], "page", "exec")
    else:
        assert words == ["first.py"], words  # the tutorial's own


def _module(name: str, words: list[str]) -> None:
    if name == "venv":
        return
    assert (ROOT / f"{name.replace('.', '/')}.py").exists() or (
        ROOT / name.replace(".", "/")
    ).is_dir(), f"no module {name}"
    _takes_options(["-m", name], words)


def _takes_options(start: list[str], words: list[str]) -> None:
    options = [word for word in words if word.startswith("--")]
    if options:
        text = _help(tuple(start))
        assert all(option in text for option in options), (start, options)
    else:
        assert start[0] == "-m" or (ROOT / start[0]).exists()


def _help(start: tuple[str, ...]) -> str:
    return _helps()[start[-1]]


@cache
def _helps() -> dict[str, str]:
    """What each program with options prints; one process, because each imports torch and more."""
    named = {words[2] for _, words in COMMANDS if words[1:2] == ["-m"]}
    named |= {word for _, words in COMMANDS for word in words[1:2] if word.startswith("examples/")}
    named = (named | set(BENCHMARKS)) - {"venv"}
    done = subprocess.run(
        [sys.executable, "-c", PRINT_HELPS, *sorted(named)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    helps: dict[str, str] = json.loads(done.stdout)
    return helps


def _manage(name: str, words: list[str]) -> None:
    parser = load_command_class(get_commands()[name], name).create_parser("manage.py", name)
    parser.parse_args(words)


def _esper(words: list[str]) -> None:
    name, command, context = "esper", click.Command("none"), None
    command = cli
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        context = command.make_context(name, [], parent=context, resilient_parsing=True)
        name, words = words[0], words[1:]
        assert name in command.commands, f"esper has no command {name}"
        command = command.commands[name]
    command.make_context(name, words, parent=context)


def _check(words: list[str]) -> None:
    stages = set(re.findall(r"\bstage(?:_beside)? (\w+) ", (ROOT / "check").read_text()))
    assert {word for word in words if word != "--all"} <= stages


def _pytest(words: list[str]) -> None:
    assert all((ROOT / word).exists() for word in words if not word.startswith("-"))


def _torchrun(words: list[str]) -> None:
    script = next(word for word in words if word.endswith(".py"))
    assert (ROOT / script).exists()


def _pip(words: list[str]) -> None:
    if words[0] == "wheel":
        assert all((ROOT / word / "pyproject.toml").exists() for word in words if word[0] == ".")
        return
    assert words[0] == "install"
    if built := [word for word in words if word.endswith(".whl")]:
        assert all(f"-{esper.__version__}-" in word for word in built)
        return
    groups = set(re.findall(r"\w+\[([\w,]+)\]", " ".join(words)))
    text = (ROOT / "pyproject.toml").read_text()
    assert all(f"\n{group} = [" in text for found in groups for group in found.split(","))


def _docker(words: list[str]) -> None:
    if words[0] == "build":
        assert (ROOT / words[words.index("-f") + 1]).is_file()
        return
    assert words[:2] == ["compose", "-f"]
    services = yaml.safe_load((ROOT / words[2]).read_text())["services"]
    if words[3] == "run":
        service, *rest = [word for word in words[4:] if word != "--rm"]
        assert service in services
        if rest[:3] == ["python", "-m", "launcher"]:
            _esper(rest[3:])
        else:
            assert rest[:2] == ["python", "manage.py"]
            _manage(rest[2], rest[3:])


def _helm(words: list[str]) -> None:
    assert (ROOT / words[2] / "Chart.yaml").is_file()


def _kubectl(words: list[str]) -> None:
    if "--" in words:
        inside = words[words.index("--") + 1 :]
        PROGRAMS[inside[0]](inside[1:])


def _curl(words: list[str]) -> None:
    method = words[words.index("-X") + 1].lower() if "-X" in words else "get"
    given = {words[i + 1].split(":")[0] for i, word in enumerate(words) if word == "-H"}
    path = words[-1].removeprefix("$ESPER_SERVER").partition("?")[0]
    schema = json.loads((DOCS / "reference" / "openapi.json").read_text())
    operation = schema["paths"][path.replace("$UID_OF_IT", "{uid}")][method]
    needed = {p["name"] for p in operation.get("parameters", []) if p["in"] == "header"}
    assert needed <= given


def _export(words: list[str]) -> None:
    settings = (DOCS / "settings.md").read_text()
    assert all(f"`{word.partition('=')[0]}`" in settings for word in words)


def _copy(words: list[str]) -> None:
    source = Path(words[-2])
    assert (ROOT / source).exists()


def _anything(_words: list[str]) -> None:
    """A program of the reader's own machine."""


PROGRAMS: dict[str, Callable[[list[str]], None]] = {
    "python": _python,
    "./up": lambda words: _esper(["up", *words]),
    "esper": _esper,
    "./check": _check,
    "pytest": _pytest,
    "torchrun": _torchrun,
    "pip": _pip,
    "docker": _docker,
    "helm": _helm,
    "kubectl": _kubectl,
    "curl": _curl,
    "export": _export,
    "cp": _copy,
    **dict.fromkeys(("chmod", "git", "cd", "npm", "eval", "pre-commit"), _anything),
}
