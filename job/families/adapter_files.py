"""The files of an adapter in PEFT's format, and what to say if they are named as a model."""

import json
from collections.abc import Collection

from job import storage
from job.errors import InputError, JobError
from job.spec.output_folders import ADAPTER, REINFORCED

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_MAX_CONFIG_BYTES = 2**20


def require_model(uri: str, paths: Collection[str]) -> None:
    """Raises InputError if the files at `uri`, named as a model, are an adapter's or a run's."""
    field = "$.model.model_name_or_path"
    if CONFIG in paths:
        base = base_of(uri) or "THE MODEL IT WAS TRAINED ON"
        raise InputError(
            field,
            "is an adapter, not a model",
            value=uri,
            fix=f"write model_name_or_path: {base} and adapter_name_or_path: {uri}",
        )
    if folder := folder_in_run(paths):
        base = base_of(below(uri, folder)) or "THE MODEL OF THAT RUN"
        merged = (
            f", or model_name_or_path: {below(uri, 'merged')} for its merged weights"
            if "merged/config.json" in paths
            else ""
        )
        raise InputError(
            field,
            "is the output of a run, not a model",
            value=uri,
            fix=f"to continue its adapter, write model_name_or_path: {base} and "
            f"adapter_name_or_path: {below(uri, folder)}{merged}",
        )


def folder_in_run(paths: Collection[str]) -> str | None:
    """The folder of the adapter in a run's output, of the reinforced one if there is one."""
    folders = (f"{REINFORCED}/{ADAPTER}", ADAPTER)
    return next((folder for folder in folders if f"{folder}/{CONFIG}" in paths), None)


def below(uri: str, folder: str) -> str:
    return f"{uri.rstrip('/')}/{folder}"


def base_of(uri: str) -> str | None:
    """The base model that the adapter names, if it can be read."""
    try:
        text = storage.read_bytes(storage.join(uri, CONFIG), _MAX_CONFIG_BYTES)
        base = json.loads(text).get("base_model_name_or_path")
    except (JobError, ValueError, AttributeError):
        return None
    return str(base) if base else None
