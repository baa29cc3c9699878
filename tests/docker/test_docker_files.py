"""docker/, checked as far as possible without an engine."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from hosts.paths import ROOT
from launcher.supervisor import plan
from scripts import requirement_hashes

DOCKER = ROOT / "docker"
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def command_of(service: str) -> list[str]:
    """What it runs: its own command, or its image's; a shell line is taken apart."""
    command = SERVICES[service].get("command") or dockerfile_command("Dockerfile.web")
    if command[:2] == ["sh", "-c"]:
        return shlex.split(
            re.sub(r"\$\$\([^)]*\)", "'\\g<0>'", str(command[2]).removeprefix("exec "))
        )
    return [str(part) for part in command]


def dockerfile_command(name: str) -> list[str]:
    last = re.findall(r"^CMD (\[.*\])$", (DOCKER / name).read_text(), re.MULTILINE)[-1]
    return list(yaml.safe_load(last))


@pytest.mark.parametrize(
    ("service", "ours"),
    [
        ("web", plan.web_command()),
        ("worker-control", plan.control_worker_command()),
        ("worker-compile", plan.compile_worker_command("$$(python -m launcher.supervisor.plan)")),
        ("worker-host", plan.host_worker_command("$$ESPER_HOST_NAME")),
        ("beat", plan.beat_command()),
        ("tamiyo", plan.tamiyo_command()),
    ],
)
def test_a_container_runs_the_command_that_the_supervisor_runs(
    service: str, ours: tuple[str, ...]
) -> None:
    theirs = command_of(service)
    assert theirs[: len(ours)] == ["python", *ours[1:]]


def test_every_service_of_the_issue_is_there() -> None:
    wanted = {
        "postgres",
        "redis",
        "web",
        "worker-control",
        "worker-compile",
        "beat",
        "tamiyo",
        "nginx",
    }
    assert wanted <= set(SERVICES)


def test_every_file_that_compose_names_exists() -> None:
    for service in SERVICES.values():
        if build := service.get("build"):
            assert (DOCKER / build["context"] / build["dockerfile"]).is_file()
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("./") and source != "./certificates":  # the installation's own
                assert (DOCKER / source).is_file()
            elif not source.startswith("./"):
                assert source in COMPOSE["volumes"]


def test_every_variable_that_compose_needs_is_in_the_example() -> None:
    used = set(re.findall(r"(?<!\$)\$\{([A-Z_]+)", (DOCKER / "compose.yaml").read_text()))
    example = set(re.findall(r"^([A-Z_]+)=", (DOCKER / "example.env").read_text(), re.MULTILINE))
    assert used == example


def test_every_variable_for_the_server_is_a_setting() -> None:
    documented = set(
        re.findall(r"^\| `([A-Z_]+)` \|", (ROOT / "docs/settings.md").read_text(), re.M)
    )
    read = {name.removesuffix("_FILE") for name in COMPOSE["x-server"]["environment"]}
    assert read <= documented


def test_only_the_compile_worker_holds_the_kernel_key() -> None:
    holders = {name for name, service in SERVICES.items() if "kernel_key" in str(service)}
    assert holders == {"worker-compile"}


def test_the_compile_worker_cannot_sign_commands_or_heads_and_reads_no_people() -> None:
    """It compiles code: it has no secret of the server, and users of databases of its own."""
    worker = SERVICES["worker-compile"]
    wanted = {"compile_database_url", "redis_compile_url", "kernel_public_key", "kernel_key"}
    assert set(worker["secrets"]) == wanted
    assert worker["environment"]["ESPER_ISSUES_COMMANDS"] == "false"
    files = {str(value) for name, value in worker["environment"].items() if "FILE" in name}
    assert files == {f"/run/secrets/{name}" for name in wanted}
    assert worker["volumes"] == ["kernels:/var/lib/esper/kernels"]
    assert "grant_compile_role esper_compile" in SERVICES["migrate"]["command"][2]


def test_what_starts_recipes_compiles_nothing_and_is_there_only_when_wanted() -> None:
    worker = SERVICES["worker-host"]
    assert worker["profiles"] == ["recipes"]
    assert "kernel_key" not in worker["secrets"]
    assert worker["environment"]["ESPER_ISSUES_COMMANDS"] == "false"
    servers = {name for name, one in SERVICES.items() if "ESPER_SERVER" in str(one)}
    assert servers == {"worker-host"}


def test_the_web_image_is_built_from_wheels_with_known_hashes() -> None:
    image = (DOCKER / "Dockerfile.web").read_text()
    assert "pip install --require-hashes --only-binary :all: -r requirements/web.lock.txt" in image
    lock = requirement_hashes.LOCK.read_text()
    assert requirement_hashes.pins(lock) == requirement_hashes.pins(
        requirement_hashes.SOURCE.read_text()
    )
    for entry in lock.removeprefix(requirement_hashes.HEAD).split("\n")[:-1]:
        assert re.fullmatch(r"[\w.=-]+ \\|    --hash=sha256:[0-9a-f]{64}( \\)?", entry), entry


def test_redis_and_postgres_have_passwords_and_no_open_ports() -> None:
    assert "--aclfile" in SERVICES["redis"]["command"]
    assert "POSTGRES_PASSWORD_FILE" in SERVICES["postgres"]["environment"]
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["nginx"]


