"""The command line: `internvl-rt chat|selftest|info|models|ops|bench`, `python -m internvl_rt`."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXIT_WRONG = 1  # selftest: it runs, and answers wrongly
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it

DEMO_NOTE = "[demonstration model: numbers, shapes, colours, counting, sides, emoji; nothing else]"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if "question" in options:
        rest = _settle(options, rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        status = options.run(options)
        print(end="", flush=True)  # what cannot be written is known here, not when Python ends
        return status
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output left: nothing more to say to it, not even when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, MemoryError, ImportError) as error:
        print(f"internvl-rt: {error}", file=sys.stderr)
        return EXIT_ERROR


def _settle(options: argparse.Namespace, rest: list[str]) -> list[str]:
    """Sorts out `chat [MODEL] [QUESTION]`; returns what is left over.

    argparse settles optional positionals before the options that stand between them, as in
    `chat MODEL -i picture.jpg "question"`, and leaves the later ones in rest.
    """
    words = [word for word in (options.model, options.question) if word is not None]
    while rest and len(words) < 2 and rest[0][:1] != "-":
        words.append(rest.pop(0))
    if len(words) == 1 and not _names_model(words[0]):
        words.insert(0, None)
    options.model, options.question = (*words, None, None)[:2]
    return rest


def _names_model(word: str) -> bool:
    """A folder, or what could only be meant as one: org/name, ./name, a/b/c."""
    # Not Path.exists(), which raises for a question that is too long for a name.
    return os.path.exists(word) or ("/" in word and not any(c.isspace() for c in word))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="internvl-rt", description="Run InternVL vision-language models."
    )
    commands = parser.add_subparsers(required=True, metavar="chat|selftest|info|models|ops|bench")

    chat = commands.add_parser("chat", help="ask about pictures or a video")
    chat.add_argument(
        "model", nargs="?", help="checkpoint folder or repo id; without it the demonstration model"
    )
    chat.add_argument("question", nargs="?", help="without it: a conversation, one turn per line")
    chat.add_argument("-i", "--image", action="append", default=[], help="may be repeated")
    chat.add_argument("-v", "--video")
    chat.add_argument("--num-frames", type=int, help="of the video; without it 8")
    chat.add_argument("--max-tiles", type=int)
    chat.add_argument("--system", help="system message; '' for none")
    chat.add_argument("--max-new-tokens", type=int, default=1024)
    chat.add_argument("--min-new-tokens", type=int, default=0)
    chat.add_argument("--temperature", type=float, default=0.0)
    chat.add_argument("--top-k", type=int, default=0)
    chat.add_argument("--top-p", type=float, default=1.0)
    chat.add_argument("--min-p", type=float, default=0.0)
    chat.add_argument("--repetition-penalty", type=float, default=1.0)
    chat.add_argument("--seed", type=int)
    chat.add_argument("--stop", action="append", help="string that ends the answer")
    chat.add_argument("--draw", metavar="OUT.png", help="the picture with the answer's boxes")
    chat.add_argument("--no-stream", action="store_true", help="print the answer when it is whole")
    chat.add_argument("--show-prompt", action="store_true", help="print the prompt, answer nothing")
    _add_model_options(chat)
    chat.set_defaults(run=_chat)

    selftest = commands.add_parser("selftest", help="is this installation right?")
    _add_model_options(selftest)
    selftest.set_defaults(run=_selftest)

    info = commands.add_parser("info", help="the machine, a checkpoint, or a memory plan")
    info.add_argument("model", nargs="?", help="as --plan")
    info.add_argument(
        "--plan",
        metavar="CONFIG",
        help="memory plan of a config.json, its folder, or a published name such as InternVL3-8B",
    )
    info.add_argument("--dtype", help="float32, bfloat16, auto; without it a plan has both")
    info.add_argument("--quant", help="int8, int4: the plan of a quantised language model")
    info.set_defaults(run=_info)

    models = commands.add_parser("models", help="the published checkpoints")
    models.add_argument("--markdown", action="store_true", help="the text of docs/models.md")
    models.set_defaults(run=_models)

    ops = commands.add_parser("ops", help="the op catalogue")
    ops.add_argument("--markdown", action="store_true", help="the text of docs/ops.md")
    ops.set_defaults(run=_ops)

    bench = commands.add_parser("bench", help="time one op")
    bench.add_argument("--op", required=True)
    bench.add_argument("--shape", help="such as 4096x896; without it the op's real-model cases")
    bench.add_argument("--dtype", help="bf16, f32, or bf16,f32; without it all that the op has")
    bench.add_argument("--backend", default="cpu", help="of cpu,cuda,triton,reference")
    bench.add_argument("--threads", type=int)
    bench.add_argument("--json", metavar="FILE", help="write the rows there too")
    bench.set_defaults(run=_bench)
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, auto")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, auto")
    parser.add_argument("--backend", choices=("native", "reference", "triton"))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--quant", help="int8, int4: weights of the language model")


def _chat(options: argparse.Namespace) -> int:
    import internvl_rt

    if options.question is None and (options.show_prompt or options.video is not None):
        what = "--show-prompt" if options.show_prompt else "a video"
        raise ValueError(f"{what} needs a question on the command line")
    if options.draw is not None:
        _check_draw(options)
    if options.model is None:
        print(DEMO_NOTE, file=sys.stderr)
    model = internvl_rt.load(
        options.model,
        device=options.device,
        dtype=options.dtype,
        backend=options.backend,
        threads=options.threads,
        quant=options.quant,
    )
    settings: dict[str, Any] = {
        "system": options.system,
        "max_tiles": options.max_tiles,
        "num_frames": options.num_frames,
        "max_new_tokens": options.max_new_tokens,
        "min_new_tokens": options.min_new_tokens,
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "min_p": options.min_p,
        "repetition_penalty": options.repetition_penalty,
        "seed": options.seed,
        "stop": options.stop,
    }
    images = options.image or None
    if options.question is not None:
        if options.show_prompt:
            print(model.show_prompt(options.question, images, options.video, **settings))
            return 0
        answer = _answer(model, options, options.question, images, options.video, None, settings)
        if options.draw is not None:
            _draw(options, answer)
        return 0
    return _converse(model, options, images, settings)


def _check_draw(options: argparse.Namespace) -> None:
    """Before a model is loaded for nothing."""
    from PIL import Image

    one = len(options.image) == 1 and options.video is None
    if not one or options.question is None or options.show_prompt:
        raise ValueError("--draw needs one picture (-i) and a question on the command line")
    path = Path(options.draw)
    try:
        Image.new("RGB", (1, 1)).save(
            io.BytesIO(), Image.registered_extensions()[path.suffix.lower()]
        )
    except (KeyError, OSError):  # a format that is not known, or not to be written
        raise ValueError(f"--draw is {options.draw!r}, expected a name such as out.png") from None
    if not os.access(path.parent, os.W_OK):
        raise OSError(f"--draw is {options.draw!r}, but nothing can be written to that folder")


def _draw(options: argparse.Namespace, answer: str) -> None:
    from internvl_rt.grounding import draw, parse
    from internvl_rt.image import load_image

    picture = load_image(options.image[0])
    height, width = picture.shape[:2]
    regions = parse(answer, width, height)
    draw(picture, regions).save(options.draw)
    print(f"regions drawn into {options.draw}: {len(regions)}", file=sys.stderr)


def _answer(
    model: Any,
    options: argparse.Namespace,
    question: str,
    images: Any,
    video: Any,
    history: Any,
    settings: dict[str, Any],
) -> str:
    pieces = model.chat(question, images, video, history, stream=True, **settings)
    answer = ""
    for piece in pieces:
        answer += piece
        if not options.no_stream:
            print(piece, end="", flush=True)
    print(answer.strip() if options.no_stream else "", flush=True)
    return answer.strip()


def _converse(
    model: Any, options: argparse.Namespace, images: Any, settings: dict[str, Any]
) -> int:
    """Turns from standard input. Ctrl-C ends an answer, a second one or end of input the talk.

    A turn that fails is not part of the talk; the exit status tells that there was one.
    """
    from internvl_rt.prompt import with_placeholders

    if sys.stdin is None:
        raise ValueError("there is no question, neither as an argument nor on standard input")
    history: list[tuple[str, str]] = []
    status = 0
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return status
        if not line.strip():
            continue
        question = with_placeholders(line.rstrip("\n"), history, num_images=len(images or ()))
        try:
            answer = _answer(model, options, question, images, None, history, settings)
        except KeyboardInterrupt:
            print("\n[interrupted]", file=sys.stderr)
            continue
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:
            print(f"internvl-rt: {error}", file=sys.stderr)
            status = EXIT_ERROR
            continue
        history.append((question, answer))


def _selftest(options: argparse.Namespace) -> int:
    from internvl_rt import selftest

    report = selftest.run(
        options.device, options.dtype, options.backend, options.threads, options.quant
    )
    print(report.text())
    return 0 if report.ok else EXIT_WRONG


def _info(options: argparse.Namespace) -> int:
    import platform

    import torch

    import internvl_rt
    from internvl_rt import _C

    if options.plan is not None and options.model is not None:
        raise ValueError(f"info takes a model or --plan, not both: {options.model!r} and --plan")
    name = options.model if options.plan is None else options.plan
    if name is not None:
        _plan(name, options.dtype, options.quant)
        return 0
    if options.dtype is not None or options.quant is not None:
        raise ValueError("--dtype and --quant are for a plan: name a checkpoint")
    print(f"internvl_rt {internvl_rt.__version__}, Python {platform.python_version()}")
    print(f"torch {torch.__version__}")
    print(f"CPU: {_C.isa()} (of {', '.join(_C.supported_isas())}), {_C.num_threads()} threads")
    print(f"CUDA kernels: {'built in' if _C.has_cuda else 'not in this build'}")
    return 0


def _plan(name: str, dtype: str | None, quant: str | None) -> None:
    """The memory plan of a checkpoint's folder, its config.json, or a published name."""
    from internvl_rt import zoo
    from internvl_rt.config import load_config
    from internvl_rt.engine import DEFAULT_PREFILL_CHUNK
    from internvl_rt.model import dtype_from
    from internvl_rt.runtime.plan import make_plan, table

    folder = Path(name)
    row = None if folder.exists() else zoo.published(name)
    if row is None and not folder.exists():
        raise FileNotFoundError(
            f"{name}: no such folder, and not a name that `internvl-rt models` prints"
        )
    if row is not None:
        config = zoo.load_published(row)
    else:
        config = load_config(folder.parent if folder.name == "config.json" else folder)
    text, vision = config.text, config.vision
    print(
        f"{config.layout} layout, {text.backbone}: {text.num_layers} layers, hidden "
        f"{text.hidden_size}, heads {text.num_heads}/{text.num_kv_heads} x {text.head_dim}; "
        f"ViT: {vision.num_layers} layers, hidden {vision.hidden_size}; "
        f"{config.tokens_per_tile} tokens a tile, template {config.template}"
    )
    dtypes = ("bfloat16", "float32") if dtype is None else (dtype,)
    kinds = [dtype_from(kind, config.torch_dtype) for kind in dtypes]
    suffix = "" if quant is None else f"+{quant}"
    plans = {
        str(kind).removeprefix("torch.") + suffix: make_plan(
            config, kind, prefill_chunk=DEFAULT_PREFILL_CHUNK, quant=quant
        )
        for kind in kinds
    }
    print(table(plans))


def _models(options: argparse.Namespace) -> int:
    from internvl_rt import zoo

    print(zoo.as_markdown() if options.markdown else zoo.as_text(), end="")
    return 0


def _ops(options: argparse.Namespace) -> int:
    from internvl_rt.ops.table import as_markdown, as_text

    print(as_markdown() if options.markdown else as_text(), end="")
    return 0


def _bench(options: argparse.Namespace) -> int:
    import internvl_rt
    from internvl_rt.ops.bench import document, run, table

    if options.threads is not None:
        internvl_rt.set_num_threads(options.threads)
    dtypes = None if options.dtype is None else options.dtype.split(",")
    rows = run(options.op, options.shape, dtypes, options.backend.split(","))
    print(table(rows))
    if options.json is not None:
        Path(options.json).write_text(json.dumps(document(rows), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
