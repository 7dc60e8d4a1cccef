"""The Kubernetes manifests against the schema that the Flink operator publishes, unknown fields refused."""

import subprocess
import zipfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "deploy" / "flink" / "kubernetes"
OPERATOR = "org.apache.flink:flink-kubernetes-operator-api:1.10.0"
JAR = ROOT / ".cache" / "flink" / "flink-kubernetes-operator-api-1.10.0.jar"
CRD = "META-INF/fabric8/flinkdeployments.flink.apache.org-v1.yml"


@pytest.fixture(scope="module")
def schema() -> Any:
    """Of a FlinkDeployment, out of the operator's jar."""
    if not JAR.exists():
        copy = "org.apache.maven.plugins:maven-dependency-plugin:3.6.1:copy"
        command = ["mvn", "--batch-mode", "--quiet", copy, f"-Dartifact={OPERATOR}", f"-DoutputDirectory={JAR.parent}"]
        subprocess.run(command, check=True, timeout=250)
    with zipfile.ZipFile(JAR) as jar:
        versions = yaml.safe_load(jar.read(CRD))["spec"]["versions"]
    (served,) = [version for version in versions if version["name"] == "v1beta1"]
    schema = strict(served["schema"]["openAPIV3Schema"])
    schema["properties"] |= {"apiVersion": {}, "kind": {}, "metadata": {}}  # Kubernetes' own
    return schema


def strict(schema: Any) -> Any:
    """The schema with unknown fields refused, as the API server drops or refuses them."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {} if "additionalProperties" in schema else {"additionalProperties": False}
    return {name: strict(value) for name, value in schema.items()} | (closed if "properties" in schema else {})


def test_the_cluster_is_as_the_operator_wants_it(schema: Any) -> None:
    deployment, _ = yaml.safe_load_all((MANIFESTS / "cluster.yaml").read_text())
    jsonschema.validate(deployment, schema)
    (pool,) = [
        each for each in deployment["spec"]["taskManager"]["podTemplate"]["spec"]["containers"] if "args" in each
    ]
    pool["arg"] = pool.pop("args")
    with pytest.raises(jsonschema.ValidationError, match="'arg' was unexpected"):
        jsonschema.validate(deployment, schema)


def test_the_jobs_pod_is_a_pod(schema: Any) -> None:
    """The operator's schema holds that of a pod, for its templates."""
    job = yaml.safe_load((MANIFESTS / "embed.yaml").read_text())
    pod = schema["properties"]["spec"]["properties"]["podTemplate"]["properties"]["spec"]
    jsonschema.validate(job["spec"]["template"]["spec"], pod)
