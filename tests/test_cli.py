"""The command line, in a process of its own as a user runs it."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

import internvl_rt as ivr
from internvl_rt.__main__ import main


def command(*arguments):
    return [sys.executable, "-m", "internvl_rt", *map(str, arguments)]


def run(*arguments, text=None):
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, input=text, timeout=120, check=False
    )


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_chat_equals_the_library(chat_folder, photo):
    done = run("chat", chat_folder, "-i", photo, "Hello world", "--max-new-tokens", 12)
    assert done.returncode == 0, done.stderr
    expected = ivr.load(chat_folder).chat("Hello world", images=photo, max_new_tokens=12)
    assert done.stdout.strip() == expected
    whole = run(
        "chat", chat_folder, "-i", photo, "Hello world", "--max-new-tokens", 12, "--no-stream"
    )
    assert whole.stdout.strip() == expected


def test_conversation_from_standard_input(chat_folder, photo):
    done = run("chat", chat_folder, "-i", photo, "--max-new-tokens", 5, text="Hello\n\nworld\n")
    assert done.returncode == 0, done.stderr
    model = ivr.load(chat_folder)
    first, history = model.chat("Hello", photo, return_history=True, max_new_tokens=5)
    second = model.chat("world", photo, history=history, max_new_tokens=5)
    assert done.stdout.strip() == f"{first}\n{second}".strip()


def test_show_prompt(chat_folder):
    done = run("chat", chat_folder, "Hello", "--system", "", "--show-prompt")
    assert done.stdout.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n\n")


def test_draw(photo, tmp_path, monkeypatch, capsys):
    """The answer's boxes are those of the picture as the model sees it."""
    answer = "<ref>cat</ref><box>[[0, 0, 500, 1000]]</box>"

    class Fake:
        def chat(self, *arguments, **options):
            return iter([answer[:20], answer[20:]])

    monkeypatch.setattr(ivr, "load", lambda *arguments, **options: Fake())
    out = tmp_path / "out.png"
    assert main(["chat", "model", "-i", str(photo), "--draw", str(out), "Where is the cat?"]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == answer
    assert printed.err.strip() == f"regions drawn into {out}: 1"
    before, after = (np.asarray(Image.open(p).convert("RGB")) for p in (photo, out))
    changed = (before != after).any(-1)
    assert changed[:, 45].all()
    assert not changed[:, 50:].any()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--draw", "out.png", "Hi"], "--draw needs one picture"),
        (["-i", "a.png", "-i", "b.png", "--draw", "out.png", "Hi"], "--draw needs one picture"),
        (["-i", "a.png", "-v", "b.mp4", "--draw", "out.png", "Hi"], "--draw needs one picture"),
        (["-i", "a.png", "--draw", "out.png"], "and a question on the command line"),
        (["-i", "a.png", "--draw", "out.png", "--show-prompt", "Hi"], "--draw needs"),
        (["-i", "a.png", "--draw", "out.abc", "Hi"], "expected a name such as out.png"),
        (["-i", "a.png", "--draw", "out.psd", "Hi"], "expected a name such as out.png"),
        (["-i", "a.png", "--draw", "/no/such/out.png", "Hi"], "nothing can be written to that"),
        (["--show-prompt"], "--show-prompt needs a question on the command line"),
        (["-v", "b.mp4"], "a video needs a question on the command line"),
    ],
)
def test_draw_is_checked_before_anything_is_loaded(arguments, match, capsys):
    assert main(["chat", "./no-such-folder", *arguments]) == 2
    assert match in capsys.readouterr().err


def test_interrupt_ends_quietly(chat_folder):
    length = ("--min-new-tokens", 30000, "--max-new-tokens", 30000)
    process = subprocess.Popen(
        command("chat", chat_folder, "Hello", "--temperature", 1, *length),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background has them ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    process.stdout.read(1)  # the answer has begun
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chat", "/no/such/model", "Hello"], "/no/such/model"),
        (["chat", "{folder}", "Hello", "-i", "/no/picture.png"], "picture.png"),
        (["chat", "{folder}", "Hello", "--temperature", "-1"], "temperature is -1"),
        (["chat", "{folder}", "Hello", "--device", "cuda"], "device is 'cuda'"),
        (["chat", "{folder}", ""], "question is empty"),
        (["chat", "{folder}", "Hello", "--quant", "int3"], "quant is 'int3', allowed: int8, int4"),
        (["info", "--plan", "{folder}", "--quant", "q4"], "quant is 'q4', allowed: int8, int4"),
        (["bench", "--op", "no_such_op"], "no_such_op"),
        (["info", "--plan", "/no/such/model"], "/no/such/model"),
        (["info", "{folder}", "--plan", "InternVL3-1B"], "a model or --plan, not both"),
        (["info", "--dtype", "float32"], "--dtype and --quant are for a plan"),
        (["bench", "--op", "rms_norm", "--shape", "1x1", "--dtype", "f32", "--json", ""], "'.'"),
    ],
)
def test_errors_are_one_line(chat_folder, arguments, message):
    done = run(*[a.format(folder=chat_folder) for a in arguments])
    assert done.returncode == 2
    assert done.stderr.startswith("internvl-rt: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_turn_that_fails_does_not_end_the_talk(chat_folder):
    talk = ("chat", chat_folder, "--max-new-tokens", 8)
    done = run(*talk, text="Hello\n<image> Hello\nworld\n")
    assert done.returncode == 2
    assert done.stderr == "internvl-rt: chat: 1 <image> placeholders for 0 images\n"
    assert done.stdout == run(*talk, text="Hello\nworld\n").stdout


def test_no_standard_input(chat_folder):
    line = shlex.join(command("chat", chat_folder)) + " <&-"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("internvl-rt: there is no question")


@pytest.mark.parametrize("arguments", [("info",), ("ops", "--markdown")])
def test_a_reader_that_leaves_is_no_error(arguments):
    line = f"{{ {shlex.join(command(*arguments))}; echo $? >&2; }} | true"
    without = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        ["sh", "-c", line], capture_output=True, text=True, check=False, env=without
    )
    assert done.stderr == "0\n"


def test_every_command_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "chat|selftest|info|models|ops|bench" in capsys.readouterr().out


def test_info_and_plan(chat_folder):
    assert "CPU: " in run("info").stdout
    plan = run("info", "--plan", chat_folder)
    assert plan.returncode == 0, plan.stderr
    assert "weights, packed" in plan.stdout
    again = run("info", "--plan", chat_folder / "config.json").stdout
    assert again.splitlines()[:4] == plan.stdout.splitlines()[:4]  # below: what memory is free


def test_a_quantised_model(chat_folder):
    done = run("chat", chat_folder, "Hello world", "--quant", "int4", "--max-new-tokens", 6)
    assert done.returncode == 0, done.stderr
    expected = ivr.load(chat_folder, quant="int4").chat("Hello world", max_new_tokens=6)
    assert done.stdout.strip() == expected
    plan = run("info", "--plan", chat_folder, "--quant", "int8").stdout
    assert "bfloat16+int8" in plan.splitlines()[1]


def test_ops_lists_the_catalogue():
    done = run("ops")
    for name in ivr.ops.catalogue():
        assert name in done.stdout


def test_bench_writes_json(tmp_path):
    out = tmp_path / "rows.json"
    done = run("bench", "--op", "rms_norm", "--shape", "16x64", "--dtype", "f32", "--json", out)
    assert done.returncode == 0, done.stderr
    assert "rms_norm" in done.stdout
    assert json.loads(out.read_text())
