"""The scripts of bench/: peers compute what our ops compute, and whole models are compared."""

import importlib.util
import json
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from internvl_rt import _C, ops, selftest
from internvl_rt.ops.registry import Inputs, outputs_of

BENCH = Path(__file__).parents[1] / "bench"
OPENVINO = importlib.util.find_spec("openvino") is not None
LLAMACPP = all(map(importlib.util.find_spec, ("xllamacpp", "gguf")))


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    yield
    for name in ("peers", "ops", "make_checkpoint", "cpu", "accuracy"):
        sys.modules.pop(name, None)


def quick_cases():
    return [
        pytest.param(op, case, id=f"{op.name}-{case.name}")
        for op in ops.catalogue().values()
        for case in op.cases
        if not case.slow and torch.float32 in case.dtypes
    ]


def test_every_op_has_a_peer():
    from peers import PEERS

    assert set(PEERS) == set(ops.catalogue())


@pytest.mark.parametrize(("op", "case"), quick_cases())
def test_peers_do_the_same_work(op, case):
    from peers import OTHER_DRAWS, PEERS

    _, prepare = PEERS[op.name]
    call = prepare(**case.arguments(op.name, torch.float32))
    if call is None:
        assert not case.bench, "a real-model case has no peer"
        return
    arguments = case.arguments(op.name, torch.float32)
    expected = outputs_of(op.reference(**arguments))
    got = outputs_of(call())
    if op.name in OTHER_DRAWS and "temperature" in arguments:
        assert [(g.shape, g.dtype) for g in got] == [(e.shape, e.dtype) for e in expected]
        return
    for g, e in zip(got, expected[: len(expected) - len(op.mutates)], strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-4)


