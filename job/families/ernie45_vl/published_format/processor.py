"""Reads and writes tokenizer, image settings and chat template in the published layout."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.errors import InputError
from job.families.ernie45_vl.published_format import served, tokenizer
from job.families.ernie45_vl.published_format.placeholders import to_native, to_published
from job.families.tokenizer_files import LOADING

if TYPE_CHECKING:
    from transformers import Ernie4_5_VLMoeProcessor

AUTO_MAP = {
    "AutoConfig": "configuration_ernie45_vl.Ernie45VLConfig",
    "AutoProcessor": "processing_ernie45_vl.Ernie45VLProcessor",
}
_MODULES = ("configuration_ernie45_vl.py", "processing_ernie45_vl.py")

_IMAGE_KEYS = (
    *("do_convert_rgb", "do_normalize", "do_rescale", "do_resize", "resample"),
    *("image_mean", "image_std", "rescale_factor", "patch_size", "merge_size"),
)


def read(uri: str, directory: Path, template: str | None = None) -> "Ernie4_5_VLMoeProcessor":
    """The checkpoint's processor, as Transformers' class; `template` replaces its chat template.

    Raises InputError if a file is missing or cannot be read.
    """
    from transformers import (
        Ernie4_5_VLMoeImageProcessor,
        Ernie4_5_VLMoeProcessor,
        Ernie4_5_VLMoeVideoProcessor,
    )

    config = _read_json(uri, directory, "tokenizer_config.json")
    settings = _read_json(uri, directory, "preprocessor_config.json")
    template = to_native(_template(uri, directory, config) if template is None else template)
    given = {key: settings[key] for key in _IMAGE_KEYS if key in settings}
    size = settings.get("size", {})
    limits = {
        "shortest_edge": settings.get("min_pixels", size.get("min_pixels")),
        "longest_edge": settings.get("max_pixels", size.get("max_pixels")),
    }
    limits = {key: value for key, value in limits.items() if value is not None}
    images = Ernie4_5_VLMoeImageProcessor(**given)
    images.size = type(images.size)(**{**dict(images.size), **limits})
    # There are no published settings for videos; Transformers' defaults match the published code.
    # Timestamps are not drawn on frames: no checkpoint has the font for it.
    videos = {**given, "draw_on_frames": False, **settings.get("video_processor", {})}
    return Ernie4_5_VLMoeProcessor(
        images,
        tokenizer.read(uri, directory, config),
        Ernie4_5_VLMoeVideoProcessor(**videos),
        chat_template=template,
    )


def _template(uri: str, directory: Path, config: dict[str, Any]) -> str:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    if (directory / "chat_template.json").is_file():
        config = _read_json(uri, directory, "chat_template.json")
    if not isinstance(config.get("chat_template"), str):
        raise InputError(uri, "holds no chat template", fix="set model.chat_template")
    return str(config["chat_template"])


def _read_json(uri: str, directory: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((directory / name).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(uri, f"holds no {name}", fix="copy the checkpoint whole") from error
    except ValueError as error:
        raise InputError(uri, f"its {name} is not JSON: {error}") from error
    assert isinstance(content, dict), name
    return content


def write(processor: "Ernie4_5_VLMoeProcessor", directory: Path) -> None:
    """Writes all files of a checkpoint except the weights and `config.json`."""
    processor.tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("processor_class", *LOADING):  # the class is the other layout's
        config.pop(key, None)
    _write_json(path, config)

    template = to_published(processor.chat_template)
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")

    images, videos = processor.image_processor.to_dict(), processor.video_processor.to_dict()
    videos.pop("video_processor_type", None)
    settings = {
        "auto_map": AUTO_MAP,
        "processor_class": AUTO_MAP["AutoProcessor"].partition(".")[2],
        **{key: images[key] for key in _IMAGE_KEYS},
        "min_pixels": images["size"]["shortest_edge"],
        "max_pixels": images["size"]["longest_edge"],
        "spatial_conv_size": images["merge_size"],
        "temporal_conv_size": videos["temporal_patch_size"],
        "video_processor": videos,
    }
    _write_json(directory / "preprocessor_config.json", settings)

    assert served.__file__ is not None
    for module in _MODULES:
        shutil.copyfile(Path(served.__file__).parent / module, directory / module)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
