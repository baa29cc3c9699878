"""Render docker/helm/esper with the real Helm, in several ways.

python -m scripts.render_chart          lint and render; print each object and what is wrong
python -m scripts.render_chart --write  write docker/helm/rendered.yaml as well

./check helm runs it and tests/docker/test_helm_chart.py. Both need the packages of
requirements/helm.txt, which are large. Without them the tests look at rendered.yaml, and at whether
the chart is still the one that it was rendered from.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parents[1] / "docker" / "helm"
CHART, RENDERED = FOLDER / "esper", FOLDER / "rendered.yaml"
RELEASE = "esper"
KUBERNETES = "1.30"
NOT_OF_KUBERNETES = frozenset({"ServiceMonitor", "PrometheusRule"})  # of the Prometheus operator
_LEAST = {
    "host": "esper.example.org",
    "images": {
        "web": "registry.example.org/esper-web@sha256:" + "0" * 64,
        "worker": "registry.example.org/esper-worker@sha256:" + "1" * 64,
    },
}
_GPU = {
    "name": "h100",
    "capability": "cuda.sm90",
    "replicas": 4,
    "gpus": 1,
    "nodeSelector": {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "runtimeClassName": "nvidia",
}
# The values of a chart by name. ``everything`` is what rendered.yaml shows.
WAYS: dict[str, dict[str, Any]] = {
    "least": _LEAST,
    "everything": {
        **_LEAST,
        "settings": {"ESPER_FRAMES_KEPT": "10000"},
        "signIn": {
            "ESPER_OIDC_ISSUER": "https://id.example.org",
            "ESPER_OIDC_CLIENT_ID": "esper",
            "ESPER_OIDC_ROLES": "esper-operators=operator",
        },
        "web": {"replicas": 3, "autoscaling": {"enabled": True}},
        "compile": {"pools": [{"name": "cpu", "capability": "cpu"}, _GPU]},
        "network": {
            "database": {"to": [{"ipBlock": {"cidr": "10.0.1.0/24"}}]},
            "redis": {"to": [{"ipBlock": {"cidr": "10.0.2.0/24"}}]},
            "bucket": {"enabled": True},
        },
        "monitoring": {"serviceMonitor": True, "alerts": True},
    },
    "nothing optional": {
        **_LEAST,
        "data": {"existingClaim": "shared"},
        "compile": {"pools": []},
        "ingress": {"enabled": False},
        "network": {"enabled": False},
    },
}


def digest() -> str:
    """Of all files of the chart, and of the values that they are rendered with."""
    whole = hashlib.sha256(repr(WAYS["everything"]).encode())
    for path in sorted(path for path in CHART.rglob("*") if path.is_file()):
        whole.update(f"{path.relative_to(CHART)}\n".encode() + path.read_bytes())
    return whole.hexdigest()


def objects(values: dict[str, Any]) -> list[dict[str, Any]]:
    """The objects that an installation with these values consists of."""
    from helm_python.chart import Chart

    with Chart.load(CHART) as chart:
        manifests = chart.render(values=values, name=RELEASE)
    texts = [text for name, text in sorted(manifests.items()) if not name.endswith(".txt")]
    return [made for text in texts for made in yaml.safe_load_all(text) if made]


def problems(values: dict[str, Any]) -> list[str]:
    """What Helm's lint and the schemas of Kubernetes find."""
    import kubernetes_validate
    from helm_python.chart import lint

    report = lint(CHART, values=values, strict=True, kube_version=f"v{KUBERNETES}.0")
    found = [f"{m['path']}: {m['error']}" for m in report["messages"] if m["severity"] > 1]
    found += report["errors"]
    for one in objects(values):
        if one["kind"] in NOT_OF_KUBERNETES:
            continue
        try:
            kubernetes_validate.validate(one, KUBERNETES, strict=True)
        except Exception as error:
            found.append(f"{one['kind']} {one['metadata']['name']}: {error}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    found: list[str] = []
    for name, values in WAYS.items():
        made = objects(values)
        print(f"{name}:", *(f"{one['kind']}/{one['metadata']['name']}" for one in made))
        found += [f"{name}: {problem}" for problem in problems(values)]
    print(*found, sep="\n")
    if arguments.write:
        head = (
            f"# Written by python -m scripts.render_chart --write: everything on.\n# {digest()}\n"
        )
        RENDERED.write_text(head + yaml.safe_dump_all(objects(WAYS["everything"]), sort_keys=False))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
