"""Pictures of the demonstration model's world, what lies in every patch, and questions about them.

A picture is a pure function of its generator: `scene(rng, ...)` draws one that can be asked about,
`page(rng, ...)` one that is full of things for the vision tower to learn from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image, ImageDraw

import world

PATCH = 14
IGNORE = -100
_FINE = 4  # most shapes are drawn this much larger and reduced: smooth edges


@dataclass
class Item:
    """Something in a picture: its dense class, colour (None for emoji) and box (x0, y0, x1, y1)."""

    kind: int
    colour: str | None
    box: tuple[float, float, float, float]


@dataclass
class Picture:
    """pixels uint8 [height, width, 3]; turns: (task, question, answer) to choose from.

    named: what the turns call a thing, and which of the items it is. first: a picture that is
    shown before this one; the turns are then about both.
    """

    pixels: np.ndarray
    items: list[Item]
    turns: list[tuple[str, str, str]] = field(default_factory=list)
    named: dict[str, list[int]] = field(default_factory=dict)
    first: Picture | None = None

    def resized(self, side: int) -> Picture:
        """Squeezed into a square, as a thumbnail is."""
        height, width = self.pixels.shape[:2]
        image = Image.fromarray(self.pixels).resize((side, side), Image.Resampling.BICUBIC)
        sx, sy = side / width, side / height
        items = [
            Item(i.kind, i.colour, (i.box[0] * sx, i.box[1] * sy, i.box[2] * sx, i.box[3] * sy))
            for i in self.items
        ]
        return replace(self, pixels=np.array(image), items=items)

    def box(self, name: str) -> np.ndarray:
        """Around all that goes by this name, (x0, y0, x1, y1) in pixels."""
        return _around([self.items[i] for i in self.named[name]])

    def labels(self) -> dict[str, np.ndarray]:
        """What is known of every patch of a square picture, row by row.

        kinds, colours: dense class and colour int64 [n], or IGNORE; boxes: of the thing that lies
        there, in patches, float32 [n, 4]; centres: 1 where a thing has its centre, float32 [n].
        """
        g = self.pixels.shape[0] // PATCH
        kinds, colours = np.zeros((g, g), np.int64), np.full((g, g), IGNORE, np.int64)
        boxes, centres = np.zeros((g, g, 4), np.float32), np.zeros((g, g), np.float32)
        for item in self.items:
            x0, y0, x1, y1 = (v / PATCH for v in item.box)
            touched = kinds[_floor(y0, g) : _floor(y1, g) + 1, _floor(x0, g) : _floor(x1, g) + 1]
            touched[touched == 0] = IGNORE
            rows, columns = _covered(y0, y1, g), _covered(x0, x1, g)
            kinds[rows, columns] = item.kind
            boxes[rows, columns] = x0, y0, x1, y1
            centres[_floor((y0 + y1) / 2, g), _floor((x0 + x1) / 2, g)] = 1
            if item.colour is not None:
                colours[rows, columns] = world.COLOUR_NAMES.index(item.colour)
        return {
            "kinds": kinds.ravel(),
            "colours": colours.ravel(),
            "boxes": boxes.reshape(-1, 4),
            "centres": centres.ravel(),
        }


def _around(items: list[Item]) -> np.ndarray:
    boxes = np.array([item.box for item in items])
    return np.concatenate((boxes[:, :2].min(0), boxes[:, 2:].max(0)))


def _floor(v: float, g: int) -> int:
    return min(max(math.floor(v), 0), g - 1)


def _covered(low: float, high: float, g: int) -> slice:
    """The patches whose centres lie within; the nearest one where none does."""
    first, last = math.ceil(low - 0.5), math.floor(high - 0.5)
    if last < first:
        first = last = _floor((low + high) / 2, g)
    return slice(max(first, 0), min(last, g - 1) + 1)


class Canvas:
    """A picture being drawn: keeps things apart and readable against the background."""

    def __init__(self, rng: np.random.Generator, width: int, height: int) -> None:
        self.rng, self.width, self.height, self.items = rng, width, height, []
        self.named: dict[str, list[int]] = {}
        self.size = min(width, height)
        kind = rng.random()
        level = rng.uniform(225, 256) if kind < 0.7 else rng.uniform(0, 45) if kind < 0.85 else 128
        tint = rng.uniform(-22, 22, 3) if kind < 0.85 else rng.uniform(-100, 100, 3)
        self.base = np.clip(level + tint, 0, 255)
        ground = np.broadcast_to(self.base, (height, width, 3))
        if rng.random() < 0.25:  # a gentle slope
            reach = rng.uniform(-18, 18, 3)
            if rng.random() < 0.5:
                ground = ground + np.linspace(-1, 1, height)[:, None, None] * reach
            else:
                ground = ground + np.linspace(-1, 1, width)[:, None] * reach
        if rng.random() < 0.2:
            ground = ground + rng.normal(0, rng.uniform(2, 8), (height, width, 3))
        self.image = Image.fromarray(np.clip(ground, 0, 255).astype(np.uint8))

    def picture(self) -> Picture:
        return Picture(np.array(self.image), self.items, named=self.named)

    def ink(self, name: str | None = None, least: float = 110) -> tuple[str, tuple[int, int, int]]:
        """A colour, by name if given, that stands out from the background."""
        names = list(world.COLOUR_NAMES) if name is None else [name]
        for _ in range(60):
            chosen = names[self.rng.integers(len(names))]
            rgb = world.colour(self.rng, chosen)
            if np.abs(np.asarray(rgb) - self.base).sum() > least:
                return chosen, rgb
        return "black", (0, 0, 0)

    def least(self, side: float, share: float) -> int:
        """The smallest side of a thing: it has to be seen in the thumbnail too."""
        return int(max(side, share * self.size))

    def located(self, name: str) -> tuple[str, str, str]:
        """A turn that asks where what is called `name` is: InternVL's box, in thousandths."""
        corners = _around([self.items[i] for i in self.named[name]])
        parts = corners / np.tile((self.width, self.height), 2)
        numbers = ", ".join(f"{round(1000 * min(max(v, 0), 0.999)):03d}" for v in parts)
        question = world.GROUNDING[self.rng.integers(len(world.GROUNDING))]
        return "box", question.format(a=name), f"<ref>{name}</ref><box>[[{numbers}]]</box>"

    def free(self, width: float, height: float, gap: float = 3) -> tuple[int, int] | None:
        """A place for a box that touches no other, or None if there seems to be none."""
        if width > self.width or height > self.height:
            return None
        for _ in range(25):
            x = int(self.rng.integers(0, int(self.width - width) + 1))
            y = int(self.rng.integers(0, int(self.height - height) + 1))
            if all(
                x >= b[2] + gap
                or x + width <= b[0] - gap
                or y >= b[3] + gap
                or y + height <= b[1] - gap
                for b in (item.box for item in self.items)
            ):
                return x, y
        return None

    def number(self, text: str, height: int, held_out: bool) -> str | None:
        """Writes digits `height` pixels high; the name of their colour, None if they do not fit."""
        files = world.fonts(held_out)
        path = files[self.rng.integers(len(files))]
        probe = world.font(path, 64).getbbox("0")
        face = world.font(path, max(8, round(64 * height / (probe[3] - probe[1]))))
        x0, y0, x1, y1 = face.getbbox(text)
        at = self.free(x1 - x0, y1 - y0)
        if at is None:
            return None
        name, rgb = self.ink(least=200)
        x, y = at[0] - x0, at[1] - y0
        ImageDraw.Draw(self.image).text((x, y), text, font=face, fill=rgb)
        for i, digit in enumerate(text):
            left = x + face.getlength(text[:i])
            a, b, c, d = face.getbbox(digit)
            box = (left + a, y + b, left + c, y + d)
            self.items.append(Item(world.DIGIT_CLASS + int(digit), name, box))
        return name

    def shape(self, noun: str, colour: str, side: int, at: tuple[int, int]) -> None:
        big = side * (_FINE if self.rng.random() < 0.75 else 1)
        mask = Image.new("L", (big, big))
        _SHAPES[noun](ImageDraw.Draw(mask), big - 1)
        turn = self.rng.uniform(-12, 12)
        if noun not in ("circle", "ring") and self.rng.random() < 0.5:
            mask = mask.rotate(turn, Image.Resampling.BILINEAR)
        mask = mask.resize((side, side), Image.Resampling.BOX)
        _, rgb = self.ink(colour, 0)
        self.image.paste(rgb, (*at, at[0] + side, at[1] + side), mask)
        box = (*at, at[0] + side, at[1] + side)
        self.items.append(Item(world.SHAPE_CLASS + world.SHAPES.index(noun), colour, box))

    def emoji(self, index: int, side: int, at: tuple[int, int]) -> None:
        sprite = Image.fromarray(world.emoji()[1][index])
        if self.rng.random() < 0.3:
            sprite = sprite.rotate(self.rng.uniform(-12, 12), Image.Resampling.BICUBIC)
        sprite = sprite.resize((side, side), Image.Resampling.BICUBIC)
        self.image.paste(sprite, at, sprite)
        box = (*at, at[0] + side, at[1] + side)
        self.items.append(Item(world.EMOJI_CLASS + index, None, box))


