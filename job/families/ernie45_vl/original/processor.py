"""Tokenizer, picture settings and chat template in the published layout."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from job.families.ernie45_vl.original import served

AUTO_MAP = {
    "AutoConfig": "configuration_ernie45_vl.Ernie45VLConfig",
    "AutoProcessor": "processing_ernie45_vl.Ernie45VLProcessor",
}
_MODULES = ("configuration_ernie45_vl.py", "processing_ernie45_vl.py")

# What stands for a picture in a template, published and in Transformers; servers look for the
# first and put the second in its place, as often as the picture has tokens.
PLACEHOLDERS = (
    ("<|image@placeholder|>", "<|IMAGE_PLACEHOLDER|>"),
    ("<|video@placeholder|>", "<|VIDEO_PLACEHOLDER|>"),
)
_GENERATION_MARK = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")


def write(processor: Any, directory: Path) -> None:
    """Writes everything of a checkpoint that is neither weights nor configuration of the model."""
    tokenizer = processor.tokenizer
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # A class of the other layout, and where this process found its tokenizer.
    for key in ("processor_class", "is_local", "local_files_only"):
        config.pop(key, None)
    _write_json(path, config)

    template = _GENERATION_MARK.sub("", processor.chat_template)
    for published, native in PLACEHOLDERS:
        template = template.replace(native, published)
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")

    images, videos = processor.image_processor.to_dict(), processor.video_processor.to_dict()
    videos.pop("video_processor_type", None)
    settings = {
        "auto_map": AUTO_MAP,
        "processor_class": AUTO_MAP["AutoProcessor"].partition(".")[2],
        **{
            key: images[key]
            for key in (
                *("do_convert_rgb", "do_normalize", "do_rescale", "do_resize", "resample"),
                *("image_mean", "image_std", "rescale_factor", "patch_size", "merge_size"),
            )
        },
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