def test_every_service_is_confined() -> None:
    for name, service in SERVICES.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert service["pids_limit"], name
        assert service["mem_limit"], name
        assert not service.get("privileged"), name
        # Those that root needs to start a service for another user; ours start as their user.
        allowed = set() if "build" in service else {"CHOWN", "SETGID", "SETUID"}
        allowed |= {
            "postgres": {"DAC_OVERRIDE", "FOWNER"},
            "nginx": {"NET_BIND_SERVICE", "DAC_READ_SEARCH"},
        }.get(name, set())
        assert set(service.get("cap_add", [])) <= allowed, name


def test_services_that_stay_have_a_health_check() -> None:
    for name, service in SERVICES.items():
        if service["restart"] != "no" and name not in {"web", "tamiyo"}:
            assert service["healthcheck"]["test"], name
    image = (DOCKER / "Dockerfile.web").read_text()
    assert "readyz?only=web" in image  # the workers wait for it, so it must not wait for them
    host = re.search(r"http://([\d.]+):8080/readyz", image)
    assert host is not None
    assert host[1] in COMPOSE["x-server"]["environment"]["ALLOWED_HOSTS"].split(",")


def test_secrets_are_files_and_each_service_has_its_own_only() -> None:
    written = runpy.run_path(str(DOCKER / "make-secrets"))["contents"]()
    assert set(COMPOSE["secrets"]) == set(written)
    values = [value for value in written.values() if value]
    assert len(set(values)) == len(values)
    for name, service in SERVICES.items():
        for variable, value in service.get("environment", {}).items():
            secret = re.search(r"SECRET|PASSWORD|TOKEN|KEY|DATABASE_URL|REDIS_URL", variable)
            if secret:
                assert variable.endswith("_FILE"), (name, variable)
                assert Path(value).name in service["secrets"], (name, variable)
    assert SERVICES["tamiyo"]["secrets"] == ["redis_tamiyo_url", "tamiyo_token"]
    secrets = {name: service.get("secrets", []) for name, service in SERVICES.items()}
    owners = [name for name, held in secrets.items() if "database_owner_url" in held]
    assert owners == ["migrate"]


def test_secrets_are_written_once_and_for_their_owner(tmp_path: Path) -> None:
    main = runpy.run_path(str(DOCKER / "make-secrets"))["main"]
    assert main(tmp_path / "secrets") == 0
    assert (tmp_path / "secrets").stat().st_mode & 0o777 == 0o700
    first = (tmp_path / "secrets" / "command_key").read_text()
    assert main(tmp_path / "secrets") == 1
    assert (tmp_path / "secrets" / "command_key").read_text() == first


def test_what_a_dockerfile_copies_exists() -> None:
    for name in ("Dockerfile.web", "Dockerfile.worker"):
        for line in re.findall(r"^COPY (.+)$", (DOCKER / name).read_text(), re.MULTILINE):
            for source in line.split()[:-1]:
                assert (ROOT / source).exists(), f"{name} copies {source}"


def test_the_web_image_has_no_torch() -> None:
    assert "requirements/app.txt" not in (DOCKER / "Dockerfile.web").read_text()
    web = (ROOT / "requirements/web.txt").read_text()
    assert not re.search(r"^(torch|scikit-learn|nvidia)", web, re.MULTILINE)


def test_the_commands_of_the_web_image_need_no_torch() -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from launcher.command import cli; cli(sys.argv[1:])"
    )
    for command in (["version"], ["token", "issue", "--help"], ["audit", "verify", "--help"]):
        answer = subprocess.run(
            [sys.executable, "-c", program, *command],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert answer.returncode == 0, answer.stderr


def test_images_hold_no_secrets() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {"docker/.env", "docker/secrets", "docker/certificates", "var", ".git"} <= set(ignored)
    for name in ("Dockerfile.web", "Dockerfile.worker"):
        text = (DOCKER / name).read_text()
        assert not re.search(r"^(ENV|ARG) .*(SECRET|PASSWORD|TOKEN|_KEY)\b", text, re.MULTILINE)
        assert "COPY . " not in text
        assert re.search(r"^USER esper$", text, re.MULTILINE)


def test_nginx_forwards_websockets_and_limits_bodies() -> None:
    text = (DOCKER / "nginx.conf").read_text()
    for line in (
        "proxy_set_header Upgrade $http_upgrade;",
        "proxy_set_header Connection $connection_upgrade;",
        "proxy_read_timeout 3600s;",
        "client_max_body_size 2m;",
        "proxy_set_header X-Forwarded-Proto https;",
    ):
        assert line in text
    assert text.count("{") == text.count("}")


def test_nginx_accepts_its_configuration(tmp_path: Path) -> None:
    text = (DOCKER / "nginx.conf").read_text()
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
    if nginx is None:  # ./check installs it where it may; elsewhere at least the form is right
        statements = [line.split("#")[0].strip() for line in text.splitlines()]
        assert all(line.endswith((";", "{", "}", "'")) for line in statements if line)
        return
    _self_signed(tmp_path / "certificates")
    # The name exists inside compose's network only.
    text = text.replace("server web:8080;", "server 127.0.0.1:8080;")
    text = text.replace("pid /run/nginx.pid;", f"pid {tmp_path}/nginx.pid;")
    (tmp_path / "nginx.conf").write_text(text)
    answer = subprocess.run(
        [nginx, "-t", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr


def _self_signed(directory: Path) -> None:
    directory.mkdir()
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "esper.example.org")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (directory / "esper.crt").write_bytes(certificate.public_bytes(pem))
    (directory / "esper.key").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
