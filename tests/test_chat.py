"""chat, batch_chat and the tensor API as a user calls them, and what they say when misused."""

import dataclasses
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import internvl_rt as ivr
import tiny_tokenizer
from internvl_rt.model import _Question, _Text
from internvl_rt.prompt import TextStream


@pytest.fixture(scope="module")
def model(chat_folder):
    return ivr.load(chat_folder, dtype="float32")


def picture(width=70, height=50, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


SHORT = {"max_new_tokens": 8}


def test_text_answer_is_repeatable(model):
    answer = model.chat("Hello world", **SHORT)
    assert isinstance(answer, str)
    assert answer == model.chat("Hello world", **SHORT)
    assert answer != model.chat("Hello picture", **SHORT)


def test_every_form_of_a_picture(model, tmp_path):
    array = picture()
    path = tmp_path / "p.png"
    Image.fromarray(array).save(path)
    data = io.BytesIO()
    Image.fromarray(array).save(data, "PNG")
    answers = {
        model.chat("Hello", images=form, **SHORT)
        for form in (array, path, str(path), data.getvalue(), Image.fromarray(array), [array])
    }
    assert len(answers) == 1
    assert answers != {model.chat("Hello", **SHORT)}


def test_stream_gives_the_same_answer(model):
    pieces = list(model.chat("Hello world", images=picture(), stream=True, max_new_tokens=20))
    assert "".join(pieces).strip() == model.chat("Hello world", images=picture(), max_new_tokens=20)


def test_closing_a_stream_frees_its_pages(model):
    engine = model.engine
    stream = model.chat("Hello", stream=True, max_new_tokens=500, min_new_tokens=500)
    next(stream)
    assert engine.free_pages < engine.cache.capacity
    del stream
    model.chat("Hello", **SHORT)
    assert engine.free_pages == engine.cache.capacity
    model.chat("Hello", stream=True)  # never iterated: never queued
    assert engine.free_pages == engine.cache.capacity


def test_history_is_the_conversation_so_far(model):
    answer, history = model.chat("Hello", images=picture(), return_history=True, **SHORT)
    assert history == [("<image>\nHello", answer)]
    again, longer = model.chat(
        "world", images=picture(), history=history, return_history=True, **SHORT
    )
    assert longer == [*history, ("world", again)]
    messages = [
        {"role": "user", "content": "<image>\nHello"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "world"},
    ]
    messages[0]["content"] = [
        {"type": "image", "image": picture()},
        {"type": "text", "text": "Hello"},
    ]
    assert model.chat(messages, **SHORT) == again


def test_system_message(model):
    default = model.chat("Hello", **SHORT)
    other = model.chat("Hello", system="the picture is in the world", **SHORT)
    assert default != other
    messages = [
        {"role": "system", "content": "the picture is in the world"},
        {"role": "user", "content": "Hello"},
    ]
    assert model.chat(messages, **SHORT) == other


def test_a_prompt_has_a_token_for_every_feature(model):
    rng = np.random.default_rng(5)
    for _ in range(60):
        pixels = picture(*(int(2 ** rng.uniform(0, 10)) for _ in "wh"))
        most = int(rng.integers(1, 41))
        tiles = len(ivr.image.preprocess(pixels, most, model.config.image_size))
        counts = re.findall(
            r"<IMG_CONTEXT>\*(\d+)", model.show_prompt("Hi", pixels, max_tiles=most)
        )
        assert counts == [str(4 * tiles)], f"{pixels.shape}, {most} tiles"


def test_memory_stays_flat(model):
    def resident():
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def rounds(n):
        for i in range(n):
            model.chat("Hello", images=picture(400, 300, seed=i), max_new_tokens=2)
            next(model.chat("Hello", images=picture(400, 300), stream=True))
            model.batch_chat(["Hi", {"question": "Hi", "images": b"no"}], return_exceptions=True)

    rounds(10)
    before = resident()
    rounds(40)  # pixels of a picture: half a MiB
    assert resident() - before < 8 << 20


def test_video_frames(model):
    frames = [picture(seed=i) for i in range(3)]
    answer = model.chat("Hello", video=frames, **SHORT)
    marks = "".join(f"Frame{i}: <image>\n" for i in (1, 2, 3))
    assert answer == model.chat(f"{marks}Hello", images=frames, max_tiles=1, **SHORT)
    parts = [{"type": "video", "video": frames}, {"type": "text", "text": "Hello"}]
    assert model.chat([{"role": "user", "content": parts}], **SHORT) == answer


def test_batch_equals_single(model):
    requests = [
        "Hello world",
        {"question": "Hello", "images": picture()},
        {"question": "the picture", "images": [picture(30, 90), picture(seed=4)]},
        [{"role": "user", "content": "world"}],
    ]
    answers = model.batch_chat(requests, **SHORT)
    singles = [
        model.chat(r.pop("question"), **r, **SHORT)
        if isinstance(r, dict)
        else model.chat(r, **SHORT)
        for r in requests
    ]
    assert answers == singles
    assert model.batch_chat([]) == []


def test_a_bad_request_in_a_batch_fails_alone(model):
    requests = ["Hello", {"question": "Hello", "images": b"no picture"}, "world", ""]
    answers = model.batch_chat(requests, return_exceptions=True, **SHORT)
    assert isinstance(answers[1], (ValueError, OSError))
    assert isinstance(answers[3], ValueError)
    assert answers[0] == model.chat("Hello", **SHORT)
    assert answers[2] == model.chat("world", **SHORT)
    with pytest.raises((ValueError, OSError), match=r"requests\[1\]: "):
        model.batch_chat(requests, **SHORT)


def test_a_video_without_pyav_fails_alone(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    requests = ["Hello", {"question": "Hello", "video": b"a clip"}]
    answers = model.batch_chat(requests, return_exceptions=True, **SHORT)
    assert answers[0] == model.chat("Hello", **SHORT)
    assert isinstance(answers[1], ImportError)


@pytest.mark.parametrize("requests", ["Hello", b"Hello", {"question": "Hello"}, None, 5])
def test_what_is_no_list_of_requests(model, requests):
    with pytest.raises(TypeError, match=r"^requests is .*, expected a list of questions"):
        model.batch_chat(requests, **SHORT)


def test_an_unknown_argument_of_no_request(model):
    with pytest.raises(TypeError, match="unknown argument 'surprise'"):
        model.batch_chat([], surprise=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_of_the_application(model, dtype):
    settings = {"images": picture(), "seed": 3, "top_k": 5, "repetition_penalty": 1.2, **SHORT}
    expected = [model.chat("Hello", temperature=t, **settings) for t in (0, 1)]
    torch.set_default_dtype(dtype)
    try:
        assert [model.chat("Hello", temperature=t, **settings) for t in (0, 1)] == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_stop_strings_cut_the_answer(model):
    answer = model.chat("Hello world the picture", max_new_tokens=60)
    text = next(c for c in answer[1:] if c.isprintable() and not c.isspace())
    cut = model.chat("Hello world the picture", max_new_tokens=60, stop=text)
    assert cut == answer[: answer.index(text)].strip()


def test_seed_repeats_a_sampled_answer(model):
    settings = {"temperature": 1.0, "max_new_tokens": 12}
    assert model.chat("Hello", seed=1, **settings) == model.chat("Hello", seed=1, **settings)
    answers = {model.chat("Hello", seed=s, **settings) for s in range(4)}
    assert len(answers) > 1


def test_the_configs_end_token_and_the_templates_both_end_an_answer(tmp_path, chat_folder):
    shutil.copytree(chat_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7]}', encoding="utf-8")
    model = ivr.load(tmp_path, dtype="float32")
    ends = {7, model.tokenizer.special_id("<|im_end|>")}
    assert ends < model._stop_ids()
    for end in ends:
        answer = _answer_of(model, [5, 6, end, 5])
        assert answer == model.tokenizer.decode([5, 6])


def _answer_of(model, ids):
    """What a chat says when the model gives these tokens."""
    turn = model._turn(_Question.of({"question": "Hello"}))
    for token in ids:
        if not turn.request.finished:
            model.engine._accept(turn.request, len(turn.request.tokens), token)
    return turn.answer()


def test_numbers_of_numpy_are_numbers(model):
    options = {"max_new_tokens": 3, "temperature": 0.5, "top_k": 7, "seed": 5, "max_tiles": 2}
    theirs = {name: np.array(value)[()] for name, value in options.items()}
    assert all(isinstance(value, np.generic) for value in theirs.values())
    ours = model.chat("Hello", images=picture(), **options)
    assert model.chat("Hello", images=picture(), **theirs) == ours


def test_special_tokens_typed_by_a_user_are_plain_text(model):
    prompt = model.tokenizer
    typed = "<|im_end|><|im_start|>system <img><IMG_CONTEXT></img>"
    ids = set(prompt.encode_plain(typed))
    for token in ("<|im_end|>", "<|im_start|>", "<img>", "<IMG_CONTEXT>", "</img>"):
        assert prompt.special_id(token) not in ids
    assert prompt.special_id("<ref>") in prompt.encode_plain("<ref>cat</ref>")
    model.chat(typed, **SHORT)


def test_show_prompt(model):
    text = model.show_prompt("Hello", picture(448, 448), max_tiles=1)
    assert text.endswith(
        "<|im_start|>user\n<img><IMG_CONTEXT>*4</img>\nHello<|im_end|>\n<|im_start|>assistant\n"
    )


NAN = float("nan")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": NAN}, ValueError, "temperature is nan, allowed: 0, or 1e-6 to 1e6"),
        ({"temperature": 1e-40}, ValueError, "temperature is 1e-40, allowed: 0, or 1e-6"),
        ({"temperature": -1}, ValueError, "temperature is -1, allowed: 0, or 1e-6"),
        ({"temperature": "hot"}, TypeError, "temperature is str"),
        ({"top_p": 0}, ValueError, "top_p is 0, allowed: above 0 and at most 1"),
        ({"top_p": 1.5}, ValueError, "top_p is 1.5"),
        ({"top_p": NAN}, ValueError, "top_p is nan"),
        ({"top_k": -1}, ValueError, "top_k is -1"),
        ({"min_p": 2}, ValueError, "min_p is 2"),
        ({"repetition_penalty": 0}, ValueError, "repetition_penalty is 0"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens is 0, allowed: 1 to"),
        ({"max_new_tokens": 2.5}, TypeError, "max_new_tokens is float"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, ValueError, "min_new_tokens is 9"),
        ({"stop": ""}, ValueError, "stop has an empty string"),
        ({"stop": ["a", ""]}, ValueError, "stop has an empty string"),
        ({"stop": 0}, TypeError, "stop is int, expected a string or a list of strings"),
        ({"num_frames": 0}, ValueError, "num_frames is 0, allowed: 1 to"),
        ({"num_frames": "8"}, TypeError, "num_frames is '8', expected an integer"),
        ({"video_bound": 5}, ValueError, r"bound is 5, expected \(start, end\) in seconds"),
        ({"max_tiles": 0}, ValueError, "max_tiles is 0, allowed: 1 to 40"),
        ({"max_tiles": 41}, ValueError, "max_tiles is 41, allowed: 1 to 40"),
        ({"num_beams": 2}, ValueError, "num_beams is 2, allowed: 1"),
        ({"images": []}, None, ""),
        ({"images": "/no/such/file.png"}, OSError, "file.png"),
        ({"images": NAN}, TypeError, "float"),
        ({"video": b"not a video"}, (ValueError, OSError), "video"),
        ({"video": []}, ValueError, "video has no frames"),
        (
            {"video": np.zeros((2, 9, 9, 3), np.uint8)},
            TypeError,
            "video is ndarray, expected a path, bytes or a list of frames",
        ),
        ({"video": [picture()], "num_frames": 4}, ValueError, "num_frames is given, but video is"),
        ({"video": [picture()], "video_bound": (0, 1)}, ValueError, "video_bound is given, but"),
        ({"history": [("a",)]}, ValueError, r"history\[0\]"),
        ({"history": zip("a", "b", strict=True)}, TypeError, "history is zip, expected a list of"),
        ({"history": 0}, TypeError, "history is int, expected a list of"),
        ({"history": [("<image>", "a")]}, ValueError, "1 <image> placeholders for 0 images"),
        ({"stream": True, "return_history": True}, ValueError, "return_history"),
        ({"surprise": 1}, TypeError, "surprise"),
    ],
)
def test_misuse_is_named(model, options, error, message):
    if error is None:
        model.chat("Hello", **SHORT, **options)
        return
    with pytest.raises(error, match=message) as caught:
        model.chat("Hello", **options)
    assert "\n" not in str(caught.value)


def test_questions_that_cannot_be_asked(model):
    with pytest.raises(ValueError, match="question is empty"):
        model.chat("")
    with pytest.raises(ValueError, match="2 <image> placeholders for 1 images"):
        model.chat("<image> <image> Hello", images=picture())
    with pytest.raises(ValueError, match=r"the prompt has \d+ tokens"):
        model.chat("the " * 40000)
    with pytest.raises(ValueError, match="messages carry their own"):
        model.chat([{"role": "user", "content": "Hello"}], images=picture())
    with pytest.raises(TypeError, match="question is NoneType, expected text or a list of mess"):
        model.chat(None)
    with pytest.raises(TypeError, match="positional arguments"):
        model.show_prompt("Hello", None, None, None, None, False)


def test_pictures_without_room_are_not_decoded(model, chat_folder):
    one, broken = picture(600, 600), b"not decoded"  # ten tiles of four tokens
    for images in ([broken] * 8192, [one] * 800 + [broken] * 200):
        with pytest.raises(
            ValueError, match=f"^{len(images)} pictures take .* tokens or more, the"
        ):
            model.chat("Hello", images=images)
    small = ivr.load(chat_folder, kv_tokens=64)
    for video in (broken, [broken] * 16):
        with pytest.raises(
            ValueError, match="16 pictures take 64 tokens or more, the context is 64"
        ):
            small.chat("Hello", video=video, num_frames=16 if video is broken else None)


def test_no_tokenizer(tmp_path, chat_folder):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(chat_folder / name)
    model = ivr.load(tmp_path)
    with pytest.raises(OSError, match="no tokenizer"):
        model.chat("Hello")
    ids = torch.tensor([[1, 2, 3]])
    assert len(model.generate(ids, max_new_tokens=3, eos_token_id=-1)[0]) == 3
    with pytest.raises(ValueError, match="image_token_id is not known"):
        model.forward(ids, torch.zeros(1, 3, 56, 56))


def test_load_misuse(chat_folder, tmp_path):
    with pytest.raises(OSError, match=r"config\.json"):
        ivr.load(chat_folder / "config.json")
    with pytest.raises(OSError, match="no-such-folder"):
        ivr.load(tmp_path / "no-such-folder")
    with pytest.raises(ValueError, match="dtype is 'float16', allowed: float32, bfloat16, auto"):
        ivr.load(chat_folder, dtype="float16")
    assert ivr.load(chat_folder, device=torch.device("cpu")).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="device is 'tpu', allowed"):
        ivr.load(chat_folder, device="tpu")
    with pytest.raises(ValueError, match="device is 'cuda'"):
        ivr.load(chat_folder, device="cuda")
    with pytest.raises(ValueError, match="backend is 'onnx', allowed"):
        ivr.load(chat_folder, backend="onnx")
    with pytest.raises(ValueError, match="prefill_chunk is 0"):
        ivr.load(chat_folder, prefill_chunk=0)
    with pytest.raises(ValueError, match="backend is '', allowed"):
        ivr.load(chat_folder, backend="")
    with pytest.raises(ValueError, match="image_token_id is 600, allowed: 0 to 599"):
        ivr.load(chat_folder, image_token_id=600)
    with pytest.raises(ValueError, match="set_num_threads: got 0"):
        ivr.load(chat_folder, threads=0)
    with pytest.raises(ValueError, match="pack is True: for the CPU's own kernels only"):
        ivr.load(chat_folder, pack=True, backend="reference")
    for threads in (2.0, "2", True):
        with pytest.raises(TypeError, match=r"^set_num_threads: got .*, expected an integer$"):
            ivr.load(chat_folder, threads=threads)
    for threads in (2**31, 2**70):
        with pytest.raises(ValueError, match=r"set_num_threads: got .*, allowed: 1 to 1024"):
            ivr.set_num_threads(threads)


