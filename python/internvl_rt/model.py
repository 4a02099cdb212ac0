"""The public face: `load` a checkpoint, `chat` with it, or drive it with tensors."""

from __future__ import annotations

import functools
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internvl_rt import _C
from internvl_rt import image as pictures
from internvl_rt import video as videos
from internvl_rt.config import ModelConfig, VisionConfig, load_config, load_vision_config
from internvl_rt.engine import DEFAULT_PREFILL_CHUNK, Engine
from internvl_rt.hub import resolve_path
from internvl_rt.models.internvl import InternVL
from internvl_rt.models.vision import VISION_OPS, VisionTower
from internvl_rt.ops import OpSet
from internvl_rt.parameters import Parameters
from internvl_rt.prompt import (
    IMG_CONTEXT,
    FinalChannel,
    Prompt,
    StopMatcher,
    Template,
    TextStream,
    build_prompt,
    default_system,
    get_template,
    is_first_generation,
    parse_messages,
    with_placeholders,
)
from internvl_rt.runtime.batch import Chunk
from internvl_rt.runtime.kv_cache import PAGE_SIZE, KvCache
from internvl_rt.runtime.plan import make_plan
from internvl_rt.runtime.platform import CPU, Platform, platform_for
from internvl_rt.runtime.request import Request, SamplingParams
from internvl_rt.tokenizer import Tokenizer, load_tokenizer
from internvl_rt.weights import Checkpoint, open_checkpoint

MAX_TILES = 40
DEFAULT_FRAMES = 8
DEMO_MODEL = Path(__file__).parent / "demo_model"
History = list[tuple[str, str]]


def load(
    path_or_repo_id: str | os.PathLike[str] | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    backend: str | None = None,
    image_token_id: int | None = None,
    prefill_chunk: int | None = None,
    threads: int | None = None,
    quant: str | None = None,
    kv_tokens: int | None = None,
    pack: bool = False,
) -> Model:
    """Loads a chat checkpoint: a folder, or a repo id of the Hugging Face hub (extra `hub`).

    path_or_repo_id: None for the demonstration model that comes with the package, which knows
        numbers, shapes, colours and emoji and nothing else.
    device: "cpu", "cuda", "cuda:1", or "auto", which is the CPU.
    dtype: "float32", "bfloat16", the torch dtypes, or "auto": what the checkpoint is stored in.
    backend: "native" (None) runs our kernels, "reference" plain torch, "triton" Triton's.
    image_token_id: for checkpoints without tokenizer files that take pictures in `generate`.
    prefill_chunk: prompt tokens that run at a time; answers do not depend on it.
    threads: CPU threads of the whole process, as `set_num_threads`.
    quant: "int8" or "int4" quantises the language model's weights as they are loaded, in groups of
        64 (the head to int8 either way); pictures are seen in dtype. On the CPU.
    kv_tokens: tokens that the KV cache holds, at most; None for what memory allows, up to eight
        requests of full context.
    pack: some CPUs read bfloat16 weights in the file, which costs neither time nor memory of its
        own. True rearranges those of the language model all the same: loading takes a second for
        each GB, and wide models decode up to 1.15 times as fast (docs/performance.md). For the
        CPU's own kernels; elsewhere there is nothing to choose.
    Raises OSError for what cannot be read and ValueError for what cannot be run, in one line.
    """
    platform = platform_for(device)
    if threads is not None:
        _C.set_num_threads(threads)
    opset = _opset(backend, platform)
    source = DEMO_MODEL if path_or_repo_id is None else path_or_repo_id
    folder = resolve_path(source)
    config = load_config(folder)
    kind = dtype_from(dtype, config.torch_dtype)
    checkpoint = open_checkpoint(folder, config)
    parameters = Parameters.of_model(checkpoint, config, platform)
    if image_token_id is not None:
        _check_integer("image_token_id", image_token_id, 0, config.text.vocab_size - 1)
    chunk = DEFAULT_PREFILL_CHUNK if prefill_chunk is None else prefill_chunk
    _check_integer("prefill_chunk", chunk, 1, 1 << 20)
    if kv_tokens is not None:
        _check_integer("kv_tokens", kv_tokens, PAGE_SIZE, 1 << 40)
    plan = make_plan(config, kind, prefill_chunk=chunk, quant=quant, platform=platform)
    if quant is not None and platform is not CPU:
        raise ValueError(f"quant is {quant!r}, but device is {device!r}: on the CPU only")
    if pack and (platform is not CPU or opset.choice("linear") != "native"):
        raise ValueError("pack is True: for the CPU's own kernels only")
    plan.require_fit()
    tokens = plan.kv_tokens if kv_tokens is None else min(kv_tokens, plan.kv_tokens)
    with platform.lock, platform.scope():
        core = InternVL(config, parameters, opset, kind, quant, pack)
        parameters.finish()
        engine = Engine(core, kv_tokens=tokens, prefill_chunk=chunk)
    return Model(folder, config, core, engine, image_token_id, name=Path(source).name)


