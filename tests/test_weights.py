"""The safetensors reader against the format's own library, and the rename tables."""

import functools
import gc
import json
import os
import struct
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import fuzz
from internvl_rt import weights
from internvl_rt.config import load_config, load_vision_config
from internvl_rt.weights import (
    MAX_HEADER_BYTES,
    Checkpoint,
    Source,
    parse_header,
    read_header,
    resolve,
    resolve_vision,
)
from tiny_model import (
    FAMILIES,
    NATIVE_FAMILIES,
    native,
    native_tensors,
    original,
    original_tensors,
    original_vision,
    write_checkpoint,
    write_config,
)

DTYPES = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
DTYPES += [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def _bytes(header, payload=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload


def _entry(dtype="U8", shape=(4,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def _parse(data):
    return parse_header(data, len(data), "x.safetensors")


def _one_line(error):
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


def test_every_dtype_and_odd_shapes(tmp_path):
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for dtype in DTYPES:
        for shape in ((), (0,), (3,), (2, 0, 5), (1, 3, 2)):
            values = torch.randint(0, 100, shape, generator=generator)
            tensors[f"{dtype}{shape}"] = values.to(dtype)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"a": "b"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint = Checkpoint(tmp_path)
        assert set(checkpoint.names) == set(tensors)
        assert len(checkpoint) == len(tensors)
        for name, expected in tensors.items():
            actual = checkpoint[name]
            assert actual.dtype == expected.dtype == checkpoint.info(name).dtype
            assert actual.shape == expected.shape
            assert torch.equal(actual, expected)
    assert checkpoint.payload_bytes == sum(t.nbytes for t in tensors.values())
    with pytest.raises(KeyError, match="no tensor 'x'"):
        checkpoint["x"]


def test_header_of_odd_length(tmp_path):
    """Payloads need not be aligned; the tensors are."""
    values = np.arange(6, dtype="<f4")
    for spaces in range(8):
        header = json.dumps({"a": _entry("F32", (6,), (0, 24))}).encode() + b" " * spaces
        (tmp_path / "model.safetensors").write_bytes(_bytes(header, values.tobytes()))
        tensor = Checkpoint(tmp_path)["a"]
        assert tensor.data_ptr() % 4 == 0
        assert torch.equal(tensor, torch.arange(6, dtype=torch.float32))


def test_tensors_outlive_the_checkpoint_and_a_release(tmp_path):
    expected = torch.arange(1 << 16, dtype=torch.float32)
    save_file({"a": expected, "b": expected + 1}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    tensor = checkpoint["a"]
    assert tensor.data_ptr() == checkpoint["a"].data_ptr()  # a view, not a copy
    assert torch.equal(tensor, expected)
    checkpoint.release("a")
    checkpoint.release(Source(("a", "b"), (2 << 16,)))
    assert torch.equal(tensor, expected)
    del checkpoint
    gc.collect()
    assert torch.equal(tensor, expected)


def test_writing_cannot_reach_the_file(tmp_path):
    save_file({"a": torch.zeros(8)}, tmp_path / "model.safetensors")
    Checkpoint(tmp_path)["a"].fill_(1)
    assert torch.equal(Checkpoint(tmp_path)["a"], torch.zeros(8))


GOOD = {"__metadata__": {"format": "pt"}, "a": _entry(), "b": _entry("F32", (2, 1), (4, 12))}

LIES = [
    (b"", "too short"),
    (b"\0" * 7, "too short"),
    (struct.pack("<Q", 0), "does not begin with {"),
    (struct.pack("<Q", 1 << 63) + b"{}", "claims 9223372036854775808 bytes"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "a pointer of Git LFS, expected"),
    (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", "at most 100000000"),
    (struct.pack("<Q", 3) + b"{}", "claims 3 bytes, the file has 2"),
    (_bytes(b" {}"), "does not begin with {"),
    (_bytes(b"[]"), "does not begin with {"),
    (_bytes(b"{}{}"), "header: Extra data"),
    (_bytes(b'{"a\xff": 1}'), "header: not UTF-8"),
    (_bytes(b'{"\\ud800": %s}' % json.dumps(_entry()).encode(), b"1234"), "lone surrogate"),
    (_bytes(b'{"__metadata__": {"a": "\\udfff"}}'), "lone surrogate"),
    (_bytes(b'{"a": ' * 100000), "header: nested too deeply"),
    (_bytes(b'{"a": 1, "a": 1}'), "'a' appears twice"),
    (_bytes({"__metadata__": {"a": 1}}), "__metadata__ is not an object of strings"),
    (_bytes({"__metadata__": None}), "__metadata__ is not an object of strings"),
    (_bytes({"a": 1}), "expected dtype, shape and data_offsets"),
    (_bytes({"a": _entry() | {"x": 1}}, b"1234"), "expected dtype, shape and data_offsets"),
    (_bytes({"a": _entry("F8_E4M3")}, b"1234"), "dtype is 'F8_E4M3', supported: U8"),
    (_bytes({"a": _entry(["U8"])}, b"1234"), "dtype is"),
    (_bytes({"a": _entry(shape=[-1])}, b"1234"), "sizes of 0 or more"),
    (_bytes({"a": _entry(shape=[True, 4])}, b"1234"), "sizes of 0 or more"),
    (_bytes({"a": _entry(shape=[4.0])}, b"1234"), "sizes of 0 or more"),
    (_bytes({"a": _entry(shape=["4"])}, b"1234"), "sizes of 0 or more"),
    (_bytes(json.dumps({"a": _entry(shape=[0])}).replace("[0]", "[-0]").encode()), "sizes of 0"),
    (_bytes({"a": _entry(shape=[1] * 17)}, b"1"), "at most 16 sizes"),
    (_bytes({"a": _entry(shape=[1 << 32, 1 << 32])}, b"1234"), "too large"),
    (_bytes({"a": _entry(shape=[0, 1 << 62, 1 << 62], offsets=[0, 0])}), "too large"),
    (_bytes({"a": _entry(shape=[1 << 64])}, b"1234"), "sizes of 0 or more"),
    (_bytes({"a": _entry() | {"shape": 4}}, b"1234"), "shape is 4"),
    (_bytes({"a": _entry(offsets=[0])}, b"1234"), "expected two integers"),
    (_bytes({"a": _entry(offsets=[False, 4])}, b"1234"), "expected two integers"),
    (_bytes({"a": _entry(offsets=[4, 0])}, b"1234"), "payload has 4 bytes"),
    (_bytes({"a": _entry(offsets=[-4, 0])}, b"1234"), "payload has 4 bytes"),
    (_bytes({"a": _entry(offsets=[0, 5])}, b"1234"), "payload has 4 bytes"),
    (_bytes({"a": _entry(offsets=[0, 10**400])}, b"1234"), "integer of 401 digits"),
    (_bytes({"a": _entry(offsets=[0, 3])}, b"1234"), "3 bytes stored, U8 of shape"),
    (_bytes({"a": _entry("F32", (1,), (0, 4))}, b"123"), "payload has 3 bytes"),
    (_bytes({"a": _entry()}, b"12345"), "cover 4 of 5 bytes"),
    (_bytes({}, b"1"), "cover 0 of 1 bytes"),
    (_bytes({"a": _entry(offsets=[1, 5])}, b"12345"), "'a' leaves a hole"),
    (_bytes({"a": _entry(), "b": _entry(offsets=[3, 7])}, b"1234567"), "'b' overlaps"),
    (_bytes({"a": _entry(), "b": _entry()}, b"1234"), "overlaps"),
    (_bytes({"a": _entry(), "b": _entry(offsets=[5, 9])}, b"123456789"), "'b' leaves a hole"),
]


@pytest.mark.parametrize(("data", "match"), LIES, ids=range(len(LIES)))
def test_lying_headers(tmp_path, data, match):
    with pytest.raises(ValueError, match=match) as error:
        _parse(data)
    assert _one_line(error).startswith("x.safetensors: ")
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=match) as error:
        Checkpoint(tmp_path)
    assert _one_line(error).startswith("model.safetensors: ")


def test_truncated_files(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(4.0), "b": torch.arange(3.0)}, path)
    whole = path.read_bytes()
    assert set(read_header(path)) == {"a", "b"}
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"^model\.safetensors: ") as error:
            Checkpoint(tmp_path)
        _one_line(error)


def test_fuzz():
    assert fuzz.fuzz_headers(20_000, "test_weights")["accepted"] > 500


def test_fuzz_of_the_index():
    assert fuzz.fuzz_indexes(400, "test_weights")["accepted"] > 5


def test_the_fuzz_finds_a_reader_that_reads_elsewhere(monkeypatch):
    entry = weights._entry

    def shifted(*arguments):
        info = entry(*arguments)
        return replace(info, shape=info.shape[::-1])

    monkeypatch.setattr(weights, "_entry", shifted)
    with pytest.raises(AssertionError):
        fuzz.fuzz_headers(1, "planted")


def _shards(folder, tensors, files=("a.safetensors", "b.safetensors"), **changes):
    names = sorted(tensors)
    half = len(names) // 2
    parts = {files[0]: names[:half], files[1]: names[half:]}
    for file, part in parts.items():
        save_file({n: tensors[n] for n in part}, folder / file)
    weight_map = {n: file for file, part in parts.items() for n in part} | changes
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


TWO = {"x": torch.arange(3.0), "y": torch.arange(4.0), "z": torch.arange(5.0)}


def test_shards(tmp_path):
    checkpoint = Checkpoint(_shards(tmp_path, TWO))
    assert set(checkpoint) == set(TWO)
    assert all(torch.equal(checkpoint[n], t) for n, t in TWO.items())


@pytest.mark.parametrize(
    "file",
    [
        *("", ".", "..", "../a.safetensors", "/a.safetensors", "s\\a.safetensors"),
        *("a\0.safetensors", "sub/a.safetensors", "a.bin", "C:a.safetensors", "a\n.safetensors"),
        *(3, None, ["a"]),
    ],
)
def test_shard_names_are_plain_file_names(tmp_path, file):
    with pytest.raises(ValueError, match=r"'x' is in .*, expected a plain file name") as error:
        Checkpoint(_shards(tmp_path, TWO, x=file))
    _one_line(error)


def test_shards_and_index_disagree(tmp_path):
    _shards(tmp_path, TWO, new="a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors: 1 tensor \(new\) of model.*not in the"):
        Checkpoint(tmp_path)
    _shards(tmp_path, TWO, x="b.safetensors")
    with pytest.raises(ValueError, match=r"b\.safetensors: 1 tensor \(x\) of model"):
        Checkpoint(tmp_path)
    _shards(tmp_path, TWO)
    save_file({"x": TWO["x"], "more": TWO["y"]}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors: 1 tensor \(more\) not in model"):
        Checkpoint(tmp_path)
    os.unlink(tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError, match=r"a\.safetensors: no such file"):
        Checkpoint(tmp_path)
    for weight_map in (None, {}, [1]):
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
        with pytest.raises(ValueError, match="weight_map is"):
            Checkpoint(tmp_path)


def test_truncated_shard(tmp_path):
    _shards(tmp_path, TWO)
    data = (tmp_path / "b.safetensors").read_bytes()
    (tmp_path / "b.safetensors").write_bytes(data[:-1])
    with pytest.raises(ValueError, match=r"^b\.safetensors: tensor 'z': data_offsets"):
        Checkpoint(tmp_path)


def test_which_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        Checkpoint(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors or"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="only safetensors is read, found pytorch_model"):
        Checkpoint(tmp_path)
    with pytest.raises(NotADirectoryError, match="is a file, expected a checkpoint folder"):
        Checkpoint(tmp_path / "pytorch_model.bin")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert Checkpoint(tmp_path).names == ("a",)
    save_file({"b": torch.zeros(1)}, tmp_path / "another.safetensors")
    with pytest.raises(ValueError, match=r"2 \.safetensors files and no model"):
        Checkpoint(tmp_path)
    save_file({"c": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert Checkpoint(tmp_path).names == ("c",)
    _shards(tmp_path, TWO)
    with pytest.raises(ValueError, match="has both"):
        Checkpoint(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(OSError, match="not a regular file"):
        Checkpoint(tmp_path)


def _layouts(family):
    named = functools.partial
    layouts = {"original": (named(original, family), named(original_tensors, family))}
    if family in NATIVE_FAMILIES:
        for layout, newer in (("native-a", False), ("native-b", True)):
            tensors = named(native_tensors, family, newer=newer)
            layouts[layout] = (named(native, family), tensors)
    return layouts


LAYOUTS = _layouts("qwen2")
OTHERS = {f"{f}-{n}": pair for f in FAMILIES if f != "qwen2" for n, pair in _layouts(f).items()}
EVERY = LAYOUTS | OTHERS


def _new(layout, tensors):
    """Names that a layout does not share with qwen2's: what stands in a decoder's first layer."""
    return [n for n in tensors if layout in LAYOUTS or ("layers.0." in n and "vision" not in n)]


def _is_head(name):
    return name in ("lm_head.weight", "language_model.lm_head.weight") or "model.output" in name


def _resolve(folder, config, tensors):
    write_checkpoint(folder, config, tensors)
    checkpoint = Checkpoint(folder)
    return checkpoint, resolve(checkpoint, load_config(folder))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_layouts_give_the_same_model(tmp_path, dtype):
    loaded = {}
    for layout, (config, tensors) in LAYOUTS.items():
        checkpoint, sources = _resolve(tmp_path / layout, config(), tensors(dtype=dtype))
        loaded[layout] = {name: checkpoint.load(source) for name, source in sources.items()}
        for name, tensor in loaded[layout].items():
            assert tensor.shape == sources[name].shape
            assert tensor.dtype == dtype
    first = loaded["original"]
    expected = original_tensors(dtype=dtype)
    assert torch.equal(first["vit.1.qkv.weight"], expected[_VIT1 + "attn.qkv.weight"])
    assert torch.equal(first["llm.1.down.weight"], expected[_LLM1 + "mlp.down_proj.weight"])
    assert torch.equal(first["proj.fc2.bias"], expected["mlp1.3.bias"])
    # q, k and v, and gate and up, are one tensor of the model each: in two layers 6, and 2 biases.
    assert len(first) == len(expected) - 2 * (2 + 2 + 1)
    for other in ("native-a", "native-b"):
        assert set(loaded[other]) == set(first)
        assert all(torch.equal(loaded[other][n], t) for n, t in first.items())


_VIT1 = "vision_model.encoder.layers.1."
_LLM1 = "language_model.model.layers.1."

INTERNAL = [
    "vit.cls",
    "vit.pos",
    "vit.patch.weight",
    "vit.patch.bias",
    "vit.0.norm1.weight",
    "vit.0.norm1.bias",
    "vit.0.qkv.weight",
    "vit.0.qkv.bias",
    "vit.0.proj.weight",
    "vit.0.proj.bias",
    "vit.0.ls1",
    "vit.0.norm2.weight",
    "vit.0.norm2.bias",
    "vit.0.fc1.weight",
    "vit.0.fc1.bias",
    "vit.0.fc2.weight",
    "vit.0.fc2.bias",
    "vit.0.ls2",
    "proj.ln.weight",
    "proj.ln.bias",
    "proj.fc1.weight",
    "proj.fc1.bias",
    "proj.fc2.weight",
    "proj.fc2.bias",
    "llm.embed.weight",
    "llm.norm.weight",
    "llm.head.weight",
    "llm.0.norm1.weight",
    "llm.0.qkv.weight",
    "llm.0.qkv.bias",
    "llm.0.o.weight",
    "llm.0.norm2.weight",
    "llm.0.gate_up.weight",
    "llm.0.down.weight",
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_internal_names(tmp_path, layout):
    config, tensors = LAYOUTS[layout]
    _, sources = _resolve(tmp_path, config(), tensors())
    second = [n.replace(".0.", ".1.") for n in INTERNAL if ".0." in n]
    assert set(sources) == {*INTERNAL, *second}


@pytest.mark.parametrize("layout", EVERY)
def test_tied_embeddings(tmp_path, layout):
    config, tensors = EVERY[layout]
    tensors = {n: t for n, t in tensors().items() if not _is_head(n)}
    checkpoint, sources = _resolve(tmp_path, config(), tensors)
    assert sources["llm.head.weight"] == sources["llm.embed.weight"]
    head = checkpoint.load(sources["llm.head.weight"])
    assert head.data_ptr() == checkpoint.load(sources["llm.embed.weight"]).data_ptr()


@pytest.mark.parametrize("layout", EVERY)
def test_every_missing_tensor_is_named(tmp_path, layout):
    config, tensors = EVERY[layout]
    whole = tensors()
    for name in _new(layout, whole):
        if _is_head(name):
            continue
        part = {n: t for n, t in whole.items() if n != name}
        if name.endswith("embeddings.cls_token") and layout.endswith("native-b"):
            match = "missing"  # nothing else tells the two spellings apart
        else:
            match = rf"1 tensor \({name}\) missing".replace(".", r"\.")
        with pytest.raises(ValueError, match=match) as error:
            _resolve(tmp_path, config(), part)
        _one_line(error)


@pytest.mark.parametrize("layout", EVERY)
def test_left_over_tensors(tmp_path, layout):
    config, tensors = EVERY[layout]
    whole = tensors()
    some = next(n for n in whole if ".1." in n and n.endswith("weight"))
    for extra in ("extra", "vision_model.encoder.layers.2.ls1", some + "2", f"x.{some}"):
        more = whole | {extra: torch.zeros(1)}
        with pytest.raises(ValueError, match=rf"1 tensor \({extra}\) left over") as error:
            _resolve(tmp_path, config(), more)
        _one_line(error)
    more = whole | {f"extra.{i}": torch.zeros(1) for i in range(9)}
    with pytest.raises(ValueError, match=r"9 tensors \(extra.0; extra.1; extra.2; \.\.\.\) left"):
        _resolve(tmp_path, config(), more)


@pytest.mark.parametrize("layout", EVERY)
def test_every_misshaped_tensor_is_named(tmp_path, layout):
    config, tensors = EVERY[layout]
    whole = tensors()
    for name in _new(layout, whole):
        tensor = whole[name]
        wrong = tensor.reshape(*tensor.shape, 1)
        with pytest.raises(ValueError, match="1 tensor of another shape: ") as error:
            _resolve(tmp_path, config(), whole | {name: wrong})
        message = _one_line(error)
        assert f"{name} is {list(wrong.shape)}, expected {list(tensor.shape)}" in message


@pytest.mark.parametrize("layout", [n for n in OTHERS if "moe" not in n and "gpt_oss" not in n])
def test_joint_projections(tmp_path, layout):
    """q, k and v one below the other, and gate above up, however a family stores them."""
    config, tensors = OTHERS[layout]
    stored = tensors()
    checkpoint, sources = _resolve(tmp_path, config(), stored)
    at = next(n for n in stored if "layers.1." in n and "language" in n).split("layers.1.")[0]
    at += "layers.1."

    def rows(*names):
        return torch.cat([stored[f"{at}{n}"] for n in names])

    if "internlm2" in layout:
        packed = stored[f"{at}attention.wqkv.weight"].view(2, 4, 8, 32)  # kv head, q q k v
        parts = [packed[:, :2].reshape(32, 32), *(packed[:, i].reshape(16, 32) for i in (2, 3))]
        qkv = torch.cat(parts)
        gate_up = rows("feed_forward.w1.weight", "feed_forward.w3.weight")
    elif "phi3" in layout:
        qkv, gate_up = rows("self_attn.qkv_proj.weight"), rows("mlp.gate_up_proj.weight")
    else:
        qkv = rows(*(f"self_attn.{x}_proj.weight" for x in "qkv"))
        gate_up = rows("mlp.gate_proj.weight", "mlp.up_proj.weight")
    assert torch.equal(checkpoint.load(sources["llm.1.qkv.weight"]), qkv)
    assert torch.equal(checkpoint.load(sources["llm.1.gate_up.weight"]), gate_up)
    assert sources["llm.1.qkv.weight"].shape == qkv.shape


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts(tmp_path, family):
    """[N, K] of every expert, gate above up, however they are stored."""
    stored = original_tensors(family)
    checkpoint, sources = _resolve(tmp_path, original(family), stored)
    at = "language_model.model.layers.1.mlp."
    for e in range(3):
        ours = {
            part: checkpoint.load(sources[f"llm.1.experts.{e}.{part}"])
            for part in ("gate_up.weight", "down.weight")
        }
        if family == "qwen3_moe":
            part = {x: stored[f"{at}experts.{e}.{x}_proj.weight"] for x in ("gate", "up", "down")}
            gate_up, down = torch.cat((part["gate"], part["up"])), part["down"]
            assert f"llm.1.experts.{e}.down.bias" not in sources
        else:
            columns = stored[f"{at}experts.gate_up_proj"][e]
            gate_up = torch.cat((columns[:, 0::2].T, columns[:, 1::2].T))
            down = stored[f"{at}experts.down_proj"][e].T
            bias = stored[f"{at}experts.gate_up_proj_bias"][e]
            found = checkpoint.load(sources[f"llm.1.experts.{e}.gate_up.bias"])
            assert torch.equal(found, torch.cat((bias[0::2], bias[1::2])))
            found = checkpoint.load(sources[f"llm.1.experts.{e}.down.bias"])
            assert torch.equal(found, stored[f"{at}experts.down_proj_bias"][e])
        assert torch.equal(ours["gate_up.weight"], gate_up)
        assert torch.equal(ours["down.weight"], down)
        checkpoint.release(sources[f"llm.1.experts.{e}.down.weight"])
    router = "gate" if family == "qwen3_moe" else "router"
    assert torch.equal(
        checkpoint.load(sources["llm.1.router.weight"]), stored[f"{at}{router}.weight"]
    )


def test_mxfp4_needs_whole_blocks(tmp_path):
    stored = original_tensors("gpt_oss")  # an MLP of 48 columns
    at = "language_model.model.layers.0.mlp.experts.gate_up_proj"
    del stored[at]
    stored[f"{at}_blocks"] = torch.zeros(3, 96, 1, 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match="48 columns, mxfp4 stores multiples of 32"):
        _resolve(tmp_path, original("gpt_oss"), stored)


def _wrong():
    own = {layout: layout.split("-")[0] if layout in OTHERS else "qwen2" for layout in EVERY}
    return [(f, layout) for f in FAMILIES for layout in EVERY if f != own[layout]]


@pytest.mark.parametrize(("family", "layout"), _wrong())
def test_the_wrong_family_is_told_the_right_one(tmp_path, family, layout):
    """Weights of one family under the config of another: unknown keys and the nearest family."""
    config, tensors = EVERY[layout]
    right, kind = config(), "native" if "native" in layout else "original"
    part = "text_config" if kind == "native" else "llm_config"
    stored = right[part]["model_type"]
    wrong = right | {part: (native if kind == "native" else original)(family)[part]}
    with pytest.raises(ValueError, match="tensor") as error:
        _resolve(tmp_path, wrong, tensors())
    message = _one_line(error)
    name = "Hugging Face-native" if kind == "native" else "original"
    if "of another shape" not in message:  # the same names: only the head size differs
        nearest = message.partition("; the nearest family is ")[2].split(" or ")
        assert f"{stored} in the {name} layout" in nearest
        assert len(nearest) <= 2  # InternLM3 with biases everywhere is Llama with them
        assert "unknown" in message or "left over" in message or "missing" in message


def test_weights_of_no_family(tmp_path):
    tensors = original_vision() | {"transformer.h.0.attn.weight": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"1 tensor \(transformer\.h.* unknown; no known family"):
        _resolve(tmp_path, original(), tensors)


def test_dtypes_of_weights(tmp_path):
    tensors = original_tensors()
    tensors["mlp1.1.bias"] = tensors["mlp1.1.bias"].to(torch.float64)
    with pytest.raises(ValueError, match=r"1 tensor of another dtype: mlp1\.1\.bias is float64"):
        _resolve(tmp_path, original(), tensors)
    tensors = native_tensors(newer=True)
    name = "model.vision_tower.encoder.layer.0.attention.k_proj.bias"
    tensors[name] = tensors[name].float()
    with pytest.raises(ValueError, match=r"q_proj\.bias and the tensors joined .* float32"):
        _resolve(tmp_path, native(), tensors)


def test_layers_behind_the_selected_one(tmp_path):
    config = original() | {"select_layer": -2}
    tensors = original_tensors()
    _, sources = _resolve(tmp_path, config, tensors)
    assert "vit.0.ls1" in sources
    assert not any(n.startswith("vit.1.") for n in sources)
    shorter = {n: t for n, t in tensors.items() if not n.startswith(_VIT1)}
    assert _resolve(tmp_path, config, shorter)[1].keys() == sources.keys()
    wrong = tensors | {_VIT1 + "ls1": torch.zeros(3)}
    with pytest.raises(ValueError, match="1 tensor of another shape"):
        _resolve(tmp_path, config, wrong)


@pytest.mark.parametrize("layout", ["standalone", "native-standalone", *LAYOUTS])
def test_vision_alone(tmp_path, layout):
    if layout == "standalone":
        config, tensors = original()["vision_config"], original_vision(root="")
    elif layout == "native-standalone":
        config, prefix = native()["vision_config"], "vision_tower."
        tensors = native_tensors(newer=False)
        tensors = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    else:
        config, tensors = LAYOUTS[layout][0](), LAYOUTS[layout][1]()
    write_checkpoint(tmp_path, config, tensors)
    checkpoint = Checkpoint(tmp_path)
    sources = resolve_vision(checkpoint, load_vision_config(tmp_path))
    expected = original_vision(root="")
    assert len(sources) == len(expected)
    qkv = checkpoint.load(sources["vit.1.qkv.weight"])
    assert torch.equal(qkv, expected["encoder.layers.1.attn.qkv.weight"])
    root = next(iter(tensors)).split("encoder")[0] if layout in LAYOUTS else ""
    stray = {f"{root.split('embeddings')[0]}stray": torch.zeros(1)}
    write_checkpoint(tmp_path, config, tensors | stray)
    with pytest.raises(ValueError, match="stray") as error:
        resolve_vision(Checkpoint(tmp_path), load_vision_config(tmp_path))
    _one_line(error)


def test_no_vision_at_all(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    write_config(tmp_path, original())
    with pytest.raises(ValueError, match="no tensor of a vision encoder's class token"):
        resolve_vision(Checkpoint(tmp_path), load_vision_config(tmp_path))
