"""Prompts against the reference implementation's, and what a user's text may and may not do."""

import base64
import json
import random
from pathlib import Path

import numpy as np
import pytest

from internvl_rt import prompt
from internvl_rt.prompt import (
    TEMPLATES,
    FinalChannel,
    ImageSpan,
    Media,
    StopMatcher,
    TextStream,
    build_prompt,
    default_system,
    get_template,
    is_first_generation,
    parse_messages,
    render,
    with_placeholders,
)
from internvl_rt.tokenizer import load_tokenizer
from tiny_tokenizer import ADDED, HARMONY, PLAIN_ADDED, write_json, write_phi3

GOLDEN = json.loads(
    (Path(__file__).parent / "golden/conversation/golden.json").read_text(encoding="utf-8")
)
CASES = GOLDEN["prompts"]
MALFORMED = ("history_with_pixels_but_no_placeholder", "more_placeholders_than_images")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_json(folder)
    return load_tokenizer(folder)


def _render(case):
    args = case["args"]
    return render(
        args["question"],
        template=case["template"],
        history=args.get("history"),
        system=args.get("system"),
        num_tiles=args.get("npl"),
        tokens_per_tile=GOLDEN["tokens_per_tile_in_these_prompts"],
        has_images=args.get("has_pixels", False),
    )


def _id(case):
    return "{source}-{template}-{case}".format(**case)


@pytest.mark.parametrize("case", CASES, ids=_id)
def test_render_equals_the_reference(case):
    assert _render(case) == case["prompt"]


@pytest.mark.parametrize("name", GOLDEN["templates"])
def test_templates_equal_the_reference(name):
    golden = GOLDEN["templates"][name]
    template = get_template(name.split("/")[1])
    assert template.system_message == golden["system_message"]
    assert template.stop_token == golden["eos_token_string_used_by_chat"]
    assert template.stop_token in template.stop_strings
    if golden["stop_str"]:
        assert golden["stop_str"] in template.stop_strings
    assert template.system.prefix == golden["system_template"].split("{")[0]
    assert template.reply.startswith(golden["roles"][1])
    assert template.user.prefix.startswith(golden["roles"][0])


def test_six_templates_the_native_one_and_llavas():
    known = {name.split("/")[1] for name in GOLDEN["templates"]}
    assert set(TEMPLATES) == known | {"hf", "vicuna_v1"}


def test_native_template():
    user, reply = "<|im_start|>user\nHi<|im_end|>\n", "<|im_start|>assistant\n"
    assert render("Hi", template="hf") == user + reply
    system = "<|im_start|>system\nS<|im_end|>\n"
    assert render("Hi", template="hf", system="S") == system + user + reply
    text = render("Hi", template="hf", history=[("", "A")])
    empty = "<|im_start|>user\n<|im_end|>\n"
    assert text == f"{empty}{reply}A<|im_end|>\n{user}{reply}"


def test_default_system():
    assert default_system("hf") is None
    assert default_system("internvl_zh") == ""
    assert default_system("Hermes-2", v1=True) == "Answer the questions."
    assert default_system("internvl2_5", v1=True) == default_system("internvl2_5")


@pytest.mark.parametrize(
    ("name", "ps_version", "first"),
    [
        ("InternVL-Chat-V1-1", "v1", True),
        ("anything", "v1", True),
        ("InternVL-Chat-V1-5", "v2", True),
        ("InternVL-Chat-V1-5-AWQ", "v2", True),
        ("Mini-InternVL-Chat-2B-V1-5", "v2", True),
        ("Mini-InternVL-Chat-4B-V1-5", "v2", True),
        ("mini-internvl-chat-4b-v1_5", "v2", True),
        ("InternVL2-4B", "v2", False),
        ("InternVL2_5-1B", "v2", False),
        ("InternVL3-1B", "v2", False),
        ("InternVL3_5-1B", "v2", False),
        ("model-v1-5", "v2", False),
    ],
)
def test_first_generation(name, ps_version, first):
    assert is_first_generation(name, ps_version) == first


def test_vicuna():
    """LLaVA's format: pictures are features alone, each text between them a text of its own."""
    text = render(
        "<image>\nWhat?",
        template="vicuna_v1",
        history=[("Hi", "Hello")],
        system="Be brief.",
        num_tiles=[1],
    )
    assert text == "Be brief. USER: Hi ASSISTANT: Hello</s>USER: <image>\nWhat? ASSISTANT:"
    assert default_system("vicuna_v1").startswith("A chat between a curious user and an art")


