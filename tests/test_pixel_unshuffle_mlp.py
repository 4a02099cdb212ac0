"""pixel_unshuffle_mlp beyond the generated cases: token order by hand, refusals."""

import pytest
import torch

from internvl_rt.ops import pixel_unshuffle_mlp


def arguments(grid, C, **options):
    tiles, width = 2, 4 * C
    x = torch.arange(tiles * grid[0] * grid[1], dtype=torch.float32)
    x = x.view(tiles, -1, 1).expand(-1, -1, C).contiguous()
    eye = torch.eye(width)
    zeros = torch.zeros(width)
    return {
        "x": x,
        "ln_weight": torch.ones(width),
        "ln_bias": zeros,
        "w1": eye,
        "b1": zeros,
        "w2": eye,
        "b2": zeros,
        "grid": grid,
        **options,
    }


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("version", "first_cells"), [("v2", [0, 2, 4, 12, 14, 16]), ("v1", [0, 12, 2, 14, 4, 16])]
)
def test_order_of_tokens_and_channels(version, first_cells, backend):
    # Constant blocks would vanish in the norm: mark one cell per block by a weight that is large.
    grid = (4, 6)
    a = arguments(grid, 1, version=version, eps=0.0)
    y = pixel_unshuffle_mlp(**a, backend=backend)  # [2, 6, 4]
    for i, cell in enumerate(first_cells):
        block = torch.tensor([cell, cell + 1, cell + 6, cell + 7], dtype=torch.float32)
        normal = (block - block.mean()) / block.std(unbiased=False)
        torch.testing.assert_close(y[0, i], torch.nn.functional.gelu(normal))
    # The blocks above differ only by a constant; which cell stands where shows without the mean.
    x = torch.zeros(1, 24, 1)
    for i, cell in enumerate(first_cells):
        x.zero_()[0, cell] = 1.0
        y = pixel_unshuffle_mlp(**{**a, "x": x, "eps": 1.0}, backend=backend)
        hit = y[0].abs().sum(-1) > 0
        assert hit.nonzero().flatten().tolist() == [i]


REFUSALS = [
    ({"grid": (4, 5)}, r"pixel_unshuffle_mlp: grid is \(4, 5\), expected multiples of ratio=2"),
    (
        {"grid": (4, 8)},
        r"pixel_unshuffle_mlp: x has shape \[2, 24, 3\], expected \[t, h\*w=32, C\]",
    ),
    ({"version": "v3"}, "pixel_unshuffle_mlp: version is 'v3', allowed: v2, v1"),
    ({"ln_bias": torch.zeros(5)}, r"pixel_unshuffle_mlp: ln_bias has shape \[5\]"),
    ({"b1": torch.zeros(5)}, r"linear: bias has shape \[5\], expected \[N=12\]"),
    ({"ratio": 0}, "expected multiples of ratio=0"),
    ({"eps": float("nan")}, "pixel_unshuffle_mlp: eps is negative or NaN"),
    ({"out": torch.zeros(2, 6, 11)}, r"pixel_unshuffle_mlp: out has shape \[2, 6, 11\]"),
]


@pytest.mark.parametrize(("change", "message"), REFUSALS)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        pixel_unshuffle_mlp(**{**arguments((4, 6), 3), **change})
