"""The processor of ERNIE-4.5-VL with the keys that vLLM reads: `images` and `grid_thw`.

Pictures are resized and cut by Transformers' own processor of this model; rescaling and
normalising is left to vLLM, which does both.
"""

import json
import os
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoTokenizer,
    BatchFeature,
    Ernie4_5_VLMoeImageProcessor,
    Ernie4_5_VLMoeVideoProcessor,
    ProcessorMixin,
)
from transformers.image_processing_utils import BaseImageProcessor

UNCHANGED = {"do_rescale": False, "do_normalize": False}


class Ernie45VLImageProcessor(BaseImageProcessor):
    """What vLLM asks about pictures: `size`, `image_mean`, `image_std`, `rescale_factor`."""

    model_input_names = ["images", "grid_thw"]  # noqa: RUF012 - as Transformers has it

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.image_mean, self.image_std = settings["image_mean"], settings["image_std"]
        self.rescale_factor = settings["rescale_factor"]
        self.patch_size, self.merge_size = settings["patch_size"], settings["merge_size"]
        self.min_pixels, self.max_pixels = settings["min_pixels"], settings["max_pixels"]
        self.size = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        cut = {"patch_size": self.patch_size, "merge_size": self.merge_size, **UNCHANGED}
        limits = {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels}
        self._images = Ernie4_5_VLMoeImageProcessor(size=limits, **cut)
        taken_as_given = {"do_sample_frames": False, "draw_on_frames": False}
        self._videos = Ernie4_5_VLMoeVideoProcessor(
            **{**settings.get("video_processor", {}), **cut, **taken_as_given}
        )

    def image(self, image: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches (N, 3 · patch_size²) with values 0 to 255, and the grid (1, 3)."""
        made = self._images(images=[image], return_tensors="pt")
        return made["pixel_values"], made["image_grid_thw"]

    def video(self, frames: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for a video's frames (frames, height, width, 3), an even number of them."""
        if len(frames) % 2:
            frames = np.concatenate([frames, frames[-1:]])
        made = self._videos(videos=[frames], return_tensors="pt")
        return made["pixel_values_videos"], made["video_grid_thw"]


class Ernie45VLProcessor(ProcessorMixin):
    attributes = ["tokenizer"]  # noqa: RUF012 - as Transformers has it
    tokenizer_class = "AutoTokenizer"
    supports_video_metadata = True

    def __init__(self, tokenizer: Any = None, settings: dict[str, Any] | None = None) -> None:
        assert settings is not None
        self.tokenizer = tokenizer
        self.chat_template = getattr(tokenizer, "chat_template", None)
        self.image_processor = Ernie45VLImageProcessor(settings)
        self.spatial_conv_size = settings["spatial_conv_size"]
        self.temporal_conv_size = settings["temporal_conv_size"]

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        **_: Any,
    ) -> "Ernie45VLProcessor":
        with open(os.path.join(path, "preprocessor_config.json"), encoding="utf-8") as file:  # noqa: PTH118, PTH123
            settings = json.load(file)
        settings["min_pixels"] = min_pixels or settings["min_pixels"]
        settings["max_pixels"] = max_pixels or settings["max_pixels"]
        return cls(AutoTokenizer.from_pretrained(path, trust_remote_code=True), settings)

    def __call__(
        self, text: Any = None, images: Any = None, videos: Any = None, **_: Any
    ) -> BatchFeature:
        fields = dict(
            self.tokenizer(text, return_tensors="pt", add_special_tokens=False, padding=True)
        )
        made = [self.image_processor.image(image) for image in images or ()]
        for video in videos or ():
            frames = video[0] if isinstance(video, tuple) else video
            made.append(self.image_processor.video(np.asarray(frames)))
        fields["images"] = torch.cat([patches for patches, _ in made]) if made else None
        fields["grid_thw"] = torch.cat([grid for _, grid in made]) if made else None
        return BatchFeature(fields)