def test_vicuna_ids(tmp_path):
    write_phi3(tmp_path, legacy=None)
    tokenizer = load_tokenizer(tmp_path)
    built = build_prompt(
        tokenizer,
        "<image>\nis",
        template="vicuna_v1",
        system="a",
        num_tiles=[2],
        tokens_per_tile=2,
    )
    (span,) = built.image_spans
    ends = built.token_ids[: span.start], built.token_ids[span.start + span.length :]
    assert ends[0] == [1, *tokenizer.encode_literal("a USER: ")]
    assert ends[1] == tokenizer.encode_literal("\nis ASSISTANT:")
    assert (span.length, span.image) == (4, 0)


@pytest.fixture(scope="module")
def harmony(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harmony")
    write_json(folder, more=HARMONY)
    return load_tokenizer(folder)


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        ("<|channel|>final<|message|>Hello world<|return|>", "Hello world"),
        ("Hello", "Hello"),
        ("", ""),
        (
            "<|channel|>analysis<|message|>Hm<|end|>"
            "<|start|>assistant<|channel|>final<|message|>Hello <ref>x</ref>",
            "Hello <ref>x</ref>",
        ),
        ("<|channel|>final <|constrain|>text<|message|>Hello", "Hello"),
        ("<|channel|>analysis<|message|>Hm", ""),
        ("<|start|>assistant<|message|>Hm", ""),
    ],
)
def test_final_channel(harmony, answer, shown):
    channel, stream = FinalChannel(harmony), TextStream(harmony)
    ids = harmony.encode_markup(answer)
    assert "".join(stream.push(i) for i in ids if channel.shows(i)) + stream.finish() == shown


def test_channel_is_restored_in_the_history(harmony):
    arguments = {"template": "internvl3_5_gpt_oss", "history": [("Hi", "Hello <|end|>"), ("a", "")]}
    text = render("b", **arguments)
    plain = build_prompt(harmony, "b", **arguments)
    assert harmony.decode(plain.token_ids, skip_special=False) == text
    built = build_prompt(harmony, "b", restore_channel=True, **arguments)
    opened = "<|start|>assistant<|channel|>final<|message|>Hello"
    assert harmony.decode(built.token_ids, skip_special=False) == text.replace(
        "<|start|>assistantHello", opened
    )
    assert built.token_ids.count(harmony.token_id("<|end|>")) == text.count("<|end|>") - 1


def test_render_leaves_what_does_not_match():
    text = render("<image>", template="hf", num_tiles=[1, 2], tokens_per_tile=1)
    assert text.count("<IMG_CONTEXT>") == 1
    assert "<image>" in render("a <image>", template="hf")
    assert (
        render("q", template="hf", history=[], num_tiles=[1], has_images=True).count("<img>") == 0
    )


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"template": "vicuna"}, ValueError, "one of: internvl_zh, Hermes-2"),
        ({"template": None}, ValueError, "template is None"),
        ({"question": None}, TypeError, "question is NoneType"),
        ({"question": "\ud800"}, ValueError, "question holds a lone surrogate"),
        ({"system": 3}, TypeError, "system is int"),
        ({"history": "x"}, TypeError, "history is str"),
        ({"history": [("a",)]}, ValueError, r"history\[0\]"),
        ({"history": [("a", 1)]}, TypeError, r"history\[0\] answer is int"),
        ({"num_tiles": [0]}, ValueError, r"num_tiles\[0\] is 0"),
        ({"num_tiles": [True]}, TypeError, r"num_tiles\[0\] is bool"),
        ({"tokens_per_tile": 0}, ValueError, "tokens_per_tile is 0"),
        ({"has_images": True}, ValueError, "num_tiles must give"),
    ],
)
def test_render_refuses(arguments, error, match):
    arguments = {"question": "Hi", "template": "internvl2_5"} | arguments
    with pytest.raises(error, match=match) as caught:
        render(**arguments)
    assert "\n" not in str(caught.value)


CHATML = [c for c in CASES if c["template"] in ("Hermes-2", "internlm2-chat", "internvl2_5")]


