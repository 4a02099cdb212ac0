"""Ctrl-C in the thread that runs a step, wherever Python lets it in: others do not notice."""

import collections
import contextlib
import dis
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

import internvl_rt as ivr
from internvl_rt.engine import Engine
from internvl_rt.model import _Question
from internvl_rt.runtime.kv_cache import PAGE_SIZE
from internvl_rt.runtime.platform import CpuPlatform
from internvl_rt.runtime.request import Request, SamplingParams
from internvl_rt.runtime.runner import Part, _DecodeGraph
from test_chat import picture

# Where CPython looks for signals: as a function or a turn of a loop begins, and after a call.
CHECKS = {"RESUME", "JUMP_BACKWARD", "CALL", "CALL_KW", "CALL_FUNCTION_EX"}
MODULES = (
    "engine",
    "model",
    "prompt",
    "runtime.kv_cache",
    "runtime.request",
    "runtime.runner",
    "tokenizer",
)
OCCURRENCES = 3  # of one place in a run: for other requests, and in other steps
COMMON = {"system": "", "seed": 3}
QUESTIONS = (
    {"question": "Hello", "max_new_tokens": 4},
    {"question": "Hello", "images": picture(), "max_new_tokens": 9, "stop": ["xyz", "\ufffd"]},
    {"question": "world", "max_new_tokens": 5, "temperature": 1.0, "repetition_penalty": 1.3},
    {"question": "This one waits for pages.", "max_new_tokens": 2},
)


class Interrupt:
    """Ctrl-C in what runs within, at the next place where it has not come yet, if there is one."""

    def __init__(self):
        modules = [sys.modules[f"internvl_rt.{name}"] for name in MODULES]
        self._files = {module.__file__ for module in (*modules, contextlib)}
        self._tried = set()
        self.place = None

    @property
    def tried(self):
        return len(self._tried)

    def __enter__(self):
        self._seen = collections.Counter()
        sys.settrace(self._enter)

    def __exit__(self, *error):
        sys.settrace(None)

    def _enter(self, frame, event, argument):
        if frame.f_code.co_filename not in self._files:
            return None
        before = None

        def step(frame, event, argument):
            nonlocal before
            if event != "opcode":
                return step
            code, at = frame.f_code, frame.f_lasti
            if before in CHECKS:
                self._reach(code, at)
            before = dis.opname[code.co_code[at]]
            return step

        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return step

    def _reach(self, code, at):
        self._seen[code, at] += 1
        place = code, at, self._seen[code, at]
        if self._seen[code, at] <= OCCURRENCES and place not in self._tried:
            self._tried.add(place)
            self.place = place
            raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def one_thread():
    """torch's pool makes many small steps wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class LockedPlatform(CpuPlatform):
    """The CPU with a lock and a scope as a GPU has them."""

    def __init__(self):
        self.lock = threading.RLock()

    @contextlib.contextmanager
    def scope(self):
        yield


def drive(engine, requests):
    """In another thread: Ctrl-C has left it no lock that the engine needs."""
    thread = threading.Thread(target=engine.run, args=(requests,), daemon=True)
    thread.start()
    thread.join(60)
    assert all(r.finished for r in requests)


def test_an_interrupt_ends_one_request_and_leaves_the_others_as_they_are(chat_folder, monkeypatch):
    monkeypatch.setattr("internvl_rt.model.platform_for", lambda name: LockedPlatform())
    model = ivr.load(chat_folder, dtype="float32")
    engine = Engine(model._core, kv_tokens=5 * PAGE_SIZE, prefill_chunk=64)

    def ask():
        turns = [model._turn(_Question(**COMMON | asked)) for asked in QUESTIONS]
        engine.submit(*(t.request for t in turns))
        return turns, [t.request for t in turns]

    def results(turns):
        return [(t.request.tokens, t.answer(), t.request.finish_reason) for t in turns]

    turns, requests = ask()
    drive(engine, requests)
    expected = results(turns)
    assert [reason for *_, reason in expected] == ["length", "stop", "length", "length"]

    interrupt = Interrupt()
    kept = []  # exceptions, whose tracebacks keep alive what was going on
    came = True
    while came:
        turns, (mine, *others) = ask()
        with interrupt:
            try:
                engine.run([mine])
                came = False
            except KeyboardInterrupt as error:
                kept.append(error)
        drive(engine, others)
        assert results(turns[1:]) == expected[1:], interrupt.place
        engine.run([mine])  # which is alive where Ctrl-C came before it was cancelled
        assert engine.free_pages == engine.cache.capacity, interrupt.place
    assert interrupt.tried > 300
    assert results(turns[:1]) == expected[:1]


def test_a_row_that_was_left_half_written_is_nobodys(chat_folder):
    model = ivr.load(chat_folder, dtype="float32")
    request = Request([1, 2, 3], SamplingParams())
    request.tokens, request.pages = [4], torch.tensor([2])
    graph = _DecodeGraph(model._core, model.engine.cache, 1, 16)
    parts = [Part(request, 3, 1)]
    graph(parts)
    expected = {name: x.clone() for name, x in graph._mirror.host.items()}

    half = SimpleNamespace(pages=torch.tensor([1]), params=SimpleNamespace(temperature=1.0))
    with pytest.raises(AttributeError):
        graph._seat(0, half)
    graph(parts)
    for name, x in graph._mirror.host.items():
        assert torch.equal(x, expected[name]), name
