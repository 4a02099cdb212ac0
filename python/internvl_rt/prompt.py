"""Questions to prompts and token ids back to text.

`render` builds the exact string of the reference implementation. `build_prompt` builds the token
ids of a chat: the same text, in which only the template's own markup has the power of special
tokens and what a user typed is plain text (`tokenizer.ALLOWED_IN_TEXT` excepted); the system
message and answers may hold marks of thoughts and tools besides (`tokenizer.ALLOWED_UNTYPED`).
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from internvl_rt.tokenizer import IdWriter, Tokenizer

IMAGE = "<image>"
IMG_START = "<img>"
IMG_END = "</img>"
IMG_CONTEXT = "<IMG_CONTEXT>"
_IMAGE_TOKENS = (IMG_START, IMG_CONTEXT, IMG_END)

MAX_DATA_URL_BYTES = 256 << 20

History = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Turn:
    """Markup of one role: `prefix` + message + `suffix`, or `empty` for an empty message."""

    prefix: str
    suffix: str
    empty: str


@dataclass(frozen=True, slots=True)
class Template:
    """One conversation format.

    `reply` opens the answer, `stop_token` ends it; `stop_strings` also end it where they come out
    as ordinary text. `system_message` is the default; None leaves the whole system block out.
    `system_message_v1` is the default of the 1.x checkpoints that share the template's name.
    `channel` is the markup of the channel that answers come in, which they lose (`FinalChannel`).
    `wraps_images`: pictures stand between `<img>` and `</img>`; otherwise their features alone.
    """

    name: str
    system: Turn
    user: Turn
    assistant: Turn
    reply: str
    stop_token: str
    stop_strings: tuple[str, ...]
    system_message: str | None
    system_message_v1: str | None = None
    channel: str = ""
    wraps_images: bool = True


def _same_suffix(
    name: str,
    system: str,
    user: str,
    assistant: str,
    sep: str,
    *,
    stop_token: str,
    stop_strings: tuple[str, ...] = (),
    system_message: str | None,
    system_message_v1: str | None = None,
    keep_empty: bool = False,
    channel: str = "",
) -> Template:
    """A format whose every message ends in `sep`; an empty one loses it unless `keep_empty`."""

    def turn(prefix: str) -> Turn:
        return Turn(prefix, sep, prefix + sep if keep_empty else prefix)

    return Template(
        name=name,
        system=Turn(system, sep, system + sep),
        user=turn(user),
        assistant=turn(assistant),
        reply=assistant,
        stop_token=stop_token,
        stop_strings=(stop_token, *stop_strings),
        system_message=system_message,
        system_message_v1=system_message_v1,
        channel=channel,
    )


_SYSTEM_2 = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，"
    "英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
_SYSTEM_2_5 = (
    "你是书生·万象，英文名是InternVL，"
    "是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)
_SYSTEM_GPT_OSS = (
    "You are InternVL, a large language model trained by Shanghai AI Laboratory.\n"
    "Knowledge cutoff: 2024-06\n"
    "Current date: 2025-08-06\n"
    "\n"
    "Reasoning: low\n"
    "\n"
    "# Valid channels: final. Channel must be included for every message."
)
_SYSTEM_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
_CHATML = ("<|im_start|>system\n", "<|im_start|>user\n", "<|im_start|>assistant\n")

TEMPLATES: Mapping[str, Template] = MappingProxyType(
    {
        template.name: template
        for template in (
            Template(
                name="internvl_zh",
                system=Turn("", " ", " "),
                user=Turn("<human>: ", " ", "<human>:"),
                assistant=Turn("<bot>: ", "</s>", "<bot>:"),
                reply="<bot>:",
                stop_token="</s>",
                stop_strings=("</s>",),
                system_message="",
            ),
            _same_suffix(
                "Hermes-2",
                *_CHATML,
                "<|im_end|>",
                stop_token="<|im_end|>",
                stop_strings=("<|endoftext|>",),
                system_message=_SYSTEM_2,
                system_message_v1="Answer the questions.",
            ),
            _same_suffix(
                "internlm2-chat",
                *_CHATML,
                "<|im_end|>",
                stop_token="<|im_end|>",
                system_message=_SYSTEM_2,
                system_message_v1="You are an AI assistant whose name is InternLM (书生·浦语).",
            ),
            _same_suffix(
                "phi3-chat",
                "<|system|>\n",
                "<|user|>\n",
                "<|assistant|>\n",
                "<|end|>",
                stop_token="<|end|>",
                system_message=_SYSTEM_2,
                system_message_v1="You are an AI assistant whose name is Phi-3.",
            ),
            _same_suffix(
                "internvl2_5",
                *_CHATML,
                "<|im_end|>\n",
                stop_token="<|im_end|>",
                system_message=_SYSTEM_2_5,
            ),
            _same_suffix(
                "internvl3_5_gpt_oss",
                "<|start|>system<|message|>",
                "<|start|>user<|message|>",
                "<|start|>assistant",
                "<|end|>",
                stop_token="<|return|>",
                system_message=_SYSTEM_GPT_OSS,
                channel="<|channel|>final<|message|>",
            ),
            # Chat V1.0, whose checkpoints are LLaVA's.
            Template(
                name="vicuna_v1",
                system=Turn("", " ", " "),
                user=Turn("USER: ", " ", "USER:"),
                assistant=Turn("ASSISTANT: ", "</s>", "ASSISTANT:"),
                reply="ASSISTANT:",
                stop_token="</s>",
                stop_strings=("</s>",),
                system_message=_SYSTEM_VICUNA,
                wraps_images=False,
            ),
            # The chat template of the Transformers-native checkpoints.
            _same_suffix(
                "hf",
                *_CHATML,
                "<|im_end|>\n",
                stop_token="<|im_end|>",
                system_message=None,
                keep_empty=True,
            ),
        )
    }
)


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """The `length` context tokens of picture `image`, from token `start` of the prompt."""

    start: int
    length: int
    image: int


@dataclass(frozen=True, slots=True)
class Prompt:
    token_ids: list[int]  # [T]
    image_spans: tuple[ImageSpan, ...]  # in the order of the pictures


@dataclass(frozen=True, slots=True)
class Media:
    """A picture or video as the caller gave it: path, bytes, array, PIL image."""

    kind: str  # "image" | "video"
    source: Any


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in the form of `build_prompt`; every entry of `media` has its `<image>`."""

    system: str | None
    history: tuple[tuple[str, str], ...]
    question: str
    media: tuple[Media, ...]

    def with_frames(self, counts: Sequence[int]) -> Conversation:
        """The placeholder of each video replaced by one labelled line per frame.

        `counts` holds the number of frames of each video, in order. Afterwards there is one
        placeholder for every picture and every frame.
        """
        videos = sum(m.kind == "video" for m in self.media)
        if len(counts) != videos:
            raise ValueError(f"with_frames: {len(counts)} counts for {videos} videos")
        lines = iter([_frame_lines(_positive("with_frames: frames", n)) for n in counts])
        media = iter(self.media)

        def expand(text: str) -> str:
            parts = text.split(IMAGE)
            out = parts[0]
            for part in parts[1:]:
                if next(media).kind == "video":
                    out += next(lines).removesuffix("\n") + part
                else:
                    out += IMAGE + part
            return out

        history = tuple((expand(question), answer) for question, answer in self.history)
        return replace(self, history=history, question=expand(self.question))


