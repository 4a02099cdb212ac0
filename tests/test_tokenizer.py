"""Tokenizers from either set of files, and the two ways to encode."""

import json
import random

import pytest
import tokenizers

from internvl_rt.tokenizer import ALLOWED_IN_TEXT, load_tokenizer
from tiny_tokenizer import ADDED, NINE, PLAIN_ADDED, vocabulary, write_json, write_vocab

TEXTS = [
    "",
    "Hello world",
    "  two  spaces\n\n\n tabs\t\tend  ",
    "图里有什么？ naïve ½ ﬁ 🦊👩‍💻",
    "e\u0301 is composed",
    "I'll they'RE 1234567890 ——……",
    "def f(x):\r\n\treturn {'a': [i**2]}",
    "\x00\x7f\u200b",
]


@pytest.fixture(scope="module", params=["json", "vocab"])
def loaded(request, tmp_path_factory):
    """The tokenizer from each set of files, beside the library's own of tokenizer.json."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_json(folder)
    reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    if request.param == "vocab":
        folder = tmp_path_factory.mktemp("vocab")
        write_vocab(folder)
    return load_tokenizer(folder), reference


def test_encode_equals_the_library(loaded):
    ours, reference = loaded
    for text in TEXTS:
        for whole in (text, f"{text}<|im_end|>{text}<ref>{text}", f"<tool_call>{text}"):
            assert ours.encode_markup(whole) == reference.encode(whole).ids
        assert ours.encode_plain(text) == reference.encode(text).ids
        assert ours.encode_literal(text) == reference.encode(text).ids
    assert ours.prefix_ids == ()


def test_decode_equals_the_library(loaded):
    ours, reference = loaded
    rng = random.Random("test_tokenizer.decode")
    for _ in range(500):
        ids = [rng.randrange(ours.vocab_size) for _ in range(rng.randrange(30))]
        whole = reference.decode(ids, skip_special_tokens=False)
        assert ours.decode(ids, skip_special=False) == whole
        skipped = reference.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, keep_markers=False) == skipped


def test_round_trip(loaded):
    ours, _ = loaded
    for text in TEXTS:
        if "\u0301" not in text:  # NFC composes it
            assert ours.decode(ours.encode_plain(text)) == text


def test_ids(loaded):
    ours, reference = loaded
    base = len(vocabulary()[0])
    assert ours.vocab_size == reference.get_vocab_size() == base + len(ADDED)
    for i, token in enumerate(ADDED):
        assert ours.token_id(token) == ours.special_id(token) == base + i
        assert ours.is_special(base + i) == (token not in PLAIN_ADDED)
    assert ours.token_id("Hello") is not None
    assert ours.special_id("Hello") is None
    assert ours.token_id("<nothing>") is None
    assert not ours.is_special(0)


@pytest.mark.parametrize("token", ADDED)
def test_typed_tokens(loaded, token):
    ours, _ = loaded
    text = f"Hello {token} world"
    ids = ours.encode_plain(text)
    assert (ours.token_id(token) in ids) == (token in ALLOWED_IN_TEXT)
    assert ours.decode(ids) == text
    literal = ours.encode_literal(text)
    assert ours.token_id(token) not in literal
    assert max(literal) < len(vocabulary()[0])
    assert ours.decode(literal) == text


def test_typed_token_that_appears_by_normalising(tmp_path):
    """A token matched after NFC must not be formed by characters that NFC turns into it."""
    write_json(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    extra = data["added_tokens"][-1] | {"content": "é!", "normalized": True}
    extra["id"] += 1
    data["added_tokens"].append(extra)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    text = "e\u0301!"
    assert tokenizer.encode_markup(text) == [extra["id"]]
    assert extra["id"] not in tokenizer.encode_plain(text)


def test_words_among_the_added_tokens(tmp_path):
    """Some conversions list them there; they are typed as they are, unless they are special."""
    write_json(tmp_path, more=["\u2014\u2014"])
    tokenizer = load_tokenizer(tmp_path)
    word = tokenizer.token_id("\u2014\u2014")
    ids = tokenizer.encode_plain("Hello\u2014\u2014 world")
    assert word not in ids  # written as a special token
    path = tmp_path / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["added_tokens"][-1]["special"] = False
    path.write_text(json.dumps(data), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    hello, world = map(tokenizer.encode_plain, ("Hello", " world"))
    assert tokenizer.encode_plain("Hello\u2014\u2014 world") == [*hello, word, *world]
    assert tokenizer.decode([word]) == "\u2014\u2014"


def test_markers_are_kept_and_controls_dropped(loaded):
    ours, _ = loaded
    ids = ours.encode_markup("<ref>a</ref><box>[[1]]</box><|im_end|><tool_call>")
    assert ours.decode(ids) == "<ref>a</ref><box>[[1]]</box><tool_call>"
    assert ours.decode(ids, keep_markers=False) == "a[[1]]<tool_call>"
    assert ours.decode([ours.vocab_size + 5]) == ""
    with pytest.raises(ValueError, match="token id is -1"):
        ours.decode([-1])


def test_added_tokens_of_the_other_files(tmp_path):
    """A base model's tokenizer.json, completed by added_tokens.json."""
    write_json(tmp_path)
    path = tmp_path / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    ids = {t["content"]: t["id"] for t in data["added_tokens"]}
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] not in NINE]
    path.write_text(json.dumps(data), encoding="utf-8")
    assert load_tokenizer(tmp_path).special_id("<img>") is None
    added = {token: ids[token] for token in NINE}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert all(tokenizer.special_id(t) == ids[t] and tokenizer.is_special(ids[t]) for t in NINE)


