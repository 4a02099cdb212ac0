"""Draws the pictures of examples/ and writes their questions and true answers beside them.

python tools/train_demo/make_examples.py examples
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import world


def _paper(width: int, height: int, colour: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (width, height), colour)
    return image, ImageDraw.Draw(image)


def number() -> Image.Image:
    image, draw = _paper(224, 224, "#fbf6e9")
    face = ImageFont.truetype(str(world.fonts(held_out=True)[-1]), 84)
    draw.text((112, 112), "4821", font=face, fill="#1d3f8f", anchor="mm")
    return image


_STAR = [(448, 120), (528, 360), (784, 364), (580, 516), (654, 762)]
_STAR += [(448, 614), (242, 762), (316, 516), (112, 364), (368, 360)]


def star() -> Image.Image:
    big, draw = _paper(896, 896, "#eef4ff")
    draw.polygon(_STAR, fill="#d3202a")
    return big.resize((224, 224), Image.Resampling.BOX)


def sides() -> Image.Image:
    big, draw = _paper(1280, 896, "#fffaf2")
    draw.polygon([(80 + x // 2, 230 + y // 2) for x, y in _STAR], fill="#e08a00")
    draw.ellipse((760, 280, 1140, 660), outline="#2458c8", width=76)
    return big.resize((320, 224), Image.Resampling.BOX)


def circles() -> Image.Image:
    big, draw = _paper(896, 896, "#f6fff4")
    for x, y, r in ((220, 230, 92), (640, 190, 104), (300, 640, 104), (680, 610, 98)):
        draw.ellipse((x - r, y - r, x + r, y + r), fill="#1f8f3a")
    return big.resize((224, 224), Image.Resampling.BOX)


def flower() -> Image.Image:
    image, _ = _paper(480, 360, "#e8f1fb")
    names, sprites = world.emoji()
    sprite = Image.fromarray(sprites[names.index("sunflower")])
    sprite = sprite.resize((256, 256), Image.Resampling.LANCZOS)
    image.paste(sprite, (112, 52), sprite)
    return image


EXAMPLES = {
    "number.png": (number, "What number is written here?", "4821"),
    "star.png": (star, "What shape is it and what colour?", "red star"),
    "circles.png": (circles, "How many circles are there?", "4"),
    "sides.png": (sides, "Is the ring left or right of the star?", "right"),
    "flower.png": (flower, "What is in the picture?", "a sunflower"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    entries = []
    for name, (draw, question, answer) in EXAMPLES.items():
        draw().save(folder / name, optimize=True)
        entries.append({"picture": name, "question": question, "answer": answer})
    text = json.dumps(entries, indent=1) + "\n"
    (folder / "answers.json").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