def is_text(value: Any) -> bool:
    """Whether `value` is a string that UTF-8 can hold (no lone surrogates)."""
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def get_template(name: str) -> Template:
    if not isinstance(name, str) or name not in TEMPLATES:
        raise ValueError(f"template is {name!r}, expected one of: {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def is_first_generation(name: str, ps_version: str) -> bool:
    """Whether a checkpoint is a 1.x one, by its name and the order of its pixel unshuffle.

    Chat V1-1 and V1-2 have an order of their own. V1-5 and the Mini-InternVL of its time cannot be
    told from InternVL2 by their configs: there the name decides, as it was published
    (`InternVL-Chat-V1-5`, `Mini-InternVL-Chat-4B-V1-5`).
    """
    return ps_version == "v1" or re.search(r"(?i)internvl.*[-_]v1[-_.]\d", name) is not None


def default_system(template: str, *, v1: bool = False) -> str | None:
    """The system message of a checkpoint whose config has none; `v1` for 1.x checkpoints."""
    entry = get_template(template)
    if v1 and entry.system_message_v1 is not None:
        return entry.system_message_v1
    return entry.system_message


def render(
    question: str,
    *,
    template: str,
    history: History | None = None,
    system: str | None = None,
    num_tiles: Sequence[int] | None = None,
    tokens_per_tile: int = 256,
    has_images: bool = False,
) -> str:
    """The prompt string of the reference implementation's `chat`.

    `history` holds (question, answer) pairs. `num_tiles` holds the tiles of each picture: the
    i-th `<image>` of the whole string becomes `<img>`, `num_tiles[i] * tokens_per_tile` context
    tokens, `</img>`; a placeholder or a picture too many is left alone, as there. `has_images`
    puts `<image>` and a newline before a question without one when `history` is None. `system`
    None is the template's default. Raises ValueError for an unknown template or a wrong argument.
    """
    entry = get_template(template)
    _check_chat(question, history, system)
    tokens = _positive("tokens_per_tile", tokens_per_tile)
    if has_images and num_tiles is None:
        raise ValueError("render: has_images is True, so num_tiles must give the tiles per picture")
    if has_images and history is None and IMAGE not in question:
        question = f"{IMAGE}\n{question}"
    text = "".join(piece.text for piece in _pieces(entry, question, history or (), system))
    tiles = _check_tiles(num_tiles or ())
    parts = text.split(IMAGE, len(tiles)) if entry.wraps_images else [text]
    out = [parts[0]]
    for count, part in zip(tiles, parts[1:], strict=False):
        out += [IMG_START, IMG_CONTEXT * (count * tokens), IMG_END, part]
    return "".join(out)


def with_placeholders(
    question: str, history: History | None, *, num_images: int = 0, num_frames: int | None = None
) -> str:
    """`question` with a placeholder for each picture where the caller wrote none.

    Acts when there are pictures, no `<image>` in the question and no history: `<image>` for one
    picture, `Image-1: <image>` and so on for several, `Frame1: <image>` and so on for the frames
    of a video, each on a line of its own before the question. Pictures come before the video.
    """
    if history or IMAGE in question:
        return question
    prefix = ""
    if num_images == 1 and num_frames is None:
        prefix = f"{IMAGE}\n"
    elif num_images:
        prefix = "".join(f"Image-{i}: {IMAGE}\n" for i in range(1, num_images + 1))
    if num_frames is not None:
        prefix += _frame_lines(num_frames)
    return prefix + question


def build_prompt(
    tokenizer: Tokenizer,
    question: str,
    *,
    template: str,
    history: History | None = None,
    system: str | None = None,
    num_tiles: Sequence[int] = (),
    tokens_per_tile: int = 256,
    restore_channel: bool = False,
) -> Prompt:
    """The token ids of one chat turn and where its pictures go.

    The arguments are those of `render`. The template's markup gets its special ids. In the
    user's texts `<image>` stands for the next picture and the reference and box markers keep
    their ids; every other special token is tokenised as the plain text it is. In the system message
    and the answers of the history marks of thoughts and tools keep theirs too. The ids of a text
    without other special tokens are those of the whole rendered string. `restore_channel` puts the
    template's channel before the answers of the history, which have lost it (`FinalChannel`).

    Raises ValueError where the placeholders of the questions do not match `num_tiles`, for an
    empty question, and for a template whose stop token the tokenizer lacks.
    """
    entry = get_template(template)
    _check_chat(question, history, system)
    if not question.strip():
        raise ValueError("chat: the question is empty")
    tokens = _positive("tokens_per_tile", tokens_per_tile)
    tiles = _check_tiles(num_tiles)
    placeholders = question.count(IMAGE) + sum(q.count(IMAGE) for q, _ in history or ())
    if placeholders != len(tiles):
        raise ValueError(f"chat: {placeholders} {IMAGE} placeholders for {len(tiles)} images")
    _special_id(tokenizer, entry.stop_token, template)

    image: tuple[int, int, int] | None = None
    if tiles and entry.wraps_images:
        start, context, end = (_special_id(tokenizer, t, template) for t in _IMAGE_TOKENS)
        image = (start, context, end)
    ids = tokenizer.writer()
    spans: list[ImageSpan] = []
    if restore_channel:
        prefix = entry.assistant.prefix + entry.channel
        entry = replace(entry, assistant=replace(entry.assistant, prefix=prefix))
    for piece in _pieces(entry, question, history or (), system):
        if piece.kind == "markup":
            ids.write(tokenizer.split_markup(piece.text))
            continue
        texts = piece.text.split(IMAGE) if piece.kind == "user" else [piece.text]
        for i, text in enumerate(texts):
            if i:
                length = tiles[len(spans)] * tokens
                spans.append(ImageSpan(_write_image(ids, image, length), length, len(spans)))
            ids.write(tokenizer.split_allowed(text, typed=piece.kind == "user"))
    return Prompt(ids.finish(), tuple(spans))


def _write_image(ids: IdWriter, image: tuple[int, int, int] | None, length: int) -> int:
    """The place of a picture's features; image: ids before, at and behind them."""
    if image is None:
        return ids.features(length)
    before, context, behind = image
    ids.write([before])
    place = ids.place(context)
    ids.write([*[context] * length, behind])
    return place


def parse_messages(messages: Sequence[Mapping[str, Any]]) -> Conversation:
    """OpenAI-style messages as system text, history, last question and media in order.

    An optional system message, then user and assistant in turn, the user last. Content is a
    string or a list of parts: {"type": "text", "text"}, {"type": "image", "image" | "url" |
    "path"}, {"type": "image_url", "image_url": str | {"url"}}, {"type": "input_image",
    "image_url"}, {"type": "video", "video" | "url" | "path"}. Each picture becomes `<image>` and
    a newline at its place, labelled `Image-1: ` and so on where the messages hold several,
    unless the message's texts have their own placeholders, which then must be as many. Messages
    without any picture may have placeholders for pictures given apart. Text for a
    picture or video is a base64 `data:` URL or a path, any other URL is refused: nothing is ever
    fetched. Raises ValueError or TypeError.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise TypeError(f"messages is {type(messages).__name__}, expected a list of dicts")
    turns: list[tuple[str, list[str | Media]]] = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise TypeError(f"{where} is {type(message).__name__}, expected a dict")
        _check_keys(where, message, required=("role", "content"))
        role = message["role"]
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"{where}.role is {_show(role)}, expected system, user or assistant")
        turns.append((role, _content(f"{where}.content", message["content"], role)))

    system = None
    if turns and turns[0][0] == "system":
        system = _joined(turns[0][1])
    dialogue = turns[0 if system is None else 1 :]
    offset = len(turns) - len(dialogue)
    for i, (role, _) in enumerate(dialogue):
        expected = ("user", "assistant")[i % 2]
        if role != expected:
            raise ValueError(f"messages[{i + offset}].role is '{role}', expected '{expected}'")
    if len(dialogue) % 2 == 0:
        raise ValueError("messages: the last message must be of role 'user'")

    media = tuple(p for _, parts in dialogue for p in parts if isinstance(p, Media))
    several = sum(m.kind == "image" for m in media) > 1
    numbers = iter(range(1, len(media) + 1))
    texts: list[str] = []
    for i, (_, parts) in enumerate(dialogue):
        own = sum(p.count(IMAGE) for p in parts if isinstance(p, str)) if i % 2 == 0 else 0
        given = sum(isinstance(p, Media) for p in parts)
        if own and given and own != given:
            raise ValueError(
                f"messages[{i + offset}]: {own} {IMAGE} placeholders for {given} images and videos"
            )
        text = ""
        for part in parts:
            if isinstance(part, str):
                text += part
                continue
            label = f"Image-{next(numbers)}: " if several and part.kind == "image" else ""
            text += "" if own else f"{label}{IMAGE}\n"
        texts.append(text)
    placeholders = sum(text.count(IMAGE) for text in texts[::2])
    if media and placeholders != len(media):
        raise ValueError(
            f"messages: {placeholders} {IMAGE} placeholders for {len(media)} images and videos"
        )
    history = tuple(zip(texts[:-1:2], texts[1::2], strict=True))
    return Conversation(system, history, texts[-1], media)


class TextStream:
    """Token ids in, text out, as soon as its characters are whole.

    The pieces of `push` and `finish` together equal `tokenizer.decode` of all ids. Special
    tokens are dropped, the reference and box markers kept unless `keep_markers` is false.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special: bool = True, keep_markers: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._keep_markers = keep_markers
        self._reader = tokenizer.text_reader()

    def push(self, token_id: int) -> str:
        data = self._tokenizer.token_bytes(
            token_id, skip_special=self._skip_special, keep_markers=self._keep_markers
        )
        return self._reader.push(data)

    def finish(self) -> str:
        """What is left; an unfinished character becomes U+FFFD."""
        return self._reader.finish()


class FinalChannel:
    """Which tokens of an answer in channels (gpt-oss's "harmony" format) are the answer itself.

    `<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>TEXT`:
    TEXT alone. What comes before any of this markup is taken for the answer, so that a model that
    leaves the channel out is heard.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        names = ("<|channel|>", "<|message|>", "<|start|>", "<|end|>")
        self._channel, self._message, self._start, self._end = map(tokenizer.special_id, names)
        self._shown = True
        self._header = b""

    def shows(self, token_id: int) -> bool:
        """Takes the answer's tokens in order."""
        if token_id == self._message:
            self._shown = self._header.strip().startswith(b"final")
        elif token_id in (self._channel, self._start, self._end):
            self._shown, self._header = False, b""
        elif not self._shown:
            self._header += self._tokenizer.token_bytes(token_id)
        return self._shown


class StopMatcher:
    """Cuts a stream of text before the first stop string, whatever the borders of the pieces.

    The stop string that is complete first wins, of several that end together the longest. Text
    that may still become a stop string is held back until `finish`.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str):
            raise TypeError("stop is a string, expected a list of strings")
        for stop in stops:
            if not isinstance(stop, str):
                raise TypeError(f"stop has an entry of type {type(stop).__name__}, expected str")
            if not stop:
                raise ValueError("stop has an empty string")
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is certain to be part of the answer; "" once stopped."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [(at + len(s), at) for s in self._stops if (at := text.find(s)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)[1]]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The text held back, which no stop string completed."""
        held, self._held = self._held, ""
        return held


@dataclass(frozen=True, slots=True)
class _Piece:
    kind: str  # "markup" | "user" | "plain"
    text: str


def _pieces(
    template: Template, question: str, history: History, system: str | None
) -> Iterator[_Piece]:
    """The whole prompt in order, markup apart from what people wrote."""

    def turn(markup: Turn, kind: str, text: str) -> Iterator[_Piece]:
        if not text:
            yield _Piece("markup", markup.empty)
            return
        yield _Piece("markup", markup.prefix)
        yield _Piece(kind, text)
        yield _Piece("markup", markup.suffix)

    system = template.system_message if system is None else system
    if system is not None:
        yield from turn(template.system, "plain", system)
    for asked, answered in history:
        yield from turn(template.user, "user", asked)
        yield from turn(template.assistant, "plain", answered)
    yield from turn(template.user, "user", question)
    yield _Piece("markup", template.reply)


def _special_id(tokenizer: Tokenizer, token: str, template: str) -> int:
    token_id = tokenizer.special_id(token)
    if token_id is None:
        raise ValueError(f"template {template}: the tokenizer has no special token {token}")
    return token_id


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`, shorter than `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


def _frame_lines(count: int) -> str:
    return "".join(f"Frame{i}: {IMAGE}\n" for i in range(1, count + 1))


def _positive(name: str, value: int) -> int:
    if type(value) is not int:
        raise TypeError(f"{name} is {type(value).__name__}, expected int")
    if value < 1:
        raise ValueError(f"{name} is {value}, expected at least 1")
    return value


def _check_tiles(num_tiles: Sequence[int]) -> list[int]:
    return [_positive(f"num_tiles[{i}]", n) for i, n in enumerate(num_tiles)]


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} is {type(value).__name__}, expected str")
    if not is_text(value):
        raise ValueError(f"{name} holds a lone surrogate, expected text that UTF-8 can hold")


