"""Pushes an export to a model repository on the hub, as one commit.

`huggingface_hub` uploads large files by content, so an interrupted push continues where it was, and
commits nothing if the repository already has these files.
"""

import fnmatch
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from job import log
from job.errors import InputError, MissingInputError
from job.export.push_failures import PushExplainer
from job.redaction import redact
from job.spec.output_folders import ADAPTER, SERVED_ADAPTER
from job.spec.types import ExportSpec
from job.storage import retry
from job.storage.backends.hub import hub_offline_variable, offline

if TYPE_CHECKING:
    from collections.abc import Callable

    from huggingface_hub import HfApi

T = TypeVar("T")

# Files that decide how a repository is loaded: those of an earlier push that this one does not
# have would be mixed with it.
_WEIGHTS = (
    *("*.safetensors", "*.safetensors.index.json", "adapter_config.json", "adapter_model.bin"),
    *("pytorch_model*.bin", "pytorch_model.bin.index.json", "config.json"),
)
_PROCESSOR = (
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("tokenizer.model", "special_tokens_map.json", "added_tokens.json", "chat_template.json"),
)
_FOLDERS = (ADAPTER, SERVED_ADAPTER)
"""Folders of a repository that a push writes."""


@dataclass(frozen=True, kw_only=True)
class HubTarget:
    """The repository and branch to push to."""

    repository: str
    revision: str
    private: bool

    @classmethod
    def of(cls, export: ExportSpec) -> "HubTarget":
        """That of a spec that pushes."""
        assert export.hub_model_id is not None
        return cls(
            repository=export.hub_model_id,
            revision=export.hub_revision or "main",
            private=export.hub_private_repo,
        )

    @property
    def uri(self) -> str:
        branch = "" if self.revision == "main" else f"@{self.revision}"
        return f"hf://{self.repository}{branch}"


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What the repository holds after a push."""

    repository: str
    revision: str
    commit: str
    """The branch's newest commit; an earlier one if it already held these files."""
    private: bool
    files: int
    bytes: int
    changed: bool
    """Whether the push made a commit."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class HubRepository:
    """A repository to push to. Methods raise InputError for what the user must fix, such as a token
    without write access, and StorageError if failures persist or the quota is exceeded.
    """

    def __init__(self, target: HubTarget) -> None:
        self._target = target
        self._explainer = PushExplainer(target.repository)

    # --- before the work ---------------------------------------------------------------------

    def require_writable(self) -> str:
        """Checks, without a change, that the token may push; returns what was found.

        A repository that does not exist counts as writable if the account or one of its
        organizations owns the name.
        """
        self._require_token()
        account = self._call("read", lambda: self._api.whoami())
        exists = self._call("read", lambda: self._api.repo_exists(self._target.repository))
        if not exists:
            self._require_owner(account)
            return f"{self._target.uri}: will be created, {self._visibility}"
        self._require_visibility()
        with suppress(MissingInputError):  # mirrors of the hub lack this request
            self._call("write", lambda: self._api.auth_check(self._target.repository, write=True))
        return f"{self._target.uri}: {account.get('name')} may write there"

    def create(self) -> None:
        """Creates the repository and the branch if they do not exist."""
        name, branch = self._target.repository, self._target.revision
        self._call(
            "write",
            lambda: self._api.create_repo(name, private=self._target.private, exist_ok=True),
        )
        self._require_visibility()
        if branch != "main":
            self._call("write", lambda: self._api.create_branch(name, branch=branch, exist_ok=True))

    def weights(self) -> list[str]:
        """The weights and configurations on the branch, sorted: a push replaces all of them."""
        return self._call("read", lambda: self._stale({}, _WEIGHTS))

    # --- the push ----------------------------------------------------------------------------

    def push(self, files: Mapping[str, Path], title: str, description: str) -> Pushed:
        """Commits the files, by their path in the repository, in one commit.

        Removes weights and configurations, also of processors, of earlier pushes that are not among
        them. Raises
        StorageError if another commit arrives meanwhile.
        """
        info = self._call(
            "read",
            lambda: self._api.repo_info(self._target.repository, revision=self._target.revision),
        )
        start = str(info.sha)
        stale: list[str] = []

        def attempt() -> str:
            from huggingface_hub import CommitOperationAdd, CommitOperationDelete

            # Read again in each attempt: an earlier one may have committed without an answer.
            stale[:] = self._stale(files, (*_WEIGHTS, *_PROCESSOR))
            add = [
                CommitOperationAdd(path_in_repo=name, path_or_fileobj=path)
                for name, path in sorted(files.items())
            ]
            return self._api.create_commit(
                self._target.repository,
                [*add, *(CommitOperationDelete(path_in_repo=name) for name in stale)],
                commit_message=redact(title),
                commit_description=redact(description),
                revision=self._target.revision,
                parent_commit=start,
            ).oid

        log.info("pushing to the hub", repository=self._target.uri, files=len(files))
        commit = self._call("write", attempt)
        if stale:
            log.info("files of an earlier push removed", files=", ".join(stale))
        return Pushed(
            repository=self._target.repository,
            revision=self._target.revision,
            commit=commit,
            private=bool(info.private),
            files=len(files),
            bytes=sum(path.stat().st_size for path in files.values()),
            changed=commit != start,
        )

    def _stale(self, files: Mapping[str, Path], globs: Sequence[str]) -> list[str]:
        """The files of an earlier push, of such names, that would be loaded with, or instead of,
        these."""
        from huggingface_hub.hf_api import RepoFile

        tree = self._api.list_repo_tree(
            self._target.repository, recursive=True, revision=self._target.revision
        )
        names = [entry.path for entry in tree if isinstance(entry, RepoFile)]
        return sorted(name for name in names if name not in files and _is_loaded(name, globs))

    # --- parts -------------------------------------------------------------------------------

    @cached_property
    def _api(self) -> "HfApi":
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars, logging

        disable_progress_bars()
        logging.set_verbosity_error()
        endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
        return HfApi(endpoint=endpoint, token=os.environ.get("HF_TOKEN") or None)

    def _call(self, operation: "retry.failures.Operation", function: "Callable[[], T]") -> T:
        if (variable := hub_offline_variable(self._target.uri)) is not None:
            raise offline(self._target.uri, variable)
        return retry.call(operation, self._target.uri, function, self._explainer)

    def _require_token(self) -> None:
        from huggingface_hub import get_token

        if not get_token():
            raise InputError(
                self._target.uri,
                "cannot write: there is no token",
                fix="set HF_TOKEN to a token with write access, or export.push_to_hub: false",
            )

    def _require_owner(self, account: Mapping[str, Any]) -> None:
        """Raises InputError if the token's account cannot create the repository."""
        owner = self._target.repository.partition("/")[0]
        names = [account.get("name"), *(each.get("name") for each in account.get("orgs") or ())]
        role = ((account.get("auth") or {}).get("accessToken") or {}).get("role")
        if role == "read":
            raise InputError(
                self._target.uri,
                "cannot write: HF_TOKEN may only read",
                fix="set HF_TOKEN to a token with write access",
            )
        if owner not in names:
            raise InputError(
                "$.export.hub_model_id",
                f"the account of HF_TOKEN, {account.get('name')}, does not belong to {owner}",
                value=self._target.repository,
                fix=f"name one of {', '.join(str(name) for name in names if name)}, or set "
                "HF_TOKEN to a token of a member",
            )

    def _require_visibility(self) -> None:
        """Raises InputError if the repository is public and the spec wants a private one."""
        info = self._call("read", lambda: self._api.repo_info(self._target.repository))
        if self._target.private and not info.private:
            raise InputError(
                "$.export.hub_private_repo",
                "the repository is public, and this run pushes to private ones only",
                value=self._target.repository,
                fix="make it private in its settings, or set export.hub_private_repo: false",
            )

    @property
    def _visibility(self) -> str:
        return "private" if self._target.private else "public"


def commit_title(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The first line of the commit: the job's name, and up to three metrics."""
    shown = [key for key in after if key not in ("rows", "answers") and _is_number(after[key])][:3]
    parts = [
        f"{key} {f'{before[key]:.3g} → ' if key in before else ''}{after[key]:.3g}" for key in shown
    ]
    return f"{name}: {', '.join(parts)}" if parts else name


def layout(
    content: str, adapter: Sequence[tuple[str, Path]], merged: Sequence[tuple[str, Path]]
) -> dict[str, Path]:
    """The files to push, by path in the repository.

    `adapter` and `merged` have the run's files by path at its output: those below `adapter/` or
    `merged/`, and `adapter-vllm/`. What is pushed alone stands at the top.
    """
    files: dict[str, Path] = {}
    for name, path in adapter if content in ("adapter", "all") else ():
        top = content == "adapter"
        files[name.removeprefix("adapter/") if top else name] = path
    for name, path in merged if content in ("merged", "all") else ():
        files[name.removeprefix("merged/")] = path
    return files


def _is_loaded(name: str, globs: Sequence[str]) -> bool:
    folder, _, file = name.rpartition("/")
    return folder in ("", *_FOLDERS) and any(fnmatch.fnmatch(file, glob) for glob in globs)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
