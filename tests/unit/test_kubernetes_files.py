"""conf/kubernetes against the published schemas, and what they do not know: names, mounts, times, the queue's key."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from flowmesh.queue import names
from flowmesh.settings.load import faults_of
from tests.kit.paths import CONF

FOLDER = CONF / "kubernetes"
OBJECTS = {
    f"{each['kind']}/{each['metadata'].get('name', each['metadata'].get('generateName'))}": each
    for path in sorted(FOLDER.glob("*.yaml"))
    for each in yaml.safe_load_all(path.read_text())
    if path.name != "kustomization.yaml"
}
PODS = {
    "DaemonSet/flowmesh-node": OBJECTS["DaemonSet/flowmesh-node"]["spec"]["template"],
    "Job/flowmesh-node-": OBJECTS["Job/flowmesh-node-"]["spec"]["template"],
    "ScaledJob/flowmesh-node": OBJECTS["ScaledJob/flowmesh-node"]["spec"]["jobTargetRef"]["template"],
}


def with_schemas() -> Iterator[Any]:
    """Objects with a schema: KEDA's have none among Kubernetes' own, but its job is a Job."""
    for name, each in OBJECTS.items():
        found = copy.deepcopy(each)
        if each["kind"] == "ScaledJob":
            found = {"apiVersion": "batch/v1", "kind": "Job", "metadata": each["metadata"]}
            found["spec"] = each["spec"]["jobTargetRef"]
        elif each["apiVersion"].startswith("keda.sh/"):
            continue
        found["metadata"].setdefault("name", found["metadata"].pop("generateName", "x"))
        yield pytest.param(found, id=name)


@pytest.mark.parametrize("found", [*with_schemas()])
def test_each_object_has_the_published_schema(found: dict[str, Any]) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    validate.validate(found, "1.32", strict=True)


def test_the_schemas_refuse_what_is_wrong() -> None:
    validate = pytest.importorskip("kubernetes_validate")
    broken = copy.deepcopy(OBJECTS["DaemonSet/flowmesh-node"])
    broken["spec"]["template"]["spec"]["terminationGraceSeconds"] = 1
    with pytest.raises(validate.ValidationError):
        validate.validate(broken, "1.32", strict=True)


def test_all_that_is_named_is_there() -> None:
    namespaces = {each["metadata"].get("namespace") for name, each in OBJECTS.items() if name != "Namespace/flowmesh"}
    assert namespaces == {"flowmesh"}
    kustomization = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    assert all((FOLDER / each).is_file() for each in kustomization["resources"])
    secret = OBJECTS["Secret/flowmesh"]["stringData"]
    for template in [*PODS.values(), OBJECTS["StatefulSet/redis"]["spec"]["template"]]:
        spec = template["spec"]
        volumes = {each["name"]: each for each in spec.get("volumes", [])}
        claims = (
            OBJECTS["StatefulSet/redis"]["spec"]["volumeClaimTemplates"] if "redis" in str(spec["containers"]) else []
        )
        known = {*volumes, *(each["metadata"]["name"] for each in claims)}
        assert {each["name"] for each in spec["containers"][0]["volumeMounts"]} <= known
        for each in volumes.values():
            if "configMap" in each:
                assert f"ConfigMap/{each['configMap']['name']}" in OBJECTS
            if "secret" in each:
                assert f"Secret/{each['secret']['secretName']}" in OBJECTS
            if "persistentVolumeClaim" in each:
                assert f"PersistentVolumeClaim/{each['persistentVolumeClaim']['claimName']}" in OBJECTS
    referred = re.findall(r"/etc/flowmesh/secret/([\w-]+)", OBJECTS["ConfigMap/flowmesh-node"]["data"]["node.toml"])
    assert set(referred) == set(secret) == {"redis-password", "page-token"}
    trigger = OBJECTS["ScaledJob/flowmesh-node"]["spec"]["triggers"][0]
    assert f"TriggerAuthentication/{trigger['authenticationRef']['name']}" in OBJECTS
    assert trigger["metadata"]["listName"] == names.OPEN
    assert trigger["metadata"]["address"].startswith("redis.flowmesh.")


@pytest.mark.parametrize("name", PODS)
def test_a_node_has_time_to_drain_and_only_the_rights_that_it_needs(name: str) -> None:
    settings = read_settings()
    template = PODS[name]
    spec, (node,) = template["spec"], template["spec"]["containers"]
    assert spec["terminationGracePeriodSeconds"] > settings["processes"]["drain_timeout_s"] + 60
    assert node["lifecycle"]["preStop"]["exec"]["command"][1:] == ["drain", "--mode", "checkpoint", "--wait"]
    for probe in ("startupProbe", "readinessProbe"):
        assert node[probe]["httpGet"] == {"path": "/healthz", "port": "page"}
    port = settings["web"]["listen"].rpartition(":")[2]
    assert [each["containerPort"] for each in node["ports"] if each["name"] == "page"] == [int(port)]
    unit = (CONF / "flowmesh-supervisor.service").read_text()
    (bounds,) = re.findall(r"^CapabilityBoundingSet=(.*)$", unit, re.MULTILINE)
    rights = node["securityContext"]
    assert sorted(f"CAP_{each}" for each in rights["capabilities"]["add"]) == sorted(bounds.split())
    assert (rights["capabilities"]["drop"], rights["allowPrivilegeEscalation"]) == (["ALL"], False)
    assert template["metadata"]["labels"]["flowmesh-redis"] == "allowed", "the network policy lets it reach Redis"
    shm = next(each for each in spec["volumes"] if each["name"] == "shm")
    assert shm["emptyDir"]["medium"] == "Memory"
    assert node["resources"]["limits"]["nvidia.com/gpu"] >= 1


@pytest.mark.parametrize(
    ("name", "spec"), [("Job/flowmesh-node-", "spec"), ("ScaledJob/flowmesh-node", "jobTargetRef")]
)
def test_a_jobs_node_ends_before_the_job(name: str, spec: str) -> None:
    job = OBJECTS[name]["spec"] if spec == "spec" else OBJECTS[name]["spec"][spec]
    (command,) = PODS[name]["spec"]["containers"][0]["args"]
    (ends_in,) = re.findall(r"node\.ends_at=\$\(\(\$\(date \+%s\) \+ (\d+)\)\)", command)
    assert int(ends_in) + 120 < job["activeDeadlineSeconds"], "the image is pulled meanwhile, too"


def read_settings() -> dict[str, Any]:
    import tomllib

    return tomllib.loads(OBJECTS["ConfigMap/flowmesh-node"]["data"]["node.toml"])


def test_the_settings_are_settings() -> None:
    assert faults_of(read_settings()) == ()