def _check_chat(question: str, history: History | None, system: str | None) -> None:
    _check_text("question", question)
    if system is not None:
        _check_text("system", system)
    if history is not None and not isinstance(history, (list, tuple)):
        raise TypeError(
            f"history is {type(history).__name__}, expected a list of (question, answer) pairs"
        )
    for i, pair in enumerate(history or ()):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ValueError(f"history[{i}] is {_show(pair)}, expected (question, answer)")
        _check_text(f"history[{i}] question", pair[0])
        _check_text(f"history[{i}] answer", pair[1])


def _show(value: Any) -> str:
    text = ascii(value) if isinstance(value, (str, int, float)) else type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."


def _check_keys(
    where: str,
    part: Mapping[str, Any],
    *,
    required: Sequence[str] = (),
    optional: Sequence[str] = (),
) -> None:
    for key in part:
        if key not in required and key not in optional:
            allowed = ", ".join((*required, *optional))
            raise ValueError(f"{where} has the key {_show(key)}, expected {allowed}")
    for key in required:
        if key not in part:
            raise ValueError(f"{where} has no key '{key}'")


def _content(where: str, content: Any, role: str) -> list[str | Media]:
    if isinstance(content, str):
        _check_text(where, content)
        return [content]
    if not isinstance(content, (list, tuple)):
        raise TypeError(f"{where} is {type(content).__name__}, expected str or a list of parts")
    parts = [_part(f"{where}[{i}]", part) for i, part in enumerate(content)]
    if role != "user" and any(isinstance(p, Media) for p in parts):
        raise ValueError(f"{where}: pictures and videos are for the role user, not {role}")
    return parts


