"""The engine's laws: bit-equality, fault containment, pages that come back."""

import itertools
import os
import signal
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import internvl_rt as ivr
from internvl_rt import _C, ops
from internvl_rt.engine import Engine
from internvl_rt.runtime import runner
from internvl_rt.runtime.batch import Chunk, make_batch
from internvl_rt.runtime.kv_cache import PAGE_SIZE, KvCache
from internvl_rt.runtime.platform import CpuPlatform
from internvl_rt.runtime.request import Request, SamplingParams
from isas import ISAS
from test_golden import GOLDEN

CASE = "internvl3-qwen2_5"
# Packed weights and rotary angles that change within the lengths below: at 192 and at 96 tokens.
FAMILIES = (
    "internvl2-internlm2",
    "internvl2-phi3",
    "internvl3_5-qwen3",
    "internvl3_5-qwen3moe",
    "internvl3_5-gptoss",
    "chat-v1_1-llama",
)
IMAGE = 595
# Prompts that end inside, at, and beyond a 256-key chunk of attention.
LENGTHS = (1, 5, 64, 255, 256, 257, 360)


def prompt(n, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + n)
    return torch.randint(0, 590, (n,), generator=generator)


def with_picture(n, tiles, seed=0):
    ids = prompt(n, seed)
    ids[3 : 3 + 4 * tiles] = IMAGE
    generator = torch.Generator().manual_seed(seed)
    return ids, torch.randn(tiles, 3, 56, 56, generator=generator)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(request):
    return ivr.load(GOLDEN / CASE, dtype=request.param, image_token_id=IMAGE)


def padded(rows):
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for b, row in enumerate(rows):
        ids[b, longest - len(row) :] = row
        mask[b, longest - len(row) :] = 1
    return ids, mask


@pytest.mark.parametrize("isa", ISAS)
def test_logits_do_not_depend_on_the_batch(model, isa):
    _C.force_isa(isa)
    try:
        rows = [prompt(n) for n in LENGTHS]
        pictures = []
        for i, (n, tiles) in enumerate(((30, 2), (90, 5))):
            ids, pixels = with_picture(n, tiles, seed=i + 1)
            rows.append(ids)
            pictures.append(pixels)
        ids, mask = padded(rows)
        together = model.forward(ids, torch.cat(pictures), attention_mask=mask)
        for b, row in enumerate(rows):
            pixels = pictures[b - len(LENGTHS)] if b >= len(LENGTHS) else None
            alone = model.forward(row[None], pixels)[0]
            assert torch.equal(together[b, mask[b].bool()], alone), f"row {b} of {len(row)} tokens"
    finally:
        _C.force_isa("")


@pytest.mark.parametrize("chunk", [1, 3, 64, 100, 256])
def test_logits_do_not_depend_on_the_prefill_chunk(model, chunk):
    assert_chunks_agree(model, prompt(300), chunk)


def assert_chunks_agree(model, ids, chunk):
    whole = model.forward(ids[None])[0]
    decoder, text = model._core.decoder, model.config.text
    pages = KvCache.pages_for(len(ids))
    cache = KvCache(text, pages + 3, model.dtype)
    for tensor in (*cache.k, *cache.v):
        tensor.fill_(float("nan"))  # what is not written must not be read
    table = torch.randperm(pages + 3)[:pages]
    parts = []
    for start in range(0, len(ids), chunk):
        step = Chunk(ids[start : start + chunk], start, table, "all", rope_len=len(ids))
        parts.append(decoder(make_batch([step], decoder.rotary), cache))
    assert torch.equal(torch.cat(parts), whole)


def test_tokens_do_not_depend_on_batch_chunk_or_threads(model):
    rows = [prompt(n, seed=7) for n in LENGTHS]
    ids, mask = padded(rows)
    settings = {"max_new_tokens": 12, "eos_token_id": -1}
    sampled = settings | {"temperature": 1.0, "top_p": 0.9}
    alone = [model.generate(r[None], **settings)[0] for r in rows]
    alone_sampled = [model.generate(r[None], seed=5 + b, **sampled)[0] for b, r in enumerate(rows)]
    assert model.generate(ids, attention_mask=mask, **settings) == alone
    assert model.generate(ids, attention_mask=mask, seed=5, **sampled) == alone_sampled
    assert alone != alone_sampled
    threads = ivr.num_threads()
    try:
        for n in (1, 2, 3):
            ivr.set_num_threads(n)
            assert model.generate(ids, attention_mask=mask, **settings) == alone
    finally:
        ivr.set_num_threads(threads)
    for chunk in (1, 7, 130):
        other = ivr.load(model.folder, dtype=model.dtype, prefill_chunk=chunk)
        assert other.generate(ids, attention_mask=mask, **settings) == alone