def _polygon(points: list[tuple[float, float]]) -> callable:
    return lambda draw, s: draw.polygon([(x * s, y * s) for x, y in points], fill=255)


def _star() -> list[tuple[float, float]]:
    radii = [0.5 if i % 2 == 0 else 0.2 for i in range(10)]
    turns = [math.pi * (i / 5 - 0.5) for i in range(10)]
    return [
        (0.5 + r * math.cos(t), 0.53 + r * math.sin(t)) for r, t in zip(radii, turns, strict=True)
    ]


def _heart() -> list[tuple[float, float]]:
    turns = [2 * math.pi * i / 48 for i in range(48)]
    xs = [16 * math.sin(t) ** 3 for t in turns]
    ys = [
        -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))
        for t in turns
    ]
    return [(0.5 + x / 34, 0.46 + y / 34) for x, y in zip(xs, ys, strict=True)]


_CROSS = [(0.33, 0), (0.67, 0), (0.67, 0.33), (1, 0.33), (1, 0.67), (0.67, 0.67)]
_CROSS += [(1 - x, 1 - y) for x, y in _CROSS]
_SHAPES = {
    "circle": lambda draw, s: draw.ellipse((0, 0, s, s), fill=255),
    "square": lambda draw, s: draw.rectangle((0.07 * s, 0.07 * s, 0.93 * s, 0.93 * s), fill=255),
    "triangle": _polygon([(0.5, 0.04), (1, 0.93), (0, 0.93)]),
    "star": _polygon(_star()),
    "heart": _polygon(_heart()),
    "diamond": _polygon([(0.5, 0), (0.88, 0.5), (0.5, 1), (0.12, 0.5)]),
    "cross": _polygon(_CROSS),
    "ring": lambda draw, s: draw.ellipse((0, 0, s, s), outline=255, width=max(1, round(0.2 * s))),
}