def _joined(parts: list[str | Media]) -> str:
    return "".join(p for p in parts if isinstance(p, str))


def _part(where: str, part: Any) -> str | Media:
    if not isinstance(part, Mapping):
        raise TypeError(f"{where} is {type(part).__name__}, expected a dict")
    kind = part.get("type")
    if kind in ("text", "input_text"):
        _check_keys(where, part, required=("type", "text"))
        _check_text(f"{where}.text", part["text"])
        return part["text"]
    if kind in ("image", "video"):
        _check_keys(where, part, required=("type",), optional=(kind, "url", "path"))
        names = [key for key in part if key != "type"]
        if len(names) != 1:
            raise ValueError(f"{where} has {len(names)} of {kind}, url, path, expected one")
        return Media(kind, _source(f"{where}.{names[0]}", part[names[0]], kind))
    if kind in ("image_url", "input_image"):
        # "detail" is a hint on cost for hosted services; tiles are chosen by max_tiles here.
        optional = ("detail",) if kind == "input_image" else ()
        _check_keys(where, part, required=("type", "image_url"), optional=optional)
        url = part["image_url"]
        if isinstance(url, Mapping):
            _check_keys(f"{where}.image_url", url, required=("url",), optional=("detail",))
            url = url["url"]
        return Media("image", _source(f"{where}.image_url", url, "image"))
    raise ValueError(
        f"{where}.type is {_show(kind)}, expected text, image, image_url, input_image or video"
    )


