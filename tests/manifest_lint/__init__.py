"""Lint rules for manifests: contradictions between values, which schemas cannot express.

Each rule checks one pod template, or all documents together.
"""

from collections.abc import Sequence

from job.kubernetes.context import Object
from tests.manifest_lint import names, policies, references, resources, security, stored, trainer
from tests.manifest_lint.pods import pods

POD_RULES = (
    names.images_are_pinned,
    names.names_in_a_pod_are_legal,
    policies.restart_policy_fits,
    policies.failure_policy_names_real_codes,
    policies.a_deployment_waits_for_its_probes,
    resources.quantities_are_sound,
    resources.shared_memory_fits,
    security.is_restricted,
    security.caches_can_be_written,
    references.mounts_name_volumes,
    references.claims_are_made_once,
    references.probes_name_ports,
)
RULES = (
    names.names_are_legal,
    resources.claims_ask_for_a_disk,
    references.objects_exist,
    references.selectors_select,
    trainer.the_trainer_finds_its_parts,
    stored.is_stored_as_written,
)


def problems(documents: Sequence[Object]) -> list[str]:
    """The documents' problems, one line each."""
    lines = [line for rule in RULES for line in rule(documents)]
    for pod in pods(documents):
        lines += [f"{pod.owner}: {line}" for rule in POD_RULES for line in rule(pod)]
    return lines
