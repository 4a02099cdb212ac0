"""The demonstration model's tokenizer, and conversations as token ids with their answers marked."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

import world
from internvl_rt.prompt import IMG_CONTEXT, render, with_placeholders

TEMPLATE = "internvl2_5"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKERS = (
    *("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>"),
    *("<ref>", "</ref>", "<box>", "</box>"),
)


def make_tokenizer(vocab: int) -> tokenizers.Tokenizer:
    """Byte-level BPE over the world's questions and answers; digits stay single."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - len(SPECIAL) - len(MARKERS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(world.corpus(), trainer)
    for name in SPECIAL + MARKERS:
        tokenizer.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False)])
    return tokenizer


# What a token of an answer counts for: in a box the digits from the first on, and little else.
PLAIN_WEIGHT, BOX_WEIGHT, DIGIT_WEIGHTS = 1.0, 0.05, (1.0, 0.5, 0.1)


@dataclass(frozen=True)
class Conversation:
    """before: ids up to the last one that stands for a picture; after: ids that follow it.

    weights: what each of `after` counts for in the loss, 0 outside of answers. branch, position: of
    each of `after`: which conversation it belongs to and how far from the picture it stands there.
    names: the name of a thing in the picture where one ends, else "".
    """

    before: list[int]
    after: list[int]
    weights: list[float]
    branch: list[int]
    position: list[int]
    names: list[str]


def together(talks: Iterable[Conversation]) -> Conversation:
    """Conversations about one picture that do not see each other."""
    talks = list(talks)
    return Conversation(
        talks[0].before,
        [i for t in talks for i in t.after],
        [w for t in talks for w in t.weights],
        [n for n, t in enumerate(talks) for _ in t.after],
        [p for t in talks for p in t.position],
        [n for t in talks for n in t.names],
    )


class Writer:
    """Turns into ids; the text around them is `internvl_rt.prompt.render`'s, as at inference."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.context = tokenizer.token_to_id(IMG_CONTEXT)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def conversation(
        self,
        turns: list[tuple[str, str]],
        last_answer: bool = True,
        *,
        tokens: Sequence[int] = (1,),
        named: Collection[str] = (),
    ) -> Conversation:
        """turns: (question, answer); without last_answer the text ends where it would begin.

        tokens: those of every picture. named: names of things in the picture, to be found in what
        is said.
        """
        first = with_placeholders(turns[0][0], None, num_images=len(tokens))
        turns = [(first, turns[0][1]), *turns[1:]]
        parts: list[tuple[str, bool]] = []  # text, is it an answer
        known = ""
        for i, (question, answer) in enumerate(turns):
            text = render(
                question,
                template=TEMPLATE,
                history=turns[:i],
                system=world.SYSTEM_MESSAGE,
                num_tiles=tokens,
                tokens_per_tile=1,
            )
            assert text.startswith(known)
            parts.append((text[len(known) :], False))
            known = text
            if i < len(turns) - 1 or last_answer:
                parts.append((f"{answer}<|im_end|>", True))
                known += f"{answer}<|im_end|>"
        before, context, rest = parts[0][0].rpartition(IMG_CONTEXT)
        parts[0] = (rest, False)
        after: list[int] = []
        weights: list[float] = []
        names: list[str] = []
        for text, answer in parts:
            found = self.tokenizer.encode(text, add_special_tokens=False)
            after += found.ids
            weights += self.weights(found.ids) if answer else [0.0] * len(found)
            names += _ends(text, found.offsets, named)
        return Conversation(
            self.ids(before + context),
            after,
            weights,
            [0] * len(after),
            list(range(len(after))),
            names,
        )

    def weights(self, answer: list[int]) -> list[float]:
        """What each token of an answer counts for."""
        if self.tokenizer.token_to_id("<box>") not in answer:
            return [PLAIN_WEIGHT] * len(answer)
        found, digits = [], 0
        for token in answer:
            digit = (self.tokenizer.id_to_token(token) or "").isdigit()
            found.append(DIGIT_WEIGHTS[min(digits, 2)] if digit else BOX_WEIGHT)
            digits = digits + 1 if digit else 0
        return found


def _ends(text: str, offsets: list[tuple[int, int]], named: Collection[str]) -> list[str]:
    """For every token the name that ends with it, the longest one that does, else ""."""
    ends = [""] * len(offsets)
    for name in sorted(named, key=len):
        for match in re.finditer(rf"\b{re.escape(name)}\b", text):
            at = next(i for i, (_, stop) in enumerate(offsets) if stop >= match.end())
            ends[at] = name
    return ends


def pad(rows: list[list], value: float) -> np.ndarray:
    longest = max(map(len, rows))
    return np.array([row + [value] * (longest - len(row)) for row in rows])
