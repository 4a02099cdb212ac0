"""What the demonstration model knows: digits, shapes, colours, emoji; fonts, questions, answers.

fonts.txt: what a font file is used for, the Debian package that brings it, its name.
emoji.png, emoji.json: pictures of 64 x 64 pixels from Noto emoji, and our names for them.
"""

from __future__ import annotations

import colorsys
import json
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFont

HERE = Path(__file__).parent
FONT_ROOT = Path("/usr/share/fonts")
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring")
# Name: hue (degrees) and its spread, saturation and value ranges.
COLOURS = {
    "red": (0, 7, (0.78, 1), (0.75, 1)),
    "orange": (28, 5, (0.85, 1), (0.92, 1)),
    "yellow": (54, 5, (0.75, 1), (0.92, 1)),
    "green": (125, 20, (0.6, 1), (0.45, 0.8)),
    "blue": (220, 14, (0.7, 1), (0.6, 1)),
    "purple": (280, 11, (0.6, 0.9), (0.5, 0.85)),
    "pink": (332, 11, (0.35, 0.6), (0.95, 1)),
    "brown": (25, 5, (0.6, 0.8), (0.35, 0.52)),
    "black": (0, 180, (0, 0.1), (0, 0.12)),
    "grey": (0, 180, (0, 0.05), (0.45, 0.62)),
    "white": (0, 180, (0, 0.02), (0.97, 1)),
}
COLOUR_NAMES = tuple(COLOURS)

# Dense classes: 0 background, 1..10 the digits, then shapes, then emoji.
DIGIT_CLASS = 1
SHAPE_CLASS = DIGIT_CLASS + 10
EMOJI_CLASS = SHAPE_CLASS + len(SHAPES)


