"""InternVL in plain torch, small and for training: parameters carry the checkpoint's names.

The vision tower is InternViT (layer scale, CLS token), the projector pixel-unshuffles 2 x 2, the
decoder is Qwen2. Attention is written out: torch's fused one is slow backwards on a CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 14
LOOKED_UP = 3  # layers of the decoder after which a name knows its thing


@dataclass(frozen=True)
class Sizes:
    vision_width: int = 192
    vision_layers: int = 6
    vision_heads: int = 3
    vision_inner: int = 768
    image_size: int = 224
    width: int = 256
    layers: int = 5
    heads: int = 4
    kv_heads: int = 2
    inner: int = 768
    vocab: int = 1024
    rope_theta: float = 10000.0

    @property
    def grid(self) -> int:
        return self.image_size // PATCH


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """[B, H, T, D] each; mask is added to the scores."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1) @ v


class VisionAttention(nn.Module):
    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.heads = s.vision_heads
        self.qkv = nn.Linear(s.vision_width, 3 * s.vision_width)
        self.proj = nn.Linear(s.vision_width, s.vision_width)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = _attend(q, k, v, None).transpose(1, 2).reshape(B, T, C)
        return F.linear(y, self.proj.weight * scale[:, None], self.proj.bias * scale)


class VisionMlp(nn.Module):
    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.fc1 = nn.Linear(s.vision_width, s.vision_inner)
        self.fc2 = nn.Linear(s.vision_inner, s.vision_width)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        y = F.gelu(self.fc1(x))
        return F.linear(y, self.fc2.weight * scale[:, None], self.fc2.bias * scale)


class VisionLayer(nn.Module):
    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.attn, self.mlp = VisionAttention(s), VisionMlp(s)
        self.norm1 = nn.LayerNorm(s.vision_width, eps=1e-6)
        self.norm2 = nn.LayerNorm(s.vision_width, eps=1e-6)
        self.ls1 = nn.Parameter(torch.ones(s.vision_width))
        self.ls2 = nn.Parameter(torch.ones(s.vision_width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), self.ls1)
        return x + self.mlp(self.norm2(x), self.ls2)


def _places(grid: int, width: int, cosines: int = 8, size: float = 4.0) -> Tensor:
    """What a patch's place starts as, [grid^2, width]: cosines of its row and of its column.

    They stand along random directions and are about `size` long: a place too faint beside what is
    in the patch is not learned.
    """
    at = (torch.arange(grid) + 0.5) / grid
    waves = torch.cos(math.pi * at[:, None] * torch.arange(1, cosines + 1)) * cosines**-0.5
    directions = torch.linalg.qr(torch.randn(width, 2 * cosines))[0].T
    rows, columns = waves @ directions[:cosines], waves @ directions[cosines:]
    return size * (rows[:, None] + columns[None]).flatten(0, 1)


class Embeddings(nn.Module):
    def __init__(self, s: Sizes) -> None:
        super().__init__()
        C = s.vision_width
        self.grid = s.grid
        self.class_embedding = nn.Parameter(torch.randn(1, 1, C) * 0.02)
        self.patch_embedding = nn.Conv2d(3, C, PATCH, stride=PATCH)
        start = torch.randn(1, 1 + s.grid**2, C) * 0.02
        start[0, 1:] += _places(s.grid, C)
        self.position_embedding = nn.Parameter(start)

    def forward(self, pixels: Tensor, corner: tuple[int, int]) -> Tensor:
        B, _, height, width = pixels.shape
        rows, columns = height // PATCH, width // PATCH
        patches = pixels.reshape(B, 3, rows, PATCH, columns, PATCH).permute(0, 2, 4, 1, 3, 5)
        weight = self.patch_embedding.weight.flatten(1)
        x = F.linear(patches.reshape(B, rows * columns, -1), weight, self.patch_embedding.bias)
        position = self.position_embedding
        grid = position[0, 1:].view(self.grid, self.grid, -1)
        window = grid[corner[0] : corner[0] + rows, corner[1] : corner[1] + columns]
        cls = (self.class_embedding + position[:, :1]).expand(B, -1, -1)
        return torch.cat((cls, x + window.reshape(1, rows * columns, -1)), 1)


