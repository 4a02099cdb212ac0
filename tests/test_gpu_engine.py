"""The engine on a GPU: on tests/fake_cuda.py, whose kernels are the emulated ones, and on a real
one where there is one."""

import json

import pytest
import torch

import fake_cuda
import internvl_rt as ivr
from fake_cuda import FakeCuda
from internvl_rt import _C
from internvl_rt.config import load_config
from internvl_rt.engine import Engine
from internvl_rt.models.internvl import InternVL, micro_batches
from internvl_rt.ops import OpSet
from internvl_rt.ops.registry import missing
from internvl_rt.runtime import runner
from internvl_rt.runtime.platform import CPU, out_of_memory, platform_for
from internvl_rt.runtime.request import Request, SamplingParams
from test_engine import padded, prompt, with_picture
from test_golden import GOLDEN, assert_close, assert_logits_close, bf16, fp32, golden

CASE = "internvl3-qwen2_5"
IMAGE = 595
# A case of each kind of decoder, and what of it runs here.
SUBCASES = (
    (CASE, "image1", "float32"),
    (CASE, "image1", "bfloat16"),
    ("chat-v1_1-llama", "image1", "float32"),
    ("internvl2-internlm2", "text", "float32"),
    ("internvl2-phi3", "text", "float32"),
    ("internvl3_5-qwen3", "text", "bfloat16"),
    ("internvl3_5-qwen3moe", "text", "float32"),
    ("internvl3_5-gptoss", "text", "float32"),
)


@pytest.fixture
def fake(monkeypatch, emulator):
    """Makes every device name that of a fake GPU, and returns it."""
    fake_cuda.install(monkeypatch, emulator)
    platform = FakeCuda()
    monkeypatch.setattr("internvl_rt.model.platform_for", lambda name: platform)
    return platform


GPU = pytest.mark.skipif(missing("cuda") is not None, reason=str(missing("cuda")))


@pytest.fixture(params=["fake", pytest.param("on_gpu", marks=GPU)])
def device(request):
    """A fake GPU, or the real one."""
    return request.getfixturevalue("fake") if request.param == "fake" else platform_for("cuda")


def load(case=CASE, dtype="float32", **options):
    return ivr.load(GOLDEN / case, device="cuda", dtype=dtype, image_token_id=IMAGE, **options)


@pytest.mark.parametrize(("case", "sub", "dtype"), SUBCASES)
def test_whole_models_keep_the_tolerance(case, sub, dtype, device):
    check_golden(load(case, dtype), case, sub)


@GPU
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sub", ["dyn", "batch"])
@pytest.mark.parametrize("backend", ["native", "triton", "reference"])
def test_larger_cases_on_gpu(backend, sub, dtype):
    check_golden(load(dtype=dtype, backend=backend), CASE, sub)


def check_golden(model, case, sub):
    g = golden(case)
    inputs, own = g.inputs(sub), g.meta["subcases"][sub]["bf16_vs_fp32"]
    wide = model.dtype == torch.float32
    if inputs["pixel_values"] is not None:
        law = fp32 if wide else bf16(own["vit_features_max_abs"])
        features = model.encode_images(inputs["pixel_values"])
        assert features.is_cuda
        assert_close("features", features.cpu(), g[f"{sub}.vit_features"], law=law)
    logits = model.forward(**inputs).cpu()
    assert_logits_close(logits, g, sub, law=fp32 if wide else bf16(own["max_abs"]))
    if wide:
        ids = model.generate(**inputs, max_new_tokens=3, eos_token_id=-1)
        assert ids == g[f"{sub}.gen_ids"][:, :3].tolist()


def test_tokens_do_not_depend_on_company_chunks_or_tables(device, monkeypatch):
    monkeypatch.setattr(runner, "FIRST_TABLE", 1)
    alone, together = load(prefill_chunk=25), load(prefill_chunk=100)
    # 62 tokens and the answer cross into a second page: a wider table.
    assert_company_is_nothing(alone, together, (5, 62, 20), max_new_tokens=4, eos_token_id=-1)
    assert {key[1:] for key in together.engine._runner._graphs} == {(4, 1), (4, 4)}


