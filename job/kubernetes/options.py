"""The options of `job manifest`, and their validation."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from job import families, storage
from job.errors import SpecError, UsageError
from job.kubernetes import cache_volume, constants, images
from job.kubernetes.cluster import Cluster
from job.kubernetes.context import RenderContext
from job.kubernetes.platforms import Platform
from job.planning.requirements import needs
from job.planning.sizes import Sizes, measure
from job.redaction import holds_secret, redact
from job.spec import hub_output
from job.spec.interpolate import variables
from job.spec.load import LoadedSpec, load_spec
from job.spec.overrides import with_output
from job.spec.parse import MAX_BYTES, decode, parse
from job.spec.types import JobSpec

_REGISTRY = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?(:\d+)?(/[a-z0-9]+([._-]+[a-z0-9]+)*)*")


ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
REACHED = (
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"),
    *("HF_ENDPOINT", "MLFLOW_TRACKING_URI", "WANDB_BASE_URL"),
)
"""Variables of `--env` beside ENDPOINTS whose URLs the job connects to."""
CACHE_VARIABLES = ("HOME", "_HOME", "_CACHE", "_CACHE_DIR", "_CACHE_ROOT")
"""Suffixes of environment variables that name a writable directory."""
WRITABLE = (constants.CACHE, constants.WORK, constants.TMP, constants.SHM)


@dataclass(frozen=True, kw_only=True)
class ManifestOptions:
    spec: str
    """Path or URI."""
    sets: tuple[str, ...] = ()
    output: str | None = None
    registry: str | None = None
    cluster: Cluster = field(default_factory=Cluster)
    image: str | None = None
    """The job's image; None is the one that `make image` pushes to the registry."""
    vllm_image: str | None = None
    """The server's image; None is vLLM's own."""
    cache_size: str | None = None
    """What the cache's claim requests, such as `200Gi`; None is the class that the job needs."""
    cache_claim: str | None = None
    """An existing claim for the cache, instead of one in the manifest."""
    environ: Mapping[str, str]

    def context(self, platform: Platform, nodes: int = 1) -> RenderContext:
        """The context for rendering on one platform; a local output moves to the cache volume.

        Raises SpecError for an invalid spec, UsageError for an invalid option, a node count that
        the spec does not allow or a secret that the manifest would show, and InputError if the
        model's configuration cannot be read.
        """
        registry = _valid_registry(self.registry or constants.REGISTRY)
        if self.image is not None and self.registry is not None:
            raise UsageError(
                "--image", "conflicts with --registry", value=self.image, fix="remove one of them"
            )
        image = self.image and images.checked("--image", self.image)
        if self.vllm_image is not None:
            served_by = images.checked("--vllm-image", self.vllm_image)
            platform = replace(platform, vllm_image=served_by)
        spec, output = self.loaded.spec, self.output
        _check_secrets(self)
        _check_name(spec.name)
        _check_nodes(spec, nodes)
        # An output on the hub keeps its state below the cache folder, which is on the volume.
        if storage.is_local(spec.output.uri) and not hub_output.is_output_of(spec):
            output = f"{constants.CACHE}/outputs/{spec.name}"
        resource = self.cluster.resource_on(platform.name, platform.resource)
        platform = replace(platform, resource=resource)
        needed = needs(spec, self.sizes, gpus=platform.gpus, output=output)
        cache = cache_volume.of_job(
            spec.name,
            needed.cache,
            nodes=nodes,
            size=self.cache_size,
            claim=self.cache_claim,
            storage_class=self.cluster.storage_class,
        )
        return RenderContext(
            spec=spec,
            text=self.text,
            platform=platform,
            needs=needed,
            job_image=image,
            cache=cache,
            family=families.resolve(spec.model)[0],
            cluster=self.cluster,
            egress_ports=self._egress_ports(),
            registry=registry,
            nodes=nodes,
            sets=self.sets,
            output=output,
            environ=self._variables(output is not None, secret=False),
            secrets=self._variables(output is not None, secret=True),
        )

    @cached_property
    def text(self) -> str:
        return decode(storage.read_bytes(self.spec, MAX_BYTES + 1), self.spec)

    @cached_property
    def loaded(self) -> LoadedSpec:
        overrides = with_output(self.sets, self.output)
        return load_spec(self.text, self.spec, overrides, self.environ)

    @cached_property
    def sizes(self) -> Sizes:
        return measure(self.loaded.spec)

    def _egress_ports(self) -> tuple[int, ...]:
        """The ports of S3's endpoint, the proxy, what `--env` names, and those asked for."""
        variables = {**self.environ, **self.cluster.env}
        urls = [variables.get(name) for name in ENDPOINTS]
        urls += [self.cluster.proxy, *(self.cluster.env.get(name) for name in REACHED)]
        ports = [_port(url) for url in urls if url]
        return (*(port for port in ports if port is not None), *self.cluster.egress_ports)

    def _variables(self, replaced_output: bool, *, secret: bool) -> dict[str, str]:
        """The environment variables that the spec uses, with values: either secrets or the rest."""
        text = self.text
        if replaced_output:  # its variables are no longer used
            text = text.replace(str(parse(text, self.spec).values["output"]["uri"]), "")
        values = {
            name: self.environ.get(name) or default for name, default in variables(text).items()
        }
        return {
            name: value
            for name, value in values.items()
            if value is not None and holds_secret(name, value) == secret
        }