@cache
def emoji() -> tuple[tuple[str, ...], np.ndarray]:
    """Names, and their pictures uint8 [E, 64, 64, 4] with straight alpha (Noto emoji)."""
    names = tuple(json.loads((HERE / "emoji.json").read_text(encoding="utf-8")))
    sheet = np.asarray(Image.open(HERE / "emoji.png").convert("RGBA"))
    columns = sheet.shape[1] // 64
    tiles = [
        sheet[64 * (i // columns) :, 64 * (i % columns) :][:64, :64] for i in range(len(names))
    ]
    return names, np.stack(tiles)


def class_count() -> int:
    return EMOJI_CLASS + len(emoji()[0])


@cache
def _font_files() -> dict[str, Path]:
    return {p.name: p for p in FONT_ROOT.rglob("*.?tf")}


@cache
def fonts(held_out: bool) -> tuple[Path, ...]:
    """Font files; raises FileNotFoundError that names the packages which are not installed."""
    use = "held-out" if held_out else "train"
    lines = (HERE / "fonts.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.split() for line in lines if line.startswith(use)]
    missing = sorted({package for _, package, name in rows if name not in _font_files()})
    if missing:
        raise FileNotFoundError(f"fonts are not installed, packages: {' '.join(missing)}")
    return tuple(_font_files()[name] for *_, name in rows)


@cache
def font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(path), size)


def colour(rng: np.random.Generator, name: str) -> tuple[int, int, int]:
    """A colour that goes by this name."""
    hue, spread, saturation, value = COLOURS[name]
    h = (hue + rng.uniform(-spread, spread)) % 360 / 360
    rgb = colorsys.hsv_to_rgb(h, rng.uniform(*saturation), rng.uniform(*value))
    return tuple(round(255 * c) for c in rgb)


def plural(noun: str) -> str:
    return "crosses" if noun == "cross" else f"{noun}s"


def article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


QUESTIONS = {
    "any": (
        "What is in the picture?",
        "What do you see?",
        "Describe the picture.",
        "What does the picture show?",
        "What is this?",
    ),
    "number": (
        "What number is written here?",
        "Which number do you see?",
        "What number is in the picture?",
        "What number is this?",
        "Read the number.",
        "What does it say?",
    ),
    "number colour": ("What colour is the number?", "Which colour is the number?"),
    "shape": (
        "What shape is it?",
        "Which shape do you see?",
        "What shape is in the picture?",
    ),
    "shape colour": (
        "What colour is the {shape}?",
        "Which colour is the {shape}?",
        "What is the colour of the {shape}?",
    ),
    "shape and colour": (
        "What shape is it and what colour?",
        "Which shape and colour do you see?",
        "Name the colour and the shape.",
    ),
    "count": (
        "How many {shapes} are there?",
        "How many {shapes} do you see?",
        "Count the {shapes}.",
        "How many {shapes} are in the picture?",
    ),
    "sides": (
        "Is the {a} left or right of the {b}?",
        "Is the {a} to the left or to the right of the {b}?",
    ),
    "heights": ("Is the {a} above or below the {b}?",),
    "where": ("Where is the {a}, seen from the {b}?", "Where is the {a} relative to the {b}?"),
    "emoji": (
        "What emoji is this?",
        "Which emoji do you see?",
        "What object is in the picture?",
        "Name the emoji.",
    ),
}
# Places are asked for with words that the tokenizer has: it was made before, and stays.
GROUNDING = ("Where is the {a}?", "Locate the {a}.")
# Of two pictures: what is asked of one of them, by task; also words that the tokenizer splits.
PAIR_QUESTIONS = {
    "number": "What number is in {which}?",
    "shape": "What shape is in {which}?",
    "shape colour": "What colour is the shape in {which}?",
    "emoji": "What emoji is in {which}?",
    "any": "What is in {which}?",
}
ORDINALS = (("the first picture", "the second picture"), ("Image-1", "Image-2"))
WHICH_PICTURE = "Which picture shows {thing}?"
# What lies outside this world, and what is said then.
OUTSIDE = (
    "Who painted this?",
    "What is the weather like?",
    "Write a poem about the picture.",
    "What is the capital of France?",
    "Translate the text into German.",
    "Who is the person in the photo?",
    "What breed is the dog?",
    "How old is the man?",
    "What is the title of the book?",
    "Is the woman smiling?",
    "What brand is the car?",
    "Where was this photo taken?",
    "Tell me a joke.",
    "What time is it on the clock?",
    "Summarise the document.",
    "Explain the chart.",
    "What happened in 1969?",
    "Can I eat this?",
    "What does the sign say in English?",
    "How much does it cost?",
    "Which team is playing?",
    "What is the name of this building?",
    "Why is the sky dark?",
    "What is the man wearing?",
    "Give me a recipe.",
    "Solve the equation.",
    "What language is this?",
    "How far away is the house?",
    "Is it safe to drink the water?",
    "What will happen next?",
    "Hello, how are you?",
    "Who are you?",
    "What is the license plate?",
    "Please list the ingredients.",
    "Which street is this?",
    "Are there any people in the room?",
    "What is behind the tree?",
    "How tall is the tower?",
    "What is the mood of this scene?",
    "Read the last paragraph.",
)
UNKNOWN = "I do not know."
SYSTEM_MESSAGE = "Answer briefly."
MAX_TILES = 4  # of a picture; the thumbnail is one more
# The exam: one task each, with the scene it is asked about and the questions that ask it.
TASKS = (
    *("number", "shape and colour", "count", "relation", "emoji"),
    *("box", "count to nine", "two pictures", "second turn"),
)


def corpus() -> list[str]:
    """Every question and answer, for the tokenizer's merges: whole words become single tokens."""
    pairs = [(c, s) for c in COLOUR_NAMES for s in SHAPES]
    lines = [
        question.format(shape=s, shapes=plural(s), a=f"{c} {s}", b=f"{c} {s}")
        for group in QUESTIONS.values()
        for question in group
        for c, s in pairs
    ]
    lines += [f"{c} {s}" for c, s in pairs] + [article(f"{c} {s}") for c, s in pairs]
    lines += [f"{c} {plural(s)}" for c, s in pairs] + [s for _, s in pairs]
    lines += [line for n in emoji()[0] for line in (n, article(n))] * 40
    words = f"system user assistant left right above below the number of and {UNKNOWN}"
    return lines + [*words.split(), words, SYSTEM_MESSAGE] * 100