@pytest.mark.parametrize("case", CHATML, ids=_id)
def test_ids_equal_those_of_the_whole_string(tokenizer, case):
    args = case["args"]
    question = args["question"]
    tiles = args.get("npl", [])
    history = args.get("history")
    question = with_placeholders(question, history, num_images=len(tiles))
    call = {"template": case["template"], "history": history, "system": args.get("system")}
    if case["case"] in MALFORMED:
        with pytest.raises(ValueError, match=r"chat: \d <image> placeholders for 1 images"):
            build_prompt(tokenizer, question, num_tiles=tiles, tokens_per_tile=4, **call)
        return
    if not question:
        with pytest.raises(ValueError, match="the question is empty"):
            build_prompt(tokenizer, question, **call)
        return
    built = build_prompt(tokenizer, question, num_tiles=tiles, tokens_per_tile=4, **call)
    assert built.token_ids == tokenizer.encode_markup(case["prompt"])
    context = tokenizer.token_id("<IMG_CONTEXT>")
    assert [s.image for s in built.image_spans] == list(range(len(tiles)))
    inside = set()
    for span, count in zip(built.image_spans, tiles, strict=True):
        assert span.length == 4 * count
        inside |= set(range(span.start, span.start + span.length))
    assert {i for i, t in enumerate(built.token_ids) if t == context} == inside


def test_spans(tokenizer):
    built = build_prompt(
        tokenizer, "<image>x<image>", template="hf", num_tiles=[1, 2], tokens_per_tile=3
    )
    first, second = built.image_spans
    assert (first.length, second.length) == (3, 6)
    assert second == ImageSpan(first.start + 3 + 3, 6, 1)  # </img> x <img>
    assert built.token_ids[first.start - 1] == tokenizer.token_id("<img>")
    assert built.token_ids[first.start + 3] == tokenizer.token_id("</img>")


MARKERS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")


@pytest.mark.parametrize("token", ADDED)
@pytest.mark.parametrize("place", ["question", "history question", "answer", "system"])
def test_typed_special_tokens_are_plain_text(tokenizer, token, place):
    typed = f"Hello {token}world"
    texts = {p: typed if p == place else "Hi" for p in ("question", "answer", "system")}
    asked = typed if place == "history question" else "Hi"
    built = build_prompt(
        tokenizer,
        texts["question"],
        template="internvl2_5",
        history=[(asked, texts["answer"])],
        system=texts["system"],
    )
    plain = build_prompt(
        tokenizer, "Hi", template="internvl2_5", history=[("Hi", "Hi")], system="Hi"
    )
    token_id = tokenizer.token_id(token)
    extra = built.token_ids.count(token_id) - plain.token_ids.count(token_id)
    untyped = token in PLAIN_ADDED and place in ("answer", "system")
    assert extra == (1 if token in MARKERS or untyped else 0)
    whole = tokenizer.decode(built.token_ids, skip_special=False)
    assert typed in whole  # nothing of the text is lost
    assert len(built.image_spans) == 0


def test_thoughts_are_marked_as_the_reference_has_them(tokenizer):
    """The whole string's ids, where operator and model wrote the marks: InternVL3.5's thinking."""
    system = "First <think>\nat length</think>, then answer."
    history = [("Hello", "<think>\nHm</think>\n\nHello <box>[[1]]</box>")]
    call = {"template": "internvl2_5", "history": history, "system": system}
    whole = tokenizer.encode_markup(render("Hello world", **call))
    assert build_prompt(tokenizer, "Hello world", **call).token_ids == whole
    assert whole.count(tokenizer.token_id("<think>")) == 2


def test_no_special_token_forms_where_texts_meet(tokenizer):
    built = build_prompt(
        tokenizer, "<|im_<ref>end|>", template="hf", history=[("<|im_end", "|>")], system=None
    )
    ends = built.token_ids.count(tokenizer.token_id("<|im_end|>"))
    assert ends == 3


def test_typed_images_in_answers_are_no_placeholders(tokenizer):
    built = build_prompt(
        tokenizer, "Hi", template="hf", history=[("Hi", "I see <image>")], system="<image>"
    )
    assert built.image_spans == ()
    assert "<image>" in tokenizer.decode(built.token_ids)


def test_build_prompt_refuses(tokenizer):
    with pytest.raises(ValueError, match="chat: 2 <image> placeholders for 1 images"):
        build_prompt(tokenizer, "<image><image>", template="hf", num_tiles=[1])
    with pytest.raises(ValueError, match="chat: 0 <image> placeholders for 1 images"):
        build_prompt(tokenizer, "Hi", template="hf", num_tiles=[1])
    with pytest.raises(ValueError, match="the question is empty"):
        build_prompt(tokenizer, " \n", template="hf")
    with pytest.raises(ValueError, match="expected one of: internvl_zh"):
        build_prompt(tokenizer, "Hi", template="none")


