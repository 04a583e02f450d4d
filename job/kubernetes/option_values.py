"""The values that options about a cluster take, as Kubernetes checks them.

Each function returns the value of a text, or raises Invalid.
"""

import re
from collections.abc import Hashable, Sequence
from typing import TypeVar
from urllib.parse import urlsplit

from job.kubernetes.cluster import WEIGHTS, Toleration, is_within
from job.redaction import is_secret, redact

T = TypeVar("T", bound=Hashable)

_DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_DNS_NAME = re.compile(
    r"(?=.{1,253}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
)
_LABEL_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_LABEL_VALUE = re.compile(rf"({_LABEL_NAME.pattern})?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_HOST = re.compile(r"\*|[A-Za-z0-9._:\-\[\]/*]+")
_EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")
_OWN_LABELS = (
    *("app.kubernetes.io", "batch.kubernetes.io", "trainer.kubeflow.org", "jobset.sigs.k8s.io"),
    *("controller-uid", "job-name", "pod-template-hash"),
)
"""Labels, or their domains, by which manifests and controllers of Kubernetes find pods."""
MAX_PORT = 65535


class Invalid(ValueError):
    """A value that an option does not take: what it must be, and an example."""

    def __init__(self, message: str, fix: str | None = None) -> None:
        super().__init__(message)
        self.message, self.fix = message, fix


def dns_label(text: str) -> str:
    if not _DNS_LABEL.fullmatch(text):
        raise Invalid("must be 1 to 63 lower-case letters, digits and hyphens")
    return text


def dns_name(text: str) -> str:
    if not _DNS_NAME.fullmatch(text):
        raise Invalid("must be lower-case letters, digits, hyphens and dots, as names of objects")
    return text


def qualified(text: str) -> str:
    """A label's or resource's name, with or without a domain."""
    domain, slash, name = text.rpartition("/")
    if (slash and not _DNS_NAME.fullmatch(domain)) or not _LABEL_NAME.fullmatch(name):
        raise Invalid("must be a name such as amd.com/gpu.product-name")
    return text


def resource(text: str) -> str:
    if "/" not in text:
        raise Invalid("must be a resource of a device plugin", "a name such as amd.com/cpx_nps4")
    if text.startswith("requests.") or is_within(text.partition("/")[0], "kubernetes.io"):
        raise Invalid("has a domain that Kubernetes keeps for itself", "the device plugin's name")
    return qualified(text)


def pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise Invalid("must be KEY=VALUE")
    return key, value


def label(text: str) -> tuple[str, str]:
    key, value = pair(text)
    qualified(key)
    if not _LABEL_VALUE.fullmatch(value):
        raise Invalid(
            "must have a value of at most 63 letters, digits, '-', '_' and '.', "
            "beginning and ending with a letter or digit"
        )
    return key, value


def own_label(text: str) -> tuple[str, str]:
    key, value = label(text)
    if key.partition("/")[0] in _OWN_LABELS:
        raise Invalid("is set by the manifest itself or by Kubernetes, which find pods by it")
    return key, value


def annotation(text: str) -> tuple[str, str]:
    key, value = pair(text)
    qualified(key)
    if redact(text) != text:
        raise Invalid("contains a secret, which the manifest would show")
    return key, value


def toleration(text: str) -> Toleration:
    rest, colon, effect = text.rpartition(":")
    rest, effect = (rest, effect) if colon else (text, "")
    key, equals, value = rest.partition("=")
    example = "KEY, KEY=VALUE, KEY:NoSchedule or KEY=VALUE:NoExecute"
    if colon and effect not in _EFFECTS:
        raise Invalid(f"must end with {', '.join(_EFFECTS)} behind the colon", example)
    try:
        qualified(key)
    except Invalid:
        raise Invalid("must name a taint's key", example) from None
    if equals and not _LABEL_VALUE.fullmatch(value):
        raise Invalid("must have a value that taints can have", example)
    return Toleration(key=key, value=value if equals else None, effect=effect or None)


def rdma(text: str) -> tuple[str, str]:
    name, equals, count = text.partition("=")
    if equals and not re.fullmatch(r"[1-9]\d{0,3}", count):
        raise Invalid("must have a whole number behind the equals sign", f"{name}=1")
    return resource(name), count or "1"


def variable(text: str) -> tuple[str, str]:
    name, value = pair(text)
    if not _VARIABLE.fullmatch(name):
        raise Invalid("must be NAME=VALUE, with a name of letters, digits and underscores")
    if is_secret(name, value) or redact(value) != value:
        raise Invalid(
            "contains a secret, which the manifest would show",
            f"add {name} to the Secret that the manifest refers to",
        )
    return name, value


def proxy(text: str) -> str:
    try:
        url = urlsplit(text)
        ok = url.scheme in ("http", "https") and url.hostname and (url.port or 1) > 0
    except ValueError:
        ok = False
    if not ok:
        raise Invalid("must be a URL", "http://proxy.example.com:3128")
    if redact(text) != text or "@" in url.netloc:
        raise Invalid(
            "contains a password, which the manifest would show",
            "add HTTPS_PROXY to the Secret instead, and open the port with --egress-port",
        )
    return text


def host(text: str) -> str:
    if not _HOST.fullmatch(text):
        raise Invalid("must be a host, a domain such as .example.com, or a network")
    return text


def hosts(text: str) -> tuple[str, ...]:
    return tuple(host(each.strip()) for each in text.split(",") if each.strip())


def port(text: str) -> int:
    if not re.fullmatch(r"\d{1,5}", text) or not 0 < int(text) <= MAX_PORT:
        raise Invalid(f"must be a port, 1 to {MAX_PORT}")
    return int(text)


def seconds(text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text):
        raise Invalid("must be a whole number of seconds, 0 or more")
    return int(text)


def flag(text: str) -> bool:
    if text not in ("true", "false"):
        raise Invalid("must be true or false")
    return text == "true"


def weights(text: str) -> str:
    if text not in WEIGHTS:
        raise Invalid(f"must be one of {', '.join(WEIGHTS)}")
    return text


def expression(text: str) -> str:
    if not text.strip() or "\n" in text:
        raise Invalid(
            "must be a CEL expression on one line",
            """'device.attributes["gpu.amd.com"].productName == "…"'""",
        )
    return text


def flat(parts: Sequence[Sequence[str]]) -> tuple[str, ...]:
    return unique([each for part in parts for each in part])


def unique(found: Sequence[T]) -> tuple[T, ...]:
    """Each value once, in order: servers refuse some lists with repetitions."""
    return tuple(dict.fromkeys(found))
