"""Chat V1.0: LLaVA's layout, from its published structure.

The reference is Transformers' Llama behind a plain torch projector; the tower's features are those
of `load_vision`, which tests/golden verifies.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

import internvl_rt as ivr
from internvl_rt import image
from internvl_rt.config import load_config
from internvl_rt.prompt import TEMPLATES
from internvl_rt.weights import open_checkpoint, resolve
from tiny_model import (
    LLAVA_TOWER,
    TOWER,
    VISION,
    llava,
    llava_tensors,
    original_vision,
    write_checkpoint,
)
from tiny_tokenizer import write_llama

PICTURE = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(3))
IMAGE_TOKEN = 0


def scaled(tensors):
    """Weights small enough for softmaxes that are not one-hot."""
    return {
        n: t if t.dim() == 1 or "embed" in n else (0.3 * t.float()).to(t.dtype)
        for n, t in tensors.items()
    }


def write_both(folder, vocabulary=40):
    """The tower's checkpoint and the chat model's beside it; the model holds the tower, too."""
    tensors = scaled(llava_tensors())
    config = llava() | {"vocab_size": vocabulary}
    if vocabulary != 40:
        generator = torch.Generator().manual_seed(5)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.randn(vocabulary, 32, generator=generator).bfloat16()
    tower = {
        n.removeprefix(LLAVA_TOWER): t for n, t in tensors.items() if n.startswith(LLAVA_TOWER)
    }
    write_checkpoint(folder / TOWER, VISION, tower)
    return write_checkpoint(folder / "chat", config, tensors), tensors


class Reference:
    """embeddings with picture features in their place -> Llama."""

    def __init__(self, folder, tensors):
        config = load_config(folder).text
        self.tensors = {n: t.float() for n, t in tensors.items()}
        self.tower = ivr.load_vision(folder.parent / TOWER, dtype="float32", backend="reference")
        self.llama = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_kv_heads,
                max_position_embeddings=config.max_position_embeddings,
                rms_norm_eps=config.rms_norm_eps,
                rope_theta=config.rope_theta,
                tie_word_embeddings=False,
            )
        ).eval()
        llama = {n: t for n, t in self.tensors.items() if "vision" not in n and "mm_" not in n}
        self.llama.load_state_dict(llama)

    def features(self, pixels):
        """The selected layer's output without the class token, through two linear layers."""
        states = self.tower(pixels, output_hidden_states=True).hidden_states
        x = states[-2][:, 1:]
        at = "model.mm_projector."
        for i in (0, 2):
            x = F.linear(x, self.tensors[f"{at}{i}.weight"], self.tensors[f"{at}{i}.bias"])
            x = F.gelu(x) if i == 0 else x
        return x

    def embeddings(self, before, features, behind):
        embed = self.llama.model.embed_tokens.weight
        return torch.cat([embed[before], features, embed[behind]]).unsqueeze(0)

    @torch.no_grad()
    def logits(self, *parts):
        return self.llama(inputs_embeds=self.embeddings(*parts), use_cache=False).logits

    @torch.no_grad()
    def generate(self, *parts, tokens):
        embeddings, ids = self.embeddings(*parts), []
        for _ in range(tokens):
            last = self.llama(inputs_embeds=embeddings, use_cache=False).logits[0, -1]
            ids.append(int(last.argmax()))
            embed = self.llama.model.embed_tokens.weight
            embeddings = torch.cat([embeddings, embed[ids[-1:]].unsqueeze(0)], dim=1)
        return ids


@pytest.mark.parametrize("place", ["inside", "beside"])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_against_the_published_structure(tmp_path, backend, place):
    folder, tensors = write_both(tmp_path)
    reference = Reference(folder, tensors)
    if place == "beside":
        rest = {n: t for n, t in tensors.items() if not n.startswith(LLAVA_TOWER)}
        write_checkpoint(folder, llava(), rest)
    model = ivr.load(folder, dtype="float32", backend=backend, image_token_id=IMAGE_TOKEN)
    assert model.config.layout == "llava"
    assert model.config.tokens_per_tile == 576
    features = reference.features(PICTURE)
    found = model.encode_images(PICTURE)
    assert found.shape == features.shape == (1, 576, 32)
    assert float((found - features).abs().max()) <= 5e-4 * max(float(features.std()), 1)

    before, behind = torch.arange(1, 8), torch.arange(9, 15)
    ids = torch.cat([before, torch.full((576,), IMAGE_TOKEN), behind]).unsqueeze(0)
    truth = reference.logits(before, features[0], behind)
    logits = model.forward(ids, PICTURE)
    assert float((logits - truth).abs().max()) <= 5e-4 * max(float(truth.std()), 1)
    expected = reference.generate(before, features[0], behind, tokens=8)
    assert model.generate(ids, PICTURE, max_new_tokens=8, eos_token_id=-1) == [expected]
    half = ivr.load(folder, dtype="bfloat16", backend=backend, image_token_id=IMAGE_TOKEN)
    off = (half.forward(ids, PICTURE) - truth).abs()
    assert float(off.mean()) <= 0.03 * float(truth.std())


