"""Finds the adapter that the spec or a command names by URI.

Like a model, it is listed here, and downloaded by `model_source.fetch_model`.
"""

from job import storage
from job.errors import InputError
from job.families.adapter_files import CONFIG, PICKLE, WEIGHTS, below, folder_in_run
from job.families.model_source import ModelInput

FIELD = "$.model.adapter_name_or_path"
_CONVERT = (
    "save it again with PEFT, which writes safetensors: "
    "PeftModel.from_pretrained(base, FOLDER).save_pretrained(NEW_FOLDER)"
)


def find_adapter(uri: str, field: str = FIELD) -> ModelInput:
    """The adapter's two files. `field` is the key or option that names it.

    Raises InputError if it is missing, not accessible, no adapter, or only pickled.
    """
    files = {file.path: file for file in storage.list_files(uri)}
    if CONFIG in files and WEIGHTS in files:
        return ModelInput(uri=uri, files=(files[CONFIG], files[WEIGHTS]))
    if CONFIG in files:
        raise InputError(
            field,
            f"has its weights only in {PICKLE}, a pickle, which can run code when it is read"
            if PICKLE in files
            else f"has no {WEIGHTS}",
            value=uri,
            fix=_CONVERT if PICKLE in files else "copy the adapter whole",
        )
    if folder := folder_in_run(files):
        reason, fix = "is the output of a run, not an adapter", f"write {below(uri, folder)}"
    elif "config.json" in files:
        reason = "holds a whole model, not an adapter"
        fix = "name it as model.model_name_or_path, and remove the adapter"
    else:
        reason = f"holds no adapter: {CONFIG} is missing"
        fix = f"name the folder or repository that holds {CONFIG} and {WEIGHTS}"
    raise InputError(field, reason, value=uri, fix=fix)
