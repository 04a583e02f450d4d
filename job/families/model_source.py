"""Finds, identifies and downloads the model that the spec names by URI.

`find_model` is cheap: it lists files and reads no remote weights, so a run whose stages are
complete downloads nothing. `fetch_model` downloads when a stage needs the files. For data, see
`job.prep.discovery`.
"""

import fnmatch
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from job import storage
from job.errors import InputError
from job.families import adapter_files
from job.local import cache, daemon_threads, eviction
from job.local.file_digests import FileDigests
from job.spec.types import JobSpec, ModelSpec
from job.storage.backends import hub
from job.storage.digests import fingerprint

BUILTIN = "builtin://"
MODELS = Path(__file__).parent / "builtin"

# Weights in safetensors only: other formats execute code when they are read.
MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt")
CODE_FILES = ("*.py",)
GENERATION = "generation_config.json"
# Those of the files above that any class reads to load a model, its tokenizer or its processor; not
# a checkpoint's license, notes, or records of its own training.
READ_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "*.jinja", "*.model", "*.py"),
    *("*config*.json", "*token*.json", "*template*.json", "*vocab*.json", "*vocab*.txt"),
    *("merges.txt", "*normalizer*.json", "emoji.json", "dict.txt"),
)


@dataclass(frozen=True, kw_only=True)
class ModelInput:
    """A checkpoint that was found, but not yet downloaded."""

    uri: str
    files: tuple[storage.Entry, ...]
    local_digests: FileDigests = field(default_factory=FileDigests, compare=False, repr=False)

    @cached_property
    def digest(self) -> str:
        """A digest of a local checkpoint's contents, or a remote one's names, sizes and versions.

        Lazy, because it reads local weights.
        """
        return self._digest_of(self._digests)

    @cached_property
    def weights_digest(self) -> str:
        """The digest of what training reads: weights, configuration, tokenizer and processor."""
        return self._digest_of(
            {
                path: digest
                for path, digest in self._digests.items()
                if path != GENERATION and any(fnmatch.fnmatch(path, glob) for glob in READ_FILES)
            }
        )

    def start_hashing(self) -> None:
        """Hashes a local checkpoint on a thread, so that the first use of a digest waits less."""
        daemon_threads.start(self._hash, name="model digest")

    def _hash(self) -> None:
        with suppress(OSError):  # the first use raises it
            _ = self._digests

    @property
    def generation_digest(self) -> str:
        """The digest of `generation_config.json`, which generation reads; empty if missing."""
        return self._digests.get(GENERATION, "")

    @cached_property
    def _digests(self) -> dict[str, str]:
        """By path."""
        directory = _local_directory(self.uri)
        if directory is None:
            return {file.path: fingerprint(file.size, file.version) for file in self.files}
        paths = [file.path for file in self.files]
        digests = self.local_digests.sha256([directory / path for path in paths])
        return dict(zip(paths, digests, strict=True))

    def _digest_of(self, digests: Mapping[str, str]) -> str:
        # The path of a local checkpoint does not matter: a copy is the same checkpoint.
        return fingerprint("" if _local_directory(self.uri) else self.uri, sorted(digests.items()))

    @property
    def size_bytes(self) -> int:
        return sum(file.size for file in self.files)


def find_model(model: ModelSpec, local_digests: FileDigests | None = None) -> ModelInput:
    """The checkpoint that the spec names; `local_digests` hashes its files if they are local.

    Raises InputError if it is missing, empty or not accessible.
    """
    uri, local_digests = model.model_name_or_path, local_digests or FileDigests()
    if uri.startswith(BUILTIN):
        directory = MODELS / uri.removeprefix(BUILTIN)
        return ModelInput(uri=uri, files=_entries(directory), local_digests=local_digests)
    if uri.startswith("hf://") and model.revision is not None:
        organization, _, name = uri.removeprefix("hf://").partition("/")
        repository, slash, rest = name.partition("/")
        uri = f"hf://{organization}/{repository}@{model.revision}{slash}{rest}"
    globs = MODEL_FILES + (CODE_FILES if model.trust_remote_code else ())
    listed = storage.list_files(uri)
    files = tuple(
        file for file in listed if any(fnmatch.fnmatch(file.path, glob) for glob in globs)
    )
    if not any(file.path == "config.json" for file in files):
        adapter_files.require_model(uri, {file.path for file in listed})
        raise InputError(
            "$.model.model_name_or_path",
            "holds no model: config.json is missing",
            value=uri,
            fix="name the folder or repository that holds config.json and *.safetensors",
        )
    return ModelInput(uri=uri, files=files, local_digests=local_digests)


