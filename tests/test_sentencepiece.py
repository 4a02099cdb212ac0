"""SentencePiece models read and run by our own code, and tokenizers made of them."""

import json
import random
from itertools import pairwise

import pytest
import tokenizers

from internvl_rt.prompt import TextStream, build_prompt, render
from internvl_rt.sentencepiece import read_sentencepiece
from internvl_rt.tokenizer import ALLOWED_IN_TEXT, CONTROL_TOKENS, load_tokenizer
from tiny_tokenizer import (
    BYTE,
    NINE,
    NORMAL,
    PHI3,
    UNKNOWN,
    UNUSED,
    WORD,
    model_bytes,
    pieces,
    write_internlm2,
    write_llama_json,
    write_phi3,
)

TEXTS = [
    "",
    "Hello world",
    "  two   spaces    and tabs\t\t ",
    "图里有什么？ naïve 🦊👩‍💻",
    "aba bab ababab baab",
    "is\nit\0\x01",
    "world\u2581world",
]
SPACE = "\u2581"


def _model(tmp_path, data):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    return read_sentencepiece(path)


def _slowly(text, entries):
    """SentencePiece's order, found by looking at every pair every time."""
    ids = {t: i for i, (t, _, kind) in enumerate(entries) if kind == NORMAL}
    scores = {t: score for t, score, kind in entries if kind == NORMAL}
    symbols = list(text.replace(" ", SPACE))
    while True:
        pairs = [(a + b, i) for i, (a, b) in enumerate(pairwise(symbols))]
        known = [(-scores[merged], i, merged) for merged, i in pairs if merged in scores]
        if not known:
            break
        _, at, merged = min(known)
        symbols[at : at + 2] = [merged]
    out = []
    for symbol in symbols:
        found = ids.get(symbol)
        out += [3 + byte for byte in symbol.encode()] if found is None else [found]
    return out


def test_merges_in_the_order_of_scores(tmp_path):
    entries = pieces()
    model = _model(tmp_path, model_bytes(entries))
    rng = random.Random("test_sentencepiece.merges")
    texts = TEXTS + ["".join(rng.choices("ab lorwdHe", k=rng.randrange(30))) for _ in range(2000)]
    for text in texts:
        assert model.encode(text) == _slowly(text, entries), text


def test_of_equal_scores_the_leftmost(tmp_path):
    """What no order of ranks can give: ab before ba in one text, after it in the other."""
    entries = [("<unk>", 0.0, UNKNOWN), ("a", -5.0, NORMAL), ("b", -6.0, NORMAL)]
    entries += [("ab", -1.0, NORMAL), ("ba", -1.0, NORMAL)]
    model = _model(tmp_path, model_bytes(entries, trainer={35: 0}))
    assert [model.token(i) for i in model.encode("aba")] == ["ab", "a"]
    assert [model.token(i) for i in model.encode("bab")] == ["ba", "b"]
    assert model.encode("axb") == [1, 0, 2]


def test_a_merge_through_a_character_that_is_no_piece(tmp_path):
    entries = [e for e in pieces() if e[0] != "o"]
    model = _model(tmp_path, model_bytes(entries))
    assert [model.token(i) for i in model.encode("Hello")] == ["Hello"]
    assert model.encode("o") == [3 + ord("o")]


def test_long_text(tmp_path):
    model = _model(tmp_path, model_bytes(pieces()))
    ids = model.encode("ab" * 50_000)
    assert len(ids) == 50_000
    assert set(ids) == {model.token_id("ab")}


def test_words_and_markup_of_the_model(tmp_path):
    write_internlm2(tmp_path)
    model = read_sentencepiece(tmp_path / "tokenizer.model")
    word, nul = model.token_id(WORD), model.token_id("\0")
    assert model.encode(f"a{WORD}b\0") == [*model.encode("a"), word, *model.encode("b"), nul]
    markup = model.token_id("[UNUSED_0]")
    assert markup not in model.encode("[UNUSED_0]")


