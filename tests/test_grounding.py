"""Regions in answers: what is understood, what is left out, and the picture that shows them."""

import random

import numpy as np
import pytest
from PIL import Image

import internvl_rt as ivr
from internvl_rt.grounding import Region, draw, parse

CAT = ((64.0, 96.0), (192.0, 240.0))  # of 640 x 480
BOX = "[[100, 200, 300, 500]]"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("", []),
        ("no boxes [[1, 2, 3, 4]]", []),
        (f"<ref>the cat</ref><box>{BOX}</box>", [("the cat", CAT)]),
        (f"<box>{BOX}</box>", [("", CAT)]),
        (f"It is <ref> cat </ref>: <box>{BOX}</box>.", [("cat", CAT)]),
        ("<ref>cat</ref><box>[100, 200, 300, 500]</box>", [("cat", CAT)]),
        ("<ref>cat</ref><box>(100,200),(300,500)</box>", [("cat", CAT)]),
        ("<ref>cat</ref><box> 100 200\n300 500 </box>", [("cat", CAT)]),
        ("<ref>cat</ref><box>[[300, 500, 100, 200]]</box>", [("cat", CAT)]),
        ("<ref>cat</ref><box>[[0.1, 0.2, 0.3, 0.5]]</box>", [("cat", CAT)]),
        ("<ref>cat</ref><box>[[.1, .2, .3, .5]]</box>", [("cat", CAT)]),
        ("<ref>cat</ref><box>[[100.0, 200.0, 300.0, 500.0]]</box>", [("cat", CAT)]),
        ("<box>[[0, 0, 1, 1]]</box>", [("", ((0.0, 0.0), (0.64, 0.48)))]),
        ("<box>[[0.0, 0, 1, 1]]</box>", [("", ((0.0, 0.0), (640.0, 480.0)))]),
        ("<box>[[-5, 0, 1200, 99999999999]]</box>", [("", ((0.0, 0.0), (640.0, 480.0)))]),
        (f"<ref>a</ref><box>{BOX}</box><box>{BOX}</box>", [("a", CAT), ("a", CAT)]),
        (f"<ref>a</ref><box>{BOX}</box> and a dog <box>{BOX}</box>", [("a", CAT), ("", CAT)]),
        (f"<ref>a</ref><box>{BOX[:-1]}, {BOX[1:]}</box>", [("a", CAT), ("a", CAT)]),
        (f"<ref>a</ref><ref>b</ref><box>{BOX}</box>", [("b", CAT)]),
        (f"<ref>图<box>{BOX}</box>", [("图", CAT)]),
        # Cut before the end: what is whole counts, and a last number that may lack digits not.
        (f"<ref>a</ref><box>{BOX}", [("a", CAT)]),
        ("<ref>a</ref><box>[[100, 200, 300, 500], [10, 2", [("a", CAT)]),
        ("<ref>a</ref><box>[[100, 200, 300, 50", []),
        ("<ref>a</ref><box>[[100, 200", []),
        ("<ref>a</ref><box>", []),
        ("<ref>a</ref><box>nothing</box>", []),
        ("<ref>a", []),
        (
            "<ref>q</ref><quad>[[0, 0, 500, 0, 500, 500, 0, 1000]]</quad>",
            [("q", ((0.0, 0.0), (320.0, 0.0), (320.0, 240.0), (0.0, 480.0)))],
        ),
    ],
)
def test_parse(answer, expected):
    regions = parse(answer, 640, 480)
    assert [r.label for r in regions] == [label for label, _ in expected]
    for region, (_, points) in zip(regions, expected, strict=True):
        np.testing.assert_allclose(region.points, points, rtol=1e-12)


def test_coordinates_go_both_ways():
    rng = random.Random("test_grounding.both_ways")
    for _ in range(200):
        width, height = rng.randint(1, 4000), rng.randint(1, 4000)
        left, right = sorted(rng.uniform(0, width) for _ in range(2))
        top, bottom = sorted(rng.uniform(0, height) for _ in range(2))
        written = [round(1000 * left / width), round(1000 * top / height)]
        written += [round(1000 * right / width), round(1000 * bottom / height)]
        (region,) = parse(f"<box>[{written}]</box>", width, height)
        error = np.abs(np.subtract(region.box, (left, top, right, bottom)))
        assert (error <= np.array([width, height] * 2) / 2000 + 1e-9).all()


def test_any_text_is_parsed():
    rng = random.Random("test_grounding.any_text")
    parts = ["<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "[[", "]]", ", ", "12"]
    parts += ["0.5", "-", ".", "1e9", "9" * 400, "\n", "图", "<", " a "]
    found = 0
    for _ in range(3000):
        for region in parse("".join(rng.choices(parts, k=rng.randrange(25))), 7, 5):
            found += 1
            left, top, right, bottom = region.box
            assert 0 <= left <= right <= 7
            assert 0 <= top <= bottom <= 5
    assert found > 20


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-1, 5), (float("nan"), 5)])
def test_size_must_be_positive(size):
    with pytest.raises(ValueError, match=rf"the picture is {size[0]} x {size[1]} pixels"):
        parse("", *size)


def test_draw():
    picture = np.zeros((100, 200, 3), np.uint8)
    regions = [
        Region("cat", ((20.0, 40.0), (60.0, 80.0))),
        Region("图", ((100.0, 2.0), (150.0, 60.0))),
        Region("", ((120.0, 70.0), (180.0, 70.0), (180.0, 95.0), (120.0, 90.0))),
    ]
    drawn = draw(picture, regions)
    assert drawn.size == (200, 100)
    pixels = np.asarray(drawn)
    assert not picture.any()
    colours = [tuple(pixels[80, 30]), tuple(pixels[60, 130]), tuple(pixels[70, 150])]
    assert len(set(colours)) == 3
    assert (0, 0, 0) not in colours
    assert tuple(pixels[60, 40]) == (0, 0, 0)  # inside of a box nothing is drawn
    assert (pixels[28:40, 20:40] == 255).any()  # the label's letters
    assert not np.asarray(draw(picture, [])).any()


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (2000, 7)])
def test_draw_into_any_size(size):
    image = Image.new("RGB", size)
    regions = parse("<ref>a</ref><box>[[0, 0, 1000, 1000]]</box>", *size)
    assert np.asarray(draw(image, regions)).any()


def test_public():
    assert ivr.grounding.parse is parse