def test_with_placeholders():
    assert with_placeholders("Q", None) == "Q"
    assert with_placeholders("Q", None, num_images=1) == "<image>\nQ"
    two = "Image-1: <image>\nImage-2: <image>\nQ"
    assert with_placeholders("Q", [], num_images=2) == two
    frames = "Frame1: <image>\nFrame2: <image>\nQ"
    assert with_placeholders("Q", None, num_frames=2) == frames
    assert with_placeholders("Q", None, num_images=1, num_frames=1) == (
        "Image-1: <image>\nFrame1: <image>\nQ"
    )
    assert with_placeholders("Q", [("a", "b")], num_images=1) == "Q"
    assert with_placeholders("<image>Q", None, num_images=2) == "<image>Q"


def _user(*parts):
    return {"role": "user", "content": list(parts)}


def _text(text):
    return {"type": "text", "text": text}


def test_messages():
    pixels = np.zeros((2, 2, 3), np.uint8)
    conversation = parse_messages(
        [
            {"role": "system", "content": [_text("Be "), _text("brief.")]},
            _user({"type": "image", "image": pixels}, _text("What?")),
            {"role": "assistant", "content": "A cat."},
            _user(
                _text("And: "),
                {"type": "image_url", "image_url": {"url": "b.png", "detail": "low"}},
                {"type": "input_image", "image_url": "c.png"},
            ),
        ]
    )
    assert conversation.system == "Be brief."
    assert conversation.history == (("Image-1: <image>\nWhat?", "A cat."),)
    assert conversation.question == "And: Image-2: <image>\nImage-3: <image>\n"
    assert conversation.media[0].source is pixels
    assert [m.source for m in conversation.media[1:]] == ["b.png", "c.png"]


def test_messages_with_own_placeholders():
    conversation = parse_messages(
        [_user({"type": "image", "path": "a.png"}, _text("<image> why?"))]
    )
    assert conversation.question == "<image> why?"
    conversation = parse_messages([_user({"type": "image", "path": "a.png"}, _text("why?"))])
    assert conversation.question == "<image>\nwhy?"
    assert parse_messages([{"role": "user", "content": "Hi"}]).question == "Hi"
    image = {"type": "image", "path": "a.png"}
    with pytest.raises(ValueError, match="2 <image> placeholders for 1 images and videos"):
        parse_messages([_user(image, _text("<image><image>"))])


def test_messages_for_pictures_given_apart():
    texts = [{"role": "user", "content": "<image><image>"}]
    conversation = parse_messages(texts)
    assert (conversation.question, conversation.media) == ("<image><image>", ())
    texts += [{"role": "assistant", "content": "A."}, _user({"type": "image", "path": "a.png"})]
    with pytest.raises(ValueError, match="messages: 3 <image> placeholders for 1 images"):
        parse_messages(texts)


def test_messages_with_video():
    conversation = parse_messages(
        [
            _user({"type": "video", "video": "v.mp4"}, _text("What?")),
            {"role": "assistant", "content": "<image> of a dog"},
            _user(
                {"type": "image", "path": "a.png"}, _text("And "), {"type": "video", "path": "w"}
            ),
        ]
    )
    assert [m.kind for m in conversation.media] == ["video", "image", "video"]
    whole = conversation.with_frames([2, 1])
    assert whole.history == (("Frame1: <image>\nFrame2: <image>\nWhat?", "<image> of a dog"),)
    assert whole.question == "<image>\nAnd Frame1: <image>\n"
    with pytest.raises(ValueError, match="1 counts for 2 videos"):
        conversation.with_frames([2])
    with pytest.raises(ValueError, match="frames is 0"):
        conversation.with_frames([2, 0])


def test_data_urls():
    data = bytes(range(256))
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    image = {"type": "image_url", "image_url": {"url": url}}
    assert parse_messages([_user(image)]).media == (Media("image", data),)
    for bad in ("data:image/png,abc", "data:;base64,%%%", "data:;base64,é", "data:;base64,"):
        with pytest.raises(ValueError, match="data: URL"):
            parse_messages([_user({"type": "image", "url": bad})])


USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("messages", "error", "match"),
    [
        ([], ValueError, "last message must be of role 'user'"),
        ("Hi", TypeError, "messages is str"),
        ([3], TypeError, r"messages\[0\] is int"),
        ([{"role": "user"}], ValueError, "has no key 'content'"),
        ([USER | {"name": "x"}], ValueError, "has the key 'name', expected role, content"),
        ([USER | {"role": "tool"}], ValueError, "role is 'tool'"),
        ([USER | {"content": None}], TypeError, "content is NoneType"),
        ([USER, USER], ValueError, r"messages\[1\].role is 'user', expected 'assistant'"),
        ([USER, {"role": "system", "content": ""}], ValueError, "expected 'assistant'"),
        ([{"role": "assistant", "content": "x"}], ValueError, "expected 'user'"),
        ([USER, {"role": "assistant", "content": "x"}], ValueError, "last message"),
        ([_user({"type": "audio"})], ValueError, "type is 'audio', expected text, image"),
        ([_user({"text": "x"})], ValueError, "type is NoneType"),
        ([_user("x")], TypeError, r"content\[0\] is str"),
        ([_user({"type": "text", "text": 3})], TypeError, "text is int"),
        ([_user({"type": "text", "text": "x", "y": 1})], ValueError, "has the key 'y'"),
        ([_user({"type": "image"})], ValueError, "0 of image, url, path"),
        ([_user({"type": "image", "image": None})], TypeError, "is NoneType"),
        ([_user({"type": "image", "image": [1]})], TypeError, "is list"),
        ([_user({"type": "image", "path": ""})], ValueError, "is empty"),
        ([_user({"type": "image", "url": "HTTPS://x/y.png"})], ValueError, "nothing is fetched"),
        ([_user({"type": "image", "url": "file:///etc/passwd"})], ValueError, "a file URL"),
        (
            [USER, {"role": "assistant", "content": [{"type": "image", "path": "a"}]}, USER],
            ValueError,
            "for the role user, not assistant",
        ),
    ],
)
def test_messages_refused(messages, error, match):
    with pytest.raises(error, match=match) as caught:
        parse_messages(messages)
    assert "\n" not in str(caught.value)


def test_text_stream_equals_decoding_at_once(tokenizer):
    rng = random.Random("test_prompt.text_stream")
    texts = ["Hello world", "naïve 🦊👩‍💻 图里有什么？", "<ref>x</ref><box>[[1]]</box><|im_end|>"]
    cases = [tokenizer.encode_markup(t) for t in texts]
    limit = tokenizer.vocab_size + 3
    cases += [[rng.randrange(limit) for _ in range(rng.randrange(40))] for _ in range(300)]
    cases += [[rng.randrange(256) for _ in range(20)] for _ in range(300)]  # broken UTF-8
    for ids in cases:
        for options in ({}, {"skip_special": False}, {"keep_markers": False}):
            stream = TextStream(tokenizer, **options)
            parts = [stream.push(i) for i in ids]
            assert "".join(parts) + stream.finish() == tokenizer.decode(ids, **options)


def test_text_stream_holds_unfinished_characters(tokenizer):
    stream = TextStream(tokenizer)
    ids = tokenizer.encode_plain("🦊")
    assert [stream.push(i) for i in ids] == ["", "", "", "🦊"]
    assert stream.push(ids[0]) == ""
    assert stream.finish() == "\ufffd"


def _cut(text, stops):
    """Where the stop string that is complete first, the longest of equals, begins."""
    for end in range(len(text) + 1):
        begins = [end - len(s) for s in stops if text[:end].endswith(s)]
        if begins:
            return text[: min(begins)], True
    return text, False


def test_stop_matcher_does_not_depend_on_the_pieces():
    rng = random.Random("test_prompt.stop_matcher")
    for _ in range(3000):
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(rng.randint(0, 3))]
        text = "".join(rng.choices("abc", k=rng.randrange(20)))
        matcher = StopMatcher(stops)
        out, at = "", 0
        while at < len(text):
            size = rng.randint(1, 5)
            out += matcher.push(text[at : at + size])
            at += size
        if not matcher.stopped:
            out += matcher.finish()
        assert (out, matcher.stopped) == _cut(text, stops), (text, stops)


def test_stop_matcher():
    matcher = StopMatcher(["<|im_end|>"])
    assert matcher.push("a<|im") == "a"
    assert matcher.push("_x") == "<|im_x"
    assert matcher.push("<|im_end") == ""
    assert matcher.push("|> b") == ""
    assert matcher.stopped
    assert matcher.push("more") == ""
    assert matcher.finish() == ""
    with pytest.raises(ValueError, match="empty string"):
        StopMatcher([""])
    with pytest.raises(TypeError, match="stop is a string"):
        StopMatcher("x")
    with pytest.raises(TypeError, match="type int"):
        StopMatcher([3])


def test_template_markup_must_be_in_the_tokenizer(tokenizer):
    with pytest.raises(ValueError, match=r"no special token <\|end\|>"):
        build_prompt(tokenizer, "Hi", template="phi3-chat")
    assert prompt.IMAGE == "<image>"