@pytest.fixture(scope="module")
def phi3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phi3")
    write_phi3(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def internlm2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("internlm2")
    write_internlm2(folder)
    return load_tokenizer(folder)


def _tokens(tokenizer, ids):
    return [tokenizer.decode([0, i], skip_special=False)[len("<unk>") :] for i in ids]


def test_phi3_spaces(phi3):
    """A space before the text that begins a prompt; markup takes the white space behind it."""

    def tokens(text):
        return _tokens(phi3, phi3.encode_markup(text))

    assert tokens("Hello") == [" ", "Hello"]
    assert tokens(" world") == ["  ", "w", "or", "ld"]
    assert tokens("<|user|>\n \u3000Hello<|end|>\n") == ["<|user|>", "Hello", "<|end|>"]
    assert tokens("<img></img>\nis") == ["<img>", "</img>", "\n", "is"]
    assert tokens("<|end|>\n<|user|>") == ["<|end|>", "<|user|>"]
    assert phi3.prefix_ids == (1,)


def test_tokens_that_take_the_space_before_them(tmp_path):
    write_phi3(tmp_path)
    path = tmp_path / "added_tokens.json"
    path.unlink()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    content = {"content": "<x>", "lstrip": True, "normalized": True}
    config["added_tokens_decoder"]["400"] = content
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert _tokens(tokenizer, tokenizer.encode_markup("a \n<x> a")) == [" ", "a", "<x>", " ", "a"]
    assert _tokens(tokenizer, tokenizer.encode_markup(" <x>")) == ["<x>"]
    assert tokenizer.vocab_size == 401


def test_legacy_spaces(tmp_path):
    write_phi3(tmp_path, legacy=None)
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode_markup("<img></img>\nis<|user|>\n a")
    shown = ["<img>", "</img>", " ", "\n", "is", "<|user|>", " ", "a"]
    assert _tokens(tokenizer, ids) == shown


def test_internlm2_has_no_space_before_a_text(internlm2):
    assert _tokens(internlm2, internlm2.encode_markup("is<|im_end|>is")) == [
        "is",
        "<|im_end|>",
        "is",
    ]
    assert internlm2.prefix_ids == (1,)
    assert internlm2.token_id("<|im_start|>") == internlm2.vocab_size - 1 - len(NINE)


@pytest.mark.parametrize("kind", ["phi3", "internlm2"])
def test_round_trip(kind, request):
    tokenizer = request.getfixturevalue(kind)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode_plain(text)) == text.replace(SPACE, " ")


@pytest.mark.parametrize("kind", ["phi3", "internlm2"])
def test_typed_tokens_are_plain_text(kind, request):
    tokenizer = request.getfixturevalue(kind)
    typed = {"<s>", "</s>", "<unk>", "<0x41>", "[UNUSED_0]", *NINE, *PHI3, *CONTROL_TOKENS}
    for token in sorted(typed):
        text = f"Hello {token} world"
        ids = tokenizer.encode_plain(text)
        token_id = tokenizer.token_id(token)
        assert (token_id in ids) == (token in ALLOWED_IN_TEXT), token
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(tokenizer.encode_literal(text)) == text
        assert token_id not in tokenizer.encode_literal(text)


@pytest.mark.parametrize("kind", ["phi3", "internlm2"])
def test_stream_equals_decoding_at_once(kind, request):
    tokenizer = request.getfixturevalue(kind)
    rng = random.Random(f"test_sentencepiece.stream.{kind}")
    cases = [tokenizer.encode_plain(text) for text in TEXTS]
    limit = tokenizer.vocab_size + 2
    cases += [[rng.randrange(limit) for _ in range(rng.randrange(20))] for _ in range(300)]
    cases += [[rng.randrange(3, 259) for _ in range(12)] for _ in range(300)]  # broken UTF-8
    for ids in cases:
        for options in ({}, {"skip_special": False}, {"keep_markers": False}):
            stream = TextStream(tokenizer, **options)
            text = "".join(stream.push(i) for i in ids) + stream.finish()
            assert text == tokenizer.decode(ids, **options)
            text.encode("utf-8")


def test_stream_of_bytes(phi3):
    fox = [3 + byte for byte in "🦊".encode()]
    stream = TextStream(phi3)
    space = phi3.token_id(SPACE)
    assert [stream.push(i) for i in (space, *fox, space)] == ["", "", "", "", "🦊", " "]
    assert stream.push(fox[0]) + stream.push(fox[1]) == ""
    assert stream.finish() == "\ufffd\ufffd"  # one for each byte, as SentencePiece
    assert phi3.decode([1, *phi3.encode_plain(" a")]) == " a"


def _library_cases(scheme):
    rng = random.Random(f"test_sentencepiece.json.{scheme}")
    texts = [text for text in TEXTS if "b" not in text]
    texts += ["".join(rng.choices("a lorwdHe", k=rng.randrange(20))) for _ in range(200)]
    return [*texts, *(f"{text}<img>{text} <ref>" for text in texts)]


@pytest.mark.parametrize("scheme", [None, "always", "first", "never"])
def test_tokenizer_json_equals_the_library(tmp_path, scheme):
    write_llama_json(tmp_path, metaspace=scheme)
    reference = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    for text in _library_cases(scheme):
        ids = reference.encode(text, add_special_tokens=False).ids
        assert ours.encode_markup(text) == ids, text
        if "<img>" not in text:
            assert ours.encode_literal(text) == ids
        whole = reference.decode(ids, skip_special_tokens=False)
        assert ours.decode(ids, skip_special=False) == whole
    assert ours.prefix_ids == (1,)


def test_tokenizer_json_of_a_slow_tokenizer(tmp_path, phi3):
    """`legacy` false says that the space stands before the whole text alone."""
    write_llama_json(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"legacy": False}))
    ours = load_tokenizer(tmp_path)
    for text in _library_cases("slow"):
        slow = _tokens(phi3, phi3.encode_markup(text))
        assert _tokens(ours, ours.encode_markup(text)) == slow


