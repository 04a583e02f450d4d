"""Validation against the strict schemas of Kubernetes and of the custom resources in use."""

import jsonschema
import kubernetes_validate
import yaml

from job.kubernetes.context import Object
from tests.jobs import ROOT

CUSTOM = {
    version: yaml.safe_load(
        (ROOT / "tests/schemas" / f"{version.replace('/', '.')}.yaml").read_text()
    )
    for version in ("trainer.kubeflow.org/v1alpha1", "monitoring.coreos.com/v1")
}


def check(document: Object, version: str) -> None:
    """Validates strictly; custom resources by their own schema, and the Jobs inside them.

    Raises the ValidationError of `jsonschema` or of `kubernetes_validate`.
    """
    if document["apiVersion"] not in CUSTOM:
        kubernetes_validate.validate(document, version, strict=True)
        return
    schema = CUSTOM[document["apiVersion"]]
    jsonschema.validate(document, {**schema, "$ref": f"#/$defs/{document['kind']}"})
    if document["kind"] == "TrainingRuntime":
        for replicated in document["spec"]["template"]["spec"]["replicatedJobs"]:
            job = {**replicated["template"], "apiVersion": "batch/v1", "kind": "Job"}
            kubernetes_validate.validate(job, version, strict=True)
