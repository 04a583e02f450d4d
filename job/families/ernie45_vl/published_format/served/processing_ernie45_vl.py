"""The processor of ERNIE-4.5-VL with the keys that vLLM reads: `images` and `grid_thw`.

Transformers' own processor resizes images and cuts them into patches; vLLM rescales and normalizes
them.
"""

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase

UNCHANGED = {"do_rescale": False, "do_normalize": False}


class Ernie45VLImageProcessor(BaseImageProcessor):
    """Has what vLLM reads: `size`, `image_mean`, `image_std` and `rescale_factor`."""

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
        frames_as_given = {"do_sample_frames": False, "draw_on_frames": False}
        self._videos = Ernie4_5_VLMoeVideoProcessor(
            **{**settings.get("video_processor", {}), **cut, **frames_as_given}
        )

    def image(self, image: "Image") -> tuple[torch.Tensor, torch.Tensor]:
        """Patches (N, 3 · patch_size²) with values from 0 to 255, and the grid (1, 3)."""
        output = self._images(images=[image], return_tensors="pt")
        return output["pixel_values"], output["image_grid_thw"]

    def video(self, frames: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for frames (frames, height, width, 3); repeats the last if they are odd."""
        if len(frames) % 2:
            frames = np.concatenate([frames, frames[-1:]])
        output = self._videos(videos=[frames], return_tensors="pt")
        return output["pixel_values_videos"], output["video_grid_thw"]


class Ernie45VLProcessor(ProcessorMixin):
    attributes = ["tokenizer"]  # noqa: RUF012 - as Transformers has it
    tokenizer_class = "AutoTokenizer"
    supports_video_metadata = True

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        assert tokenizer is not None
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
        **_: object,
    ) -> "Ernie45VLProcessor":
        with open(os.path.join(path, "preprocessor_config.json"), encoding="utf-8") as file:  # noqa: PTH118, PTH123
            settings = json.load(file)
        settings["min_pixels"] = min_pixels or settings["min_pixels"]
        settings["max_pixels"] = max_pixels or settings["max_pixels"]
        return cls(AutoTokenizer.from_pretrained(path, trust_remote_code=True), settings)

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: "Sequence[Image] | None" = None,
        videos: "Sequence[np.ndarray | tuple[np.ndarray, object]] | None" = None,
        **_: object,
    ) -> BatchFeature:
        fields = dict(
            self.tokenizer(text, return_tensors="pt", add_special_tokens=False, padding=True)
        )
        outputs = [self.image_processor.image(image) for image in images or ()]
        for video in videos or ():
            frames = video[0] if isinstance(video, tuple) else video
            outputs.append(self.image_processor.video(np.asarray(frames)))
        fields["images"] = torch.cat([patches for patches, _ in outputs]) if outputs else None
        fields["grid_thw"] = torch.cat([grid for _, grid in outputs]) if outputs else None
        return BatchFeature(fields)