def test_sampled_tokens_do_not_depend_on_company(device):
    model = load(dtype="bfloat16")
    sampled = {"max_new_tokens": 3, "temperature": 1.0, "top_p": 0.9, "top_k": 50}
    assert_company_is_nothing(model, model, (5, 3), eos_token_id=-1, **sampled)
    careful = {"eos_token_id": 3, "min_new_tokens": 3, "repetition_penalty": 1.5}
    assert_company_is_nothing(model, model, (5, 3), **sampled, **careful)


def assert_company_is_nothing(alone, together, lengths, **options):
    rows = [prompt(n, seed=7) for n in lengths]
    ids, mask = padded(rows)
    expected = [alone.generate(r[None], seed=5 + b, **options)[0] for b, r in enumerate(rows)]
    assert together.generate(ids, attention_mask=mask, seed=5, **options) == expected


def test_logits_and_features_do_not_depend_on_company(device):
    model = load(dtype="bfloat16")
    ids, pixels = with_picture(20, 3, seed=1)
    other, more = with_picture(15, 2, seed=2)
    batch, mask = padded([ids, other])
    together = model.forward(batch, torch.cat((pixels, more)), attention_mask=mask).cpu()
    assert torch.equal(together[0, mask[0].bool()], model.forward(ids[None], pixels)[0].cpu())
    assert torch.equal(together[1, mask[1].bool()], model.forward(other[None], more)[0].cpu())
    features = model.encode_images(torch.cat((pixels, more))).cpu()
    assert torch.equal(features[3:], model.encode_images(more).cpu())


def test_graphs_change_no_bit(device):
    """Where this fails and the others' laws hold, look at capture and replay, not at kernels."""
    captured, eager = load(dtype="bfloat16"), load(dtype="bfloat16")
    eager._core.capturable = False
    text, (_, pixels) = prompt(9)[None], with_picture(20, 1)
    sampled = {"temperature": 1.0, "top_p": 0.9, "seed": 3, "eos_token_id": -1}
    tokens = [m.generate(text, max_new_tokens=4, **sampled) for m in (captured, eager)]
    assert tokens[0] == tokens[1]
    assert captured.engine._runner._graphs
    assert not eager.engine._runner._graphs
    features = [m.encode_images(pixels).cpu() for m in (captured, eager)]
    assert torch.equal(*features)


class Drawn:
    """Weights for any config, in the place of Parameters."""

    def __init__(self, weights, platform):
        self.platform, self._weights = platform, weights

    def __getitem__(self, name):
        return self.platform.load(self._weights[name])

    def table(self, name):
        return self[name]

    def pair(self, name):
        return self[f"{name}.weight"], self[f"{name}.bias"]

    def linear(self, name):
        weights, biases = self._weights.linear(name)
        load = self.platform.load
        return [load(w) for w in weights], None if biases is None else [load(b) for b in biases]


