"""Measures sampled rows, in tokens if the model's tokenizer is at hand; without torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor, sqrt
from pathlib import Path
from typing import Any

from job import storage
from job.families import model_source
from job.families.tokenizer_files import read_json
from job.prep.rows import EncodedImage, Row

MARGIN, STEP = 1.5, 256
"""`max_length` is the longest sampled row times the margin, rounded up to a multiple of the step:
longer rows than the sampled ones are likely."""
_TOKENS_PER_MESSAGE = 10  # of the chat template, about
_PATCH, _MERGE = 14, 2  # of ERNIE-4.5-VL and Qwen-VL: a token for 28 × 28 pixels


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """The longest of the sampled rows; tokens are estimates."""

    tokenizer: str | None
    """The model whose tokenizer counted; None if tokens are estimated from characters."""
    row: int
    """Tokens of the longest row, images included."""
    images: int
    """Tokens of its images."""
    answer: int
    """Of the longest answer: tokens, or characters without a tokenizer."""

    @property
    def max_length(self) -> int:
        return -(-int(self.row * MARGIN) // STEP) * STEP


def measure(rows: Sequence[Row], model: str, instruction: str) -> Lengths:
    """The lengths of the rows, which must not be empty, for the model at a URI.

    `instruction` is what the rows' questions lack.
    """
    location = model_source.location(model)
    directory = storage.local_path(location) if storage.is_local(location) else None
    count = _tokenizer(directory) if directory is not None else None
    image_tokens = _ImageTokens.of(directory)
    tokens = count or _from_characters
    asked = tokens(instruction)
    found = []
    for row in rows:
        images = sum(map(image_tokens.count, row.images))
        text = sum(
            tokens(message.text + (message.reasoning or "")) + _TOKENS_PER_MESSAGE
            for message in row.messages
        )
        found.append((asked + text + images, images))
    longest, images = max(found)
    return Lengths(
        tokenizer=model if count is not None else None,
        row=longest,
        images=images,
        answer=max(count(row.answer) if count else len(row.answer) for row in rows),
    )


def _tokenizer(directory: Path) -> Callable[[str], int] | None:
    """Counts tokens as the model does; None without a `tokenizer.json` that can be read."""
    from tokenizers import Tokenizer

    path = directory / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception:  # noqa: BLE001 - the library raises nothing more specific
        return None
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def _from_characters(text: str) -> int:
    """An estimate that is rarely too low: formulas have about two characters per token, Chinese
    about one."""
    ascii_characters = sum(character.isascii() for character in text)
    return -(-ascii_characters // 2) + len(text) - ascii_characters


@dataclass(frozen=True, kw_only=True)
class _ImageTokens:
    """How the image processors of ERNIE-4.5-VL and Qwen-VL size an image."""

    side: int
    """Pixels of a token's square."""
    min_pixels: int
    max_pixels: int

    @classmethod
    def of(cls, directory: Path | None) -> "_ImageTokens":
        """The processor's settings, or those of ERNIE-4.5-VL where it has no such settings."""
        files = ("processor_config.json", "preprocessor_config.json")
        settings: dict[str, Any] = {}
        for config in (read_json(directory, name) for name in files) if directory else ():
            inner = config.get("image_processor")
            settings |= inner if isinstance(inner, dict) else config
        if "merge_size" not in settings:  # another kind of processor, whose sizes mean others
            settings = {}
        size = settings.get("size")
        settings |= size if isinstance(size, dict) else {}

        def number(*names: str, default: int) -> int:
            found = [settings[name] for name in names if isinstance(settings.get(name), int)]
            return int(found[0]) if found else default

        side = number("patch_size", default=_PATCH) * number("merge_size", default=_MERGE)
        return cls(
            side=side,
            min_pixels=number("min_pixels", "shortest_edge", default=4 * side**2),
            max_pixels=number("max_pixels", "longest_edge", default=6177 * side**2),
        )

    def count(self, image: EncodedImage) -> int:
        height, width, side = image.height, image.width, self.side
        rows, columns = max(1, round(height / side)), max(1, round(width / side))
        if rows * columns * side**2 > self.max_pixels:
            scale = sqrt(height * width / self.max_pixels)
            rows, columns = floor(height / scale / side), floor(width / scale / side)
        elif rows * columns * side**2 < self.min_pixels:
            scale = sqrt(self.min_pixels / (height * width))
            rows, columns = ceil(height * scale / side), ceil(width * scale / side)
        return max(1, rows) * max(1, columns)