def require_hub(spec: JobSpec, *, exempt: str | None = None, also: Sequence[str] = ()) -> None:
    """Raises one InputError for all hub URIs of the spec, if the environment disables the hub.

    Called before heavy imports. The URI `exempt` is not checked; those in `also` are.
    """
    sources = (source.uri for source in spec.data.sources().values())
    problems = [
        hub.offline(uri, variable).problems[0]
        for uri in (spec.model.model_name_or_path, spec.model.adapter_name_or_path, *sources, *also)
        if uri is not None
        and uri != exempt
        and (variable := hub.hub_offline_variable(uri)) is not None
    ]
    if problems:
        raise InputError.from_problems(problems)


def location(uri: str) -> str:
    """The URI of a model's files: a folder of this package for `builtin://`."""
    return str(MODELS / uri.removeprefix(BUILTIN)) if uri.startswith(BUILTIN) else uri


def fetch_model(model: ModelInput, cache_dir: Path, limit: int = 0) -> Path:
    """The checkpoint's local folder; downloaded once, and checked before each use.

    `limit` is the cache's maximum size in bytes, 0 for no limit. Raises what `cache.ensure` does.
    """
    return _local_directory(model.uri) or _fetched(
        model.uri, model.files, model.digest, cache_dir, limit
    )


def fetch_headers(model: ModelInput, cache_dir: Path, limit: int = 0) -> Path:
    """A local folder with the checkpoint's files, possibly without its weights."""
    if directory := _local_directory(model.uri):
        return directory
    small = tuple(file for file in model.files if not file.path.endswith(".safetensors"))
    digest = model.digest
    if not (cache_dir / eviction.MODELS / _key(digest) / eviction.COMPLETE).exists():
        digest = fingerprint(model.digest, "headers")  # a separate cache entry
    return _fetched(model.uri, small, digest, cache_dir, limit)


def is_local(uri: str) -> bool:
    """Whether the model's files are on this machine: those of a folder, or a builtin one."""
    return _local_directory(uri) is not None


def _local_directory(uri: str) -> Path | None:
    """The folder of a local or builtin checkpoint; None for a remote one."""
    if uri.startswith(BUILTIN):
        return MODELS / uri.removeprefix(BUILTIN)
    return storage.local_path(uri) if storage.is_local(uri) else None


def _fetched(
    uri: str, files: tuple[storage.Entry, ...], digest: str, cache_dir: Path, limit: int
) -> Path:
    wanted = [cache.ExpectedFile(path=f.path, size=f.size, sha256=f.sha256) for f in files]

    def download(file: cache.ExpectedFile, path: Path) -> None:
        storage.download(storage.join(uri, file.path), path)

    return cache.ensure(
        cache_dir, eviction.MODELS, _key(digest), wanted, download, source=uri, limit=limit
    )


def _key(digest: str) -> str:
    """The name of a checkpoint's entry in the cache."""
    return digest[:32]


def _entries(directory: Path) -> tuple[storage.Entry, ...]:
    if not directory.is_dir():
        known = ", ".join(BUILTIN + path.name for path in sorted(MODELS.iterdir()))
        raise InputError(
            "$.model.model_name_or_path",
            "does not exist",
            value=BUILTIN + directory.name,
            fix=f"builtin models: {known}",
        )
    return storage.list_files(str(directory))