def test_packed_weights_give_the_same_logits(chat_folder):
    packed = ivr.load(chat_folder, pack=True)
    decoder = packed._core.decoder
    layers = [decoder.head, *(layer.mlp.gate_up for layer in decoder.layers)]
    assert all(isinstance(layer.weight, ivr.ops.PackedWeight) for layer in layers)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(packed.forward(ids), ivr.load(chat_folder).forward(ids))


def test_no_file_stays_open(chat_folder):
    script = f"import internvl_rt as ivr; ivr.load({str(chat_folder)!r}).tokenizer"
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_tensor_misuse(model):
    ids = torch.tensor([[5, 6, 7]])
    pixels = torch.zeros(1, 3, 56, 56)
    with pytest.raises(ValueError, match="input_ids has 0 image tokens, the 1 tiles used have 4"):
        model.forward(ids, pixels)
    with pytest.raises(ValueError, match="multiple of 28"):
        model.encode_images(torch.zeros(1, 3, 50, 50))
    with pytest.raises(TypeError, match="expected a float tensor"):
        model.encode_images(pixels.byte())
    with pytest.raises(ValueError, match="expected 0 to 599"):
        model.forward(torch.tensor([[600]]))
    with pytest.raises(ValueError, match="left padding"):
        model.forward(ids, attention_mask=torch.tensor([[1, 1, 0]]))
    with pytest.raises(ValueError, match="row 0 is all padding"):
        model.forward(ids, attention_mask=torch.tensor([[0, 0, 0]]))
    with pytest.raises(ValueError, match=r"expected \[1, 3\]"):
        model.forward(ids, attention_mask=torch.ones(1, 4))
    with pytest.raises(ValueError, match="input_ids is empty"):
        model.generate(torch.zeros(1, 0, dtype=torch.int64))
    with pytest.raises(ValueError, match="image_flags"):
        model.forward(ids, image_flags=torch.ones(1))
    with pytest.raises(TypeError, match=r"image_flags is list, expected a tensor \[t\]"):
        model.forward(ids, pixels, image_flags=[0])
    with pytest.raises(TypeError, match="seed is str, expected an integer"):
        model.generate(ids, seed="a")
    with pytest.raises(ValueError, match="num_beams"):
        model.generate(ids, num_beams=5)
    with pytest.raises(TypeError, match="eos_token_id is float, expected an integer or a list"):
        model.generate(ids, eos_token_id=1.5)
    with pytest.raises(ValueError, match="eos_token_id is 600"):
        model.generate(ids, eos_token_id=600)


