"""Build both distributions, install them into an empty environment, and use them there.

python scripts/wheel_check.py

The third-party packages are those of the Python that runs this script; the new environment finds
them by one path file, because installing torch again would take minutes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import threading
import tomllib
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parents[1]
SMOKE_SECONDS = 1200
# What a training script must not find in an environment with the library alone.
NOT_IN_THE_LIBRARY = ("apps", "esper_web", "launcher", "hosts", "esper_control_server")
LIBRARY_PROGRAM = """
import importlib, sys
server = {server!r}
for name in server:
    sys.modules[name] = None  # importing it fails
import esper, esper.pipeline, esper.sdk, esper.grafting, esper.compilation, esper.contracts.protocol
print(esper.__file__)
for name in {absent!r}:
    try:
        importlib.import_module(name)
    except ImportError:
        continue
    print(name, "can be imported")
"""


class CheckError(Exception):
    """A distribution is not what it has to be; the message says how."""


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="esper-wheels-") as name:
        directory = Path(name).resolve()
        try:
            library, server = build(directory)
            check_sdists(directory, server)
            environment = Environment(directory / "venv")
            environment.install(library)
            check_library(environment)
            environment.install(server)
            check_server(environment, directory)
        except CheckError as error:
            print(f"FAILED: {error}", file=sys.stderr)
            return 1
    print("both wheels are built, installed and in use")
    return 0


def build(directory: Path) -> tuple[Path, Path]:
    """The wheels of the library and of the server."""
    print("building both wheels and both sdists", flush=True)
    for project in (ROOT, ROOT / "wheels" / "server"):
        run([sys.executable, "-m", "hatchling", "build", "-d", str(directory)], cwd=project)
    (library,) = directory.glob("esper_control-*.whl")
    (server,) = directory.glob("esper_control_server-*.whl")
    return library, server


def check_sdists(directory: Path, server: Path) -> None:
    """The server's sdist, which is built apart from the tree, gives the same wheel."""
    (sdist,) = directory.glob("esper_control_server-*.tar.gz")
    again = directory / "again"
    again.mkdir()
    run(["tar", "xzf", str(sdist), "-C", str(again)], cwd=directory)
    (project,) = again.iterdir()
    run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(again)], cwd=project)
    (rebuilt,) = again.glob("*.whl")
    if contents(rebuilt) != contents(server):
        raise CheckError("the server's sdist and the tree give different wheels")


def contents(wheel: Path) -> dict[str, int]:
    """The files of a wheel with their checksums; RECORD repeats them in another order."""
    with zipfile.ZipFile(wheel) as archive:
        return {i.filename: i.CRC for i in archive.infolist() if not i.filename.endswith("RECORD")}


class Environment:
    """An empty virtual environment, with the third-party packages of this Python on its path."""

    def __init__(self, directory: Path) -> None:
        venv.EnvBuilder(symlinks=True, with_pip=False).create(directory)
        self.directory = directory
        self.python = str(directory / "bin" / "python")
        (self.packages,) = directory.glob("lib/python*/site-packages")
        third_party = sysconfig.get_path("purelib")
        (self.packages / "third-party.pth").write_text(f"{third_party}\n")

    def install(self, wheel: Path) -> None:
        """Installs one wheel without what it depends on."""
        print(f"installing {wheel.name}", flush=True)
        pip = (sys.executable, "-m", "pip", "--python", self.python)
        options = ("--quiet", "--disable-pip-version-check", "--no-deps", "--no-index")
        run([*pip, "install", *options, str(wheel)], cwd=self.directory)

    def unmet(self) -> list[str]:
        """Requirements of our packages that the third-party packages do not meet."""
        pip = (sys.executable, "-m", "pip", "--python", self.python, "--disable-pip-version-check")
        answer = subprocess.run(
            [*pip, "check"], capture_output=True, text=True, check=False, timeout=300
        )
        return [line for line in answer.stdout.splitlines() if line.startswith("esper-control")]

    def names(self) -> set[str]:
        """The top-level names of our packages."""
        found = {path.name for path in self.packages.iterdir() if path.suffix != ".dist-info"}
        return found - {"third-party.pth", "__pycache__"}


