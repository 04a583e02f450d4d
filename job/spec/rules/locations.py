"""Checks of URIs and paths: the model, the output, and local folders."""

import contextlib
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path as FilePath

from job.spec.hub_output import HUB
from job.spec.output_folders import FOLDERS, LOGS
from job.spec.problems import Finding
from job.spec.rules.view import Rule, Unavailable, View, finding, unknown_builtin

BUILTIN_MODELS = ("builtin://ernie-vl-tiny",)
INPUTS = (
    "model.model_name_or_path",
    "model.adapter_name_or_path",
    "model.chat_template",
)
_UNUSABLE = ("", ".", "..")
_READ_ONLY = ("hf://", "builtin://", "http://", "https://")
_URIS = (
    *INPUTS,
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
"""A known scheme without its two slashes: `s3:/bucket`, `s3:bucket`, `s3//bucket`."""


def _uris_have_two_slashes(at: View) -> Iterator[Finding]:
    """Without them a URI would be taken for a local path."""
    folders = (f"{source}.{name}" for source in at.sources() for name in ("uri", "image_folder"))
    for dotted in (*_URIS, *folders):
        try:
            uri = at(dotted)
        except Unavailable:
            continue
        match = _ONE_SLASH.fullmatch(uri) if isinstance(uri, str) else None
        if match is None or (match[2].startswith(":///") and match["scheme"] not in _BUCKETS):
            continue
        scheme, rest = match["scheme"].lower(), match["rest"]
        if scheme in ("file", "local") and match[2] == ":/":
            rest = f"/{rest}"
        yield finding(
            dotted,
            f"must have two slashes after {scheme}:, or it is a path",
            f"write {scheme}://{rest.lstrip('/') if scheme in _BUCKETS else rest}",
        )


def _builtin_model_exists(at: View) -> Iterator[Finding]:
    uri = at("model.model_name_or_path")
    if uri.startswith("builtin://"):
        yield from unknown_builtin("model.model_name_or_path", uri, BUILTIN_MODELS)


def _revision_is_consistent(at: View) -> Iterator[Finding]:
    uri, revision = at("model.model_name_or_path"), at("model.revision")
    if revision is None:
        return
    if not uri.startswith("hf://"):
        yield finding("model.revision", "applies to hf:// models only", "remove the line")
    elif _revision(uri) not in (None, revision):
        yield finding(
            "model.revision",
            "differs from the revision in model_name_or_path",
            "remove one of the two",
        )


def _remote_code_is_pinned(at: View) -> Iterator[Finding]:
    uri = at("model.model_name_or_path")
    scheme, remote, _ = uri.partition("://")
    if not at("model.trust_remote_code") or not remote or scheme in ("file", "local", "builtin"):
        return
    if scheme != "hf":
        yield finding(
            "model.trust_remote_code",
            f"must be false for a model at {scheme}://, where its code can change",
            "remove the line, or name a commit at hf:// or a local folder that you have read",
        )
        return
    revision = at("model.revision") or _revision(uri) or ""
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        yield finding(
            "model.trust_remote_code",
            "requires model.revision to be a commit of 40 hexadecimal digits: "
            "code at any other revision can change",
            "set model.revision to a commit, or remove trust_remote_code",
        )


def _revision(uri: str) -> str | None:
    match = re.search(r"@([^/@]+)", uri.removeprefix("hf://"))
    return match[1] if match else None


def _output_overwrites_no_input(at: View) -> Iterator[Finding]:
    """Neither may contain the other (links resolved), or the run would overwrite its input."""
    output = at("output.uri")
    if output.startswith(HUB):  # see job.spec.rules.hub
        return
    if output.startswith(_READ_ONLY):
        yield _read_only("output.uri", output)
        return
    for dotted in (*INPUTS, *(f"{source}.uri" for source in at.sources())):
        with contextlib.suppress(Unavailable):
            uri = at(dotted)
            if dotted == "model.chat_template" and "{" in (uri or ""):
                continue  # the template itself
            if uri is not None and (problem := _overlap(output, uri, dotted)):
                yield finding("output.uri", problem, "write the URI of another folder")
                return
    if problem := unusable(output):
        parts = [part for part in output.partition("://")[2].split("/") if part not in _UNUSABLE]
        fix = f"write {output.partition('://')[0]}://{'/'.join(parts)}"
        yield finding("output.uri", problem, fix)


def _overlap(output: str, uri: str, dotted: str) -> str | None:
    """How the output conflicts with the input at `uri`, which the key `dotted` sets."""
    pattern = re.search(r"[*?\[]", uri)
    if pattern is not None:  # check its folder; matching files may be next to the output
        uri = posixpath.dirname(uri[: pattern.start()]) or "."
    read, written = canonical(uri), canonical(output)
    if _contains(read, written) and pattern is None:
        return f"must not be {dotted} or inside it"
    if _contains(written, read):
        return f"must not contain {dotted}, which the run could overwrite"
    for folder in FOLDERS if _is_local(output) else ():
        inside = canonical(f"{output.rstrip('/')}/{folder}")
        if _contains(inside, read) or (_contains(read, inside) and pattern is None):
            return f"its folder {folder}/ links to {dotted}, which the run would overwrite"
    return None


def _contains(folder: str, path: str) -> bool:
    return f"{path}/".startswith(f"{folder.rstrip('/')}/")


def _logging_dir_is_writable(at: View) -> Iterator[Finding]:
    folder = at("train.logging_dir")
    if folder is None:
        return
    if folder.startswith(_READ_ONLY):
        yield _read_only("train.logging_dir", folder)
        return
    output = at("output.uri")
    for own in FOLDERS:
        if own != LOGS and _contains(canonical(f"{output.rstrip('/')}/{own}"), canonical(folder)):
            yield finding(
                "train.logging_dir",
                f"must not be in the output's {own}/: the run checks and removes files there",
                f"remove the line: trackers write to {LOGS}/ there",
            )


def _local_folders_are_outside_the_output(at: View) -> Iterator[Finding]:
    for dotted in ("runtime.workdir", "runtime.cache_dir"):
        with contextlib.suppress(Unavailable):
            folder, output = at(dotted), at("output.uri")
            for own in FOLDERS if folder is not None else ():
                if _contains(canonical(f"{output.rstrip('/')}/{own}"), canonical(folder)):
                    yield finding(
                        dotted,
                        f"must not be in the output's {own}/: the run checks and removes files "
                        "there",
                        "write a folder outside of the output",
                    )


def _metrics_file_is_local(at: View) -> Iterator[Finding]:
    file = at("runtime.metrics_file")
    if file is not None and "://" in file and not file.startswith("file://"):
        yield finding(
            "runtime.metrics_file",
            "must be a local file, for Prometheus' node exporter to read",
            "write a path, or use metrics_port",
        )
    elif file is not None and _contains(canonical(at("output.uri")), canonical(file)):
        yield finding(
            "runtime.metrics_file",
            "must not be in the output, where a run writes only under its lease",
            "write a path outside of it, in the folder that the node exporter reads",
        )


def _read_only(dotted: str, uri: str) -> Finding:
    return finding(
        dotted,
        f"must be writable storage; {uri.split('://')[0]}:// is read-only",
        "write a path or an s3:// URI",
    )


def unusable(uri: str) -> str | None:
    """Why a URI cannot be written to, if so.

    Some object stores keep empty, `.` and `..` parts in names and others drop them, so listings may
    not find what was stored.
    """
    if _is_local(uri) or uri.lower().startswith("memory://"):
        return None
    parts = (
        uri.partition("://")[2].strip("/").split("/")
    )  # `_uris_have_two_slashes` checks leading ones
    if "" in parts:
        return "has an empty part: two consecutive slashes"
    dots = [part for part in parts if part in (".", "..")]
    return f"has the part {dots[0]!r}, which object stores do not resolve" if dots else None


def _is_local(uri: str) -> bool:
    return "://" not in uri or uri.lower().startswith(("file://", "local://"))


def canonical(uri: str) -> str:
    """The canonical form of a URI; for a local path, absolute with links resolved."""
    if not _is_local(uri):
        scheme, _, rest = uri.partition("://")
        scheme = "s3" if scheme.lower() == "s3a" else scheme.lower()
        path = posixpath.normpath(re.sub("/+", "/", rest))
        return f"{scheme}://{path}"
    uri = uri.partition("://")[2] if "://" in uri else uri
    with contextlib.suppress(RuntimeError):  # no such user, so it is a folder of that name
        uri = FilePath(uri).expanduser().as_posix()
    return os.path.realpath(uri)


RULES: tuple[Rule, ...] = (
    _uris_have_two_slashes,
    _builtin_model_exists,
    _revision_is_consistent,
    _remote_code_is_pinned,
    _output_overwrites_no_input,
    _logging_dir_is_writable,
    _local_folders_are_outside_the_output,
    _metrics_file_is_local,
)
