"""Which processes Esper consists of, and how each is started.

    stop order   0 demo trainers, Tamiyo, beat   1 workers   2 web   3 Valkey

Valkey is stopped last: a worker that loses its broker ends, and one that starts waits for it.
docker/compose.yaml runs the same commands; a test compares the two.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from hosts.keyring import kernel_key_path
from hosts.paths import ROOT
from hosts.processes import MARK
from launcher.supervisor import valkey
from launcher.supervisor.child import ChildSpec, Restart

PYTHON = sys.executable
CELERY = (PYTHON, "-m", "celery", "--quiet", "-A", "esper_web.celery")
# Lines that they print at every start or stop, and that need no action.
VALKEY_ROUTINE = re.compile(r"Memory overcommit must|signal-handler|is now ready to exit")
WORKER_ROUTINE = re.compile(r"worker: (Warm|Soft) shutdown")
CELERY_ENVIRONMENT = {
    # Celery warns root at every start. The reason is pickle, and we accept JSON only.
    "PYTHONWARNINGS": "ignore:You're running the worker with superuser",
    # Django's checks import every page and every view, which no worker needs; ./check runs them.
    "CELERY_SKIP_CHECKS": "1",
}


@dataclass(frozen=True, slots=True)
class Demo:
    """A trainer that shows what Esper does: one of the examples, with its options."""

    name: str
    script: str
    options: tuple[str, ...] = ()


DEMOS = (
    Demo("digits_perceptron", "digits_perceptron.py", ("--pause", "0.02")),  # too narrow
    Demo("topics_lm", "topics_lm.py", ("--rate-jump-at", "2000")),  # a fault in its schedule
    Demo("digits_cnn", "digits_cnn.py", ("--units", "32")),  # nothing is wrong with it
)


@dataclass(frozen=True, kw_only=True)
class Site:
    """One running installation.

    Args:
        redis_url: where Redis is; ``redis_port`` is set when it is our own Valkey.
        mark: the value by which our processes are found; it is in their environment.
        keyring: see ``hosts.keyring``.
    """

    data_dir: Path
    port: int
    redis_url: str
    redis_port: int | None
    mark: str
    keyring: Mapping[str, object]

    @property
    def url(self) -> str:
        """The address that a person opens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def host(self) -> str:
        """This machine's name in queue names. Celery splits lists of queues at commas."""
        return os.environ.get("ESPER_HOST_NAME") or socket.gethostname()

    @property
    def environment(self) -> dict[str, str]:
        """The environment of every process. Its only secret is the password of Redis."""
        return {
            **_without(os.environ, "ESPER_KERNEL_KEY_FILE"),
            "DJANGO_SETTINGS_MODULE": "esper_web.settings.local",
            "ESPER_DATA_DIR": str(self.data_dir),
            "ESPER_HOST_NAME": self.host,
            "REDIS_URL": self.redis_url,
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            MARK: self.mark,
        }

    def token(self, service: str) -> str:
        """The service token that ``create_demo_people`` made."""
        tokens = self.keyring.get("tokens")
        return str(tokens.get(service, "")) if isinstance(tokens, dict) else ""


def valkey_child(site: Site) -> ChildSpec:
    """The embedded Redis-compatible server."""
    password = str(site.keyring["redis_password"])
    port = site.redis_port or 0
    configuration = valkey.write_configuration(
        site.data_dir / "valkey", port=port, password=password
    )
    return ChildSpec(
        name="valkey",
        argv=(valkey.valkey_program(), str(configuration)),
        env={"PATH": os.defpath, MARK: site.mark},
        stop_order=3,
        ready=valkey.answers(port, password),
        hidden=VALKEY_ROUTINE,
    )


def web_child(site: Site) -> ChildSpec:
    """Pages, REST API and websockets."""
    return ChildSpec(
        name="web",
        argv=(*web_command(), "--host", "127.0.0.1", "--port", str(site.port)),
        env=site.environment,
        stop_order=2,
        ready=_answers_http(f"{site.url}/readyz?only=web"),
    )


def service_children(site: Site, capabilities: str) -> tuple[ChildSpec, ...]:
    """Workers, beat and Tamiyo."""
    environment = site.environment | {"ESPER_WORKER_CAPABILITIES": capabilities}
    celery = environment | CELERY_ENVIRONMENT
    return (
        ChildSpec(
            name="worker-control",
            argv=control_worker_command(),
            env=celery | {"ESPER_WORKER_NAME": f"control@{site.host}"},
            stop_order=1,
            hidden=WORKER_ROUTINE,
        ),
        ChildSpec(
            name="worker-compile",
            argv=compile_worker_command(
                ",".join(filter(None, (compile_queues(capabilities), host_queue(site.host))))
            ),
            env=celery
            | {
                "ESPER_WORKER_NAME": f"compile@{site.host}",
                "ESPER_KERNEL_KEY_FILE": str(kernel_key_path(site.data_dir)),
                "ESPER_SERVER": site.url,
                "OMP_NUM_THREADS": "1",
            },
            stop_order=1,
            hidden=WORKER_ROUTINE,
        ),
        ChildSpec(
            name="beat",
            argv=(*beat_command(), "--schedule", str(site.data_dir / "beat-schedule")),
            env=celery,
        ),
        ChildSpec(
            name="tamiyo",
            argv=(*tamiyo_command(), "--urza-url", site.url),
            env=environment | {"ESPER_TOKEN": site.token("tamiyo"), "OMP_NUM_THREADS": "1"},
        ),
    )