def _digits(rng: np.random.Generator, length: int) -> str:
    return "".join(str(d) for d in rng.integers(0, 10, length))


def _between(rng: np.random.Generator, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def page(rng: np.random.Generator, size: int, held_out: bool = False) -> Picture:
    """A picture full of digits, shapes and emoji, for dense labels; nothing is asked about it.

    Some hold a few large things: each is then spread over many patches, which must help each other.
    """
    canvas = Canvas(rng, size, size)
    large = size > 112 and rng.random() < 0.4
    low, high, share = (0.2 * size, 0.75 * size, 1.5) if large else (18, 48, 4 * (size / 224) ** 2)
    for _ in range(round(rng.uniform(4, 8) * share)):
        kind = rng.random()
        reach = (low, high) if rng.random() < 0.8 else (18, 0.8 * size)
        side = int(_between(rng, *reach))
        if kind < 0.6:
            canvas.number(_digits(rng, int(rng.integers(1, 4))), side, held_out)
            continue
        side = int(1.15 * side)
        at = canvas.free(side, side)
        if at is None:
            continue
        if kind < 0.78:
            noun = world.SHAPES[rng.integers(len(world.SHAPES))]
            canvas.shape(noun, canvas.ink()[0], side, at)
        else:
            canvas.emoji(int(rng.integers(len(world.emoji()[0]))), side, at)
    return canvas.picture()


def scene(
    rng: np.random.Generator, task: str, width: int, height: int, held_out: bool = False
) -> Picture:
    """A picture for one of _SCENES with all its turns; turns[0] is the one that names it."""
    while True:
        canvas = Canvas(rng, width, height)
        turns = _SCENES[task](canvas, rng, held_out)
        if turns is not None:
            picture = canvas.picture()
            picture.turns = turns
            return picture


def pair(rng: np.random.Generator, side: int, held_out: bool = False) -> Picture:
    """Two pictures of one thing each, with turns about either; the result is the second."""
    tasks = ("number", "shape and colour", "emoji")
    shown = [scene(rng, str(rng.choice(tasks)), side, side, held_out) for _ in range(2)]
    turns = []
    for i, picture in enumerate(shown):
        for task, _, answer in picture.turns:
            if task in world.PAIR_QUESTIONS:
                which = world.ORDINALS[rng.integers(len(world.ORDINALS))][i]
                question = world.PAIR_QUESTIONS[task].format(which=which)
                turns.append(("two pictures", question, answer))
    things = [next(a for task, _, a in p.turns if task == "any") for p in shown]
    if things[0] != things[1]:
        i = int(rng.integers(2))
        question = world.WHICH_PICTURE.format(thing=things[i])
        turns.append(("two pictures", question, ("the first", "the second")[i]))
    shown[1].turns = [turns[i] for i in rng.permutation(len(turns))]
    shown[1].named = {}  # a place is one in the picture that was shown last
    shown[1].first = shown[0]
    return shown[1]


def _ask(rng: np.random.Generator, group: str, **names: str) -> str:
    questions = world.QUESTIONS[group]
    return questions[rng.integers(len(questions))].format(**names)


def _number(canvas: Canvas, rng: np.random.Generator, held_out: bool) -> list | None:
    text = _digits(rng, int(rng.integers(1, 5)))
    if len(text) > 1 and text[0] == "0":
        text = str(rng.integers(1, 10)) + text[1:]
    highest = min(0.7 * canvas.size, 1.35 * canvas.size / len(text))
    colour = canvas.number(text, int(_between(rng, canvas.least(22, 0.1), highest)), held_out)
    if colour is None:
        return None
    canvas.named["number"] = list(range(len(canvas.items)))
    return [
        ("number", _ask(rng, "number"), text),
        ("number colour", _ask(rng, "number colour"), colour),
        ("any", _ask(rng, "any"), f"the number {text}"),
        canvas.located("number"),
    ]


def _one_shape(canvas: Canvas, rng: np.random.Generator, held_out: bool) -> list | None:
    side = int(_between(rng, canvas.least(22, 0.1), 0.85 * canvas.size))
    noun, colour = world.SHAPES[rng.integers(len(world.SHAPES))], canvas.ink()[0]
    canvas.shape(noun, colour, side, canvas.free(side, side))
    canvas.named |= {noun: [0], f"{colour} {noun}": [0]}
    return [
        ("shape and colour", _ask(rng, "shape and colour"), f"{colour} {noun}"),
        ("shape", _ask(rng, "shape"), noun),
        ("shape colour", _ask(rng, "shape colour", shape=noun), colour),
        ("any", _ask(rng, "any"), world.article(f"{colour} {noun}")),
        canvas.located(f"{colour} {noun}"),
    ]


def _count(canvas: Canvas, rng: np.random.Generator, held_out: bool) -> list | None:
    few = rng.random() < 0.75
    return _counted(canvas, rng, int(rng.integers(1, 6)) if few else int(rng.integers(6, 10)))


def _count_to_nine(canvas: Canvas, rng: np.random.Generator, held_out: bool) -> list | None:
    turns = _counted(canvas, rng, int(rng.integers(1, 10)))
    return turns and [("count to nine", *turns[0][1:]), *turns[1:]]


def _counted(canvas: Canvas, rng: np.random.Generator, count: int) -> list | None:
    noun, colour = world.SHAPES[rng.integers(len(world.SHAPES))], canvas.ink()[0]
    largest = canvas.size / (2.2 if count < 3 else 3 if count < 6 else 3.8)
    side = int(rng.integers(canvas.least(18, 0.085), int(largest)))
    for _ in range(count):
        scaled = max(17, int(side * rng.uniform(0.85, 1.1)))
        at = canvas.free(scaled, scaled, gap=5)
        if at is None:
            return None
        canvas.shape(noun, colour, scaled, at)
    shapes = world.plural(noun)
    described = world.article(f"{colour} {noun}") if count == 1 else f"{count} {colour} {shapes}"
    return [
        ("count" if count < 6 else "count to nine", _ask(rng, "count", shapes=shapes), str(count)),
        ("shape colour", f"What colour are the {shapes}?", colour),
        ("any", _ask(rng, "any"), described),
    ]


def _relation(canvas: Canvas, rng: np.random.Generator, held_out: bool) -> list | None:
    """Two things, or a few more: which side of another one is on, by name."""
    count = 2 if rng.random() < 0.6 else int(rng.integers(3, 5))
    largest = canvas.size / (2.6 if count == 2 else 3.6)
    things: list[tuple[str, str]] = []
    while len(things) < count:
        thing = canvas.ink()[0], world.SHAPES[rng.integers(len(world.SHAPES))]
        if thing not in things:
            things.append(thing)
    for colour, noun in things:
        side = int(rng.integers(canvas.least(20, 0.09), int(largest)))
        at = canvas.free(side, side)
        if at is None:
            return None
        canvas.shape(noun, colour, side, at)
    nouns = [noun for _, noun in things]
    alone = [n if nouns.count(n) == 1 else None for n in nouns]
    full = [f"{colour} {noun}" for colour, noun in things]
    canvas.named |= {name: [i] for i, name in enumerate(full)}
    canvas.named |= {name: [i] for i, name in enumerate(alone) if name}

    def called(i: int) -> str:
        return alone[i] if alone[i] and rng.random() < 0.5 else full[i]

    boxes = np.array([item.box for item in canvas.items])
    turns = []
    for i, j in rng.permutation([(i, j) for i in range(count) for j in range(count) if i != j]):
        side = _side(boxes[i], boxes[j])
        if side is None:
            continue
        a, b = called(i), called(j)
        upright = side in ("above", "below")
        question = _ask(rng, "heights" if upright else "sides", a=a, b=b)
        turns.append(("relation", question, side))
        seen = f"{side} the {b}" if upright else f"{side} of the {b}"
        turns.append(("where", _ask(rng, "where", a=a, b=b), seen))
    if not turns:
        return None
    if count == 2:
        along = 1 if turns[0][2] in ("above", "below") else 0
        order = np.argsort(boxes[:, along] + boxes[:, along + 2])  # from the left, or from above
        both = " and ".join(world.article(full[i]) for i in order)
        turns.append(("any", _ask(rng, "any"), both))
    turns += [
        ("shape colour", _ask(rng, "shape colour", shape=noun), colour)
        for colour, noun in things
        if nouns.count(noun) == 1
    ]
    return turns + [canvas.located(called(i)) for i in range(count)]


def _side(a: np.ndarray, b: np.ndarray) -> str | None:
    """Which side of box b box a is on; None where that is not clear."""
    gap = (a[:2] + a[2:] - b[:2] - b[2:]) / 2
    sizes = (a[2:] - a[:2] + b[2:] - b[:2]) / 2
    along = int(abs(gap[1]) > abs(gap[0]))
    if abs(gap[along]) < sizes[along] + 2 or abs(gap[1 - along]) > 0.6 * abs(gap[along]):
        return None
    return (("left", "right"), ("above", "below"))[along][int(gap[along] > 0)]


def _emoji(canvas: Canvas, rng: np.random.Generator, held_out: bool) -> list | None:
    names, _ = world.emoji()
    index = int(rng.integers(len(names)))
    side = int(_between(rng, canvas.least(26, 0.11), 0.95 * canvas.size))
    canvas.emoji(index, side, canvas.free(side, side))
    canvas.named[names[index]] = [0]
    return [
        ("emoji", _ask(rng, "emoji"), names[index]),
        ("any", _ask(rng, "any"), world.article(names[index])),
        canvas.located(names[index]),
    ]


def _texture(rng: np.random.Generator, canvas: Canvas) -> None:
    """Blots of several sizes over the whole picture: something that is none of the known things."""
    size = (canvas.width, canvas.height)
    total = np.zeros((canvas.height, canvas.width, 3))
    for cells in rng.choice([2, 3, 5, 9, 17, 33, 65], 3, replace=False):
        noise = rng.uniform(0, 255, (cells, cells, 3)).astype(np.uint8)
        total += np.asarray(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC))
    canvas.image = Image.fromarray((total / 3).astype(np.uint8))


def _outside(canvas: Canvas, rng: np.random.Generator, held_out: bool) -> list | None:
    """A known question about a texture, or a question from outside about anything."""
    question = world.OUTSIDE[rng.integers(len(world.OUTSIDE))]
    if rng.random() < 0.5:
        _texture(rng, canvas)
        group = str(rng.choice(["any", "number", "shape and colour", "emoji"]))
        question = question if rng.random() < 0.3 else _ask(rng, group)
    else:
        task = str(rng.choice(["shape and colour", "count", "relation", "emoji"]))
        if _SCENES[task](canvas, rng, held_out) is None:
            return None
    return [("outside", question, world.UNKNOWN)]


_SCENES = {
    "outside": _outside,
    "number": _number,
    "shape and colour": _one_shape,
    "count": _count,
    "count to nine": _count_to_nine,
    "relation": _relation,
    "emoji": _emoji,
}
