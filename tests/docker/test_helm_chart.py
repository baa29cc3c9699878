"""docker/helm, as the real Helm renders it, against docker/compose.yaml and the settings.

./check helm installs Helm and looks at every way to render it; without it, at rendered.yaml alone.
"""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import pytest
import yaml

from hosts.paths import ROOT
from scripts import render_chart

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]
DOCUMENTED = set(re.findall(r"^\| `([A-Z_]+)` \|", (ROOT / "docs/settings.md").read_text(), re.M))
HELM = importlib.util.find_spec("helm_python") is not None
WRITTEN = list(yaml.safe_load_all(render_chart.RENDERED.read_text()))
WAYS = (
    {name: render_chart.objects(values) for name, values in render_chart.WAYS.items()}
    if HELM
    else {}
)
every_way = pytest.mark.parametrize("objects", [WRITTEN, *WAYS.values()], ids=["written", *WAYS])
with_helm = pytest.mark.skipif(not HELM, reason="./check helm installs it")
# The service of compose whose counterpart a container is.
COUNTERPART = {
    "web": "web",
    "control": "worker-control",
    "compile": "worker-compile",
    "beat": "beat",
    "tamiyo": "tamiyo",
    "migrate": "migrate",
    "catalogue": "catalogue",
}
FROM_THE_CLUSTER = {"POD_IP"}


def pods(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one["spec"]["template"]["spec"] for one in objects if "template" in one["spec"]]


