"""Restart and failure policies."""

from collections.abc import Iterator

from job import errors
from tests.manifest_lint.pods import Pod

CODES = {code for retry in errors.RETRIES for code in errors.exit_codes(retry)}
NEVER = set(errors.exit_codes("never"))
MOST_RULES = 20
DEADLINE = 600
"""Kubernetes' default progressDeadlineSeconds."""


def restart_policy_fits(pod: Pod) -> Iterator[str]:
    policy = pod.spec.get("restartPolicy", "Always")
    if pod.kind == "Deployment" and policy != "Always":
        yield f"restartPolicy must be Always in a Deployment (found {policy})"
    if pod.kind == "Job" and policy != "Never":
        yield f"restartPolicy must be Never for a failure policy to be allowed (found {policy})"


def a_deployment_waits_for_its_probes(pod: Pod) -> Iterator[str]:
    if pod.kind != "Deployment":
        return
    deadline = pod.job.get("progressDeadlineSeconds", DEADLINE)
    for container in pod.containers:
        probe = container.get("startupProbe", {})
        allowed = probe.get("periodSeconds", 10) * probe.get("failureThreshold", 3)
        if probe and deadline <= allowed:
            yield (
                f"progressDeadlineSeconds is {deadline}, and {container['name']} may take {allowed}"
            )


def failure_policy_names_real_codes(pod: Pod) -> Iterator[str]:
    if pod.kind != "Job":
        return
    rules = pod.job.get("podFailurePolicy", {}).get("rules", [])
    if rules and pod.job.get("podReplacementPolicy", "Failed") != "Failed":
        yield "podReplacementPolicy must be Failed beside a podFailurePolicy"
    if len(rules) > MOST_RULES:
        yield f"podFailurePolicy has {len(rules)} rules, and {MOST_RULES} are the most"
    failing: dict[str, set[int]] = {container["name"]: set() for container in pod.containers}
    for index, rule in enumerate(rules):
        exits = rule.get("onExitCodes")
        if (exits is None) == (not rule.get("onPodConditions")):
            yield f"podFailurePolicy[{index}] must have one of onExitCodes and onPodConditions"
        if exits is None:
            continue
        codes = exits["values"]
        if exits.get("containerName") not in failing:
            yield f"podFailurePolicy[{index}] names no container: {exits.get('containerName')}"
            continue
        if unknown := sorted(set(codes) - CODES):
            yield f"podFailurePolicy[{index}] names exit codes that the job never has: {unknown}"
        if codes != sorted(set(codes)) or 0 in codes:
            yield f"podFailurePolicy[{index}] must list codes once, in order, and never 0: {codes}"
        if rule["action"] == "FailJob":
            failing[exits["containerName"]] |= set(codes)
        elif retried := sorted(NEVER & set(codes)):
            yield f"podFailurePolicy[{index}] retries permanent errors: {retried}"
    for name, codes in failing.items():
        if missing := sorted(NEVER - codes):
            yield f"podFailurePolicy retries permanent errors of {name}: {missing}"
    if not any(_ignores_disruption(rule) for rule in rules):
        yield "podFailurePolicy counts a node disruption as a failure of the job"
    if not pod.job.get("backoffLimit"):
        yield "backoffLimit must be 1 or more, to retry transient errors"


def _ignores_disruption(rule: dict[str, object]) -> bool:
    condition = {"type": "DisruptionTarget", "status": "True"}
    conditions = rule.get("onPodConditions", [])
    assert isinstance(conditions, list)
    return rule["action"] == "Ignore" and condition in conditions
