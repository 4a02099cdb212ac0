"""The demonstration model's pictures are what their answers say, and its training trains."""

import json
import re
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
    def centre(picture, name):
        words = name.split()
        (item,) = (
            i
            for i in picture.items
            if world.SHAPES[i.kind - world.SHAPE_CLASS] == words[-1]
            and (len(words) == 1 or i.colour == words[0])
        )
        x0, y0, x1, y1 = item.box
        assert np.array_equal(picture.box(name), item.box)
        return (x0 + x1) / 2, (y0 + y1) / 2

    sizes = set()
    for picture in scenes("relation", 60):
        sizes.add(len(picture.items))
        pairs = [t for t in picture.turns if t[0] in ("relation", "where")]
        for (_, asked, side), (_, question, answer) in zip(pairs[::2], pairs[1::2], strict=True):
            text = question.removeprefix("Where is the ").rstrip("?")
            a, b = re.split(", seen from the | relative to the ", text)
            (ax, ay), (bx, by) = (centre(picture, name) for name in (a, b))
            holds = {"left": ax < bx, "right": ax > bx, "above": ay < by, "below": ay > by}
            assert holds[side], (question, answer)
            assert answer == (
                f"{side} the {b}" if side in ("above", "below") else f"{side} of the {b}"
            )
            assert asked.startswith(f"Is the {a} ")
            assert asked.endswith(f"the {b}?")
    assert sizes == {2, 3, 4}


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
    shown = writer.tokenizer.decode(talk.before, skip_special_tokens=False)
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


def test_a_conversation_about_two_pictures_is_the_prompt_that_runs():
    writer = tokens.Writer(tokens.make_tokenizer(700))
    talk = writer.conversation(
        [("What is in Image-2?", "a star")], last_answer=False, tokens=(3, 2)
    )
    expected = render(
        "Image-1: <image>\nImage-2: <image>\nWhat is in Image-2?",
        template=tokens.TEMPLATE,
        system=world.SYSTEM_MESSAGE,
        num_tiles=[3, 2],
        tokens_per_tile=1,
    )
    assert writer.tokenizer.decode(talk.before + talk.after, skip_special_tokens=False) == expected
    assert talk.before.count(writer.context) == 5
    assert talk.before[-1] == writer.context


def test_names_are_found_where_they_end():
    writer = tokens.Writer(tokens.make_tokenizer(700))
    turns = [
        ("Is the red star left of the star-shaped ring?", "left of the ring, not of the rings")
    ]
    talk = writer.conversation(turns, named={"star": [0], "red star": [0], "ring": [1]})
    found = [
        (name, writer.tokenizer.decode(talk.after[: i + 1]).split()[-1])
        for i, name in enumerate(talk.names)
        if name
    ]
    expected = [("red star", "star"), ("star", "star"), ("ring", "ring"), ("ring", "ring")]
    assert found == expected


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
    before, pictures = torch.tensor([talks[0].before]), torch.randn(1, 1, SMALL.width)
    trainer = SimpleNamespace(model=model, writer=writer)

    def states(talk):
        after = [torch.tensor([x]) for x in (talk.after, talk.branch, talk.position)]
        return train.Trainer.states(trainer, before, pictures, *after)

    together = states(tokens.together(talks))
    at = 0
    for talk in talks:
        n = len(talk.after)
        for alone, joined in zip(states(talk), together, strict=True):
            assert torch.allclose(alone, joined[:, at : at + n], atol=1e-5)
        at += n
    assert all(at == joined.shape[1] for joined in together)


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
    for picture in scenes("relation", 20):
        sides = [side for task, _, side in picture.turns if task == "relation"]
        assert sorted(sides) == sorted(opposite[side] for side in sides)


def said_of(picture):
    """All that may be answered about a picture of one thing."""
    kind, colour = picture.items[0].kind, picture.items[0].colour
    if kind >= world.EMOJI_CLASS:
        name = world.emoji()[0][kind - world.EMOJI_CLASS]
        return {name, world.article(name)}
    if kind >= world.SHAPE_CLASS:
        noun = world.SHAPES[kind - world.SHAPE_CLASS]
        return {noun, colour, world.article(f"{colour} {noun}")}
    text = "".join(str(item.kind - world.DIGIT_CLASS) for item in picture.items)
    return {text, f"the number {text}"}