def load_vision(
    path_or_repo_id: str | os.PathLike[str],
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    backend: str | None = None,
) -> VisionModel:
    """Loads the vision tower alone.

    Of a standalone InternViT, of a chat checkpoint, or of the contrastive InternVL-14B-224px.
    """
    platform = platform_for(device)
    opset = _opset(backend, platform)
    opset.require(*VISION_OPS)
    folder = resolve_path(path_or_repo_id)
    config = load_vision_config(folder)
    checkpoint = Checkpoint(folder)
    kind = dtype_from(dtype, str(checkpoint.dtype).removeprefix("torch."))
    parameters = Parameters.of_vision(checkpoint, config, platform)
    with platform.lock, platform.scope():
        tower = VisionTower(config, parameters, config.num_layers, opset, kind)
        parameters.finish()
    return VisionModel(config, tower, platform)


@dataclass(frozen=True)
class VisionOutput:
    """last_hidden_state [t, 1+n, C], pooler_output [t, C] (its CLS token), hidden_states or None.

    hidden_states holds the embeddings and the output of every layer.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor
    hidden_states: tuple[Tensor, ...] | None


class VisionModel:
    """InternViT as a function of pixels."""

    def __init__(self, config: VisionConfig, tower: VisionTower, platform: Platform = CPU) -> None:
        self.config, self._tower, self._platform = config, tower, platform

    def __call__(self, pixel_values: Tensor, output_hidden_states: bool = False) -> VisionOutput:
        """pixel_values: float [t, 3, height, width], normalised, sides multiples of the patch."""
        _check_pixels("pixel_values", pixel_values, self.config.patch_size, square=False)
        platform = self._platform
        states: list[Tensor] = []
        each = None
        if output_hidden_states:
            each = lambda x: states.append(platform.hand_out(x.clone()))  # noqa: E731
        with platform.lock, platform.scope():
            x = platform.hand_out(self._tower(platform.receive(pixel_values.detach()), each))
        return VisionOutput(x, x[:, 0], tuple(states) if output_hidden_states else None)


class Model:
    """A loaded checkpoint. Its methods may be called from several threads at a time."""

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        core: InternVL,
        engine: Engine,
        image_token_id: int | None,
        *,
        name: str | None = None,
    ) -> None:
        """name: as the checkpoint was published; None for the name of its folder."""
        self.folder, self.config, self.engine = folder, config, engine
        self.template = get_template(config.template)
        self.system_message = config.system_message
        if self.system_message is None:
            v1 = is_first_generation(name or folder.name, config.ps_version)
            self.system_message = default_system(config.template, v1=v1)
        self._core = core
        self._image_token_id = image_token_id
        self._tokenizer: Tokenizer | None = None
        self._lock = threading.Lock()

    @property
    def dtype(self) -> torch.dtype:
        return self._core.dtype

    @property
    def tokenizer(self) -> Tokenizer:
        """Read when it is first needed; FileNotFoundError where the checkpoint has none."""
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = load_tokenizer(self.folder)
            return self._tokenizer

    @property
    def image_token_id(self) -> int:
        """The id whose embeddings the picture features replace.

        Looked up by name where there is a tokenizer: some converted configs store a wrong one.
        """
        given = self._image_token_id
        if given is None:
            try:
                given = self.tokenizer.special_id(IMG_CONTEXT)
            except FileNotFoundError as error:
                given = self.config.image_token_id
                if given is None:
                    raise ValueError(f"image_token_id is not known: {error}") from None
        if given is None or not 0 <= given < self.config.text.vocab_size:
            raise ValueError(
                f"image_token_id is {given}, expected 0 to {self.config.text.vocab_size - 1}"
            )
        return given

    # Text in, text out.

    def chat(
        self,
        question: str | Sequence[Mapping[str, Any]],
        images: Any = None,
        video: Any = None,
        history: Sequence[tuple[str, str]] | None = None,
        system: str | None = None,
        stream: bool = False,
        return_history: bool = False,
        max_tiles: int | None = None,
        *,
        num_frames: int | None = None,
        video_bound: tuple[float, float] | None = None,
        max_new_tokens: int = 1024,
        min_new_tokens: int = 0,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        num_beams: int = 1,
    ) -> Any:
        """Answers a question, about pictures or a video if there are any.

        question: text, or OpenAI-style messages, which then carry history and pictures too.
            `<image>` marks the place of a picture; without one, pictures come first.
        images: one picture or a list: path, bytes, PIL image, or uint8 array [H, W, 3]. With a
            history: the pictures of all turns, in the order of their places. A video's frames
            take the places after them.
        video: path or bytes, of which num_frames (None: 8) are taken, evenly spaced within
            video_bound (seconds); or a list of frames, which is taken whole. A frame is one tile.
        system: the system message; None for the checkpoint's, "" for none.
        max_tiles: tiles per picture, thumbnail not counted, 1 to 40; None for the checkpoint's.
        temperature 0 is greedy. seed: None draws one; the same seed repeats an answer.
        stop: strings that end the answer and are not part of it.
        Returns the answer; with stream an iterator of its pieces (closing it cancels); with
        return_history (answer, history + this turn).
        Raises ValueError, TypeError or OSError in one line that names what is wrong.
        """
        if stream and return_history:
            raise ValueError("return_history cannot be combined with stream")
        turn = self._turn(
            _Question(
                question=question,
                images=images,
                video=video,
                history=history,
                system=system,
                max_tiles=max_tiles,
                num_frames=num_frames,
                video_bound=video_bound,
                stop=stop,
                seed=seed,
                num_beams=num_beams,
                max_new_tokens=max_new_tokens,
                min_new_tokens=min_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
            )
        )
        if stream:
            return turn.pieces(self.engine)
        answer = "".join(turn.pieces(self.engine)).strip()
        return (answer, [*turn.history, (turn.question, answer)]) if return_history else answer

    def batch_chat(
        self,
        requests: Sequence[str | Mapping[str, Any] | Sequence[Mapping[str, Any]]],
        *,
        return_exceptions: bool = False,
        **common: Any,
    ) -> list[Any]:
        """Answers several requests as one batch; each answer is what `chat` alone would give.

        requests: questions, lists of messages, or dicts of `chat`'s arguments; common holds
        arguments for all of them. With return_exceptions a request that fails has its exception
        in the place of its answer, and the others run; otherwise the first error is raised
        before anything runs, or after everything else has.
        """
        if isinstance(requests, (str, bytes, Mapping)) or not isinstance(requests, Iterable):
            raise TypeError(
                f"requests is {_describe(requests)}, expected a list of questions, of lists of "
                "messages or of dicts"
            )
        _Question.of({"question": "", **common})  # refuses an unknown argument of no request, too
        turns: list[_Turn | Exception] = []
        for i, entry in enumerate(requests):
            arguments = dict(entry) if isinstance(entry, Mapping) else {"question": entry}
            try:
                turns.append(self._turn(_Question.of({**common, **arguments})))
            except (ValueError, TypeError, OSError, MemoryError, ImportError) as error:
                if not return_exceptions:
                    raise type(error)(f"requests[{i}]: {error}") from None
                turns.append(error)
        live = [t.request for t in turns if isinstance(t, _Turn)]
        self.engine.submit(*live)
        self.engine.run(live)
        answers = [t if isinstance(t, Exception) else t.answer() for t in turns]
        if not return_exceptions:
            for answer in answers:
                if isinstance(answer, BaseException):
                    raise answer
        return answers

    def show_prompt(
        self,
        question: str | Sequence[Mapping[str, Any]],
        images: Any = None,
        video: Any = None,
        history: Sequence[tuple[str, str]] | None = None,
        system: str | None = None,
        **options: Any,
    ) -> str:
        """The prompt that `chat` would run for these arguments; runs of image tokens as a count."""
        given = {"question": question, "images": images, "video": video, "history": history}
        asked = _Question.of(given | {"system": system} | options)
        ids = self._turn(asked).request.prompt.tolist()
        text = self.tokenizer.decode(ids, skip_special=False)
        return re.sub(
            f"(?:{IMG_CONTEXT})+", lambda m: f"{IMG_CONTEXT}*{m[0].count(IMG_CONTEXT)}", text
        )

    def _turn(self, asked: _Question) -> _Turn:
        most = self.config.max_dynamic_patch if asked.max_tiles is None else asked.max_tiles
        _check_integer("max_tiles", most, 1, MAX_TILES)
        _check_integer("num_beams", asked.num_beams, 1, 1, "beam search is not implemented")
        stops = _stops(asked.stop)
        sampling = asked.sampling(self._stop_ids())
        StopMatcher(stops)  # refuses what is no stop string before any work
        if asked.num_frames is not None:
            videos.check_num_frames(asked.num_frames)
        if asked.video_bound is not None:
            videos.check_bound(asked.video_bound)

        asked, media = self._media(asked)
        system = self.system_message if asked.system is None else asked.system
        tiles = self._tiles(media, most)
        prompt = build_prompt(
            self.tokenizer,
            asked.question,
            template=self.config.template,
            history=asked.history,
            system=system,
            num_tiles=[grid.tiles for grid in tiles],
            tokens_per_tile=self.config.tokens_per_tile,
            restore_channel=True,
        )
        self._check_length(prompt, len(tiles))
        pixels = None
        if tiles:
            pixels = torch.cat([grid.pixels() for grid in tiles])
        text = _Text(self.tokenizer, [*stops, *self.template.stop_strings], self.template)
        positions = [p for s in prompt.image_spans for p in range(s.start, s.start + s.length)]
        request = Request(
            prompt.token_ids,
            sampling,
            pixels=pixels,
            image_positions=positions,
            on_token=text.push,
        )
        return _Turn(request, text, asked.question, list(asked.history or ()))

    def _media(self, asked: _Question) -> tuple[_Question, list[tuple[str, Any]]]:
        """`asked` as text with a placeholder for every picture, and the pictures: kind, source."""
        if not isinstance(asked.question, Sequence):
            raise TypeError(
                f"question is {_describe(asked.question)}, expected text or a list of messages"
            )
        if not isinstance(asked.question, str):
            return self._messages(asked)
        images = _listed(asked.images)
        frames = None if asked.video is None else self._frames(asked.video, asked)
        question = with_placeholders(
            asked.question,
            asked.history,
            num_images=len(images),
            num_frames=None if frames is None else len(frames),
        )
        media = [("image", s) for s in images] + [("frame", f) for f in frames or ()]
        return replace(asked, question=question), media

    def _messages(self, asked: _Question) -> tuple[_Question, list[tuple[str, Any]]]:
        """`_media` of OpenAI-style messages."""
        if asked.images is not None or asked.video is not None or asked.history is not None:
            raise ValueError("messages carry their own images, video and history")
        conversation = parse_messages(asked.question)
        system = asked.system
        if conversation.system is not None:
            if system is not None:
                raise ValueError("system is given twice: as an argument and as a message")
            system = conversation.system
        media: list[tuple[str, Any]] = []
        counts: list[int] = []
        for part in conversation.media:
            if part.kind == "video":
                frames = self._frames(part.source, asked)
                counts.append(len(frames))
                media += [("frame", frame) for frame in frames]
            else:
                media.append((part.kind, part.source))
        conversation = conversation.with_frames(counts)
        question, history = conversation.question, conversation.history
        return replace(asked, question=question, history=history, system=system), media

    def _frames(self, video: Any, asked: _Question) -> Sequence[Any]:
        if isinstance(video, (str, os.PathLike, bytes, bytearray, memoryview)):
            n = DEFAULT_FRAMES if asked.num_frames is None else asked.num_frames
            self._check_room(n, n)
            return videos.load_video(video, n, asked.video_bound)
        if not isinstance(video, (list, tuple)):
            raise TypeError(
                f"video is {_describe(video)}, expected a path, bytes or a list of frames"
            )
        if not video:
            raise ValueError("video has no frames")
        for name in ("num_frames", "video_bound"):
            if getattr(asked, name) is not None:
                raise ValueError(f"{name} is given, but video is a list of frames, taken whole")
        return video

    def _tiles(self, media: Sequence[tuple[str, Any]], max_tiles: int) -> list[_Tiles]:
        """Decodes the pictures, so that their tiles can be counted before anything is computed."""
        out: list[_Tiles] = []
        config = self.config
        for i, (kind, source) in enumerate(media):
            self._check_room(len(media), sum(grid.tiles for grid in out) + len(media) - i)
            most = max_tiles if kind == "image" and config.dynamic_image_size else 1
            picture = pictures.load_image(source)
            if config.pad_to_square:
                picture = pictures.pad_to_square(picture)
            height, width = picture.shape[:2]
            columns, rows = pictures.tile_grid(width, height, most, config.image_size)
            count = columns * rows
            if config.use_thumbnail and count > 1:
                count += 1
            pixels = functools.partial(
                pictures.preprocess, picture, most, config.image_size, config.use_thumbnail
            )
            out.append(_Tiles(count, pixels))
        return out

    def _check_room(self, n_pictures: int, tiles: int) -> None:
        """Refuses pictures that take too many tokens before the next of them is decoded."""
        least, context = tiles * self.config.tokens_per_tile, self.engine.context
        if least >= context:
            raise ValueError(
                f"{n_pictures} pictures take {least} tokens or more, the context is {context} "
                "including the answer; lower max_tiles or num_frames, or give fewer"
            )

    def _check_length(self, prompt: Prompt, n_pictures: int) -> None:
        total, context = len(prompt.token_ids), self.engine.context
        if total >= context:
            spent = sum(s.length for s in prompt.image_spans)
            hint = "; lower max_tiles or num_frames" if spent else ""
            raise ValueError(
                f"the prompt has {total} tokens ({spent} of them for {n_pictures} pictures), "
                f"the context {context} including the answer{hint}"
            )

    def _stop_ids(self) -> frozenset[int]:
        """The config's end tokens and the template's: configs often name another one."""
        ids = set(self.config.eos_token_ids)
        found = self.tokenizer.special_id(self.template.stop_token)
        if found is not None:
            ids.add(found)
        return frozenset(i for i in ids if i < self.config.text.vocab_size)

    # Tensors in, tensors out.

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Projected picture features: float [t, 3, S, S] -> [t, n, hidden].

        S is a multiple of 28 (patch size times unshuffle ratio); n = (S / 28)^2. Where S is not the
        size that the tower was trained for, its position embedding is resized. The features are on
        the model's device.
        """
        unit = self.config.vision.patch_size * self.config.unshuffle
        _check_pixels("pixel_values", pixel_values, unit, square=True)
        return self._core.encode_images(pixel_values.detach())

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_flags: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits of every position: int64 [B, T] -> float32 [B, T, V].

        pixel_values: [t, 3, S, S], its features fill the image tokens of all rows in order.
        image_flags: [t] or [t, 1], 0 drops a tile's features; None uses all.
        attention_mask: [B, T] of 0 and 1, left padded. Logits at masked places are zeros.
        They are on the model's device.
        """
        rows = self._rows(input_ids, attention_mask)
        images = self._row_images(rows, pixel_values, image_flags)
        text, platform = self.config.text, self._core.platform
        pages = sum(KvCache.pages_for(len(r)) for r in rows)
        with platform.lock, platform.scope():
            cache = KvCache(text, pages, self.dtype, platform.device)
            each = torch.arange(pages).split([KvCache.pages_for(len(r)) for r in rows])
            chunks = [
                Chunk(r, 0, own, "all", image, image_row)
                for r, own, (image, image_row) in zip(rows, each, images, strict=True)
            ]
            logits = self._core.run(chunks, cache)
            assert logits is not None
            out = logits.new_zeros(*input_ids.shape, text.vocab_size)
            for b, part in enumerate(logits.split([len(r) for r in rows])):
                out[b, out.shape[1] - len(part) :] = part
            return platform.hand_out(out)

    __call__ = forward

    def generate(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_flags: Tensor | None = None,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 1024,
        min_new_tokens: int = 0,
        temperature: float = 0,
        seed: int | None = None,
        num_beams: int = 1,
        eos_token_id: int | Sequence[int] | None = None,
        *,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
    ) -> list[list[int]]:
        """New token ids of each row, the end token included if there was one.

        Tensors as in `forward`. eos_token_id: None for the checkpoint's, -1 never to stop, or ids.
        Row b of a sampled batch uses seed + b.
        """
        _check_integer("num_beams", num_beams, 1, 1, "beam search is not implemented")
        if seed is None:
            seed = secrets.randbits(62)
        _check_integer("seed", seed, -(2**63), 2**63 - 1)
        stops = self._eos(eos_token_id)
        rows = self._rows(input_ids, attention_mask, answer=1)
        requests = []
        for b, row in enumerate(rows):
            params = SamplingParams(
                max_new_tokens=max_new_tokens,
                min_new_tokens=min_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                seed=seed + b,
                stop_ids=stops,
            )
            requests.append(Request(row.tolist(), params))
        images = self._row_images(rows, pixel_values, image_flags)
        for request, (image, image_row) in zip(requests, images, strict=True):
            request.image, request.image_row = image, image_row
        self.engine.submit(*requests)
        self.engine.run(requests)
        for request in requests:
            if request.error:
                raise request.error
        return [r.tokens for r in requests]

    def _eos(self, eos_token_id: int | Sequence[int] | None) -> frozenset[int]:
        if eos_token_id is None:
            try:
                return self._stop_ids()
            except FileNotFoundError:
                # Without a tokenizer the template's end token has no id.
                return frozenset(self.config.eos_token_ids)
        if not isinstance(eos_token_id, (int, list, tuple, set, frozenset)):
            raise TypeError(
                f"eos_token_id is {_describe(eos_token_id)}, expected an integer or a list of them"
            )
        ids = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
        if ids == [-1]:
            return frozenset()
        for i in ids:
            _check_integer("eos_token_id", i, 0, self.config.text.vocab_size - 1)
        return frozenset(ids)

    def _rows(
        self, input_ids: Tensor, attention_mask: Tensor | None, *, answer: int = 0
    ) -> list[Tensor]:
        """The unpadded rows, int64 each; the context has room for `answer` more tokens."""
        if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
            raise ValueError(f"input_ids is {_describe(input_ids)}, expected a tensor [B, T]")
        if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
            raise TypeError(f"input_ids is {input_ids.dtype}, expected integers")
        if not input_ids.numel():
            raise ValueError(f"input_ids is empty: {list(input_ids.shape)}")
        V = self.config.text.vocab_size
        low, high = int(input_ids.min()), int(input_ids.max())
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if not isinstance(mask, Tensor) or mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask is {_describe(mask)}, expected {list(input_ids.shape)}"
            )
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError("attention_mask has values other than 0 and 1")
        if bool((mask[:, 1:] < mask[:, :-1]).any()):
            raise ValueError("attention_mask has a 0 after a 1, expected left padding")
        pairs = zip(input_ids.cpu(), mask.cpu(), strict=True)
        rows = [i[m.bool()].long() for i, m in pairs]
        for b, row in enumerate(rows):
            if not len(row):
                raise ValueError(f"attention_mask: row {b} is all padding")
            if len(row) + answer > self.engine.context:
                including = " including the answer" if answer else ""
                raise ValueError(
                    f"row {b} has {len(row)} tokens, the context {self.engine.context}{including}"
                )
        if any(bool(((r < 0) | (r >= V)).any()) for r in rows):
            raise ValueError(f"input_ids has ids from {low} to {high}, expected 0 to {V - 1}")
        return rows

    def _row_images(
        self, rows: Sequence[Tensor], pixel_values: Tensor | None, image_flags: Tensor | None
    ) -> list[tuple[Tensor | None, Tensor | None]]:
        """Features [N, hidden] and their places (as in Batch.image_row) for each row."""
        if pixel_values is None:
            if image_flags is not None:
                raise ValueError("image_flags is given without pixel_values")
            return [(None, None)] * len(rows)
        unit = self.config.vision.patch_size * self.config.unshuffle
        _check_pixels("pixel_values", pixel_values, unit, square=True)
        t = len(pixel_values)
        if image_flags is not None:
            if not isinstance(image_flags, Tensor):
                raise TypeError(f"image_flags is {_describe(image_flags)}, expected a tensor [t]")
            flags = image_flags.flatten()
            if flags.shape != (t,) or not bool(((flags == 0) | (flags == 1)).all()):
                raise ValueError(f"image_flags must be {t} values of 0 or 1, one per tile")
            pixel_values = pixel_values[flags.bool().to(pixel_values.device)]
        token = self.image_token_id
        counts = [int((r == token).sum()) for r in rows]
        each = (pixel_values.shape[-1] // unit) ** 2
        if sum(counts) != each * len(pixel_values):
            raise ValueError(
                f"input_ids has {sum(counts)} image tokens, the {len(pixel_values)} tiles used "
                f"have {each * len(pixel_values)}"
            )
        features = self._core.encode_images(pixel_values.detach()).flatten(0, 1)
        out: list[tuple[Tensor | None, Tensor | None]] = []
        for row, part in zip(rows, features.split(counts), strict=True):
            here = row == token
            out.append((part, torch.where(here, here.cumsum(0) - 1, -1)))
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    """The arguments of `Model.chat` that make a prompt and choose its answer."""

    question: str | Sequence[Mapping[str, Any]]
    images: Any = None
    video: Any = None
    history: Sequence[tuple[str, str]] | None = None
    system: str | None = None
    max_tiles: int | None = None
    num_frames: int | None = None
    video_bound: tuple[float, float] | None = None
    stop: str | Sequence[str] | None = None
    seed: int | None = None
    num_beams: int = 1
    max_new_tokens: int = 1024
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> _Question:
        names = [field.name for field in fields(cls)]
        unknown = sorted(set(arguments) - set(names))
        if unknown:
            raise TypeError(f"unknown argument {unknown[0]!r}, allowed: {', '.join(names)}")
        if "question" not in arguments:
            raise TypeError("a request has no question")
        return cls(**arguments)

    def sampling(self, stop_ids: frozenset[int]) -> SamplingParams:
        return SamplingParams(
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=secrets.randbits(63) if self.seed is None else self.seed,
            stop_ids=stop_ids,
        )


@dataclass(frozen=True)
class _Tiles:
    """A decoded picture: how many tiles it gives, and the tiles."""

    tiles: int
    pixels: Callable[[], Tensor]


class _Text:
    """The answer's text as its tokens come in: `push` by one thread, the rest by another."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], template: Template) -> None:
        self._tokenizer, self._stops, self._template = tokenizer, stops, template
        self._tokens: list[int] = []
        self._pieces: list[str] = []  # of each token, what it made certain
        self._taken = 0  # of the pieces
        self._begin()

    def _begin(self) -> None:
        self._channel = FinalChannel(self._tokenizer) if self._template.channel else None
        self._stream = TextStream(self._tokenizer)
        self._matcher = StopMatcher(self._stops)
        self._next = 0  # index of the token that may follow; -1 while one is read

    def push(self, index: int, token: int) -> bool:
        """True where a stop string is complete.

        A token that is not the next one comes again: those before it are then read anew.
        """
        if index != self._next:
            self._begin()
            for earlier in self._tokens[:index]:
                self._read(earlier)
        self._next = -1
        self._tokens[index:] = [token]
        self._pieces[index:] = [self._read(token)]
        self._next = index + 1
        return self._matcher.stopped

    def _read(self, token: int) -> str:
        if self._channel is not None and not self._channel.shows(token):
            return ""
        return self._matcher.push(self._stream.push(token))

    def take(self) -> str:
        """The text that has become certain since the last call."""
        new = self._pieces[self._taken :]
        self._taken += len(new)
        return "".join(new)

    def finish(self) -> str:
        rest = self._matcher.push(self._stream.finish())
        return self.take() + rest + self._matcher.finish()


