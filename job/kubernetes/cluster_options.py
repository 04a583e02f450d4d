"""Reads the options about a cluster, from the command line and from a file of the same names."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from job import storage
from job.errors import Problem, SpecError, UsageError
from job.kubernetes import option_values as values
from job.kubernetes.cluster import Cluster
from job.spec.foreign_names import nearest
from job.spec.parse import MAX_BYTES, decode, parse

FILE = "--cluster"
Texts = Mapping[str, Sequence[str]]
"""Values by option name, as written; a flag's is `true`."""
Value = Any
"""Of the type of its field in `Cluster`."""


@dataclass(frozen=True, kw_only=True)
class Option:
    field: str
    """Of `Cluster`."""
    parse: Callable[[str], Value]
    many: Callable[[list[Value]], Value] | None = None
    """Joins the values of a repeatable option; None for one that takes a single value."""


def read(command_line: Texts, file: str | None = None) -> Cluster:
    """The cluster that a file and the command line describe.

    A single value on the command line replaces the file's; repeatable ones are added to them.
    Raises UsageError with every problem, and InputError if the file cannot be read.
    """
    problems: list[Problem] = []
    found: dict[str, list[Value]] = {}
    for texts, origin in ((_from_file(file) if file else {}, file), (command_line, None)):
        for name, written in texts.items():
            where = f"--{name}" if origin is None else f"{origin}: {name}"
            if name not in OPTIONS:
                near = nearest(name, OPTIONS)
                fix = f"{f'did you mean {near}? ' if near else ''}known: {', '.join(OPTIONS)}"
                problems.append(Problem(where, "is no option about a cluster", fix=fix))
                continue
            option, parsed = OPTIONS[name], []
            if option.many is None and len(written) > 1:
                message, shown = "takes one value", ", ".join(written)
                problems.append(Problem(where, message, shown))
                continue
            for value in written:
                try:
                    parsed.append(option.parse(value))
                except values.Invalid as error:
                    problems.append(Problem(where, error.message, value, error.fix))
            if not written:
                continue
            if option.many is dict:
                problems += _two_values(where, parsed)
            found[name] = [*(found.get(name, ()) if option.many else ()), *parsed]
    if problems:
        raise UsageError.from_problems(problems)
    cluster = Cluster(**_fields(found))
    _check_together(cluster)
    return cluster


def _two_values(where: str, pairs: Sequence[tuple[str, str]]) -> Iterator[Problem]:
    """The keys that one origin gives two values, of which only the last would count."""
    kept: dict[str, str] = {}
    for key, value in pairs:
        if kept.setdefault(key, value) != value:
            message = f"gives {key} two values, {kept[key]!r} and {value!r}"
            yield Problem(where, message, f"{key}={value}", "remove one of them")


def _fields(found: Mapping[str, list[Value]]) -> dict[str, Value]:
    fields = {}
    for name, parsed in found.items():
        option = OPTIONS[name]
        if parsed:
            fields[option.field] = option.many(parsed) if option.many else parsed[-1]
    return fields


def _check_together(cluster: Cluster) -> None:
    """Raises UsageError for options that contradict each other."""
    if cluster.device_class is not None and cluster.gpu_resource is not None:
        raise UsageError(
            "--gpu-resource",
            "conflicts with --device-class: a pod claims its GPU or asks for a resource",
            value=cluster.gpu_resource,
            fix="choose a partition of a claimed GPU with --device-selector",
        )
    if cluster.device_selectors and cluster.device_class is None:
        raise UsageError(
            "--device-selector",
            "selects among the devices of --device-class, which is not given",
            value=cluster.device_selectors[0],
            fix="--device-class gpu.amd.com, or --node-selector to choose among nodes",
        )
    if cluster.no_proxy and cluster.proxy is None:
        raise UsageError(
            "--no-proxy",
            "lists what a proxy is not used for, but there is no --proxy",
            value=",".join(cluster.no_proxy),
            fix="--proxy http://proxy.example.com:3128",
        )


def _from_file(file: str) -> Texts:
    """The file's values as texts: mappings as `key=value`, lists one by one."""
    data = storage.read_bytes(file, MAX_BYTES + 1)
    try:
        document = parse(decode(data, file), file).values
    except SpecError as error:
        fix = "write options as keys, such as `namespace: finetune`"
        raise UsageError.from_problems(
            [
                replace(problem, fix=fix) if "specs/" in (problem.fix or "") else problem
                for problem in error.problems
            ]
        ) from None
    texts: dict[str, Sequence[str]] = {}
    for name, value in document.items():
        where = f"{file}: {name}"
        if isinstance(value, dict):
            texts[name] = [f"{key}={_scalar(each, where)}" for key, each in value.items()]
        elif isinstance(value, list):
            texts[name] = [_scalar(each, where) for each in value]
        elif value is not None:
            texts[name] = [_scalar(value, where)]
    return texts


def _scalar(value: object, where: str) -> str:
    """A value of the file as text. Raises UsageError if its text is not what was written."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | str):
        return str(value)
    message = "must be text, a whole number, true or false"
    raise UsageError(where, message, value=value, fix="put the value in quotes")


OPTIONS: Mapping[str, Option] = {
    "namespace": Option(field="namespace", parse=values.dns_label),
    "label": Option(field="labels", parse=values.own_label, many=dict),
    "annotation": Option(field="annotations", parse=values.annotation, many=dict),
    "node-selector": Option(field="node_selector", parse=values.label, many=dict),
    "toleration": Option(field="tolerations", parse=values.toleration, many=values.unique),
    "priority-class": Option(field="priority_class", parse=values.dns_name),
    "runtime-class": Option(field="runtime_class", parse=values.dns_name),
    "pull-secret": Option(field="pull_secrets", parse=values.dns_name, many=values.unique),
    "storage-class": Option(field="storage_class", parse=values.dns_name),
    "gpu-resource": Option(field="gpu_resource", parse=values.resource),
    "device-class": Option(field="device_class", parse=values.dns_name),
    "device-selector": Option(
        field="device_selectors", parse=values.expression, many=values.unique
    ),
    "rdma-resource": Option(field="rdma_resources", parse=values.rdma, many=dict),
    "env": Option(field="env", parse=values.variable, many=dict),
    "proxy": Option(field="proxy", parse=values.proxy),
    "no-proxy": Option(field="no_proxy", parse=values.hosts, many=values.flat),
    "egress-port": Option(field="egress_ports", parse=values.port, many=values.unique),
    "metrics-from": Option(field="metrics_from", parse=values.dns_label),
    "ttl": Option(field="ttl_seconds", parse=values.seconds),
    "openshift": Option(field="openshift", parse=values.flag),
    "weights": Option(field="weights", parse=values.weights),
}
"""By name: on the command line behind two hyphens, in the file as a key."""