def _source(where: str, source: Any, kind: str) -> Any:
    """`source` itself, or the bytes of a `data:` URL."""
    if isinstance(source, str):
        scheme = re.match(r"(?i)([a-z][a-z0-9+.-]*):(//)?", source)
        if scheme and scheme[1].lower() == "data":
            return _data_url(where, source)
        if scheme and scheme[2]:
            raise ValueError(
                f"{where} is a {scheme[1].lower()} URL: nothing is fetched; "
                "give a path, bytes, or a base64 data: URL"
            )
        if not source:
            raise ValueError(f"{where} is empty")
        return source
    frames = kind == "video" and isinstance(source, (list, tuple))
    binary = isinstance(source, (bytes, bytearray, memoryview, os.PathLike))
    if frames or binary or hasattr(source, "shape") or hasattr(source, "convert"):
        return source
    raise TypeError(f"{where} is {type(source).__name__}, expected a path, bytes, array or image")


def _data_url(where: str, url: str) -> bytes:
    def fail(reason: str) -> NoReturn:
        raise ValueError(f"{where}: the data: URL {reason}") from None

    head, comma, body = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        fail("is not base64 (data:image/png;base64,...)")
    if len(body) > MAX_DATA_URL_BYTES:
        fail(f"has {len(body)} characters, at most {MAX_DATA_URL_BYTES}")
    try:
        data = base64.b64decode(body.encode("ascii"), validate=True)
    except (UnicodeEncodeError, binascii.Error):
        fail("is not valid base64")
    if not data:
        fail("is empty")
    return data
