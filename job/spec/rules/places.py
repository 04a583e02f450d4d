"""Where the model comes from and where the output goes."""

import contextlib
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path as FilePath

from job.spec.finding import Finding
from job.spec.rules.view import Rule, Unread, View, builtin, find

BUILTIN_MODELS = ("builtin://ernie-vl-tiny",)
_READ_ONLY = ("hf://", "builtin://", "http://", "https://")
_URIS = (
    "model.model_name_or_path",
    "output.uri",
    "train.logging_dir",
    "train.resume_from_checkpoint",
    "runtime.metrics_file",
)
_BUCKETS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "r2", "hf", "http", "https")
_SCHEMES = (
    *_BUCKETS,
    "file",
    "local",
    "memory",
    "builtin",
    "ftp",
    "sftp",
    "ssh",
    "hdfs",
    "webhdfs",
)
_ONE_SLASH = re.compile(rf"(?P<scheme>{'|'.join(_SCHEMES)})(:/?(?!/)|//|:///+)(?P<rest>.*)", re.I)
"""What has a scheme and not its two slashes: `s3:/bucket`, `s3:bucket`, `s3//bucket`."""


def _uris_have_two_slashes(at: View) -> Iterator[Finding]:
    """Without them a URI is the path of a local folder by that name, which nobody means."""
    folders = (f"{source}.{name}" for source in at.sources() for name in ("uri", "image_folder"))
    for dotted in (*_URIS, *folders):
        try:
            uri = at(dotted)
        except Unread:
            continue
        found = _ONE_SLASH.fullmatch(uri) if isinstance(uri, str) else None
        if found is None or (found[2].startswith(":///") and found["scheme"] not in _BUCKETS):
            continue
        scheme, rest = found["scheme"].lower(), found["rest"]
        if scheme in ("file", "local") and found[2] == ":/":
            rest = f"/{rest}"
        yield find(
            dotted,
            f"must have two slashes after {scheme}:, or it is a path",
            f"write {scheme}://{rest.lstrip('/') if scheme in _BUCKETS else rest}",
        )


def _model_is_known(at: View) -> Iterator[Finding]:
    uri = at("model.model_name_or_path")
    if uri.startswith("builtin://"):
        yield from builtin("model.model_name_or_path", uri, BUILTIN_MODELS)


def _revision_is_said_once(at: View) -> Iterator[Finding]:
    uri, revision = at("model.model_name_or_path"), at("model.revision")
    if revision is None:
        return
    if not uri.startswith("hf://"):
        yield find("model.revision", "is read for hf:// models only", "remove the line")
    elif _revision(uri) not in (None, revision):
        yield find(
            "model.revision",
            "is not the revision that model_name_or_path names",
            "remove one of the two",
        )


def _remote_code_is_pinned(at: View) -> Iterator[Finding]:
    uri = at("model.model_name_or_path")
    scheme, remote, _ = uri.partition("://")
    if not at("model.trust_remote_code") or not remote or scheme in ("file", "local", "builtin"):
        return
    if scheme != "hf":
        yield find(
            "model.trust_remote_code",
            f"must be false for a model at {scheme}://, where code can change under its name",
            "remove the line, or name a commit at hf:// or a local folder that you have read",
        )
        return
    revision = at("model.revision") or _revision(uri) or ""
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        yield find(
            "model.trust_remote_code",
            "needs model.revision to be a commit of 40 hexadecimal digits: "
            "code under any other name can change",
            "set model.revision to a commit, or remove trust_remote_code",
        )


def _revision(uri: str) -> str | None:
    found = re.search(r"@([^/@]+)", uri.removeprefix("hf://"))
    return found[1] if found else None


def _output_overwrites_no_input(at: View) -> Iterator[Finding]:
    output = at("output.uri")
    if output.startswith(_READ_ONLY):
        yield _read_only("output.uri", output)
        return
    inputs = ["model.model_name_or_path", *(f"{source}.uri" for source in at.sources())]
    for dotted in inputs:
        place = _place(at(dotted))
        if f"{_place(output)}/".startswith(f"{place}/"):
            yield find(
                "output.uri",
                f"must not be {dotted}, nor lie inside it",
                "write the URI of a folder of its own",
            )
            return


def _trackers_can_write(at: View) -> Iterator[Finding]:
    folder = at("train.logging_dir")
    if folder is not None and folder.startswith(_READ_ONLY):
        yield _read_only("train.logging_dir", folder)


def _metrics_file_is_local(at: View) -> Iterator[Finding]:
    file = at("runtime.metrics_file")
    if file is not None and "://" in file and not file.startswith("file://"):
        yield find(
            "runtime.metrics_file",
            "must be a local file, for Prometheus' node exporter to read",
            "write a path, or use metrics_port",
        )


def _read_only(dotted: str, uri: str) -> Finding:
    return find(
        dotted,
        f"must be storage that can be written; {uri.split('://')[0]}:// is read only",
        "write a path or an s3:// URI",
    )


def _place(uri: str) -> str:
    """One spelling for the URIs of one place."""
    uri = uri.removeprefix("file://")
    if "://" in uri:
        scheme, _, rest = uri.partition("://")
        return f"{scheme.lower()}://{posixpath.normpath(rest)}"
    with contextlib.suppress(RuntimeError):  # no such user: then it is a folder of that name
        uri = FilePath(uri).expanduser().as_posix()
    return posixpath.normpath(posixpath.join(FilePath.cwd().as_posix(), uri))


RULES: tuple[Rule, ...] = (
    _uris_have_two_slashes,
    _model_is_known,
    _revision_is_said_once,
    _remote_code_is_pinned,
    _output_overwrites_no_input,
    _trackers_can_write,
    _metrics_file_is_local,
)
