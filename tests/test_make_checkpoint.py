"""bench/make_checkpoint.py writes what the loader reads, in both layouts."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from internvl_rt.config import load_config
from internvl_rt.weights import Checkpoint, resolve

SCRIPT = Path(__file__).parents[1] / "bench" / "make_checkpoint.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_checkpoint", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def shape(script):
    return replace(script.SHAPES["tiny"], vocab=600)


def tensors(folder):
    checkpoint = Checkpoint(folder)
    found = resolve(checkpoint, load_config(folder))
    return {name: checkpoint.load(source).clone() for name, source in found.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_both_layouts_load_and_hold_the_same_values(script, shape, tmp_path, dtype):
    for layout in ("original", "hf"):
        script.make(tmp_path / layout, shape, layout=layout, dtype=dtype, shard_bytes=200_000)
    a, b = tensors(tmp_path / "original"), tensors(tmp_path / "hf")
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == dtype
        assert torch.equal(a[name], b[name]), name
    assert float(a["llm.0.norm1.weight"].float().mean()) == pytest.approx(1, abs=0.02)
    assert float(a["llm.embed.weight"].float().std()) == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(a["llm.0.qkv.weight"], a["llm.1.qkv.weight"])


def test_shards_are_read_by_the_formats_own_library(script, shape, tmp_path):
    total = script.make(tmp_path / "m", shape, shard_bytes=200_000)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in (tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 1
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == total
    seen = {}
    for file in files:
        with safe_open(tmp_path / "m" / file, "pt") as f:
            seen |= {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    assert seen.keys() == index["weight_map"].keys()
    assert sum(t.numel() * t.element_size() for t in seen.values()) == total
    assert all(bool(t.isfinite().all()) for t in seen.values())


def test_the_seed_decides(script, shape, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        script.make(tmp_path / name, shape, seed=seed, shard_bytes=200_000)
    a, b, c = (tensors(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not any(torch.equal(a[n], c[n]) for n in a)


def test_the_real_shape(script):
    """Number of parameters of InternVL3-1B as published: 938 million."""
    shape = script.SHAPES["internvl3-1b"]
    counts = [sum(t.numel for t in layout(shape)) for layout in (script.original, script.native)]
    assert counts[0] == counts[1]
    assert counts[0] == pytest.approx(938.2e6, rel=1e-3)
    config = script.original_config(shape, "bfloat16")["config.json"]
    assert config["system_message"] is None
    assert config["llm_config"]["rope_scaling"]["type"] == "dynamic"


def test_command_line(script, tmp_path, capsys):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    out = tmp_path / "out"
    command = [str(out), "--shape", "tiny", "--vocab", "64", "--text-layers", "1"]
    assert script.main([*command, "--tokenizer", str(tokenizer)]) == 0
    config = load_config(out)
    assert (config.text.num_layers, config.text.vocab_size) == (1, 64)
    assert (out / "tokenizer.json").read_text() == "{}"
    capsys.readouterr()
    for wrong, message in (
        (command, "is not empty"),
        ([str(tmp_path / "x"), "--vocab", "0"], "vocab is 0"),
        ([str(tmp_path / "x"), "--tokenizer", str(out / "none")], "none of"),
    ):
        assert script.main(wrong) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "x").exists()