def test_two_pictures_are_asked_about_by_their_order():
    rng, kinds = np.random.default_rng(9), set()
    for _ in range(30):
        second = draw.pair(rng, 112)
        for task, question, answer in second.turns:
            assert task == "two pictures"
            kinds.add(question.split()[0])
            if question.startswith("Which picture"):
                named = question.removeprefix("Which picture shows ").rstrip("?")
                shown = (second.first, second)[answer == "the second"]
                assert answer in ("the first", "the second")
                assert named in said_of(shown)
            else:
                shown = (second.first, second)[any(w in question for w in ("second", "Image-2"))]
                assert answer in said_of(shown), question
    assert kinds == {"What", "Which"}


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
    ids = [*talk.before, *[writer.context] * 15, *talk.after]
    logits = loaded.forward(torch.tensor([ids]), pixels)
    parts = (torch.tensor([talk.before[:-1]]), torch.tensor([talk.after]))
    states = torch.cat((model.embed(parts[0]), features, model.embed(parts[1])), 1)
    expected = model.logits(model.decode(states)[0])
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
        a == p.turns[0][2]
        for a, p in zip(
            trainer.answers(pictures, [p.turns[:1] for p in pictures]), pictures, strict=True
        )
    )
    assert right >= 8


def test_tiles_are_those_of_preprocess():
    rng = np.random.default_rng(3)
    picture = draw.scene(rng, "emoji", 300, 200)
    tiles = data.tiles_of(picture.pixels, 112)
    whole = ivr.image.preprocess(picture.pixels, max_tiles=world.MAX_TILES, image_size=112)
    assert len(tiles) == len(whole) - 1 > 1
    assert torch.allclose(data.normalise(tiles, "cpu", torch.float32), whole[:-1], atol=1e-5)


@pytest.mark.parametrize("kind", ["scene", "thumbnail", "tiles", "pair"])
def test_a_batch_of_every_source(kind, monkeypatch):
    monkeypatch.setattr(data, "JOINS", {"emoji": 0.0, "relation": 0.5})
    writer = tokens.Writer(tokens.make_tokenizer(700))
    plan = data.Plan("test", (data.Source(kind, 112, 3),), staged=True)
    arrays = data.batch(plan, writer, 0, 0.1)
    assert arrays["pixels"].shape == (3, 112, 112, 3)
    assert arrays["kinds"].shape == arrays["colours"].shape == (3, 64)
    if kind != "pair":
        assert (arrays["kinds"] >= world.EMOJI_CLASS).any(1).all()  # relation has not joined
    assert len({arrays[k].shape for k in ("after", "weights", "branch", "position")}) == 1
    assert arrays["named"].shape == (*arrays["after"].shape, 4)
    context = (arrays["before"] == writer.context).sum(1)
    assert (context == 16 * (1 + arrays.get("tiles", np.empty((3, 0))).shape[1])).all()
    assert (arrays["weights"] > 0).any(1).all()
    assert ("tiles" in arrays) == (kind in ("tiles", "pair"))
    again = data.batch(plan, writer, 0, 0.1)
    for key, array in arrays.items():
        np.testing.assert_array_equal(array, again[key])


def test_names_know_the_boxes_of_their_things():
    writer = tokens.Writer(tokens.make_tokenizer(Sizes.vocab))
    plan = data.Plan(
        "test", (data.Source("scene", 224, 4),), weights=data.WEIGHTS | {"relation": 1e9}
    )
    arrays = data.batch(plan, writer, 0, 1.0)
    named = ~np.isnan(arrays["named"][..., 0])
    assert (named.sum(1) >= 2).all()  # the first question names two
    things = [writer.tokenizer.decode([i]).split()[-1] for i in arrays["after"][named]]
    assert set(things) <= {*world.SHAPES}
    boxes = arrays["boxes"].reshape(4, -1, 4)
    for row, box in zip(np.nonzero(named)[0], arrays["named"][named], strict=True):
        assert (boxes[row] == box.astype(np.float32)).all(1).any()  # a thing of this picture


def test_tokens_know_the_box_of_the_one_thing_they_are_part_of():
    canvas = draw.Canvas(np.random.default_rng(0), 112, 112)
    canvas.shape("square", "red", 28, (14, 14))  # shares a token with the second
    canvas.shape("star", "blue", 14, (42, 14))
    canvas.shape("heart", "pink", 42, (56, 56))
    arrays = {k: v[None] for k, v in canvas.picture().labels().items()}
    grid, corner, asked = Sizes().grid, (2, 4), []

    def token_box(tokens):
        asked.append(len(tokens))
        return (torch.tensor([[4, 4, 7, 7]]).expand(len(tokens), -1) + shift) / grid

    shift = torch.tensor([4.0, 2.0] * 2)
    heads = {"token_centre": lambda x: x[..., :1], "token_box": token_box}
    trainer = SimpleNamespace(
        model=SimpleNamespace(dense=heads),
        sizes=Sizes(),
        device="cpu",
        place_loss=lambda *_: torch.zeros(()),
    )
    found = train.Trainer.token_losses(trainer, torch.zeros(1, 16, 8), corner, arrays)
    # Of the square's four tokens one is also the star's; the heart has four of its own.
    assert asked == [3 + 4]
    square = np.abs(np.array([1, 1, 3, 3]) - [4, 4, 7, 7]).sum() / grid
    assert abs(float(found["token_box"]) - 3 * square / (7 * 4)) < 1e-6


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
