"""Every kind of manifest, fitted to the cluster."""

from collections.abc import Callable, Mapping
from functools import wraps

from job.kubernetes import adaptation, batch, quota, serving, trainjob
from job.kubernetes.context import Object, RenderContext

Bundle = Callable[[RenderContext], list[Object]]


def _fitted(bundle: Bundle) -> Bundle:
    @wraps(bundle)
    def fitted(context: RenderContext) -> list[Object]:
        return adaptation.fit(bundle(context), context)

    return fitted


job = _fitted(batch.bundle)
parity = _fitted(batch.parity)
several_nodes = _fitted(trainjob.bundle)
server = _fitted(serving.deployment)
smoke = _fitted(serving.smoke_job)


def quota_of(context: RenderContext) -> list[Object]:
    """The quota that a namespace needs for the job, its server and the smoke test at once."""
    training = job if context.nodes == 1 else several_nodes
    documents = training(context)
    if serving.is_servable(context):
        documents += [*server(context), *smoke(context)]
    limits = quota.resource_quota(context, documents)
    adaptation.fit_metadata(limits["metadata"], context.cluster, namespaced=True)
    return [limits]


KINDS: Mapping[str, Bundle] = {
    "job": job,
    "trainjob": several_nodes,
    "vllm": server,
    "vllm-smoke": smoke,
    "parity": parity,
    "quota": quota_of,
}