def _port(url: str) -> int | None:
    """The port of a URL; None if the job would not reach anything there either."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return None
    return port or {"http": 80, "https": constants.HTTPS}.get(parts.scheme)


def _valid_registry(registry: str) -> str:
    if not _REGISTRY.fullmatch(registry):
        raise UsageError(
            "--registry",
            "must be a host, optionally followed by a path",
            value=registry,
            fix="registry.example.com/team, in lower case and without https://",
        )
    return registry


def _check_secrets(options: ManifestOptions) -> None:
    """Raises an error for a secret written in the spec or on the command line.

    Manifests contain both verbatim, and are committed to repositories.
    """
    fix = "write ${NAME} instead, and add NAME to the Secret that the manifest refers to"
    message = "contains a secret, which the manifest would show"
    for option, text in (*(("--set", each) for each in options.sets), ("--output", options.output)):
        if text and redact(text) != text:
            raise UsageError(option, message, value=text, fix=fix)
    for number, line in enumerate(options.text.splitlines(), 1):
        if redact(line) != line:
            raise SpecError(f"{options.spec}:{number}", message, value=line.strip(), fix=fix)


def _check_nodes(spec: JobSpec, nodes: int) -> None:
    """Raises UsageError for node counts that the job would refuse at startup."""
    if nodes < 1:
        raise UsageError("--nodes", "must be 1 or more", value=nodes)
    distributed = spec.runtime.distributed
    if (distributed == "none" and nodes > 1) or (distributed in ("ddp", "fsdp2") and nodes == 1):
        raise UsageError(
            "--nodes",
            f"conflicts with runtime.distributed: {distributed}",
            value=nodes,
            fix="set runtime.distributed: auto, or use "
            + ("one node" if distributed == "none" else "two or more nodes"),
        )
    if nodes > 1 and storage.is_local(spec.output.uri):
        raise UsageError(
            "--nodes",
            "more than one node needs an output that all of them can reach",
            value=spec.output.uri,
            fix="--output s3://bucket/prefix",
        )


def _check_name(name: str) -> None:
    """Raises SpecError for a name that specs allow but Services do not."""
    if not name[0].isalpha():
        raise SpecError("$.name", "must begin with a letter to name a Service", value=name)


def check_caches_are_writable(environ: Mapping[str, str]) -> None:
    """Raises UsageError for a cache directory outside the pod's volumes: it would be read-only."""
    for name, value in environ.items():
        path = PurePosixPath(value)
        if name.endswith(CACHE_VARIABLES) and not any(map(path.is_relative_to, WRITABLE)):
            raise UsageError(
                name,
                "is outside the pod's writable volumes",
                value=value,
                fix=f"set it to a path in {constants.CACHE}",
            )