def test_the_448_tower_and_its_layers(tmp_path):
    config = llava() | {"mm_vision_tower": f"x/{TOWER}-448px", "mm_vision_select_layer": -1}
    (tmp_path / TOWER).mkdir()
    write_checkpoint(tmp_path / f"{TOWER}-448px", VISION, original_vision(""))
    folder = write_checkpoint(tmp_path / "chat", config, llava_tensors())
    found = load_config(folder)
    assert (found.image_size, found.tokens_per_tile, found.vision_layers_used) == (448, 1024, 2)
    assert ivr.load(folder).encode_images(torch.zeros(1, 3, 448, 448)).shape == (1, 1024, 32)


def test_a_resized_position_embedding_and_old_buffers(tmp_path):
    """What the code of the first release stored."""
    folder, tensors = write_both(tmp_path)
    before = ivr.load(folder, dtype="float32").encode_images(PICTURE)
    name = f"{LLAVA_TOWER}embeddings.position_embedding"
    grid = tensors[name].float()[:, 1:].view(1, 4, 4, 16).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (24, 24), mode="bicubic", align_corners=False)
    resized = torch.cat([tensors[name][:, :1].float(), grid.flatten(2).transpose(1, 2)], dim=1)
    more = {name: resized} | {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)
    }
    write_checkpoint(folder, llava(), tensors | more)
    after = ivr.load(folder, dtype="float32").encode_images(PICTURE)
    assert torch.equal(before, after)
    more[name] = resized[:, :-1].contiguous()
    write_checkpoint(folder, llava(), tensors | more)
    with pytest.raises(ValueError, match=r"position_embedding is \[1, 576, 16\]"):
        ivr.load(folder)


def test_without_the_towers_config_it_is_internvit_6b(tmp_path):
    config = load_config_of(tmp_path, llava() | {"mm_hidden_size": 3200})
    assert (config.vision.hidden_size, config.vision.num_layers) == (3200, 48)
    assert (config.vision.num_heads, config.vision.grid, config.image_size) == (25, 16, 336)


def load_config_of(folder, config):
    return load_config(write_checkpoint(folder / "chat", config, {"x": torch.zeros(1)}))


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("mm_vision_tower", "openai/clip-vit-large-patch14-336", "name of an InternViT-6B"),
        ("mm_vision_tower", None, "mm_vision_tower is None"),
        ("mm_vision_tower", "x/..", "mm_vision_tower is 'x/..'"),
        ("mm_projector_type", "linear", "mm_projector_type is 'linear', supported: mlp2x_gelu"),
        ("mm_vision_select_feature", "cls_patch", "supported: patch"),
        ("mm_vision_select_layer", -50, "mm_vision_select_layer is -50"),
        ("mm_use_im_start_end", True, "mm_use_im_start_end is True"),
        ("image_aspect_ratio", "anyres", "image_aspect_ratio is 'anyres', supported: pad"),
        ("mm_hidden_size", 1024, "mm_hidden_size is 1024, expected hidden_size=3200"),
        ("architectures", ["LlavaForConditionalGeneration"], "supported: \\['LlavaLlamaFor"),
        ("num_key_value_heads", 3, "num_key_value_heads is 3"),
    ],
)
def test_refused(tmp_path, key, value, match):
    config = llava() | {"mm_hidden_size": 3200} | {key: value}
    with pytest.raises(ValueError, match=match) as error:
        load_config_of(tmp_path, config)
    assert "\n" not in str(error.value)


