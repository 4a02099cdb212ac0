"""The preprocess op against Pillow itself; its own cases run in test_ops.py."""

import numpy as np
import pytest
import torch
from PIL import Image

from internvl_rt import _C, num_threads, ops, set_num_threads
from isas import PLAIN_ISAS

# With these numbers a tile's value is the byte itself, over 255.
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def pillow_resize(picture, width, height):
    """Image.resize in two calls of one pass each, in the order of Pillow 13."""
    lost = picture.height - height
    if lost > 0 and lost > 2 * (picture.width - width):
        return picture.resize((picture.width, height)).resize((width, height))
    return picture.resize((width, picture.height)).resize((width, height))


def pillow_tiles(array, columns, rows, side, thumbnail):
    picture = Image.fromarray(array)
    grid = np.asarray(pillow_resize(picture, columns * side, rows * side))
    tiles = [
        grid[y * side : (y + 1) * side, x * side : (x + 1) * side]
        for y in range(rows)
        for x in range(columns)
    ]
    if thumbnail:
        tiles.append(np.asarray(pillow_resize(picture, side, side)))
    return torch.from_numpy(np.stack(tiles).transpose(0, 3, 1, 2).copy())


@pytest.fixture(params=PLAIN_ISAS)
def isa(request):
    _C.force_isa(request.param)
    yield request.param
    _C.force_isa("")


def test_random_sizes_equal_pillow(isa):
    rng = np.random.default_rng(11)
    for trial in range(300):
        top = int(rng.choice([20, 200, 600]))
        height, width = (int(v) for v in rng.integers(1, top, 2))
        columns, rows = (int(v) for v in rng.integers(1, 5, 2))
        side = int(rng.choice([1, 3, 14, 16, 28, 33, 64, 100]))
        if trial % 10 == 0:
            width = columns * side
        if trial % 10 == 5:
            height = rows * side
        high = int(rng.choice([2, 256]))  # two values: every sum that can clamp does
        array = rng.integers(0, high, (height, width, 3), dtype=np.uint8) * (256 // high)
        array = np.minimum(array, 255).astype(np.uint8)
        got = ops.preprocess(
            torch.from_numpy(array),
            columns=columns,
            rows=rows,
            image_size=side,
            thumbnail=True,
            **PLAIN,
        )
        want = pillow_tiles(array, columns, rows, side, thumbnail=True).float() / 255
        assert torch.equal(got, want), (height, width, columns, rows, side)


@pytest.mark.skipif(
    int(Image.__version__.split(".")[0]) < 13, reason="Pillow before 13 has another order of passes"
)
@pytest.mark.parametrize(
    "size", [(300, 40), (300, 100), (300, 200), (40, 300), (111, 62), (90, 64)]
)
def test_the_order_of_passes_is_pillows(size):
    array = np.random.default_rng(2).integers(0, 256, (*size, 3), dtype=np.uint8)
    for width, height in ((56, 56), (84, 28), (28, 84), (112, 56), (60, 30)):
        want = np.asarray(Image.fromarray(array).resize((width, height)))
        got = np.asarray(pillow_resize(Image.fromarray(array), width, height))
        assert np.array_equal(got, want), (width, height)


def test_any_number_of_threads_gives_the_same_bits():
    array = np.random.default_rng(3).integers(0, 256, (700, 500, 3), dtype=np.uint8)
    before = num_threads()
    results = []
    try:
        for n in (1, 2, 5):
            set_num_threads(n)
            results.append(
                ops.preprocess(
                    torch.from_numpy(array), columns=2, rows=3, image_size=56, thumbnail=True
                )
            )
    finally:
        set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_values_are_those_of_torchvision():
    byte = torch.arange(256, dtype=torch.uint8)
    image = byte.view(16, 16, 1).expand(16, 16, 3).contiguous()
    got = ops.preprocess(image, columns=1, rows=1, image_size=16)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    want = (image.permute(2, 0, 1).to(torch.float32).div(255) - mean) / std
    assert torch.equal(got[0], want)
    half = ops.preprocess(image, columns=1, rows=1, image_size=16, dtype=torch.bfloat16)
    assert torch.equal(half[0], want.to(torch.bfloat16))


IMAGE = torch.zeros(8, 9, 3, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image": IMAGE.float()}, "image is float32, expected uint8|image is f32, expected u8"),
        ({"image": IMAGE[:, :, :2]}, r"image has shape \[8, 9, 2\]"),
        ({"image": IMAGE[:0]}, r"image has shape \[0, 9, 3\], allowed: sides of 1"),
        ({"image": IMAGE[:, ::2]}, "stride of 6 between pixels, expected 3"),
        ({"columns": -1}, "columns"),
        ({"columns": 2000}, "columns and rows are 2000 and 1, allowed: 0 to 1024"),
        ({"image_size": 0}, "image_size"),
        ({"mean": (0.5, 0.5)}, r"mean is \[0.5, 0.5\], expected 3 finite numbers"),
        ({"std": (0.5, 0.0, 1.0)}, "std is .*, expected 3 positive numbers"),
        ({"std": (0.5, float("nan"), 1.0)}, "std is .*, expected 3 positive numbers"),
        ({"dtype": torch.float16}, "dtype is torch.float16, allowed: torch.float32"),
        ({"out": torch.empty(1, 3, 4, 5)}, r"out has shape \[1, 3, 4, 5\]"),
        (
            {"out": torch.empty(1, 3, 4, 4, dtype=torch.bfloat16)},
            "out is torch.bfloat16",
        ),
    ],
)
def test_wrong_arguments(change, words):
    arguments = {"image": IMAGE, "columns": 1, "rows": 1, "image_size": 4} | change
    with pytest.raises(ValueError, match=words) as caught:
        ops.preprocess(arguments.pop("image"), **arguments)
    assert str(caught.value).startswith("preprocess: ")