def containers(objects: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each container with its pod."""
    return [
        (pod, container)
        for pod in pods(objects)
        for container in (*pod.get("initContainers", []), *pod["containers"])
    ]


def files_of(pod: dict[str, Any], container: dict[str, Any]) -> set[str]:
    """The secrets that a container can read."""
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    volumes = [volume for volume in pod["volumes"] if volume["name"] in mounted]
    return {
        item["path"]
        for volume in volumes
        if "secret" in volume
        for item in volume["secret"]["items"]
    }


def named(objects: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    (found,) = (
        one for one in objects if (one["kind"], one["metadata"]["name"]) == (kind, f"esper-{name}")
    )
    return found


def test_what_is_written_was_rendered_from_this_chart() -> None:
    hint = "run ./check helm, then python -m scripts.render_chart --write"
    assert render_chart.RENDERED.read_text().splitlines()[1] == f"# {render_chart.digest()}", hint


@with_helm
@pytest.mark.parametrize("name", render_chart.WAYS)
def test_helm_and_the_schemas_of_kubernetes_find_nothing(name: str) -> None:
    assert render_chart.problems(render_chart.WAYS[name]) == []


@with_helm
@pytest.mark.parametrize(
    "wrong",
    [
        {"host": ""},
        {"images": {"web": "", "worker": "x"}},
        {"settings": {"ESPER_MAIL_PASSWORD": "plain"}},
        {"settings": {"DATABASE_URL": "postgresql://u:p@h/d"}},
        {"beat": {"replicas": 2}},
        {"compile": {"pools": [{"name": "x", "capability": "gpu"}]}},
        {"secret_key": "plain"},
    ],
)
def test_wrong_values_and_secrets_in_values_are_refused(wrong: dict[str, Any]) -> None:
    from helm_python.errors import HelmValuesError

    with pytest.raises(HelmValuesError):
        render_chart.objects(render_chart.WAYS["least"] | wrong)


@with_helm
def test_the_written_manifests_are_what_helm_renders() -> None:
    assert render_chart.objects(render_chart.WAYS["everything"]) == WRITTEN


@every_way
def test_a_container_runs_the_command_of_its_service(objects: list[dict[str, Any]]) -> None:
    seen = set()
    for _, container in containers(objects):
        service = COMPOSE[COUNTERPART[container["name"]]]
        theirs = [
            str(part).replace("http://esper-web:", "http://web:")
            for part in container.get("command", [])
        ]
        assert theirs == list(map(str, service.get("command", []))), container["name"]
        image = "worker" if "worker" in str(service["build"]["dockerfile"]) else "web"
        assert f"esper-{image}" in container["image"]
        seen.add(container["name"])
    assert seen >= set(COUNTERPART) - {"compile"}


@every_way
def test_a_container_has_the_settings_and_the_secrets_of_its_service(
    objects: list[dict[str, Any]],
) -> None:
    for pod, container in containers(objects):
        service = COMPOSE[COUNTERPART[container["name"]]]
        ours, theirs = container["env"], service["environment"]
        names = {entry["name"] for entry in ours}
        files = {e["name"]: e["value"] for e in ours if e.get("value", "").startswith("/run/")}
        assert files == {k: v for k, v in theirs.items() if str(v).startswith("/run/")}
        assert names >= set(theirs) - {"ESPER_WORKER_CAPABILITIES"}, container["name"]
        assert files_of(pod, container) == {path.rpartition("/")[2] for path in files.values()}
        assert files_of(pod, container) <= set(service["secrets"])


@every_way
def test_every_setting_is_documented_and_none_holds_a_secret(objects: list[dict[str, Any]]) -> None:
    for _, container in containers(objects):
        for entry in container["env"]:
            name = entry["name"]
            if container["name"] != "tamiyo":
                known = {name, name.removesuffix("_FILE")} & DOCUMENTED
                assert known or name in FROM_THE_CLUSTER, name
            if re.search(r"SECRET|PASSWORD|TOKEN|_KEY|DATABASE_URL|REDIS_URL", name):
                assert entry["value"].startswith("/run/secrets/"), name
            assert "secretKeyRef" not in str(entry)
    assert not [one for one in objects if one["kind"] in {"Secret", "ConfigMap"}]
    assert "BEGIN " not in str(objects)
    assert not re.search(r"://[^/\s]*:[^/\s]*@", str(objects))


@every_way
def test_every_pod_is_restricted(objects: list[dict[str, Any]]) -> None:
    """The Pod Security Standard ``restricted``, and a root file system that is read-only."""
    for pod in pods(objects):
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        kinds = {kind for volume in pod["volumes"] for kind in volume if kind != "name"}
        assert kinds <= {"secret", "emptyDir", "persistentVolumeClaim"}
    for _, container in containers(objects):
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["limits"]["memory"]
        assert container["resources"]["requests"]["cpu"]


@every_way
def test_there_is_one_beat_and_the_tables_come_first(objects: list[dict[str, Any]]) -> None:
    beat = named(objects, "Deployment", "beat")["spec"]
    assert (beat["replicas"], beat["strategy"]) == (1, {"type": "Recreate"})
    job = named(objects, "Job", "migrate")
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    for one in objects:
        if one["kind"] == "HorizontalPodAutoscaler":
            assert one["spec"]["scaleTargetRef"]["name"] == "esper-web"


@every_way
def test_labels_select_what_they_name(objects: list[dict[str, Any]]) -> None:
    templates = [
        one["spec"]["template"]["metadata"]["labels"]
        for one in objects
        if "template" in one["spec"]
    ]
    wanted = []
    for one in objects:
        spec = one["spec"]
        if one["kind"] == "Service":
            wanted.append(spec["selector"])
        elif one["kind"] == "NetworkPolicy":
            wanted.append(spec["podSelector"]["matchLabels"])
        elif one["kind"] in {"Deployment", "ServiceMonitor"}:
            wanted.append(spec["selector"]["matchLabels"])
    for labels in wanted:
        pools = labels["app.kubernetes.io/component"] == "compile" and not any(
            "esper/pool" in t for t in templates
        )
        assert pools or any(labels.items() <= template.items() for template in templates), labels
    deployments = [one for one in objects if one["kind"] == "Deployment"]
    for one in deployments:  # no two own the pods of one another
        own = one["spec"]["selector"]["matchLabels"]
        others = [o for o in deployments if o is not one]
        for other in others:
            assert not own.items() <= other["spec"]["template"]["metadata"]["labels"].items()


def test_a_part_reaches_what_it_needs_and_no_more() -> None:
    ports = {
        policy["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"]: {
            port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]
        }
        for policy in WRITTEN
        if policy["kind"] == "NetworkPolicy"
    }
    database, redis, bucket = 5432, 6379, 443
    assert ports == {
        "web": {53, database, redis, bucket},
        "control": {53, database, redis, bucket, 587},
        "compile": {53, database, redis, bucket},
        "beat": {53, redis},
        "tamiyo": {53, redis, 8080},
    }
    entered = {
        policy["metadata"]["name"] for policy in WRITTEN
        if policy["kind"] == "NetworkPolicy" and policy["spec"]["ingress"]
    }  # fmt: skip
    assert entered == {"esper-web"}


def test_a_gpu_pool_has_one_device_for_each_process() -> None:
    pool = named(WRITTEN, "Deployment", "compile-h100")["spec"]
    pod = pool["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    assert {"name": "ESPER_WORKER_CAPABILITIES", "value": "cuda.sm90"} in container["env"]
    assert pool["strategy"]["rollingUpdate"]["maxSurge"] == 0
    cpu = named(WRITTEN, "Deployment", "compile-cpu")["spec"]["template"]["spec"]
    assert "nvidia.com/gpu" not in cpu["containers"][0]["resources"]["limits"]


def test_sockets_stay_open_and_probes_ask_by_a_name_that_is_allowed() -> None:
    ingress = next(one for one in WRITTEN if one["kind"] == "Ingress")
    annotations = ingress["metadata"]["annotations"]
    for name in ("proxy-read-timeout", "proxy-send-timeout"):
        assert int(annotations[f"nginx.ingress.kubernetes.io/{name}"]) >= 3600
    (web,) = named(WRITTEN, "Deployment", "web")["spec"]["template"]["spec"]["containers"]
    allowed = next(e["value"] for e in web["env"] if e["name"] == "ALLOWED_HOSTS").split(",")
    for probe in ("readinessProbe", "livenessProbe"):
        (header,) = web[probe]["httpGet"]["httpHeaders"]
        assert header["value"] in allowed
    assert web["readinessProbe"]["httpGet"]["path"] == "/readyz?only=web"
    assert "$(POD_IP)" in allowed  # Prometheus asks each pod
    assert "esper-web" in allowed  # Tamiyo
    monitor = next(one for one in WRITTEN if one["kind"] == "ServiceMonitor")
    assert monitor["spec"]["endpoints"][0]["authorization"]["credentials"]["key"] == "metrics_token"


def test_the_alerts_are_those_of_compose_and_what_is_optional_is_off() -> None:
    rules = next(one for one in WRITTEN if one["kind"] == "PrometheusRule")
    assert rules["spec"] == yaml.safe_load((ROOT / "docker/monitoring/alerts.yml").read_text())
    values = yaml.safe_load((render_chart.CHART / "values.yaml").read_text())
    assert values["web"]["autoscaling"]["enabled"] is False
    assert values["monitoring"] == {"serviceMonitor": False, "alerts": False}
    assert values["web"]["replicas"] > 1
