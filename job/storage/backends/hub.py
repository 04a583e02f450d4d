"""`hf://`: models and datasets of the Hugging Face hub, read only."""

import os
import threading

from job.errors import InputError
from job.storage.backend import Backend, Entry
from job.storage.failures import Kind, Operation
from job.storage.filesystem import HubFileSystem
from job.storage.uri import scheme

_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_TRUE = ("1", "ON", "YES", "TRUE")  # as the hub's libraries read them


class Hub(Backend[HubFileSystem]):
    """Uses huggingface_hub, unless an environment variable sets offline mode."""

    read_only = True

    def options(self, uri: str) -> dict[str, object]:
        from huggingface_hub.utils import disable_progress_bars, logging

        # Its progress bars and messages would break the structured log.
        disable_progress_bars()
        logging.set_verbosity_error()
        endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
        return {"endpoint": endpoint, "token": os.environ.get("HF_TOKEN") or None}

    def connection_scope(self, uri: str) -> object:
        return threading.get_ident()  # the listing cache of a connection is not thread-safe

    def connect(self, uri: str) -> HubFileSystem:
        if (variable := hub_offline_variable(uri)) is not None:
            raise offline(uri, variable)
        return super().connect(uri)

    def _list(self, filesystem: HubFileSystem, path: str) -> list[Entry]:
        filesystem.invalidate_cache()
        return super()._list(filesystem, filesystem.resolve_path(path).unresolve())

    def _kind_of_type(self, error: BaseException) -> Kind | None:
        if isinstance(error, OSError) and "Consistency check failed" in str(error):
            return "transient"  # a download of the wrong length
        return super()._kind_of_type(error)

    def fix_missing(self, uri: str) -> str:
        return "check repository, revision and path; set HF_TOKEN if the repository is private"

    def fix_denied(self, uri: str, operation: Operation, reason: str) -> str:
        return (
            "check the repository's name; if it is private or gated, set HF_TOKEN to a token of an "
            "account that was granted access"
        )

    def fix_failed(self, uri: str) -> str:
        return "check the network, and HF_ENDPOINT; then run again"


def hub_offline_variable(uri: str) -> str | None:
    """The environment variable that sets offline mode for `uri`, a URI of the hub, if any."""
    if scheme(uri) != "hf":
        return None
    datasets = ("HF_DATASETS_OFFLINE",) if uri.startswith("hf://datasets/") else ()
    for variable in (*_OFFLINE, *datasets):
        if os.environ.get(variable, "").upper() in _TRUE:
            return variable
    return None


def offline(uri: str, variable: str) -> InputError:
    """The error for a URI of the hub in offline mode, set by `variable`."""
    return InputError(
        uri,
        f"access to the hub is disabled: {variable} is set",
        value=os.environ.get(variable),
        fix=f"unset {variable}, or name a copy in a folder or a bucket",
    )
