"""What a user asks for: one spec, with what was said beside it on the command line."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from job import families, storage
from job.errors import SpecError, UsageError
from job.kubernetes import constants
from job.kubernetes.context import Request
from job.kubernetes.platforms import Platform
from job.planning.requirements import needs
from job.planning.sizes import Sizes, measure
from job.redaction import holds_secret, is_secret_name, redact
from job.spec.interpolate import variables
from job.spec.load import LoadedSpec, load_spec
from job.spec.overrides import with_output
from job.spec.parse import MAX_BYTES, decode, parse

_REGISTRY = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?(:\d+)?(/[a-z0-9]+([._-]+[a-z0-9]+)*)*")


@dataclass(frozen=True, kw_only=True)
class Order:
    spec: str
    """Path or URI."""
    sets: tuple[str, ...] = ()
    output: str | None = None
    registry: str | None = None
    environ: Mapping[str, str]

    def request(self, platform: Platform, nodes: int = 1) -> Request:
        """The request for one platform.

        Results that would go to a folder of the container go to the cache's volume instead.
        Raises SpecError, UsageError for a registry that no image can come from, for several nodes
        that would share such a folder and for a secret that the manifest would show, and
        InputError where the model's configuration cannot be read.
        """
        registry = self.registry or constants.REGISTRY
        if not _REGISTRY.fullmatch(registry):
            raise UsageError(
                "--registry",
                "must be a host with a path or none, as image names begin",
                value=registry,
                fix="registry.example.com/team, in lower case and without https://",
            )
        spec, output = self.loaded.spec, self.output
        _no_secret_is_shown(self)
        _name_is_one_for_kubernetes(spec.name, nodes)
        _nodes_are_what_the_spec_wants(spec.runtime.distributed, nodes)
        if storage.is_local(spec.output.uri):
            if nodes > 1:
                raise UsageError(
                    "--nodes",
                    "several nodes need an output that all of them reach",
                    value=spec.output.uri,
                    fix="--output s3://bucket/prefix",
                )
            output = f"{constants.CACHE}/outputs/{spec.name}"
        return Request(
            spec=spec,
            text=self.text,
            platform=platform,
            needs=needs(spec, self.sizes, gpus=platform.gpus),
            family=families.resolve(spec.model)[0],
            registry=registry,
            nodes=nodes,
            sets=self.sets,
            output=output,
            environ=self._named(output is not None, secret=False),
            secrets=self._named(output is not None, secret=True),
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

    def _named(self, replaced_output: bool, *, secret: bool) -> dict[str, str]:
        """The variables that the spec names, with their values: the secrets, or all others."""
        text = self.text
        if replaced_output:  # then its variables mean nothing any more
            text = text.replace(str(parse(text, self.spec).values["output"]["uri"]), "")
        found = {
            name: self.environ.get(name) or default for name, default in variables(text).items()
        }
        found = {name: value for name, value in found.items() if _is_secret(name, value) == secret}
        return {name: value for name, value in found.items() if value is not None}


def _is_secret(name: str, value: str | None) -> bool:
    return is_secret_name(name) if value is None else holds_secret(name, value)


def _no_secret_is_shown(order: Order) -> None:
    """Raises an error for a secret that is written in the spec or on the command line.

    Manifests hold both as they are written, and go into repositories.
    """
    fix = "write ${NAME} in its place, and put NAME into the Secret that the manifest names"
    message = "holds a secret, which the manifest would show"
    for option, text in (*(("--set", each) for each in order.sets), ("--output", order.output)):
        if text and redact(text) != text:
            raise UsageError(option, message, value=text, fix=fix)
    for number, line in enumerate(order.text.splitlines(), 1):
        if redact(line) != line:
            raise SpecError(f"{order.spec}:{number}", message, value=line.strip(), fix=fix)


def _nodes_are_what_the_spec_wants(distributed: str, nodes: int) -> None:
    """Raises UsageError for what the job itself would refuse in its pods."""
    if (distributed == "none" and nodes > 1) or (distributed in ("ddp", "fsdp2") and nodes == 1):
        raise UsageError(
            "--nodes",
            f"does not fit to runtime.distributed: {distributed}",
            value=nodes,
            fix="write runtime.distributed: auto, or ask for "
            + ("one node" if distributed == "none" else "two nodes or more"),
        )


def _name_is_one_for_kubernetes(name: str, nodes: int) -> None:
    """Raises SpecError for names that a spec may have and an object made from it may not."""
    if nodes < 1:
        raise UsageError("--nodes", "must be 1 or more", value=nodes)
    if not name[0].isalpha():
        raise SpecError("$.name", "must begin with a letter for a Service of it", value=name)
