"""What pyproject.toml says about the project, and what else says the same."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import esper
from hosts.paths import ROOT, default_data_dir, is_clone

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
SERVER: dict[str, Any] = tomllib.loads((ROOT / "wheels/server/pyproject.toml").read_text())
GROUPS = PROJECT["dependency-groups"]


def members(group: str) -> Iterator[Requirement]:
    """The requirements of a group and of the groups that it includes."""
    for entry in GROUPS[group]:
        if isinstance(entry, dict):
            yield from members(entry["include-group"])
        else:
            yield Requirement(entry)


def pins(name: str) -> dict[str, Version]:
    """The pinned packages of a requirements file and of the files that it includes."""
    found: dict[str, Version] = {}
    for line in (ROOT / "requirements" / name).read_text().splitlines():
        text = line.partition("#")[0].strip()
        if text.startswith("-r "):
            found |= pins(text.removeprefix("-r ").strip())
        elif text:
            package, _, version = text.partition("==")
            found[canonicalize_name(package)] = Version(version)
    return found


def outside(wanted: Iterator[Requirement], pinned: dict[str, Version]) -> list[str]:
    """Requirements without a pin, or with one outside of their range."""
    return [
        f"{requirement}: {pinned.get(canonicalize_name(requirement.name))}"
        for requirement in wanted
        if canonicalize_name(requirement.name) not in pinned
        or pinned[canonicalize_name(requirement.name)] not in requirement.specifier
    ]


def test_the_pins_of_up_fit_the_ranges_of_library_and_server() -> None:
    library = map(Requirement, PROJECT["project"]["dependencies"])
    assert outside(library, pins("app.txt")) == []
    assert outside(members("server"), pins("app.txt")) == []


def test_the_pins_of_check_fit_the_ranges_of_the_group_dev_and_of_the_extras() -> None:
    assert outside(members("dev"), pins("dev.txt")) == []
    extras = PROJECT["project"]["optional-dependencies"].values()
    assert outside((Requirement(text) for extra in extras for text in extra), pins("dev.txt")) == []


def test_the_installed_packages_are_the_pinned_ones() -> None:
    metadata = import_module("importlib.metadata")
    pinned = pins("dev.txt")
    named = [canonicalize_name(r.name) for r in members("dev")]
    assert {name: Version(metadata.version(name)) for name in named} == {
        name: pinned[name] for name in named
    }


def test_the_version_is_written_once() -> None:
    for project in (PROJECT, SERVER):
        assert "version" not in project["project"]
        assert "version" in project["project"]["dynamic"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "esper/version.py"
    source = (ROOT / "esper" / "version.py").read_text()
    assert re.findall(r'^__version__ = "(.+)"$', source, re.MULTILINE) == [esper.__version__]


def test_both_distributions_agree_on_python_and_licence() -> None:
    for key in ("requires-python", "license"):
        assert PROJECT["project"][key] == SERVER["project"][key]
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_the_server_s_wheel_has_every_folder_that_its_images_have() -> None:
    source = (ROOT / "wheels/server/hatch_build.py").read_text()
    folders = set(
        re.findall(r'"(\w+)"', re.findall(r"^FOLDERS = \((.+?)^\)", source, re.M | re.S)[0])
    )
    assert all((ROOT / folder).is_dir() for folder in folders)
    for name in ("Dockerfile.web", "Dockerfile.worker"):
        copied = re.findall(r"^COPY (\w+) \1$", (ROOT / "docker" / name).read_text(), re.M)
        assert set(copied) - {"esper"} <= folders


def test_the_hook_before_a_commit_checks_the_types_that_check_checks() -> None:
    code = re.findall(r"^code=\((.+)\)$", (ROOT / "check").read_text(), re.M)[0]
    assert f"mypy {code}\n" in (ROOT / ".pre-commit-config.yaml").read_text()


def test_no_address_is_invented() -> None:
    assert "urls" not in PROJECT["project"]
    assert "urls" not in SERVER["project"]


@pytest.mark.parametrize("installed", [False, True])
def test_data_is_in_var_in_a_clone_and_in_the_user_data_directory_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, installed: bool
) -> None:
    monkeypatch.delenv("ESPER_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    if not installed:
        (tmp_path / "up").touch()
    assert is_clone(tmp_path) is not installed
    wanted = tmp_path / "share" / "esper" if installed else tmp_path / "var"
    assert default_data_dir(tmp_path) == wanted
    monkeypatch.setenv("ESPER_DATA_DIR", str(tmp_path / "mine"))
    assert default_data_dir(tmp_path) == tmp_path / "mine"