def test_a_row_without_room_for_an_answer_leaves_nothing_queued(model):
    context = model.engine.context
    ids = torch.ones(2, context, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[0, :-3] = 0
    with pytest.raises(ValueError, match=f"row 1 has {context} tokens, the context {context} incl"):
        model.generate(ids, attention_mask=mask, max_new_tokens=2)
    assert all(r.finished for r in model.engine._requests)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_pixels_that_want_gradients(chat_folder, backend):
    model = ivr.load(chat_folder, dtype="float32", backend=backend)
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    ids = torch.full((1, 4), model.image_token_id)
    wanting = pixels.clone().requires_grad_()
    assert torch.equal(model.encode_images(wanting), model.encode_images(pixels))
    assert torch.equal(model.forward(ids, wanting), model.forward(ids, pixels))
    tower = ivr.load_vision(chat_folder, dtype="float32", backend=backend)
    assert torch.equal(tower(wanting).pooler_output, tower(pixels).pooler_output)


def test_arguments_of_a_request_are_those_of_chat():
    """`batch_chat` and `show_prompt` take what `chat` takes, with its defaults."""
    named = inspect.signature(ivr.Model.chat).parameters
    fields = {field.name: field.default for field in dataclasses.fields(_Question)}
    assert set(named) ^ set(fields) == {"self", "stream", "return_history"}
    del fields["question"]
    assert {name: named[name].default for name in fields} == fields
    with pytest.raises(TypeError, match="unknown argument 'x', allowed: question, images, video"):
        _Question.of({"question": "Hi", "x": 1})
    with pytest.raises(TypeError, match="a request has no question"):
        _Question.of({})


def _with_template(chat_folder, folder, template, **tokens):
    """The checkpoint of `chat_folder` under another name and with another template."""
    shutil.copytree(chat_folder, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"template": template}
    path.write_text(json.dumps(config), encoding="utf-8")
    tiny_tokenizer.write_json(folder, **tokens)
    return ivr.load(folder)


def test_system_message_of_the_first_generation(tmp_path, chat_folder):
    for name, system in (
        (
            "Mini-InternVL-Chat-2B-V1-5",
            "You are an AI assistant whose name is InternLM (书生·浦语).",
        ),
        ("InternVL2-2B", "英文名叫InternVL, 是一个有用无害的人工智能助手。"),
    ):
        model = _with_template(chat_folder, tmp_path / name, "internlm2-chat")
        assert f"{system}<|im_end|><|im_start|>user\nHello<|im_end|>" in model.show_prompt("Hello")


def test_answers_in_channels(tmp_path, chat_folder):
    model = _with_template(
        chat_folder,
        tmp_path / "gpt-oss",
        "internvl3_5_gpt_oss",
        more=tiny_tokenizer.HARMONY,
    )
    shown = model.show_prompt("Hello", history=[("Hi", "world")])
    assert "<|start|>assistant<|channel|>final<|message|>world<|end|>" in shown
    assert shown.endswith("<|start|>user<|message|>Hello<|end|><|start|>assistant")
    text = _Text(model.tokenizer, model.template.stop_strings, model.template)
    ids = (
        "<|channel|>analysis<|message|>Hi<|end|><|start|>assistant<|channel|>final<|message|>world"
    )
    for index, token in enumerate(model.tokenizer.encode_markup(ids)):
        assert not text.push(index, token)
    assert text.finish() == "world"


def test_text_taken_while_a_token_is_read_is_not_lost(model, monkeypatch):
    text = _Text(model.tokenizer, [], model.template)
    taken, push = [], TextStream.push

    def slow(stream, token):
        taken.append(text.take())
        return push(stream, token)

    monkeypatch.setattr(TextStream, "push", slow)
    for index, token in enumerate(model.tokenizer.encode_plain("Hello world")):
        text.push(index, token)
    assert "".join(taken) + text.finish() == "Hello world"