def test_a_product_of_groups_is_a_peer():
    import peers

    op = ops.catalogue()["grouped_linear"]
    prepare = peers.GPU_PEERS[op.name]["grouped_mm"]
    assert all(
        prepare(**c.arguments(op.name, torch.float32)) is None for c in op.cases if not c.slow
    )
    arguments = op.shaped(Inputs("groups", torch.bfloat16), (5, 4, 2, 48, 64))
    expected = op.reference(**arguments)
    torch.testing.assert_close(prepare(**arguments)(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("package", ["flashinfer", "liger_kernel"])
def test_packages_that_are_here_are_peers(package, monkeypatch):
    """Stand-ins with the packages' signatures: no package is needed to keep the calls right."""
    import peers

    stand_ins = {
        "flashinfer": {"single_prefill_with_kv_cache": _prefill},
        "flashinfer.norm": {"rmsnorm": lambda x, w, eps: F.rms_norm(x, w.shape, w, eps)},
        "flashinfer.activation": {"silu_and_mul": lambda x: _silu_and_mul(*x.chunk(2, -1))},
        "liger_kernel": {},
        "liger_kernel.ops.rms_norm": {"LigerRMSNormFunction": _Applied(_liger_rms_norm)},
        "liger_kernel.ops.layer_norm": {
            "LigerLayerNormFunction": _Applied(lambda x, w, b, e: F.layer_norm(x, w.shape, w, b, e))
        },
        "liger_kernel.ops.swiglu": {"LigerSiLUMulFunction": _Applied(_silu_and_mul)},
    }
    for name, members in stand_ins.items():
        module = types.ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: name == package or None)
    for name in peers.PACKAGES[package]:
        op, ran = ops.catalogue()[name], 0
        prepare = peers.slow_peers(name, compiler="eager")[package]
        for case in (c for c in op.cases if not c.slow and torch.float32 in c.dtypes):
            arguments = case.arguments(name, torch.float32)
            call = prepare(**arguments)
            if call is None or not all(t.numel() for t in outputs_of(op.reference(**arguments))):
                continue
            expected, *_ = outputs_of(op.reference(**arguments))
            torch.testing.assert_close(call(), expected, rtol=1e-4, atol=1e-4)
            ran += 1
        assert ran > 0, f"{package} takes no case of {name}"


class _Applied:
    def __init__(self, function):
        self.apply = function


def _silu_and_mul(gate, up):
    return F.silu(gate) * up


def _liger_rms_norm(x, weight, eps, offset, casting_mode, in_place):
    assert (offset, casting_mode, in_place) == (0.0, "llama", False)
    return F.rms_norm(x, weight.shape, weight, eps)


def _prefill(q, k, v, *, causal, sm_scale):
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    mask = torch.ones(q.shape[1], k.shape[1]).tril(k.shape[1] - q.shape[1]).bool()
    options = {"attn_mask": mask if causal else None, "scale": sm_scale, "enable_gqa": True}
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(0, 1)


def test_models_beside_transformers(tmp_path):
    """Both sides on one tiny checkpoint; they agree before they are timed."""
    import make_checkpoint

    shape = replace(make_checkpoint.SHAPES["tiny"], vocab=600)
    make_checkpoint.make(tmp_path / "model", shape, layout="hf")
    rows = ["vit-1", "prefill-320", "decode-8x320", "decode-320-int4", "preprocess-4k"]
    command = [sys.executable, str(BENCH / "cpu.py"), "--shape", "tiny", "--seconds", "0"]
    command += ["--rows", ",".join(rows), "--dtype", "f32"]
    command += ["--checkpoint", str(tmp_path / "model"), "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr + result.stdout
    written = json.loads((tmp_path / "cpu-tiny-float32.json").read_text())
    assert [row["row"] for row in written["rows"]] == rows
    for row in written["rows"]:
        assert row["ratio"] == row["peer"]["median"] / row["ours"]["median"]
        assert row["ours"]["min"] <= row["ours"]["median"] <= row["ours"]["max"]
        assert ("share" in row) == (row["row"] != "preprocess-4k")
        if "share" in row:
            assert row["floor"] > 0
        assert ("ratio_openvino" in row) == (OPENVINO and row["row"] in rows[:3])
        assert ("ratio_llamacpp" in row) == (LLAMACPP and row["row"] in rows[1:4])
    assert 0 < written["agreement"]["logits"] < 1e-3
    assert "sdpa attention" in written["peer"]
    assert ("llamacpp" in written) == ("logits, llamacpp" in written["agreement"]) == LLAMACPP


@pytest.mark.parametrize("side", ["openvino", "llamacpp"])
def test_a_third_side_has_its_columns(side):
    cpu = pytest.importorskip("cpu", reason="not run from the repository")
    samples = {"ours": [0.1, 0.2, 0.3], "peer": [0.4], side: [0.3]}
    rows = [cpu.summary("decode-8x320", samples, 0.05), cpu.summary("load", {"ours": [1.0]})]
    assert (rows[0]["ratio"], rows[0][f"ratio_{side}"]) == pytest.approx((2.0, 1.5))
    assert rows[0][side]["tokens_per_s"] == 8 / 0.3
    head, first, second = cpu.table(rows).splitlines()
    assert head.split()[-6:] == [side, "[min,", "max]", "ratio", "floor", "share"]
    assert first.split()[-4:] == ["1.50", "50.0", "ms", "25%"]
    assert head.index(side) + len(side) == first.index("300.0 ms") + len("300.0 ms")
    assert second == f"load{'':<13}{'1.00 s':>10} [1.00, 1.00]"
    assert side not in cpu.table(rows[1:])


def test_a_fourth_side_is_beside_the_third():
    cpu = pytest.importorskip("cpu", reason="not run from the repository")
    rows = [
        cpu.summary("vit-1", {"ours": [0.1], "peer": [0.4], "openvino": [0.3]}, 0.05),
        cpu.summary("decode-320-int4", {"ours": [0.1], "peer": [0.4], "llamacpp": [0.2]}, 0.05),
    ]
    head, first, second = cpu.table(rows).splitlines()
    for line, side, cell in ((first, "openvino", "300.0 ms"), (second, "llamacpp", "200.0 ms")):
        assert head.index(side) + len(side) == line.index(cell) + len(cell)
    assert first.index("50.0 ms") == second.index("50.0 ms")


def test_sides_take_part_in_the_rows_they_have():
    cpu = pytest.importorskip("cpu", reason="not run from the repository")
    for row, left_out in (
        ("vit-4", {"packed", "llamacpp"}),
        ("prefill-320", set()),
        ("decode-8x320", set()),
        ("decode-320-int4", {"packed", "openvino"}),
        ("preprocess-4k", {"packed", "openvino", "llamacpp"}),
    ):
        assert cpu.taking_part(row, cpu.SIDES) == [s for s in cpu.SIDES if s not in left_out], row


@pytest.mark.parametrize("missing", ["openvino", "xllamacpp", "gguf"])
def test_a_side_is_there_where_all_of_its_packages_are(missing, monkeypatch):
    cpu = pytest.importorskip("cpu", reason="not run from the repository")
    monkeypatch.setattr(cpu.importlib.util, "find_spec", lambda name: name != missing or None)
    gone = "openvino" if missing == "openvino" else "llamacpp"
    assert cpu.available_sides() == [s for s in cpu.SIDES if s != gone]


@pytest.mark.parametrize(("side", "installed"), [("openvino", OPENVINO), ("llamacpp", LLAMACPP)])
def test_a_side_that_is_not_installed_is_refused(side, installed):
    if installed:
        pytest.skip(f"{side} is installed")
    command = [sys.executable, str(BENCH / "cpu.py"), "--sides", f"ours,{side}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].endswith(f"--sides: {side} is not installed")


@pytest.mark.skipif(not LLAMACPP, reason="xllamacpp and gguf are not installed")
@pytest.mark.parametrize(
    ("quant", "weights", "head", "bound"),
    [(None, "F32", "F32", 1e-3), ("int8", "Q8_0", "Q8_0", 0.02), ("int4", "Q4_0", "Q8_0", 0.15)],
)
def test_llamacpp_computes_the_same_model(tmp_path, quant, weights, head, bound):
    """All of the language model is in the file, and a step of several rows continues each."""
    import gguf

    import cpu
    import llamacpp_peer
    import make_checkpoint

    shape = replace(make_checkpoint.SHAPES["tiny"], vocab=600)
    make_checkpoint.make(tmp_path / "model", shape, layout="hf")
    file = tmp_path / "model.gguf"
    config = llamacpp_peer.write_gguf(file, tmp_path / "model", torch.float32, quant)
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(file).tensors}
    assert len(kinds) == 3 + 12 * shape.layers
    assert kinds["output.weight"] == kinds["token_embd.weight"] == head
    assert kinds["blk.1.attn_q.weight"] == kinds["blk.0.ffn_down.weight"] == weights
    assert kinds["blk.1.attn_q.bias"] == kinds["output_norm.weight"] == "F32"

    side = llamacpp_peer.LlamaCpp(file, config["vocab_size"], threads=2)
    peer = cpu.Transformers.load(tmp_path / "model", torch.float32, threads=2)
    ids = torch.randint(0, 600, (1, 40), generator=torch.Generator().manual_seed(5))
    expected, got = peer.logits(ids), side.logits(ids)
    assert (got - expected).norm() < bound * expected.norm()
    assert side.prefill(ids) == got.argmax(-1).tolist()
    context = side._context(2)
    rows = torch.stack((ids[0], ids[0].flip(0)))
    side._run(context, rows[:, :-1])
    for row, last in zip(rows, side._run(context, rows[:, -1:]), strict=True):
        torch.testing.assert_close(torch.from_numpy(last), side.logits(row[None])[0])


def test_cpu_refuses_what_it_does_not_know():
    command = [sys.executable, str(BENCH / "cpu.py"), "--rows", "vit-2"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2
    assert "'vit-2', allowed: vit-1" in result.stderr


@pytest.mark.skipif("avx2" not in _C.supported_isas(), reason="no AVX2 here")
def test_all_sides_are_held_to_an_instruction_set(tmp_path):
    import make_checkpoint

    shape = replace(make_checkpoint.SHAPES["tiny"], vocab=600)
    make_checkpoint.make(tmp_path / "model", shape, layout="hf")
    command = [sys.executable, str(BENCH / "cpu.py"), "--shape", "tiny", "--seconds", "0"]
    command += ["--rows", "prefill-320,load", "--isa", "avx2"]
    command += ["--checkpoint", str(tmp_path / "model"), "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr + result.stdout
    assert ("left out, cannot be held to avx2: openvino" in result.stderr) == OPENVINO
    written = json.loads((tmp_path / "cpu-tiny-bfloat16-avx2.json").read_text())
    assert (written["isa"], written["peer_isa"]) == ("avx2", "AVX2")
    assert [row["row"] for row in written["rows"]] == ["prefill-320", "load"]


def test_an_instruction_set_that_is_not_there_is_refused():
    command = [sys.executable, str(BENCH / "cpu.py"), "--isa", "avx9"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2
    assert "--isa: 'avx9', allowed: portable" in result.stderr


def test_quantised_weights_keep_the_demonstration_models_accuracy(tmp_path, monkeypatch, capsys):
    """The gate of bench/accuracy.py over the small set of `selftest`."""
    accuracy = pytest.importorskip("accuracy", reason="not run from the repository")
    asked = [
        accuracy.Question(entry["task"], [image], entry["question"], entry["answer"])
        for image, entry in selftest.questions()
    ]
    monkeypatch.setattr(accuracy, "SETS", {"selftest": lambda count: asked[:count]})
    # One answer of 32 is three points.
    monkeypatch.setattr(accuracy, "GATE", {"int8": 3.2, "int4": 3.2})
    out = tmp_path / "accuracy.json"
    command = ["--sets", "selftest", "--runs", "bf16:native,int8:native,int4:native"]
    assert accuracy.main([*command, "--count", "32", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["run"] for row in rows] == command[-1].split(",")
    assert rows[0]["different"] == 0
    assert rows[0]["accuracy"]["all"] > 75
    monkeypatch.setattr(accuracy, "GATE", {"int8": -1.0})
    capsys.readouterr()
    assert accuracy.main([*command[:3], "bf16:native,int8:native", "--count", "5"]) == 1
    assert "selftest int8: 0.0 points lost, allowed: -1.0" in capsys.readouterr().out
