"""Builds the server from the root of the tree, or from its own sdist."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

FOLDERS = (
    *("apps", "esper_web", "launcher", "hosts", "templates", "locale", "static", "recipes"),
    "examples",
)
PACKAGE = "esper_control_server"


def find_root(project: str) -> Path | None:
    """The root of the tree; None in an unpacked sdist, which contains all files itself."""
    root = Path(project).resolve().parents[1]
    return root if (root / "esper" / "version.py").is_file() else None


class ServerMetadata(MetadataHookInterface):
    """Version and dependencies, as the root has them. An sdist has them in PKG-INFO."""

    def update(self, metadata: dict[str, Any]) -> None:
        root = find_root(self.root)
        if root is None:
            return
        source = (root / "esper" / "version.py").read_text()
        version = re.findall(r'^__version__ = "(.+)"$', source, re.MULTILINE)[0]
        groups = tomllib.loads((root / "pyproject.toml").read_text())["dependency-groups"]
        metadata["version"] = version
        metadata["dependencies"] = [f"esper-control=={version}", *groups["server"]]


class ServerFiles(BuildHookInterface[Any]):
    """Takes the folders of the root into the package."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = find_root(self.root)
        if root is None:
            return
        for name in (*FOLDERS, "LICENSE"):
            build_data["force_include"][str(root / name)] = f"{PACKAGE}/{name}"