def _write(folder, name, data):
    text = data if isinstance(data, bytes) else json.dumps(data).encode()
    (folder / name).write_bytes(text)


@pytest.mark.parametrize(
    ("name", "data", "match"),
    [
        ("added_tokens.json", {"<img>": 3}, "'<img>' has id 3, elsewhere"),
        ("added_tokens.json", {"<new>": 9999}, "'<new>' has id 9999 in the files and"),
        ("added_tokens.json", {"<new>": "x"}, "'<new>' has the id 'x'"),
        ("added_tokens.json", {"": 3}, "an added token is ''"),
        ("added_tokens.json", b"[", "added_tokens.json: Expecting"),
        ("tokenizer_config.json", {"added_tokens_decoder": []}, None),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "is not an object"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}, "has 'x'"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": {}}}, "an added token is None"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"9": {"content": "<n>", "special": 1}}},
            "flag that is not true or false",
        ),
        ("tokenizer.json", b"{}", "not a tokenizer that the library can read"),
        ("tokenizer.json", b"[1]", "expected an object"),
        ("tokenizer.json", {"added_tokens": 3}, "added_tokens is not a list"),
        ("tokenizer.json", b"\xff", "not UTF-8"),
    ],
)
def test_refused_files(tmp_path, name, data, match):
    write_json(tmp_path)
    _write(tmp_path, name, data)
    if match is None:
        load_tokenizer(tmp_path)
        return
    with pytest.raises(ValueError, match=match) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "data", "match"),
    [
        ("vocab.json", {"a": -1}, "an id is not an integer"),
        ("vocab.json", {"a": True}, "an id is not an integer"),
        ("merges.txt", b"#version: 0.2\na b c\n", "line 2 is 'a b c', expected two tokens"),
        ("merges.txt", b"\xff", "not UTF-8"),
        ("merges.txt", b"zz zz\n", "library can read"),
    ],
)
def test_refused_vocabularies(tmp_path, name, data, match):
    write_vocab(tmp_path)
    _write(tmp_path, name, data)
    with pytest.raises(ValueError, match=match) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_not_byte_level(tmp_path):
    write_json(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    data["decoder"] = {"type": "Fuse"}
    _write(tmp_path, "tokenizer.json", data)
    with pytest.raises(ValueError, match="the decoder is Fuse, supported: ByteLevel"):
        load_tokenizer(tmp_path)


def test_no_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer files"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{}", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="no tokenizer files"):
        load_tokenizer(tmp_path)


def test_limits_of_training_do_not_act(tmp_path):
    write_json(tmp_path)
    plain = load_tokenizer(tmp_path).encode_plain("Hello world, Hello world")
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    library.enable_truncation(3)
    library.enable_padding(length=50)
    library.save(str(tmp_path / "tokenizer.json"))
    assert len(library.encode("Hello world, Hello world").ids) == 50
    assert load_tokenizer(tmp_path).encode_plain("Hello world, Hello world") == plain
    library.model.dropout = 0.5
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"dropout is 0\.5, supported: none"):
        load_tokenizer(tmp_path)
