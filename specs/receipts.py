"""Draws receipts as scanners deliver them, and what to read from each: a folder to train on.

python specs/receipts.py data/receipts [ROWS]
"""

import json
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SHOPS = ("Aldi", "Carrefour", "Coop", "Lidl", "Migros", "Spar", "Tesco", "Walmart")
ITEMS = ("Bread", "Butter", "Cheese", "Coffee", "Eggs", "Milk", "Rice", "Tea")


def draw(rng: random.Random) -> tuple[Image.Image, dict[str, object]]:
    """A receipt of 140 × 84 pixels, and its fields."""
    shop, items = rng.choice(SHOPS), rng.randint(1, 2)
    prices = [rng.randint(50, 2_000) / 100 for _ in range(items)]
    fields = {"shop": shop, "items": items, "total": round(sum(prices), 2)}
    lines = [(shop, ""), *((rng.choice(ITEMS), f"{price:.2f}") for price in prices)]
    picture = Image.new("L", (140, 84), rng.randint(235, 255))
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(rng.choice((14, 15, 16)))
    for number, (name, price) in enumerate([*lines, ("TOTAL", f"{fields['total']:.2f}")]):
        pen.text((5, 1 + 20 * number), name, font=font)
        pen.text((135, 1 + 20 * number), price, font=font, anchor="ra")
    return picture, fields


def main(folder: Path, rows: int) -> None:
    rng = random.Random(7)  # noqa: S311 - the same receipts every time
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as lines:
        for number in range(rows):
            picture, fields = draw(rng)
            picture.save(folder / f"{number:05}.png")
            row = {"image": f"{number:05}.png", "text": json.dumps(fields)}
            lines.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 4_000)