@dataclass(frozen=True)
class _Turn:
    request: Request
    text: _Text
    question: str
    history: History

    def pieces(self, engine: Engine) -> Iterator[str]:
        # Queued by the first step of the iterator: one that is never used costs nothing.
        engine.submit(self.request)
        for _ in engine.stream(self.request):
            piece = self.text.take()
            if piece:
                yield piece
        rest = self.text.finish()
        if rest:
            yield rest

    def answer(self) -> str | BaseException:
        if self.request.error:
            return self.request.error
        return self.text.finish().strip()


def _stops(stop: Any) -> list[Any]:
    if stop is None:
        return []
    if not isinstance(stop, (str, list, tuple)):
        raise TypeError(f"stop is {_describe(stop)}, expected a string or a list of strings")
    return [stop] if isinstance(stop, str) else list(stop)


def _listed(images: Any) -> list[Any]:
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__


def _check_integer(name: str, value: Any, low: int, high: int, why: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} is {type(value).__name__}, expected an integer")
    if not low <= value <= high:
        allowed = str(low) if low == high else f"{low} to {high}"
        raise ValueError(f"{name} is {value}, allowed: {allowed}" + (f" ({why})" if why else ""))


def _check_pixels(name: str, pixels: Any, unit: int, *, square: bool) -> None:
    if not isinstance(pixels, Tensor) or not pixels.is_floating_point():
        raise TypeError(f"{name} is {_describe(pixels)}, expected a float tensor [t, 3, S, S]")
    if pixels.dim() != 4 or pixels.shape[1] != 3:
        raise ValueError(f"{name} is {_describe(pixels)}, expected [t, 3, S, S]")
    height, width = pixels.shape[2:]
    if (square and height != width) or height % unit or width % unit or not height or not width:
        what = "S" if square else "height and width"
        raise ValueError(f"{name} is {_describe(pixels)}, expected {what} a multiple of {unit}")


def _opset(backend: str | None, platform: Platform) -> OpSet:
    """The ops that models on this platform call; ValueError for a backend that is not for it."""
    kind = platform.device.type
    if kind == "cuda" and backend != "reference" and not _C.has_cuda:
        raise ValueError(
            f"device is '{platform.device}', but this build has no CUDA kernels; available: cpu"
        )
    return OpSet(backend, device=kind)


def dtype_from(dtype: str | torch.dtype, stored: str | None) -> torch.dtype:
    """The dtype to compute in, from what the caller asked for and what the checkpoint holds."""
    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        return torch.bfloat16 if stored == "bfloat16" else torch.float32
    allowed = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in allowed:
        raise ValueError(f"dtype is {name!r}, allowed: float32, bfloat16, auto")
    return allowed[name]
