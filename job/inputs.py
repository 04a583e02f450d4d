"""Models by URI: what the spec names is found, identified and brought to this machine.

`find_model` is cheap: it lists, and reads no remote weights, so that a run whose stages are
complete needs no download. `fetch_model` brings the files when a stage asks for them. Data is
found by `job.prep.find`.
"""

import fnmatch
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from job import log, storage
from job.errors import InputError, StorageError
from job.manifest import download_verified, fingerprint, sha256_file
from job.spec.types import JobSpec, ModelSpec
from job.storage import connect

BUILTIN = "builtin://"
MODELS = Path(__file__).parent / "builtin"
FORMULAS = "builtin://formulas"

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
COMPLETE = ".complete"


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
        connect.offline(uri, variable).problems[0]
        for uri in (spec.model.model_name_or_path, *sources)
        if uri != but and (variable := connect.hub_forbidden_by(uri)) is not None
    ]
    if found:
        raise InputError.from_problems(found)


def place(uri: str) -> str:
    """Where the files of a model lie: a folder of this package for `builtin://`."""
    return str(MODELS / uri.removeprefix(BUILTIN)) if uri.startswith(BUILTIN) else uri


def fetch_model(model: ModelInput, cache_dir: Path) -> Path:
    """The checkpoint's folder on this machine; downloaded once, whole or not at all."""
    return _here(model) or _fetched(model.uri, model.files, model.digest, cache_dir)


def fetch_headers(model: ModelInput, cache_dir: Path) -> Path:
    """A folder with all of the checkpoint but its weights, whose shapes the configuration tells."""
    if here := _here(model):
        return here
    whole = _cached(cache_dir, model.digest)
    if (whole / COMPLETE).exists():
        return whole
    small = tuple(file for file in model.files if not file.path.endswith(".safetensors"))
    return _fetched(model.uri, small, fingerprint(model.digest, "headers"), cache_dir)


def _here(model: ModelInput) -> Path | None:
    """Where the checkpoint lies on this machine, if it need not be fetched."""
    if model.uri.startswith(BUILTIN):
        return MODELS / model.uri.removeprefix(BUILTIN)
    return storage.local_path(model.uri) if storage.is_local(model.uri) else None


def _cached(cache_dir: Path, digest: str) -> Path:
    return cache_dir / "models" / digest[:16]


def _fetched(uri: str, files: tuple[storage.Entry, ...], digest: str, cache_dir: Path) -> Path:
    directory = _cached(cache_dir, digest)
    if (directory / COMPLETE).exists():
        return directory
    # A file of the right size is whole: downloads become visible only when they are.
    missing = [file for file in files if not _is_there(directory / file.path, file.size)]
    needed = sum(file.size for file in missing)
    free = shutil.disk_usage(_existing(cache_dir)).free
    if free < needed:
        raise InputError(
            "$.runtime.cache_dir",
            f"the checkpoint needs {log.size(needed)} and {log.size(free)} are free",
            value=str(cache_dir),
            fix="name a folder on a larger disk",
        )
    log.info("download model", uri=uri, size=log.size(sum(file.size for file in files)))
    with log.progress("download", len(missing), "files") as bar, ThreadPoolExecutor(4) as pool:
        for _ in pool.map(lambda file: _download(uri, file, directory), missing):
            bar.advance()
    (directory / COMPLETE).touch()
    return directory


def _entries(directory: Path) -> tuple[storage.Entry, ...]:
    if not directory.is_dir():
        raise InputError(
            "$.model.model_name_or_path",
            "there is no such builtin model",
            value=BUILTIN + directory.name,
            fix=f"known: {', '.join(BUILTIN + path.name for path in sorted(MODELS.iterdir()))}",
        )
    return storage.list_files(str(directory))


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _is_there(path: Path, size: int) -> bool:
    return path.exists() and path.stat().st_size == size


def _download(uri: str, file: storage.Entry, directory: Path) -> None:
    """Brings a file; compared with its SHA-256 where the hub tells that."""
    path = directory / file.path
    if file.sha256 is None:
        storage.download(storage.join(uri, file.path), path)
    elif not download_verified(uri, file.path, path, file.sha256):
        raise StorageError(
            storage.join(uri, file.path),
            "other bytes arrive than are stored: the SHA-256 differs",
            fix="check the network and what is between here and there, then run again",
        )