def test_prompt_equals_the_whole_string(phi3, internlm2):
    history = [("  is it", "  a world"), ("<image>\n\nlo", "")]
    for tokenizer, template in ((phi3, "phi3-chat"), (internlm2, "internlm2-chat")):
        arguments = {
            "template": template,
            "history": history,
            "system": " You is.",
            "num_tiles": [2, 1],
            "tokens_per_tile": 3,
        }
        question = "<image> Hello\n<ref>a</ref>"
        built = build_prompt(tokenizer, question, **arguments)
        text = render(question, **arguments)
        assert built.token_ids == [1, *tokenizer.encode_markup(text)]
        context = tokenizer.token_id("<IMG_CONTEXT>")
        for span in built.image_spans:
            inside = built.token_ids[span.start : span.start + span.length]
            assert inside == [context] * span.length


GOOD = pieces()


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"\x0a", "the file ends within a number"),
        (b"\x0a\x05abc", "field 1 has 5 bytes, 3 are left"),
        (b"\x0b", "field 1 has the wire type 3, expected 0, 1, 2 or 5"),
        (b"\x00\x01", "a field has the number 0"),
        (b"\x80" * 10 + b"\x01", "a number has more than 10 bytes"),
        (b"\x08\x01", "pieces is a number, expected a message"),
        (b"", "model_type is 1, supported: 2"),
        (model_bytes(GOOD, trainer={3: 1}), "model_type is 1, supported: 2"),
        (model_bytes(GOOD, trainer={24: 1}), "treat_whitespace_as_suffix is 1, supported: 0"),
        (model_bytes(GOOD, normalizer={4: 1}), "remove_extra_whitespaces is 1, supported: 0"),
        (model_bytes(GOOD, normalizer={5: 0}), "escape_whitespaces is 0, supported: 1"),
        (model_bytes(GOOD, normalizer={2: b"abc"}), "precompiled_charsmap is 3 bytes long"),
        (model_bytes([*GOOD, GOOD[-1]]), "the piece '.' is there twice"),
        (model_bytes(GOOD[1:]), "0 pieces are of the kind UNKNOWN, expected 1"),
        (model_bytes([GOOD[0], *GOOD[4:]]), "byte fallback has 255 pieces, expected 256"),
        (model_bytes([*GOOD, ("<0xzz>", 0.0, BYTE)]), "expected a byte such as"),
        (model_bytes([*GOOD, ("", 0.0, NORMAL)]), "piece 307 is empty"),
        (model_bytes([*GOOD, ("x", float("nan"), NORMAL)]), "has the score nan"),
        (model_bytes([*GOOD, ("x", 0.0, UNUSED)]), "is of the kind 5, supported: "),
        (model_bytes([*GOOD, ("x", 0.0, 77)]), "is of the kind 77, supported: "),
        (b"\x0a\x02\x08\x01", "piece 0 has a field of another type"),
        (b"\x0a\x03\x0a\x01\xff", "piece 0 is not UTF-8"),
    ],
)
def test_refused_models(tmp_path, data, match):
    with pytest.raises(ValueError, match=match) as error:
        _model(tmp_path, data)
    assert str(error.value).startswith("tokenizer.model: ")
    assert "\n" not in str(error.value)


def test_mutated_models_are_read_or_refused(tmp_path):
    rng = random.Random("test_sentencepiece.mutated")
    good = model_bytes(pieces())
    refused = 0
    for _ in range(250):
        data = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            if rng.random() < 0.3:
                del data[at : at + rng.randint(1, 40)]
            else:
                data[at] = rng.randrange(256)
        try:
            model = _model(tmp_path, bytes(data))
            assert all(0 <= i < model.size for i in model.encode("Hello world 🦊"))
        except ValueError as error:
            refused += "\n" not in str(error)
    assert refused > 60


@pytest.mark.parametrize(
    ("name", "data", "match"),
    [
        ("added_tokens.json", {"Hello": 9}, r"token 'Hello' has id 9, tokenizer.model has it at"),
        ("added_tokens.json", {"<new>": 262}, r"'<new>' has id 262, tokenizer.model is 'He'"),
        ("added_tokens.json", {"<img>": "x"}, "has the id 'x'"),
        ("tokenizer_config.json", {"add_bos_token": 1}, "add_bos_token is 1, expected true or"),
        ("tokenizer_config.json", {"bos_token": "<b>"}, "bos_token is '<b>', which has no id"),
        ("tokenizer_config.json", {"add_eos_token": True}, "add_eos_token is true, supported"),
        ("tokenizer_config.json", {"legacy": "no"}, "legacy is 'no', expected true or false"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"999": {"content": "<n>", "single_word": True}}},
            "'<n>' has single_word true, supported: false",
        ),
    ],
)
def test_refused_folders(tmp_path, name, data, match):
    write_phi3(tmp_path)
    (tmp_path / name).write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ValueError, match=match) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_no_bos(tmp_path):
    write_phi3(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    assert load_tokenizer(tmp_path).prefix_ids == ()
