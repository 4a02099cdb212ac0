"""A byte-level BPE of a few hundred tokens with InternVL's special tokens, for the tests."""

import json
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
PLAIN_ADDED = ["<tool_call>", "</tool_call>"]  # added tokens that are not flagged as special
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


def write_json(folder: Path) -> None:
    """tokenizer.json, built from the library's own parts."""
    vocab, merges = vocabulary()
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    for token in ADDED:
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
