"""Models by URI: what the spec names is found, identified and brought to this machine.

`find_model` is cheap: it lists, and reads no remote weights, so that a run whose stages are
complete needs no download. `fetch_model` brings the files when a stage asks for them. Data is
found by `job.prep.discovery`.
"""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from job import storage
from job.errors import InputError
from job.local import cache, eviction
from job.spec.types import JobSpec, ModelSpec
from job.storage.backends import hub
from job.storage.digests import fingerprint, sha256_file

BUILTIN = "builtin://"
MODELS = Path(__file__).parent / "builtin"

# Weights come as safetensors alone: the other formats run code when they are read.
MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt")
CODE_FILES = ("*.py",)
GENERATION = "generation_config.json"
# Of the files above those that loading a model, its tokenizer and its processor reads, whatever
# the class. A checkpoint's licence, notes and records of its own training are none of them.
READ_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "*.jinja", "*.model", "*.py"),
    *("*config*.json", "*token*.json", "*template*.json", "*vocab*.json", "*vocab*.txt"),
    *("merges.txt", "*normalizer*.json", "emoji.json", "dict.txt"),
)


@dataclass(frozen=True, kw_only=True)
class ModelInput:
    """A checkpoint found, not yet fetched."""

    uri: str
    files: tuple[storage.Entry, ...]

    @cached_property
    def digest(self) -> str:
        """Of the contents for a local checkpoint, of names, sizes and versions for a remote one.

        Local weights are read for it, so not before it is asked for.
        """
        return self._digest_of(self._digests)

    @cached_property
    def weights_digest(self) -> str:
        """The same of what training reads: weights, configuration, tokenizer and processor."""
        return self._digest_of(
            {
                path: digest
                for path, digest in self._digests.items()
                if path != GENERATION and any(fnmatch.fnmatch(path, each) for each in READ_FILES)
            }
        )

    @property
    def generation_digest(self) -> str:
        """The same of `generation_config.json`, which answering reads; empty if there is none."""
        return self._digests.get(GENERATION, "")

    @cached_property
    def _digests(self) -> dict[str, str]:
        """By path."""
        directory = _here(self)
        if directory is None:
            return {file.path: fingerprint(file.size, file.version) for file in self.files}
        return {file.path: sha256_file(directory / file.path) for file in self.files}

    def _digest_of(self, digests: Mapping[str, str]) -> str:
        # A local checkpoint may be copied elsewhere and stays the same.
        return fingerprint("" if _here(self) else self.uri, sorted(digests.items()))

    @property
    def size_bytes(self) -> int:
        return sum(file.size for file in self.files)


def find_model(model: ModelSpec) -> ModelInput:
    """The checkpoint that the spec names.

    Raises InputError where it is missing, empty or not accessible.
    """
    uri = model.model_name_or_path
    if uri.startswith(BUILTIN):
        directory = MODELS / uri.removeprefix(BUILTIN)
        return ModelInput(uri=uri, files=_entries(directory))
    if uri.startswith("hf://") and model.revision is not None:
        organisation, _, name = uri.removeprefix("hf://").partition("/")
        repository, slash, rest = name.partition("/")
        uri = f"hf://{organisation}/{repository}@{model.revision}{slash}{rest}"
    patterns = MODEL_FILES + (CODE_FILES if model.trust_remote_code else ())
    files = tuple(
        file
        for file in storage.list_files(uri)
        if any(fnmatch.fnmatch(file.path, pattern) for pattern in patterns)
    )
    if not any(file.path == "config.json" for file in files):
        raise InputError(
            "$.model.model_name_or_path",
            "there is no model: config.json is missing",
            value=uri,
            fix="name the folder or repository that holds config.json and *.safetensors",
        )
    return ModelInput(uri=uri, files=files)


def require_hub(spec: JobSpec, *, but: str | None = None) -> None:
    """Raises InputError for what is on the hub, all at once, if a variable forbids to ask it.

    Before anything heavy is imported. What the URI `but` names is left out.
    """
    sources = (source.uri for source in spec.data.sources().values())
    found = [
        hub.offline(uri, variable).problems[0]
        for uri in (spec.model.model_name_or_path, *sources)
        if uri != but and (variable := hub.hub_forbidden_by(uri)) is not None
    ]
    if found:
        raise InputError.from_problems(found)


def place(uri: str) -> str:
    """Where the files of a model lie: a folder of this package for `builtin://`."""
    return str(MODELS / uri.removeprefix(BUILTIN)) if uri.startswith(BUILTIN) else uri


def fetch_model(model: ModelInput, cache_dir: Path, limit: int = 0) -> Path:
    """The checkpoint's folder on this machine; downloaded once, and looked at before each use.

    `limit` is what the cache may take, in bytes; zero for no limit. For errors see `cache.ensure`.
    """
    return _here(model) or _fetched(model.uri, model.files, model.digest, cache_dir, limit)


def fetch_headers(model: ModelInput, cache_dir: Path, limit: int = 0) -> Path:
    """A folder with all of the checkpoint but its weights, whose shapes the configuration tells."""
    if here := _here(model):
        return here
    small = tuple(file for file in model.files if not file.path.endswith(".safetensors"))
    digest = model.digest
    if not (cache_dir / eviction.MODELS / _key(digest) / eviction.COMPLETE).exists():
        digest = fingerprint(model.digest, "headers")  # an entry of their own
    return _fetched(model.uri, small, digest, cache_dir, limit)


def _here(model: ModelInput) -> Path | None:
    """Where the checkpoint lies on this machine, if it need not be fetched."""
    if model.uri.startswith(BUILTIN):
        return MODELS / model.uri.removeprefix(BUILTIN)
    return storage.local_path(model.uri) if storage.is_local(model.uri) else None


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
        raise InputError(
            "$.model.model_name_or_path",
            "there is no such builtin model",
            value=BUILTIN + directory.name,
            fix=f"known: {', '.join(BUILTIN + path.name for path in sorted(MODELS.iterdir()))}",
        )
    return storage.list_files(str(directory))
