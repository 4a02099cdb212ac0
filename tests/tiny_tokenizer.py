"""Tokenizers of a few hundred tokens with InternVL's special tokens, for the tests.

A byte-level BPE as Qwen's, and SentencePiece models as Phi-3's and InternLM2's.
"""

import json
import struct
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

WORDS = [
    "Hello",
    "world",
    "Ġworld",
    "Ġthe",
    "Ġpicture",
    "user",
    "system",
    "assistant",
    "Ġis",
    "Ġin",
]
CHAT = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Added tokens that are not flagged as special.
PLAIN_ADDED = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
NINE = ["<img>", "</img>", "<IMG_CONTEXT>"]
NINE += ["<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]
ADDED = [*CHAT, *PLAIN_ADDED, *NINE]

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for word in WORDS:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                merges.append((word[: end - 1], word[end - 1]))
                vocab[word[:end]] = len(vocab)
    return vocab, merges


HARMONY = ["<|return|>", "<|channel|>", "<|start|>", "<|end|>", "<|message|>"]


def write_json(folder: Path, *, more: Iterable[str] = ()) -> None:
    """tokenizer.json, built from the library's own parts; `more` are added tokens."""
    vocab, merges = vocabulary()
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    for token in [*ADDED, *more]:
        special = token not in PLAIN_ADDED
        tokenizer.add_tokens([tokenizers.AddedToken(token, special=special, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))


def write_vocab(folder: Path) -> None:
    """vocab.json, merges.txt, and the added tokens in two files as real checkpoints have them."""
    vocab, merges = vocabulary()
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    ids = {token: len(vocab) + i for i, token in enumerate(ADDED)}
    decoder = {
        str(ids[t]): {"content": t, "special": t not in PLAIN_ADDED, "normalized": False}
        for t in [*CHAT, *PLAIN_ADDED]
    }
    config = {"added_tokens_decoder": decoder}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    added = {token: ids[token] for token in NINE}
    (folder / "added_tokens.json").write_text(json.dumps(added), encoding="utf-8")


NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
WORD = "\u2014\u2014"  # a user-defined piece that is ordinary text
PHI3 = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]


def pieces(*, user_defined: Iterable[str] = ()) -> list[tuple[str, float, int]]:
    """(text, score, kind) of a small vocabulary in which several scores are equal."""
    found = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    found += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    merged = ["ab", "ba", "bab", "He", "ll", "lo", "Hell", "Hello", "\u2581\u2581", "\u2581w"]
    merged += ["or", "\u2581wor", "ld", "\u2581world", "\u2581\u2581\u2581", "is", "\u2581is"]
    letters = "\u2581\0\n\u56feabcdeghilmnoprstuwH<>/|_[]."
    found += [(text, -float(i // 2), NORMAL) for i, text in enumerate(merged)]
    found += [(text, -100.0 - i, NORMAL) for i, text in enumerate(letters)]
    return found + [(text, 0.0, USER_DEFINED) for text in user_defined]


def model_bytes(
    entries: list[tuple[str, float, int]],
    *,
    add_dummy_prefix: bool = True,
    trainer: dict[int, int] | None = None,
    normalizer: dict[int, int | bytes] | None = None,
) -> bytes:
    """A tokenizer.model: BPE, byte fallback, no normalisation.

    `trainer` and `normalizer` hold fields of the two specs, by number, in place of these.
    """

    def varint(value: int) -> bytes:
        out = bytearray()
        while value > 0x7F:
            out.append(value & 0x7F | 0x80)
            value >>= 7
        return bytes([*out, value])

    def field(number: int, value: float | bytes) -> bytes:
        if isinstance(value, bytes):
            return varint(number << 3 | 2) + varint(len(value)) + value
        if isinstance(value, float):
            return varint(number << 3 | 5) + struct.pack("<f", value)
        return varint(number << 3) + varint(value)

    def message(fields: dict[int, int | bytes]) -> bytes:
        return b"".join(field(number, value) for number, value in fields.items())

    data = b""
    for text, score, kind in entries:
        piece = field(1, text.encode("utf-8")) + field(2, score)
        data += field(1, piece + (b"" if kind == NORMAL else field(3, kind)))
    data += field(2, message({3: 2, 35: 1} | (trainer or {})))
    return data + field(3, message({3: int(add_dummy_prefix), 4: 0} | (normalizer or {})))


def write_phi3(folder: Path, *, legacy: bool | None = False) -> None:
    """As InternVL2-4B has it: a space before the text, markup that takes the space after it."""
    entries = pieces()
    (folder / "tokenizer.model").write_bytes(model_bytes(entries))
    decoder = {}
    for i, token in enumerate(PHI3):
        flags = {"rstrip": token != PHI3[0], "special": token != "<|end|>"}
        decoder[str(len(entries) + i)] = {"content": token, **flags}
    config = {"add_bos_token": True, "bos_token": "<s>", "added_tokens_decoder": decoder}
    if legacy is not None:
        config["legacy"] = legacy
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    added = {token: len(entries) + len(PHI3) + i for i, token in enumerate(NINE)}
    (folder / "added_tokens.json").write_text(json.dumps(added), encoding="utf-8")


def write_internlm2(folder: Path) -> None:
    """As InternVL2-2B has it: no space before the text, markup in the place of unused pieces."""
    entries = pieces(user_defined=[WORD, "[UNUSED_0]", "[UNUSED_1]"])
    model = model_bytes(entries, add_dummy_prefix=False)
    (folder / "tokenizer.model").write_bytes(model)
    ids = {"<|im_end|>": len(entries) - 2, "<|im_start|>": len(entries) - 1}
    decoder = {str(i): {"content": token, "special": True} for token, i in ids.items()}
    config = {"bos_token": {"content": "<s>"}, "added_tokens_decoder": decoder}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    added = {token: len(entries) + i for i, token in enumerate(NINE)}
    (folder / "added_tokens.json").write_text(json.dumps(added), encoding="utf-8")


def write_llama_json(folder: Path, *, metaspace: str | None = None) -> None:
    """tokenizer.json of a SentencePiece vocabulary, from the library's own parts.

    metaspace: the scheme of a Metaspace in place of a normalizer that prepends.
    """
    entries = [e for e in pieces() if e[0] not in ("ba", "bab")]  # without ties that matter
    vocab = {text: i for i, (text, _, _) in enumerate(entries)}
    ranked = sorted((e for e in entries if e[2] == NORMAL and len(e[0]) > 1), key=lambda e: -e[1])
    merges = [
        (text[:at], text[at:])
        for text, _, _ in ranked
        for at in range(1, len(text))
        if text[:at] in vocab and text[at:] in vocab
    ]
    model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    spaces = normalizers.Replace(" ", "\u2581")
    if metaspace is None:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=metaspace, split=False)
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [] if metaspace == "never" else [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence([*parts, *strip])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    added = [tokenizers.AddedToken(t, special=True, normalized=False) for t in ("<s>", *NINE)]
    tokenizer.add_tokens(added)
    tokenizer.save(str(folder / "tokenizer.json"))


def write_llama(folder: Path, *, legacy: bool) -> None:
    """As Vicuna has it: SentencePiece, BOS, no added tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model_bytes(pieces()))
    config = {"add_bos_token": True, "bos_token": {"content": "<s>"}, "legacy": legacy}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