@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_family_keeps_the_laws(case, dtype):
    """Prompts and answers within, across and beyond the limits of the rotary angles."""
    model = ivr.load(GOLDEN / case, dtype=dtype, prefill_chunk=50)
    rows = [prompt(n, seed=2) for n in (5, 90, 187, 250)]
    ids, mask = padded(rows)
    settings = {"max_new_tokens": 8, "eos_token_id": -1}
    alone = [model.generate(r[None], **settings)[0] for r in rows]
    assert model.generate(ids, attention_mask=mask, **settings) == alone
    other = ivr.load(GOLDEN / case, dtype=dtype, prefill_chunk=512)
    assert other.generate(ids, attention_mask=mask, **settings) == alone
    together = model.forward(ids, attention_mask=mask)
    for b, row in enumerate(rows):
        assert torch.equal(together[b, mask[b].bool()], model.forward(row[None])[0])
    assert_chunks_agree(model, rows[3], 70)


class KernelsAlone(TorchDispatchMode):
    """Refuses what a tape would miss: all that torch does but views and empty tensors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returns = func._schema.returns
        views = returns and all(r.alias_info and not r.alias_info.is_write for r in returns)
        assert views or "empty" in func._schema.name, f"{func} in captured work"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", [CASE, *FAMILIES])
def test_replayed_steps_give_the_tokens_of_steps_that_are_not(case, monkeypatch):
    """Alone and in a batch, greedy, sampled and penalised, on a page table that has to grow."""
    model = ivr.load(GOLDEN / case, dtype="bfloat16", quant="int8" if case == CASE else None)
    capture, captured = CpuPlatform.capture, []

    def strict(platform, work):
        def alone():
            with KernelsAlone():
                return work()

        captured.append(capture(platform, alone))
        return captured[-1]

    def answers():
        ids, mask = padded([prompt(n, seed=4) for n in (5, 60, 130)])
        settings = {"max_new_tokens": 8, "eos_token_id": -1}
        sampled = settings | {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "seed": 3}
        careful = sampled | {"eos_token_id": 3, "min_new_tokens": 4, "repetition_penalty": 1.5}
        return [
            model.generate(*rows, **options)
            for rows in ((ids, None, None, mask), (prompt(60, seed=4)[None],))
            for options in (settings, sampled, careful)
        ]

    monkeypatch.setattr(CpuPlatform, "capture", strict)
    monkeypatch.setattr(runner, "FIRST_TABLE", 1)
    with monkeypatch.context() as patch:
        patch.setattr(CpuPlatform, "decode_graphs", (0,))
        eager = answers()
    assert not captured
    assert answers() == eager
    assert len(captured) == 3  # three rows; one, and one with more pages
    assert answers() == eager
    assert len(captured) == 3


def test_captured_calls_are_made_when_they_are_replayed():
    x, weight, out = torch.randn(3, 64), torch.randn(64), torch.full((3, 64), float("nan"))
    expected = ops.rms_norm(x, weight, eps=1e-6)

    def work():
        return ops.rms_norm(ops.rms_norm(x, weight, eps=1e-6), weight, eps=1e-6, out=out)

    tape = CpuPlatform().capture(work)
    assert tape.outputs is out
    assert bool(out.isnan().all())
    torch.full((3, 64), 7.0)  # the first norm's result is nobody else's memory
    tape.replay()
    assert torch.equal(out, ops.rms_norm(expected, weight, eps=1e-6))
    x.mul_(-3)
    tape.replay()
    assert torch.equal(out, work())

    def wrong():
        ops.rms_norm(x, weight[:5], eps=1e-6, out=out)

    with pytest.raises(ValueError, match=r"^rms_norm: weight has shape"):
        CpuPlatform().capture(wrong).replay()
    with pytest.raises(ZeroDivisionError):
        CpuPlatform().capture(lambda: 1 / 0)
    assert torch.equal(ops.rms_norm(x, weight, eps=1e-6), ops.rms_norm(x, weight, eps=1e-6))


@pytest.mark.parametrize("case", ["internvl2-internlm2", "internvl2-phi3"])
def test_cached_keys_keep_the_rotation_they_were_written_with(case):
    """Beyond the limit an answer is not what a prefill of the same tokens would give."""
    model = ivr.load(GOLDEN / case, dtype="float32")
    limit = model.config.text.max_position_embeddings
    scaling = model.config.text.rope_scaling
    limit = scaling.original_max_position_embeddings or limit
    ids = prompt(limit - 4)
    new = model.generate(ids[None], max_new_tokens=12, eos_token_id=-1)[0]
    both = torch.cat((ids, torch.tensor(new[:-1])))
    text, pages = model.config.text, KvCache.pages_for(len(both))
    cache = KvCache(text, pages, model.dtype)
    table = torch.arange(pages)
    cuts = [0, *range(len(ids), len(both) + 1)]
    steps = [Chunk(both[a:b], a, table, "last") for a, b in itertools.pairwise(cuts)]
    stepped = [model._core.run([s], cache)[0] for s in steps]
    assert [int(row.argmax()) for row in stepped] == new
    whole = model.forward(both[None])[0]
    assert torch.equal(stepped[0], model.forward(ids[None])[0, -1])
    assert not torch.allclose(stepped[-1], whole[-1], atol=1e-3)


def test_forward_and_generate_agree(model):
    ids = prompt(50, seed=3)
    new = model.generate(ids[None], max_new_tokens=8, eos_token_id=-1)[0]
    both = torch.cat((ids, torch.tensor(new)))
    assert model.forward(both[None])[0, 49:-1].argmax(-1).tolist() == new


@pytest.fixture
def engine(model):
    return Engine(model._core, kv_tokens=6 * PAGE_SIZE)


def request(n=5, seed=0, **options):
    return Request(prompt(n, seed).tolist(), SamplingParams(**{"max_new_tokens": 4} | options))


def test_pages_come_back_and_requests_wait_for_them(engine):
    capacity = engine.cache.capacity
    # Each needs two of six pages: at most three run at a time.
    requests = [request(100, seed=i) for i in range(8)]
    for r in requests:
        engine.submit(r)
    engine.run(requests)
    assert [r.finish_reason for r in requests] == ["length"] * 8
    assert engine.free_pages == capacity
    alone = request(100, seed=5)
    engine.submit(alone)
    engine.run([alone])
    assert alone.tokens == requests[5].tokens


def test_a_closed_stream_gives_its_pages_back(engine):
    capacity = engine.cache.capacity
    r = request(10, max_new_tokens=100)
    engine.submit(r)
    stream = engine.stream(r)
    next(stream)
    assert engine.free_pages < capacity
    stream.close()
    assert r.finish_reason == "cancelled"
    assert engine.free_pages == capacity


def test_cancelling_before_the_start(engine):
    r, other = request(), request(seed=1)
    engine.submit(r)
    engine.submit(other)
    engine.cancel(r)
    engine.run([r, other])
    assert (r.finish_reason, r.tokens) == ("cancelled", [])
    assert other.finish_reason == "length"


def test_a_prompt_that_can_never_fit_is_refused(engine):
    with pytest.raises(ValueError, match=r"the prompt has 384 tokens, the context 384"):
        engine.submit(request(6 * PAGE_SIZE))
    with pytest.raises(ValueError, match="the prompt is empty"):
        engine.submit(request(0))
    with pytest.raises(ValueError, match="the prompt is empty"):
        engine.submit(request(), request(0))
    late = request()
    engine.submit(late)
    engine.run([late])
    assert engine._requests == [late]  # nothing else was queued


def test_the_context_bounds_the_answer(engine):
    r = request(6 * PAGE_SIZE - 3, max_new_tokens=100)
    engine.submit(r)
    engine.run([r])
    assert r.finish_reason == "length"
    assert len(r.tokens) == 3


def test_a_bad_picture_fails_only_its_own_request(engine):
    ids, pixels = with_picture(20, 1)
    bad = Request(
        ids.tolist(),
        SamplingParams(max_new_tokens=4),
        pixels=pixels.fill_(float("nan")),
        image_positions=range(3, 7),
    )
    good = request(20)
    for r in (bad, good):
        engine.submit(r)
    engine.run([bad, good])
    assert bad.finish_reason == "error"
    assert "NaN" in str(bad.error)
    assert good.finish_reason == "length"
    assert engine.free_pages == engine.cache.capacity
    with pytest.raises(ValueError, match="NaN"):
        list(engine.stream(bad))


def test_an_error_in_a_callback_fails_only_its_own_request(engine):
    def explode(token):
        raise RuntimeError("no")

    bad, good = request(), request(seed=1)
    bad.on_token = explode
    for r in (bad, good):
        engine.submit(r)
    engine.run([bad, good])
    assert (bad.finish_reason, good.finish_reason) == ("error", "length")


def test_stop_ids_and_min_new_tokens(engine):
    plain = request(max_new_tokens=10)
    engine.submit(plain)
    engine.run([plain])
    stop = plain.tokens[2]
    at = plain.tokens.index(stop)
    r = request(max_new_tokens=10, stop_ids=frozenset([stop]))
    engine.submit(r)
    engine.run([r])
    assert r.tokens == plain.tokens[: at + 1]
    assert r.finish_reason == "stop"
    later = request(max_new_tokens=10, min_new_tokens=10, stop_ids=frozenset([stop]))
    engine.submit(later)
    engine.run([later])
    assert len(later.tokens) == 10
    assert stop not in later.tokens


def test_threads_share_the_engine(model):
    rows = [prompt(20 + i, seed=i) for i in range(6)]
    expected = [model.generate(r[None], max_new_tokens=8, eos_token_id=-1)[0] for r in rows]
    results = [None] * len(rows)

    def work(i):
        results[i] = model.generate(rows[i][None], max_new_tokens=8, eos_token_id=-1)[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(rows))]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert results == expected


def test_a_forked_child_computes(model):
    ids = prompt(70)[None]
    expected = model.forward(ids)
    child = os.fork()
    if child == 0:
        # Leave without pytest's teardown, whatever happens, and in a minute at the latest.
        code = 1
        signal.alarm(60)
        torch.set_num_threads(1)  # torch's OpenMP threads do not survive a fork; ours are remade
        try:
            code = 0 if torch.equal(model.forward(ids), expected) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