def check_library(environment: Environment) -> None:
    """It works without any package of the server, and brings one name and no command."""
    program = LIBRARY_PROGRAM.format(server=server_only_modules(), absent=NOT_IN_THE_LIBRARY)
    lines = run([environment.python, "-c", program], cwd=environment.directory).splitlines()
    if not Path(lines[0]).is_relative_to(environment.packages):
        raise CheckError(f"esper was imported from {lines[0]}, not from the new environment")
    if lines[1:]:
        raise CheckError(f"with the library alone {', '.join(lines[1:])}")
    if environment.names() != {"esper"}:
        raise CheckError(f"the library installs {sorted(environment.names())}")
    if (environment.directory / "bin" / "esper").exists():
        raise CheckError("the library alone installs a command")


def server_only_modules() -> list[str]:
    """Import names of what only the server depends on, as far as a trainer could notice."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    names = {re.split(r"[\[<>=]", text)[0].lower() for text in groups["server"]}
    wanted = {"django": "django", "celery": "celery", "channels": "channels"}
    wanted |= {"djangorestframework": "rest_framework", "whitenoise": "whitenoise"}
    missing = set(wanted) - names
    if missing:
        raise CheckError(f"the server's dependencies have no {', '.join(sorted(missing))}")
    return sorted(wanted.values())


def check_server(environment: Environment, directory: Path) -> None:
    """``esper up --smoke`` from another directory; pages and static files are served meanwhile."""
    if environment.names() != {"esper", "esper_control_server"}:
        raise CheckError(f"the server installs {sorted(environment.names())}")
    if unmet := environment.unmet():
        raise CheckError("; ".join(unmet))
    elsewhere = directory / "elsewhere"
    elsewhere.mkdir()
    variables = {
        name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ
    }
    variables |= {"HOME": str(elsewhere), "OMP_NUM_THREADS": "1"}
    esper = str(environment.directory / "bin" / "esper")
    version = run([esper, "version"], cwd=elsewhere, env=variables).strip()
    if f"-{version}-" not in next(directory.glob("esper_control-*.whl")).name:
        raise CheckError(f"esper version prints {version}")
    print("running esper up --smoke", flush=True)
    smoke = [esper, "up", "--smoke", "--data-dir", str(directory / "data")]
    output, status = watch(smoke, elsewhere, variables)
    if status != 0:
        raise CheckError(f"esper up --smoke ended with exit status {status}")
    if "Traceback" in output or "Event loop is closed" in output:
        raise CheckError("esper up --smoke printed a traceback")
    if leftovers := [path for path in elsewhere.iterdir() if path.name != ".cache"]:
        raise CheckError(f"esper up --smoke wrote {leftovers}, outside its data directory")


def watch(command: Sequence[str], cwd: Path, env: dict[str, str]) -> tuple[str, int]:
    """Runs it, shows its lines, and asks for pages as soon as it prints its address."""
    lines: list[str] = []
    with subprocess.Popen(
        command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        limit = threading.Timer(SMOKE_SECONDS, process.terminate)
        limit.start()
        try:
            for line in process.stdout or ():
                print(f"  {line.rstrip()[:200]}", flush=True)
                lines.append(line)
                if found := re.match(r"Esper is at (\S+)", line):
                    check_pages(found[1])
        except BaseException:
            process.terminate()
            raise
        finally:
            limit.cancel()
    return "".join(lines), process.returncode


def check_pages(url: str) -> None:
    """The sign-in page is drawn, and every file that it names is there."""
    page = fetch(f"{url}/login")
    files = re.findall(r'(?:href|src)="(/static/[^"]+)"', page)
    if not files:
        raise CheckError("the sign-in page names no static file")
    for path in files:
        fetch(url + path)
    print(f"  the sign-in page and its {len(files)} static files are served", flush=True)


def fetch(url: str) -> str:
    try:
        with urlopen(url, timeout=60) as answer:  # noqa: S310 (our own server on loopback)
            return str(answer.read().decode())
    except OSError as error:
        raise CheckError(f"{url}: {error}") from error


def run(command: Sequence[str], *, cwd: Path, env: dict[str, str] | None = None) -> str:
    """The output of a command that must succeed."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    answer = subprocess.run(
        command, cwd=cwd, env=env or clean, capture_output=True, text=True, check=False, timeout=300
    )
    if answer.returncode != 0:
        raise CheckError(f"{' '.join(command[:6])} failed:\n{answer.stdout}{answer.stderr}")
    return answer.stdout


if __name__ == "__main__":
    sys.exit(main())