def test_a_tower_that_is_nowhere(tmp_path):
    tensors = {n: t for n, t in llava_tensors().items() if not n.startswith(LLAVA_TOWER)}
    folder = write_checkpoint(tmp_path / "chat", llava() | {"mm_hidden_size": 3200}, tensors)
    with pytest.raises(FileNotFoundError) as error:
        ivr.load(folder)
    message = str(error.value)
    assert f"the vision tower {TOWER}" in message
    assert message.endswith(f"expected in {tmp_path / TOWER}")
    assert "\n" not in message


def test_left_over_and_missing_tensors(tmp_path):
    folder, tensors = write_both(tmp_path)
    write_checkpoint(folder, llava(), tensors | {"model.mm_projector.4.bias": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"mm_projector\.4\.bias.*llama in the LLaVA layout"):
        ivr.load(folder)
    del tensors["model.mm_projector.2.bias"]
    write_checkpoint(folder, llava(), tensors)
    with pytest.raises(ValueError, match=r"mm_projector\.2\.bias.* missing"):
        ivr.load(folder)


def test_every_tensor_is_found(tmp_path):
    folder, tensors = write_both(tmp_path)
    config = load_config(folder)
    checkpoint = open_checkpoint(folder, config)
    sources = resolve(checkpoint, config)
    used = {name for source in sources.values() for name in source.names}
    second = {n for n in tensors if n.startswith(f"{LLAVA_TOWER}encoder.layers.1.")}
    assert used == set(tensors) - second  # behind the selected layer


# ---- pictures -----------------------------------------------------------------------------------


def picture(width, height):
    rng = np.random.default_rng(width * 1000 + height)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def reference_pixels(pixels, size):
    """LLaVA's expand2square with the mean colour, then CLIP's resize, scale and normalise."""
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    height, width = pixels.shape[:2]
    side = max(width, height)
    square = Image.new("RGB", (side, side), tuple(int(m * 255) for m in mean))
    square.paste(Image.fromarray(pixels), ((side - width) // 2, (side - height) // 2))
    small = np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))
    return torch.from_numpy((small / 255 - mean) / std).permute(2, 0, 1).float()


@pytest.mark.parametrize(
    ("width", "height"), [(1, 1), (40, 40), (61, 20), (20, 61), (7, 500), (641, 480)]
)
def test_pictures_are_padded(width, height):
    pixels = picture(width, height)
    untouched = pixels.copy()
    found = image.preprocess(image.pad_to_square(pixels), 1, 336)
    assert found.shape == (1, 3, 336, 336)
    torch.testing.assert_close(found[0], reference_pixels(pixels, 336), rtol=0, atol=1e-6)
    assert np.array_equal(pixels, untouched)


def test_a_picture_that_would_be_too_large():
    assert image.pad_to_square(picture(8192, 1)).shape == (8192, 8192, 3)
    with pytest.raises(
        ValueError, match="is 8193 x 1 pixels and padded to a square, allowed: 8192"
    ):
        image.pad_to_square(picture(8193, 1))


@pytest.mark.parametrize("legacy", [False, True])
def test_chat(tmp_path, legacy):
    """From question and picture to text: prompt, pixels, features, tokens."""
    write_llama(tmp_path / "chat", legacy=legacy)
    folder, tensors = write_both(tmp_path, vocabulary=320)
    model = ivr.load(folder, dtype="float32")
    tokenizer = model.tokenizer
    pixels = picture(50, 30)
    reference = Reference(folder, tensors)
    features = reference.features(reference_pixels(pixels, 336).unsqueeze(0))[0]
    # Each text between pictures is tokenised by itself, as LLaVA's tokenizer_image_token does.
    system = TEMPLATES["vicuna_v1"].system_message
    before = [1, *tokenizer.encode_literal(f"{system} USER: ")]
    behind = tokenizer.encode_literal("\nHello ASSISTANT:")
    expected = reference.generate(before, features, behind, tokens=6)
    answer = model.chat("Hello", images=pixels, max_new_tokens=6)
    assert answer == tokenizer.decode(expected).strip()
    assert answer != model.chat("Hello", max_new_tokens=6)


def test_two_pictures_and_history(tmp_path):
    write_llama(tmp_path / "chat", legacy=False)
    folder, _ = write_both(tmp_path, vocabulary=320)
    model = ivr.load(folder, dtype="float32")
    pair = [picture(20, 30), picture(30, 20)]
    answer, history = model.chat(
        "<image>\nHello<image>", images=pair, max_new_tokens=3, return_history=True
    )
    again = model.chat("Hello", images=pair, history=history, max_new_tokens=3)
    assert isinstance(answer, str)
    assert isinstance(again, str)
