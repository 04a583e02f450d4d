"""Images in every mode of Pillow look in RGB as they do in their own, or are refused."""

import base64
import io
import struct
import zlib
from typing import Any

import numpy as np
import PIL.Image
import pytest
from PIL import Image, ImageCms

from job.export.vllm_proof import chat_message
from job.prep.colors import to_rgb
from job.prep.images import ImageRefused, decode, inspect
from job.prep.rows import Message, Part

RAMP = np.tile(np.arange(256, dtype=np.uint8), (8, 1))  # (8, 256): from black to white
WIDE = RAMP.astype(np.uint16)
RED_TO_BLUE = np.stack([RAMP, np.full_like(RAMP, 90), 255 - RAMP], axis=-1)  # (8, 256, 3)
ALPHA = np.full_like(RAMP, 128)
HALF = ((RAMP.astype(int) * 128 + 255 * 127) / 255).round()  # the ramp at half on white


def grey(levels: np.ndarray) -> np.ndarray:
    return np.stack([levels] * 3, axis=-1)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(bits: int, kind: int, values: np.ndarray, key: bytes) -> bytes:
    """A PNG of 256 × 8 as Pillow writes none; `key` is its transparent color, if any."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", 256, 8, bits, kind, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    before = [(b"IHDR", header), *([(b"tRNS", key)] if key else [])]
    chunks = [*before, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


def tiff(
    data: bytes, bits: tuple[int, ...], *, photometric: int = 1, sample: int = 1, extra: int = -1
) -> bytes:
    """A TIFF of 256 × 8 whose samples Pillow reads and does not write."""
    shorts = {256: 256, 257: 8, 259: 1, 262: photometric, 277: len(bits), 339: sample}
    if extra >= 0:
        shorts[338] = extra
    entries = {tag: struct.pack("<HHII", tag, 3, 1, value) for tag, value in shorts.items()}
    start = 8 + 2 + 12 * (len(entries) + 3) + 4
    told = struct.pack(f"<{len(bits)}H", *bits)
    inline = len(told) <= 4
    entries[258] = struct.pack("<HHI", 258, 3, len(bits)) + (
        told.ljust(4, b"\0") if inline else struct.pack("<I", start)
    )
    strip = start + (0 if inline else len(told))
    entries[273] = struct.pack("<HHII", 273, 4, 1, strip)
    entries[279] = struct.pack("<HHII", 279, 4, 1, len(data))
    table = b"".join(entries[tag] for tag in sorted(entries))
    head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + bytes(4)
    return head + (b"" if inline else told) + data


def packed(values: np.ndarray, bits: int) -> np.ndarray:
    """Rows of samples with fewer than 8 bits, or with 12, as bytes."""
    wide = np.unpackbits(values.astype(">u2").view(np.uint8), axis=1)
    samples = wide.reshape(len(values), -1, 16)[:, :, 16 - bits :]
    return np.packbits(samples.reshape(len(values), -1), axis=1)


def of_mode(mode: str) -> Image.Image:
    return Image.fromarray(RED_TO_BLUE).convert(mode)


def lab() -> Image.Image:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    transform = ImageCms.buildTransform(*profiles, "RGB", "LAB")
    found = ImageCms.applyTransform(Image.fromarray(RED_TO_BLUE), transform)
    assert found is not None
    return found


def with_alpha(image: Image.Image, mode: str | None = None) -> Image.Image:
    image = image.copy()
    image.putalpha(Image.fromarray(ALPHA))
    return image if mode is None else image.convert(mode)


FOUR = (RAMP >> 4) * 17  # what 4 bits hold of the ramp
TWO = (RAMP >> 6) * 85
RED_ON_WHITE = ((RED_TO_BLUE.astype(int) * 128 + 255 * 127) / 255).round()
CLEAR = np.where(RAMP == 0, 255, RAMP)  # the ramp whose black is transparent
PREMULTIPLIED = np.stack([RAMP // 2, ALPHA], axis=-1)

# The file, what it shows, and by how much a level may be off.
FILES: dict[str, tuple[bytes, np.ndarray, int]] = {
    "1": (
        saved(Image.fromarray(RAMP).convert("1", dither=Image.Dither.NONE), "PNG"),
        grey(np.where(RAMP > 127, 255, 0)),
        0,
    ),
    "L": (saved(Image.fromarray(RAMP), "PNG"), grey(RAMP), 0),
    "L, 2 bits and a transparent black": (
        png(2, 0, packed(WIDE >> 6, 2), b"\0\0"),
        grey(np.where(TWO == 0, 255, TWO)),
        0,
    ),
    "L, 4 bits and a transparent grey": (
        png(4, 0, packed(WIDE >> 4, 4), b"\0\7"),
        grey(np.where(FOUR == 7 * 17, 255, FOUR)),
        0,
    ),
    "I;16": (saved(Image.fromarray(WIDE * 257), "PNG"), grey(RAMP), 0),
    "I;16 with a transparent black": (
        png(16, 0, (WIDE * 257).astype(">u2"), b"\0\0"),
        grey(CLEAR),
        0,
    ),
    "I;16 of 8 bits and zeros": (saved(Image.fromarray(WIDE * 256), "TIFF"), grey(RAMP), 0),
    "I;16 of 12 bits": (tiff(packed(WIDE * 16 + 15, 12).tobytes(), (12,)), grey(RAMP), 0),
    "I;16, white is zero": (
        tiff((65_535 - WIDE * 257).tobytes(), (16,), photometric=0),
        grey(RAMP),
        0,
    ),
    "I;16B": (
        saved(Image.fromarray((WIDE * 257).astype(">u2")), "TIFF", big_tiff=False),
        grey(RAMP),
        0,
    ),
    "I": (
        saved(Image.fromarray(RAMP.astype(np.int32) << 23), "TIFF"),
        grey(RAMP),
        0,
    ),
    "I without a sign": (tiff((RAMP.astype("<u4") << 24).tobytes(), (32,)), grey(RAMP), 0),
    "I of 16 bits": (
        tiff((RAMP.astype("<i2") << 7).tobytes(), (16,), sample=2),
        grey(RAMP),
        0,
    ),
    "F": (saved(Image.fromarray((RAMP / 255).astype(np.float32)), "TIFF"), grey(RAMP), 0),
    "F, white is zero": (
        tiff((1 - RAMP / 255).astype("<f4").tobytes(), (32,), photometric=0, sample=3),
        grey(RAMP),
        0,
    ),
    "LA": (saved(with_alpha(Image.fromarray(RAMP)), "PNG"), grey(HALF), 1),
    "LA, 16 bits": (
        png(16, 4, (np.stack([WIDE, ALPHA.astype(np.uint16)], -1) * 257).astype(">u2"), b""),
        grey(HALF),
        1,
    ),
    "La": (tiff(PREMULTIPLIED.tobytes(), (8, 8), extra=1), grey(HALF), 3),
    "P": (saved(Image.fromarray(RAMP).convert("P"), "PNG"), grey(RAMP), 0),
    "P with a transparent black": (
        saved(Image.fromarray(RAMP).convert("P"), "PNG", transparency=0),
        grey(CLEAR),
        0,
    ),
    "P, a GIF": (saved(Image.fromarray(RAMP), "GIF"), grey(RAMP), 0),
    "RGB": (saved(of_mode("RGB"), "PNG"), RED_TO_BLUE, 0),
    "RGB, 16 bits": (
        png(16, 2, (RED_TO_BLUE.astype(np.uint16) * 257).astype(">u2"), b""),
        RED_TO_BLUE,
        0,
    ),
    "RGB, a JPEG": (saved(of_mode("RGB"), "JPEG", quality=100), RED_TO_BLUE, 6),
    "RGB with a transparent color": (
        saved(of_mode("RGB"), "PNG", transparency=(0, 90, 255)),
        np.where((RAMP == 0)[:, :, None], 255, RED_TO_BLUE),
        0,
    ),
    "RGBA": (saved(with_alpha(of_mode("RGB")), "WEBP", lossless=True), RED_ON_WHITE, 1),
    "RGBA, a TIFF": (saved(with_alpha(of_mode("RGB")), "TIFF"), RED_ON_WHITE, 1),
    "RGBa": (
        tiff(
            with_alpha(of_mode("RGB"), "RGBa").tobytes(),
            (8, 8, 8, 8),
            photometric=2,
            extra=1,
        ),
        RED_ON_WHITE,
        3,
    ),
    "RGBX": (saved(of_mode("RGBX"), "TIFF"), RED_TO_BLUE, 0),
    "CMYK": (saved(of_mode("CMYK"), "TIFF"), RED_TO_BLUE, 1),
    "CMYK as Adobe writes it": (saved(of_mode("CMYK"), "JPEG", quality=100), RED_TO_BLUE, 6),
    "YCbCr": (saved(of_mode("YCbCr"), "TIFF"), RED_TO_BLUE, 3),
    "LAB": (saved(lab(), "TIFF"), RED_TO_BLUE, 24),  # a step of it is as many of a dark red
}
# Modes that no format taken stores, or not with these samples.
IN_MEMORY: dict[str, tuple[Image.Image, np.ndarray, int]] = {
    "HSV": (of_mode("HSV"), RED_TO_BLUE, 6),
    "I;16L": (Image.frombytes("I;16L", (256, 8), (WIDE * 257).astype("<u2").tobytes()),
              grey(RAMP), 0),
    "I;16N": (Image.frombytes("I;16N", (256, 8), (WIDE * 257).tobytes()), grey(RAMP), 0),
    "PA": (with_alpha(Image.fromarray(RAMP).convert("P"), "PA"), grey(HALF), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_gradient_is_the_same_gradient_in_rgb(name: str) -> None:
    data, expected, off = FILES[name]
    found = np.asarray(decode(inspect(data)))
    assert np.abs(found.astype(int) - expected).max() <= off


@pytest.mark.parametrize("name", IN_MEMORY)
def test_a_gradient_that_no_file_holds_is_the_same_too(name: str) -> None:
    image, expected, off = IN_MEMORY[name]
    assert np.abs(np.asarray(to_rgb(image)).astype(int) - expected).max() <= off


def test_every_mode_of_pillow_has_its_gradient() -> None:
    assert set(PIL.Image.MODES) <= {*FILES, *IN_MEMORY}


def strokes(color: str, ground: tuple[int, int, int, int] = (0, 0, 0, 0)) -> Image.Image:
    image = Image.new("RGBA", (64, 40), ground)
    image.paste(color, (10, 10, 30, 14))
    return image


REFUSED = {
    "32 bits with values of 16": (
        saved(Image.fromarray(WIDE.astype(np.int32) * 257), "TIFF"),
        "up to 65535 where white is 2147483647",
    ),
    "16 bits with values of 12": (saved(Image.fromarray(WIDE * 16), "PNG"), "up to 4080"),
    "negative levels": (saved(Image.fromarray(RAMP.astype(np.int32) - 9), "TIFF"), "from -9"),
    "floats to 255": (saved(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), "from 0 to 255"),
    "floats below 0": (
        saved(Image.fromarray(RAMP.astype(np.float32) / 255 - 0.1), "TIFF"),
        "from -0.1",
    ),
    "a float that is none": (
        saved(Image.fromarray(np.where(RAMP == 9, np.nan, 0).astype(np.float32)), "TIFF"),
        "floats from nan",
    ),
    "colors of 16 bits, one of them transparent": (
        png(16, 2, (RED_TO_BLUE.astype(np.uint16) * 257).astype(">u2"), bytes(6)),
        "tRNS",
    ),
    "white on clear": (saved(strokes("white"), "PNG"), "white on a transparent background"),
    "everything clear": (
        saved(Image.merge("RGBA", [*of_mode("RGB").split(), Image.new("L", (256, 8))]), "PNG"),
        "fully transparent",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_rgb_cannot_show_is_refused_with_its_reason(name: str) -> None:
    data, reason = REFUSED[name]
    with pytest.raises(ImageRefused, match=reason):
        inspect(data)


@pytest.mark.parametrize(
    ("image", "stroke"),
    [(strokes("black"), 0), (strokes("white", (0, 0, 0, 255)), 255)],
    ids=["black on clear", "white on black"],
)
def test_strokes_differ_from_their_ground(image: Image.Image, stroke: int) -> None:
    shown = decode(inspect(saved(image, "PNG")))
    assert shown.getpixel((12, 12)) == (stroke,) * 3
    assert shown.getpixel((2, 2)) == (255 - stroke,) * 3


@pytest.mark.parametrize("clear", [False, True], ids=["RGB", "transparent"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG"])
@pytest.mark.parametrize("turned", range(1, 9))
def test_an_image_is_upright_by_exif_in_every_format(kind: str, turned: int, clear: bool) -> None:
    if clear and kind == "JPEG":
        return  # it knows no transparency
    upright = Image.new("RGB", (24, 16), "white")
    upright.paste("black", (0, 0, 8, 8))  # the corner at the top left
    stored = {
        1: lambda image: image,
        2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda image: image.transpose(Image.Transpose.ROTATE_180),
        4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
        6: lambda image: image.transpose(Image.Transpose.ROTATE_90),
        7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
        8: lambda image: image.transpose(Image.Transpose.ROTATE_270),
    }[turned](upright.copy())
    if clear:
        stored.putalpha(stored.convert("L").point(lambda level: 255 - level))
    exif = Image.Exif()
    exif[0x0112] = turned
    told = inspect(saved(stored, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {})))
    shown = decode(told)
    assert (told.width, told.height) == shown.size == (24, 16)
    assert np.abs(np.asarray(shown).astype(int) - np.asarray(upright)).max() < 40


def test_a_probe_of_vllm_is_sent_as_it_is_trained() -> None:
    image = inspect(FILES["I;16"][0])  # of which vLLM itself would make a white one
    sent = chat_message(Message(role="user", parts=(Part(image=0),)), [image])["content"][0]
    data = base64.b64decode(sent["image_url"]["url"].partition(",")[2])
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), grey(RAMP))