@pytest.fixture
def with_tensor_cores(tmp_path, monkeypatch):
    """make(platform, dtype, backend): a decoder of one layer with heads of 64, as real ones."""
    monkeypatch.syspath_prepend(str(GOLDEN.parents[1] / "bench"))
    from random_weights import RandomWeights

    source = json.loads((GOLDEN / "internvl3_5-qwen3" / "config.json").read_text())
    source["llm_config"] |= {"head_dim": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    source["llm_config"] |= {"num_key_value_heads": 1, "layer_types": ["full_attention"]}
    (tmp_path / "config.json").write_text(json.dumps(source))
    config = load_config(tmp_path)

    def make(platform, dtype, backend=None):
        with platform.lock, platform.scope():
            weights = Drawn(RandomWeights(config, dtype), platform)
            opset = OpSet(backend, device=platform.device.type)
            core = InternVL(config, weights, opset, dtype)
            return ivr.Model(tmp_path, config, core, Engine(core, kv_tokens=2048), IMAGE)

    return make


def test_heads_of_64_in_decode_steps(with_tensor_cores, device):
    """Keys beyond one split of the decode kernel, alone and in a batch."""
    model = with_tensor_cores(device, torch.bfloat16)
    rows = [prompt(n, seed=3) for n in (254, 7, 3)]
    settings = {"max_new_tokens": 4, "eos_token_id": -1}
    alone = [model.generate(r[None], **settings)[0] for r in rows]
    ids, mask = padded(rows)
    assert model.generate(ids, attention_mask=mask, **settings) == alone
    # What decode steps see is what a prefill of the same tokens sees, within the law.
    whole = torch.cat((rows[0], torch.tensor(alone[0])))[None]
    truth = with_tensor_cores(CPU, torch.float32, "reference").forward(whole)[0]
    same = with_tensor_cores(CPU, torch.bfloat16, "reference").forward(whole)[0]
    own = float((same - truth).abs().max())
    assert_close("logits", model.forward(whole)[0].cpu(), truth, law=bf16(own))
    for i, token in enumerate(alone[0]):
        row = truth[len(rows[0]) - 1 + i]
        assert float(row.max() - row[token]) <= 2 * bf16(own)(float(truth.std()))


def test_tiles_run_in_buckets_without_padding():
    sizes = FakeCuda.micro_batches
    for tiles in range(60):
        assert sum(micro_batches(tiles, sizes)) == tiles
    assert micro_batches(13, sizes) == [13]
    assert micro_batches(33, sizes) == [13, 13, 7]
    assert micro_batches(12, sizes) == [7, 4, 1]
    assert micro_batches(7, (4, 3, 2, 1)) == [4, 3]


def test_page_tables_have_few_widths():
    assert [runner.table_width(n, 1000) for n in (1, 16, 17, 64, 65)] == [16, 16, 64, 64, 256]
    assert runner.table_width(300, 400) == 400
    assert runner.table_width(3, 2) == 3


def test_a_decode_step_is_two_copies_one_wait_and_a_replay(fake):
    model, machine = load(), fake.machine
    requests = [Request(prompt(9, s).tolist(), SamplingParams(max_new_tokens=9)) for s in (1, 2)]
    for r in requests:
        model.engine.submit(r)
    stream = model.engine.stream(requests[0])
    for _ in range(2):
        next(stream)
    machine.launches.clear()
    before = machine.copies, machine.waits, machine.replays, machine.captures
    next(stream)
    after = machine.copies, machine.waits, machine.replays, machine.captures
    assert [a - b for a, b in zip(after, before, strict=True)] == [2, 1, 1, 0]
    assert machine.launches == []
    stream.close()


def test_a_prefill_step_is_one_copy_there(fake):
    model, machine = load(prefill_chunk=20), fake.machine
    request = Request(prompt(50).tolist(), SamplingParams(max_new_tokens=2, temperature=1.0))
    model.engine.submit(request)
    before = machine.copies, machine.waits
    next(model.engine.stream(request))
    # Three chunks, of which the last gives a token.
    assert (machine.copies - before[0], machine.waits - before[1]) == (4, 1)


def test_pictures_in_a_request(device):
    model = load()
    ids, pixels = with_picture(20, 1)
    positions = (ids == IMAGE).nonzero().flatten().tolist()
    expected = model.generate(ids[None], pixels, max_new_tokens=2, eos_token_id=-1)[0]
    params = SamplingParams(max_new_tokens=2)
    good = Request(ids.tolist(), params, pixels=pixels, image_positions=positions)
    bad = Request(ids.tolist(), params, pixels=pixels * torch.nan, image_positions=positions)
    for r in (good, bad):
        model.engine.submit(r)
    model.engine.run([good, bad])
    assert good.tokens == expected
    assert "the pictures gave NaN" in str(bad.error)


def test_the_reference_backend_runs_without_graphs(fake):
    fake.machine.reads = True
    check_golden(load(backend="reference"), CASE, "image1")
    assert fake.machine.captures == 0
    assert fake.machine.launches == []


def test_the_vision_tower_alone(device):
    g = golden("internvit-300m")
    model = ivr.load_vision(g.folder, device="cuda", dtype="float32")
    out = model(g["native.pixel_values"], output_hidden_states=True)
    assert_close("last", out.last_hidden_state.cpu(), g["native.last_hidden_state"], law=fp32)
    for i, state in enumerate(out.hidden_states[:-1]):
        assert_close(f"hidden {i}", state.cpu(), g[f"native.hidden_states.{i}"], law=fp32)


def test_memory_is_planned_and_bounded(fake):
    capacity = load().engine.cache.capacity
    assert load(kv_tokens=130).engine.cache.capacity == 3 < capacity
    with pytest.raises(ValueError, match="kv_tokens is 0, allowed: 64"):
        load(kv_tokens=0)
    fake.free = 1 << 20
    with pytest.raises(MemoryError, match=r"the model needs .* GiB .* are available"):
        load()


def test_a_full_device_is_one_line():
    cause = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has")
    error = out_of_memory(torch.device("cuda", 1), cause, 3 << 29)
    assert str(error) == "cuda:1 is out of memory: 20.00 MiB wanted, 1.50 GiB are free"


def test_what_a_gpu_does_not_run_is_one_line(fake, monkeypatch):
    with pytest.raises(ValueError, match="quant is 'int8', but device is 'cuda': on the CPU only"):
        load(quant="int8")
    opset = OpSet(device="cuda")
    opset.require("linear")
    monkeypatch.setitem(ivr.ops.catalogue(), "linear", _without_cuda("linear"))
    with pytest.raises(ValueError, match="linear: no CUDA kernel yet; available on a GPU: backend"):
        opset.require("rope", "linear")
    monkeypatch.setattr(_C, "has_cuda", False)
    with pytest.raises(ValueError, match="device is 'cuda:0', but this build has no CUDA kernels"):
        load()


def _without_cuda(name):
    import dataclasses

    op = ivr.ops.catalogue()[name]
    return dataclasses.replace(op, faces={k: v for k, v in op.faces.items() if k != "cuda"})


def test_device_names(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"^device is 'cuda:1', but there is no CUDA device; av"):
        platform_for("cuda:1")
    for name in ("gpu", "cuda:", "cuda:-1", "cuda:x", ""):
        with pytest.raises(ValueError, match=f"^device is '{name}', allowed: cpu, cuda, cuda:N"):
            platform_for(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"^device is 'cuda:2', available: cpu, cuda:0 to cuda:1$"):
        platform_for("cuda:2")
    assert platform_for("auto").device.type == "cpu"


# ---- the rules of the fake device can be broken -------------------------------------------------


def test_the_fake_device_refuses(fake):
    with fake.lock, fake.scope():
        x = torch.ones(4, device="cuda:0")
        with pytest.raises(AssertionError, match="reads a device's value"):
            bool(x[0])
        with pytest.raises(AssertionError, match="of the host and of the device"):
            x + torch.ones(4)
        with pytest.raises(AssertionError, match="pageable"):
            x.copy_(torch.ones(4), non_blocking=True)
        with pytest.raises(AssertionError, match="the host waits"):
            x.copy_(fake.pinned([4], torch.float32))
        with pytest.raises(AssertionError, match="in a graph"):
            fake.capture(lambda: fake.fetch(x))
        assert bool(torch.empty(3, device="cuda:0").inner.isnan().all())
        (there,) = fake.upload([torch.arange(3)])
        assert fake.fetch(there).tolist() == [0, 1, 2]
        staged = fake.pinned([4], torch.float32).zero_()
        x.copy_(staged, non_blocking=True)
        staged.fill_(1)
        with pytest.raises(AssertionError, match="changed under a copy"):
            fake.wait()
        fake.machine.in_flight.clear()
    with pytest.raises(AssertionError, match="outside a scope"):
        x + 1


def test_a_fake_graph_repeats_what_it_captured(fake):
    state = {"factor": 2.0}
    with fake.lock, fake.scope():
        x = torch.ones(3, device="cuda:0")
        graph = fake.capture(lambda: x * state["factor"] + torch.zeros(3, device="cuda:0"))
        assert bool(graph.outputs.inner.isnan().all())
        state["factor"] = 5.0
        x.fill_(3)
        graph.replay()
        assert fake.fetch(graph.outputs).tolist() == [6, 6, 6]