def demo_child(site: Site, demo: Demo) -> ChildSpec:
    """A trainer: a user's script. It has a lower priority, so that pages stay fast."""
    environment = _without(site.environment, "REDIS_URL")
    return ChildSpec(
        name=demo.name,
        argv=(
            *(PYTHON, str(ROOT / "examples" / demo.script), *demo.options),
            *("--forever", "--checkpoint", str(site.data_dir / f"{demo.name}.pt")),
        ),
        env=environment
        | {
            "ESPER_SERVER": site.url,
            "ESPER_TOKEN": site.token("trainer"),
            "ESPER_STATE_DIR": str(site.data_dir / "trainers"),
            "ESPER_STAGE_DIR": str(site.data_dir / "stage"),
            "ESPER_COMPILED_KERNEL_KEY": str(site.keyring.get("kernel_public_key", "")),
            "OMP_NUM_THREADS": "1",
        },
        restart=Restart.ON_FAILURE,
        # Not SIGINT, which fails the run: it continues from its checkpoint at the next start.
        stop_signal=signal.SIGTERM,
        stop_seconds=5.0,
        niceness=5,
    )


# The commands. docker/compose.yaml has the same.


def web_command() -> tuple[str, ...]:
    """uvicorn without access log; open websockets do not delay a stop."""
    return (
        *(PYTHON, "-m", "uvicorn", "esper_web.asgi:application", "--lifespan", "off"),
        *("--log-level", "warning", "--timeout-graceful-shutdown", "3", "--ws-max-size", "262144"),
        *("--ws-per-message-deflate", "false"),  # frames are small, and each socket would pay
    )


def control_worker_command() -> tuple[str, ...]:
    """Short database tasks."""
    return (*CELERY, "worker", "-Q", "control", "-n", "control@%h", "-c", "2", "-l", "WARNING")


def compile_queues(capabilities: str) -> str:
    """``compile.cpu,compile.cuda.sm90``: the queue of kernels for each capability."""
    names = (name.strip() for name in capabilities.split(","))
    return ",".join(f"compile.{name}" for name in names if name)


def host_queue(host: str) -> str:
    """The queue of a worker that starts recipes and stages kernels on this host."""
    return f"host.{host}"


def compile_worker_command(queues: str) -> tuple[str, ...]:
    """One build at a time: it owns the device."""
    return (*CELERY, "worker", "-Q", queues, "-n", "compile@%h", "-c", "1", "-l", "WARNING")


def host_worker_command(host: str) -> tuple[str, ...]:
    """Where it is apart from the compile worker, which compiles code and holds fewer secrets."""
    queue = host_queue(host)
    return (*CELERY, "worker", "-Q", queue, "-n", "host@%h", "-c", "1", "-l", "WARNING")


def beat_command() -> tuple[str, ...]:
    """Sends periodic tasks. There must be exactly one."""
    return (*CELERY, "beat", "--pidfile=", "-l", "WARNING")


def tamiyo_command() -> tuple[str, ...]:
    """Tamiyo. It reads Redis and its token from the environment, which ps does not show."""
    return (PYTHON, "-m", "esper.services.tamiyo.launch_enhanced")


def capabilities_of_this_machine() -> str:
    """``cpu``, or what torch reports. torch is imported in a child, and only if a GPU may exist."""
    if given := os.environ.get("ESPER_WORKER_CAPABILITIES"):
        return given
    if not Path("/proc/driver/nvidia").exists() and shutil.which("nvidia-smi") is None:
        return "cpu"
    program = "from esper.compilation.key import capabilities; print(*capabilities(), sep=',')"
    answer = subprocess.run(
        [PYTHON, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    return answer.stdout.strip()


def _without(environment: Mapping[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in names}


def _answers_http(url: str) -> Callable[[], Awaitable[bool]]:
    def ask() -> bool:
        try:
            with urlopen(url, timeout=5) as reply:  # noqa: S310 (our own loopback URL)
                return bool(reply.status == HTTPStatus.OK)
        except (URLError, OSError):
            return False

    async def check() -> bool:
        return await asyncio.to_thread(ask)

    return check


if __name__ == "__main__":  # a container's shell asks for the queues of its worker
    print(compile_queues(os.environ["ESPER_WORKER_CAPABILITIES"]))
