"""References between objects: volumes, ports, selectors."""

from collections.abc import Iterator, Sequence

from job.kubernetes.context import Object
from tests.manifest_lint.pods import Pod, pods


def mounts_name_volumes(pod: Pod) -> Iterator[str]:
    volumes = {volume["name"] for volume in pod.spec.get("volumes", [])}
    mounted = set()
    for container in pod.containers:
        paths = [mount["mountPath"] for mount in container.get("volumeMounts", [])]
        if len(paths) != len(set(paths)):
            yield f"container {container['name']} mounts two volumes at one path"
        for mount in container.get("volumeMounts", []):
            mounted.add(mount["name"])
            if mount["name"] not in volumes:
                yield f"container {container['name']} mounts {mount['name']}, which is no volume"
    if unused := sorted(volumes - mounted):
        yield f"volumes that nothing mounts: {unused}"


def claims_are_made_once(pod: Pod) -> Iterator[str]:
    claimed = {claim["name"] for claim in pod.spec.get("resourceClaims", [])}
    used = {
        claim["name"]
        for container in pod.containers
        for claim in container["resources"].get("claims", [])
    }
    if claimed != used:
        yield f"claims devices that no container uses, or the reverse: {sorted(claimed ^ used)}"


def probes_name_ports(pod: Pod) -> Iterator[str]:
    for container in pod.containers:
        ports = {port["name"] for port in container.get("ports", [])}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            port = container.get(probe, {}).get("httpGet", {}).get("port")
            if port is not None and port not in ports:
                yield f"{probe} asks port {port}, which the container does not have"


def objects_exist(documents: Sequence[Object]) -> Iterator[str]:
    """A manifest defines everything that its pods refer to, except Secrets."""
    defined = {(document["kind"], document["metadata"]["name"]) for document in documents}
    for pod in pods(documents):
        wanted = set()
        if "serviceAccountName" in pod.spec:
            wanted.add(("ServiceAccount", pod.spec["serviceAccountName"]))
        for claim in pod.spec.get("resourceClaims", []):
            wanted.add(("ResourceClaimTemplate", claim["resourceClaimTemplateName"]))
        for volume in pod.spec.get("volumes", []):
            if "configMap" in volume:
                wanted.add(("ConfigMap", volume["configMap"]["name"]))
            if "persistentVolumeClaim" in volume:
                claim = volume["persistentVolumeClaim"]["claimName"]
                wanted.add(("PersistentVolumeClaim", claim))
        for kind, name in sorted(wanted - defined):
            yield f"{pod.owner}: there is no {kind}/{name}"
    for document in documents:
        if document["kind"] == "TrainJob":
            runtime = document["spec"]["runtimeRef"]
            if (runtime["kind"], runtime["name"]) not in defined:
                yield f"TrainJob: there is no {runtime['kind']}/{runtime['name']}"


def selectors_select(documents: Sequence[Object]) -> Iterator[str]:
    found = list(pods(documents))
    for document in documents:
        where = f"{document['kind']}/{document['metadata']['name']}"
        spec = document.get("spec", {})
        if document["kind"] == "Deployment":
            selector = spec["selector"]["matchLabels"]
            if not selector.items() <= spec["template"]["metadata"]["labels"].items():
                yield f"{where}: its selector does not select its own pods"
        elif document["kind"] in ("Service", "NetworkPolicy"):
            selector = spec.get("selector") or spec.get("podSelector", {}).get("matchLabels", {})
            chosen = [pod for pod in found if selector.items() <= pod.labels.items()]
            if not selector or not chosen:
                yield f"{where}: its selector selects no pod"
            for port in spec.get("ports", []):
                target = port.get("targetPort", port["port"])
                offered = {
                    known
                    for pod in chosen
                    for container in pod.containers
                    for own in container.get("ports", [])
                    for known in (own["name"], own["containerPort"])
                }
                if target not in offered:
                    yield f"{where}: no pod has port {target}"
