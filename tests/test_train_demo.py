"""The demonstration model's pictures are what their answers say, and its training trains."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import internvl_rt as ivr
from internvl_rt.prompt import render

TOOLS = Path(__file__).parents[1] / "tools" / "train_demo"
if not TOOLS.is_dir():
    pytest.skip("not run from the repository", allow_module_level=True)
sys.path.insert(0, str(TOOLS))

import data  # noqa: E402
import draw  # noqa: E402
import export  # noqa: E402
import optimizer  # noqa: E402
import tokens  # noqa: E402
import train  # noqa: E402
import world  # noqa: E402
from model import Demo, Sizes  # noqa: E402

SMALL = Sizes(
    vision_width=64, vision_layers=2, vision_heads=2, vision_inner=96, image_size=112, width=64,
    layers=2, heads=2, kv_heads=1, inner=96, vocab=700,
)  # fmt: skip


def scenes(task, count=20, side=112):
    rng = np.random.default_rng([7, *task.encode()])
    return [draw.scene(rng, task, side, side) for _ in range(count)]


@pytest.mark.parametrize("task", ["shape and colour", "count", "relation", "emoji", "outside"])
def test_the_same_generator_draws_the_same(task):
    a, b = scenes(task, 3), scenes(task, 3)
    assert all(
        np.array_equal(x.pixels, y.pixels) and x.turns == y.turns for x, y in zip(a, b, strict=True)
    )
    assert all(x.pixels.shape == (112, 112, 3) and x.pixels.dtype == np.uint8 for x in a)


def test_count_is_the_number_of_things_drawn():
    for picture in scenes("count", 30):
        assert picture.turns[0][2] == str(len(picture.items))
        assert len({item.kind for item in picture.items}) == 1


def test_relation_agrees_with_the_boxes():
    def named(picture, text):
        words = text.split()
        found = [
            i
            for i in picture.items
            if world.SHAPES[i.kind - world.SHAPE_CLASS] == words[-1]
            and (len(words) == 1 or i.colour == words[0])
        ]
        assert len(found) == 1
        x0, y0, x1, y1 = found[0].box
        return (x0 + x1) / 2, (y0 + y1) / 2

    for picture in scenes("relation", 60):
        _, question, answer = picture.turns[1]
        text = question.removeprefix("Where is the ").rstrip("?")
        separator = ", seen from the " if ", seen" in text else " relative to the "
        a, b = (named(picture, name) for name in text.split(separator))
        holds = {
            "left": a[0] < b[0],
            "right": a[0] > b[0],
            "above": a[1] < b[1],
            "below": a[1] > b[1],
        }
        assert holds[answer.split()[0]], (question, answer)
        assert picture.turns[0][2] == answer.split()[0]


def test_labels_cover_the_thing_and_nothing_else():
    canvas = draw.Canvas(np.random.default_rng(0), 112, 112)
    canvas.shape("square", "red", 42, (14, 28))
    labels = canvas.picture().labels()
    kinds, colours, centres = (labels[k].reshape(8, 8) for k in ("kinds", "colours", "centres"))
    inside = np.zeros((8, 8), bool)
    inside[2:5, 1:4] = True
    assert (kinds[inside] == world.SHAPE_CLASS + world.SHAPES.index("square")).all()
    assert (colours[inside] == world.COLOUR_NAMES.index("red")).all()
    assert set(kinds[~inside].tolist()) <= {0, draw.IGNORE}
    assert (colours[~inside] == draw.IGNORE).all()
    assert (labels["boxes"].reshape(8, 8, 4)[inside] == [1, 2, 4, 5]).all()
    assert np.argwhere(centres).tolist() == [[3, 2]]


def test_a_conversation_is_the_prompt_that_runs():
    writer = tokens.Writer(tokens.make_tokenizer(700))
    turns = [("What number is this?", "4821"), ("What colour is the number?", "red")]
    talk = writer.conversation(turns)
    shown = writer.tokenizer.decode(talk.before, skip_special_tokens=False) + "<IMG_CONTEXT>"
    shown += writer.tokenizer.decode(talk.after, skip_special_tokens=False)
    expected = render(
        turns[1][0],
        template=tokens.TEMPLATE,
        history=[(f"<image>\n{turns[0][0]}", "4821")],
        system=world.SYSTEM_MESSAGE,
        num_tiles=[1],
        tokens_per_tile=1,
    )
    assert shown == expected + "red<|im_end|>"
    marked = [i for i, weight in zip(talk.after, talk.weights, strict=True) if weight]
    assert (
        writer.tokenizer.decode(marked, skip_special_tokens=False) == "4821<|im_end|>red<|im_end|>"
    )


def test_the_tokenizer_is_still_the_committed_one():
    committed = (ivr.model.DEMO_MODEL / "tokenizer.json").read_text(encoding="utf-8")
    assert json.loads(tokens.make_tokenizer(Sizes.vocab).to_str()) == json.loads(committed)


def test_a_box_weighs_by_its_leading_digits():
    writer = tokens.Writer(tokens.make_tokenizer(700))
    ids = writer.ids("<ref>star</ref><box>[[045, 120, 388, 467]]</box>")
    weights = writer.weights(ids)
    digits = [
        w for i, w in zip(ids, weights, strict=True) if writer.tokenizer.decode([i]).isdigit()
    ]
    assert digits == 4 * list(tokens.DIGIT_WEIGHTS)
    assert set(weights) - set(digits) == {tokens.BOX_WEIGHT}


def test_conversations_about_one_picture_do_not_see_each_other():
    torch.manual_seed(2)
    model = Demo(SMALL, 5, 3)
    writer = tokens.Writer(tokens.make_tokenizer(SMALL.vocab))
    talks = [
        writer.conversation([(q, a)]) for q, a in (("What is this?", "star"), ("Count it.", "3 2"))
    ]
    before, pictures = torch.tensor([talks[0].before]), torch.randn(1, 4, SMALL.width)

    def states(talk):
        after = [torch.tensor([x]) for x in (talk.after, talk.branch, talk.position)]
        return train.Trainer.states(SimpleNamespace(model=model), before, pictures, *after)

    joined, shared = states(tokens.together(talks)), before.shape[1] + pictures.shape[1]
    at = shared
    for talk in talks:
        alone = states(talk)
        assert torch.allclose(alone[:, :shared], joined[:, :shared], atol=1e-5)
        n = len(talk.after)
        assert torch.allclose(alone[:, shared:], joined[:, at : at + n], atol=1e-5)
        at += n
    assert at == joined.shape[1]


@pytest.mark.parametrize("task", ["shape and colour", "relation", "emoji"])
def test_boxes_are_those_of_the_things(task):
    rng = np.random.default_rng(5)
    for picture in (draw.scene(rng, task, 300, 200) for _ in range(10)):
        located = [turn for turn in picture.turns if turn[0] == "box"]
        assert len(located) == len(picture.items)
        for (_, question, answer), item in zip(located, picture.items, strict=True):
            (region,) = ivr.grounding.parse(answer, 300, 200)
            assert question in [q.format(a=region.label) for q in world.GROUNDING]
            assert np.allclose(region.box, np.clip(item.box, 0, [300, 200] * 2), atol=0.4)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("<ref>red star</ref><box>[[100, 100, 300, 300]]</box>", True),
        ("<ref>red star</ref><box>[[100, 100, 301, 199]]</box>", False),
        ("<ref>red star</ref><box>[[100, 099, 300, 201]]</box>", True),
        ("<ref>red star</ref><box>[[400, 400, 600, 600]]</box>", False),
        ("<ref>star</ref><box>[[100, 100, 300, 300]]</box>", False),
        ("<ref>red star</ref>", False),
        ("red star", False),
    ],
)
def test_a_box_is_right_from_half_on(answer, right):
    assert data.right(answer, "<ref>red star</ref><box>[[100, 100, 300, 300]]</box>") == right


def test_the_exam_of_boxes_asks_for_one():
    for picture in data.exam("box", 112, 5, held_out=True, seed=4):
        task, question, answer = picture.turns[0]
        assert task == "box"
        assert data.right(answer, answer)
        assert question.rstrip("?.").endswith(ivr.grounding.parse(answer, 1, 1)[0].label)


def test_relations_are_asked_both_ways():
    opposite = {"left": "right", "above": "below"}
    opposite |= {b: a for a, b in opposite.items()}
    for picture in scenes("relation", 10):
        (_, _, there), (_, _, back) = (t for t in picture.turns if t[0] == "relation")
        assert back == opposite[there]


def test_optimizer_learns_and_leaves_the_frozen_alone():
    torch.manual_seed(0)
    model = Demo(SMALL, 5, 3).bfloat16()
    steps = optimizer.Optimizer(model)
    frozen = {n: p.clone() for n, p in model.named_parameters() if n.startswith("mlp1.")}
    pixels = torch.randn(8, 3, 112, 112).bfloat16()
    labels = torch.randint(0, 5, (8 * 64,))
    losses = []
    for _ in range(25):
        patches = model.vision_model(pixels)[:, 1:].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(model.dense["kind"](patches).float(), labels)
        loss.backward()
        steps.step({"vision_model.": 3e-3, "dense.": 3e-3})
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.75 * losses[0]
    named = dict(model.named_parameters())
    assert all(torch.equal(named[n], p) for n, p in frozen.items())


def test_the_exported_checkpoint_is_the_trained_model(tmp_path):
    torch.manual_seed(1)
    model = Demo(SMALL, 5, 3)
    with torch.no_grad():  # what the file stores
        for p in model.parameters():
            p.copy_(p.add_(0.05 * torch.randn_like(p)).bfloat16())
    export.write(dict(model.named_parameters()), tmp_path, SMALL)
    loaded = ivr.load(tmp_path, dtype="float32")
    picture = scenes("emoji", 1)[0]
    pixels = data.normalise(picture.pixels[None], "cpu", torch.float32)
    features = model.project(model.vision_model(pixels))
    assert torch.allclose(loaded.encode_images(pixels), features, atol=1e-4, rtol=1e-3)
    writer = tokens.Writer(tokens.make_tokenizer(SMALL.vocab))
    talk = writer.conversation([picture.turns[0][1:]], last_answer=False)
    ids = [*talk.before, *[loaded.image_token_id] * 16, *talk.after]
    logits = loaded.forward(torch.tensor([ids]), pixels)
    parts = (torch.tensor([talk.before]), torch.tensor([talk.after]))
    states = torch.cat((model.embed(parts[0]), features, model.embed(parts[1])), 1)
    expected = model.logits(model.decode(states))
    assert torch.allclose(logits, expected, atol=1e-3, rtol=1e-3)
    assert loaded.system_message == world.SYSTEM_MESSAGE
    assert isinstance(
        loaded.chat(picture.turns[0][1], images=picture.pixels, max_new_tokens=3), str
    )


def test_training_goes_on_from_the_committed_weights(tmp_path):
    trainer = train.Trainer(tmp_path, "cpu", ivr.model.DEMO_MODEL)
    stored = load_file(ivr.model.DEMO_MODEL / "model.safetensors")
    named = dict(trainer.model.named_parameters())
    assert set(named) - set(stored) == {n for n in named if n.startswith("dense.")}
    assert all(torch.equal(named[n], t) for n, t in stored.items())
    pictures = data.exam("emoji", 224, 10, held_out=True, seed=3)
    right = sum(
        a == p.turns[0][2] for a, p in zip(trainer.answers(pictures), pictures, strict=True)
    )
    assert right >= 8


def test_tiles_are_those_of_preprocess():
    rng = np.random.default_rng(3)
    picture = draw.scene(rng, "emoji", 300, 200)
    tiles = data.tiles_of(picture.pixels, 112)
    whole = ivr.image.preprocess(picture.pixels, max_tiles=world.MAX_TILES, image_size=112)
    assert len(tiles) == len(whole) - 1 > 1
    assert torch.allclose(data.normalise(tiles, "cpu", torch.float32), whole[:-1], atol=1e-5)


@pytest.mark.parametrize("kind", ["scene", "thumbnail", "tiles"])
def test_a_batch_of_every_source(kind, monkeypatch):
    monkeypatch.setattr(data, "JOINS", {"emoji": 0.0, "relation": 0.5})
    writer = tokens.Writer(tokens.make_tokenizer(700))
    plan = data.Plan("test", (data.Source(kind, 112, 3),), staged=True)
    arrays = data.batch(plan, writer, 0, 0.1)
    assert arrays["pixels"].shape == (3, 112, 112, 3)
    assert arrays["kinds"].shape == arrays["colours"].shape == (3, 64)
    assert (arrays["kinds"] >= world.EMOJI_CLASS).any(1).all()  # relation has not joined
    assert len({arrays[k].shape for k in ("after", "weights", "branch", "position")}) == 1
    assert (arrays["weights"] > 0).any(1).all()
    assert ("tiles" in arrays) == (kind == "tiles")
    again = data.batch(plan, writer, 0, 0.1)
    assert all(np.array_equal(arrays[k], again[k]) for k in arrays)


@pytest.mark.parametrize("step", [1, 2])
def test_the_place_in_a_window_is_that_in_the_whole(step):
    grid, corner, n = Sizes().grid, (3, 5), 8 // step
    rows, columns = (
        torch.nn.functional.one_hot(torch.arange(c, c + 8, step), grid) * 100.0 for c in corner
    )
    said = {"row": rows.repeat_interleave(n, 0)[None], "column": columns.repeat(n, 1)[None]}
    heads = {name: lambda _, logits=logits: logits for name, logits in said.items()}
    trainer = SimpleNamespace(model=SimpleNamespace(dense=heads))

    def loss(where):
        zeros = torch.zeros(1, n * n, 4)
        return train.Trainer.place_loss(trainer, ("row", "column"), zeros, where, step)

    assert loss(corner) < 1e-6
    assert loss((4, 5)) > 10


def test_a_step_of_the_last_stage_teaches_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "JOINS", {"emoji": 0.0})
    trainer = train.Trainer(tmp_path, "cpu")
    plan = data.Plan("test", (data.Source("tiles", 112, 2),), staged=True)
    arrays = data.batch(plan, trainer.writer, 0, 0.0)
    losses = trainer.losses("finish", train.STAGES["finish"], arrays)
    assert set(losses) == {*train.DENSE_WEIGHTS, *train.TOKEN_WEIGHTS, "answer"}
    assert all(0 <= v.detach() < 100 for v in losses.values())  # also without a colour to name