class Vision(nn.Module):
    """pixels [B, 3, S, S] -> [B, 1 + n, C]; smaller pictures see a window of the positions."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.embeddings = Embeddings(s)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(VisionLayer(s) for _ in range(s.vision_layers))

    def forward(self, pixels: Tensor, corner: tuple[int, int] = (0, 0)) -> Tensor:
        x = self.embeddings(pixels, corner)
        for layer in self.encoder.layers:
            x = layer(x)
        return x


class RmsNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, 1e-6)


class TextAttention(nn.Module):
    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.H, self.K, self.D = s.heads, s.kv_heads, s.width // s.heads
        self.q_proj = nn.Linear(s.width, self.H * self.D)
        self.k_proj = nn.Linear(s.width, self.K * self.D)
        self.v_proj = nn.Linear(s.width, self.K * self.D)
        self.o_proj = nn.Linear(self.H * self.D, s.width, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        B, T, _ = x.shape
        q = _rotate(self.q_proj(x).view(B, T, self.H, self.D).transpose(1, 2), rope)
        k = _rotate(self.k_proj(x).view(B, T, self.K, self.D).transpose(1, 2), rope)
        v = self.v_proj(x).view(B, T, self.K, self.D).transpose(1, 2)
        k, v = (t.repeat_interleave(self.H // self.K, 1) for t in (k, v))
        return self.o_proj(_attend(q, k, v, mask).transpose(1, 2).reshape(B, T, -1))


class TextMlp(nn.Module):
    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(s.width, s.inner, bias=False)
        self.up_proj = nn.Linear(s.width, s.inner, bias=False)
        self.down_proj = nn.Linear(s.inner, s.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class TextLayer(nn.Module):
    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.self_attn, self.mlp = TextAttention(s), TextMlp(s)
        self.input_layernorm, self.post_attention_layernorm = RmsNorm(s.width), RmsNorm(s.width)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Text(nn.Module):
    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(s.vocab, s.width)
        self.layers = nn.ModuleList(TextLayer(s) for _ in range(s.layers))
        self.norm = RmsNorm(s.width)


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    a, b = x.chunk(2, -1)
    cos, sin = rope
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Demo(nn.Module):
    """The whole model; embeddings and head are tied.

    `dense` says what lies in every patch, how far it reaches, whether its centre is there, and
    where the patch is; the last three also of the four patches that make a token. And of every name
    of a thing in a text, after LOOKED_UP layers, where the thing is and how far it reaches. It
    teaches and is not part of the checkpoint. kinds, colours: how many of them there are.
    """

    def __init__(self, s: Sizes, kinds: int, colours: int) -> None:
        super().__init__()
        self.sizes = s
        heads = {"kind": kinds, "colour": colours, "row": s.grid, "column": s.grid}
        heads |= {"box": 4, "centre": 1}
        self.dense = nn.ModuleDict({k: nn.Linear(s.vision_width, n) for k, n in heads.items()})
        heads = {"token_row": s.grid, "token_column": s.grid, "token_centre": 1, "token_box": 4}
        heads |= {"name_row": s.grid, "name_column": s.grid, "name_box": 4}
        self.dense.update({k: nn.Linear(s.width, n) for k, n in heads.items()})
        self.vision_model = Vision(s)
        C, W = 4 * s.vision_width, s.width
        self.mlp1 = nn.Sequential(nn.LayerNorm(C), nn.Linear(C, W), nn.GELU(), nn.Linear(W, W))
        self.language_model = nn.Module()
        self.language_model.model = Text(s)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for weight in self._last_of_branch():
            weight.data /= math.sqrt(2 * s.layers)

    def _last_of_branch(self) -> list[Tensor]:
        text = [w for x in self.text.layers for w in (x.self_attn.o_proj, x.mlp.down_proj)]
        tower = [w for x in self.vision_model.encoder.layers for w in (x.attn.proj, x.mlp.fc2)]
        return [w.weight for w in text + tower]

    @property
    def text(self) -> Text:
        return self.language_model.model

    def project(self, features: Tensor) -> Tensor:
        """[B, 1 + n, C] of the tower -> [B, n / 4, W]."""
        B, n, C = features.shape
        g = math.isqrt(n - 1)
        x = features[:, 1:].reshape(B, g // 2, 2, g // 2, 2, C)
        # Version 2 stacks the 2 x 2 patches column by column within a row: (row, column, C).
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(B, g * g // 4, 4 * C)
        return self.mlp1(x)

    def embed(self, ids: Tensor) -> Tensor:
        return self.text.embed_tokens(ids)

    def decode(
        self, x: Tensor, branch: Tensor | None = None, position: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings [B, T, W] -> the last layer's normalised states [B, T, W], causal.

        The second result are the states after LOOKED_UP layers.
        branch int [B, T]: 0 is seen by all that follow, any other by its own alone; position
        int [B, T]: for RoPE. Without them x is one text.
        """
        T, D = x.shape[1], self.sizes.width // self.sizes.heads
        if branch is None or position is None:
            branch = torch.zeros(1, T, dtype=torch.int64, device=x.device)
            position = torch.arange(T, device=x.device)[None]
        frequency = self.sizes.rope_theta ** (-torch.arange(0, D, 2, device=x.device) / D)
        angle = (position[:, :, None] * frequency)[:, None]
        rope = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        seen = (branch[:, None] == 0) | (branch[:, None] == branch[:, :, None])
        hidden = ~seen | torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        mask = torch.zeros(hidden.shape, dtype=x.dtype, device=x.device)
        mask = mask.masked_fill(hidden, -math.inf)[:, None]
        looked_up = x
        for i, layer in enumerate(self.text.layers):
            x = layer(x, rope, mask)
            looked_up = x if i < LOOKED_UP else looked_up
        return self.text.norm(x), looked_up

    def logits(self, states: Tensor) -> Tensor:
        return F.linear(states, self.text.embed_tokens.weight).float()
