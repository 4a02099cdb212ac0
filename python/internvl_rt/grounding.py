"""Places in a picture that an answer names: `<ref>text</ref><box>[[x1, y1, x2, y2]]</box>`.

InternVL writes coordinates as integers from 0 to 1000 over the width and height of the original
picture, whatever its tiles were; some of its training data had fractions of 1. Models do not always
keep to the format, so `parse` takes what can be understood and leaves out the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from internvl_rt.image import load_image

SCALE = 1000

_PART = re.compile(r"<(ref|box|quad)>(.*?)(</\1>|(?=<(?:ref|box|quad)>)|\Z)", re.DOTALL)
_NUMBER = re.compile(r"-?\d+(?:\.\d*)?|-?\.\d+")
_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000")


@dataclass(frozen=True, slots=True)
class Region:
    """points: in pixels of the original picture, (x, y) each.

    The upper left and lower right corner of a box, or the four corners of a quad as the model
    gave them. label: what the model named it, "" if nothing.
    """

    label: str
    points: tuple[tuple[float, float], ...]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) around all points."""
        xs, ys = zip(*self.points, strict=True)
        return min(xs), min(ys), max(xs), max(ys)


def parse(answer: str, width: int, height: int) -> list[Region]:
    """The regions of `answer` in order, in pixels of the picture of width x height.

    Brackets and separators do not matter; several boxes may share one `<box>`; corners in the
    wrong order are put right and coordinates outside the picture moved to its edge; numbers that
    are too few for a box (an answer that was cut) are left out. A body with a decimal point and
    no number above 1 is taken for fractions of 1. The label is that of the last `<ref>` unless
    words stand between. Raises ValueError for a size that is not positive.
    """
    if not (width >= 1 and height >= 1):
        raise ValueError(f"the picture is {width} x {height} pixels, expected at least 1 x 1")
    regions: list[Region] = []
    label, end = "", 0
    for match in _PART.finditer(answer):
        kind, body, closing = match.groups()
        if kind == "ref":
            label = body.strip()
        else:
            if re.search(r"\w", answer[end : match.start()]):
                label = ""
            numbers = _numbers(body, closed=bool(closing))
            corners = 4 if kind == "quad" else 2
            for points in _points(numbers, corners, width, height):
                regions.append(Region(label, points if kind == "quad" else _ordered(points)))
        end = match.end()
    return regions


def _numbers(body: str, *, closed: bool) -> list[float]:
    """The numbers of a body, as parts of 1."""
    found = list(_NUMBER.finditer(body))
    if found and not closed and found[-1].end() == len(body):
        found.pop()  # it may lack digits
    values = [float(match[0]) for match in found]
    fractions = any("." in match[0] for match in found) and max(values) <= 1
    scale = 1 if fractions else SCALE
    return [min(max(value / scale, 0.0), 1.0) for value in values]


def _points(
    numbers: list[float], corners: int, width: int, height: int
) -> Iterable[tuple[tuple[float, float], ...]]:
    """`corners` points at a time, in pixels."""
    size = 2 * corners
    for at in range(0, len(numbers) - size + 1, size):
        some = numbers[at : at + size]
        yield tuple((x * width, y * height) for x, y in zip(some[::2], some[1::2], strict=True))


def _ordered(points: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
    (x1, y1), (x2, y2) = points
    return (min(x1, x2), min(y1, y2)), (max(x1, x2), max(y1, y2))


def draw(picture: Any, regions: Iterable[Region]) -> Image.Image:
    """A copy of `picture` with its regions outlined and named, one colour for a label.

    picture: as in `Model.chat`. Raises what reading it raises.
    """
    image = Image.fromarray(load_image(picture))
    canvas = ImageDraw.Draw(image)
    line = max(1, min(image.size) // 200)
    font = ImageFont.load_default(max(10, min(image.size) // 30))
    labels: dict[str, str] = {}
    for region in regions:
        colour = labels.setdefault(region.label, _COLOURS[len(labels) % len(_COLOURS)])
        left, top, _, _ = region.box
        if len(region.points) == 2:
            canvas.rectangle(region.box, outline=colour, width=line)
        else:
            canvas.line([*region.points, region.points[0]], fill=colour, width=line)
        if region.label:
            # Above the region where there is room, otherwise inside of it.
            place = (left, top) if top < font.size + line else (left, top - font.size - line)
            around = canvas.textbbox(place, region.label, font)
            canvas.rectangle(around, fill=colour)
            canvas.text(place, region.label, "white", font)
    return image
