"""Generates images of short receipts with their fields as labels: a folder and its `rows.jsonl`.

python specs/receipts.py data/receipts [ROWS]
"""

import argparse
import json
import random
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

SHOPS = ("Aldi", "Carrefour", "Coop", "Lidl", "Migros", "Spar", "Tesco", "Walmart")
# The font that builtin://ernie-vl-tiny was trained on; it comes with matplotlib.
FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "cmr10.ttf"


def draw(rng: random.Random) -> tuple[Image.Image, dict[str, object]]:
    """A receipt of 224 × 56 pixels, and its fields."""
    fields = {"shop": rng.choice(SHOPS), "total": rng.randint(100, 9_999) / 100}
    image = Image.new("L", (224, 56), rng.randint(235, 255))
    canvas, font = ImageDraw.Draw(image), ImageFont.truetype(str(FONT), rng.choice((20, 21, 22)))
    left = rng.randint(4, 16)
    canvas.text((left, 1), fields["shop"], font=font)
    canvas.text((left, 29), "TOTAL", font=font)
    canvas.text((212, 29), f"{fields['total']:.2f}", font=font, anchor="ra")
    return image, fields


def main(folder: Path, rows: int) -> None:
    rng = random.Random(7)  # noqa: S311 - the same receipts each time
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as lines:
        for number in range(rows):
            image, fields = draw(rng)
            image.save(folder / f"{number:05}.png")
            row = {"image": f"{number:05}.png", "text": json.dumps(fields)}
            lines.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="output folder")
    parser.add_argument("rows", type=int, nargs="?", default=4_000)
    main(**vars(parser.parse_args()))
