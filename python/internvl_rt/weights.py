"""A checkpoint's safetensors files as named tensors.

Three steps, each usable alone: `read_header` checks one file's header against the file,
`Checkpoint` maps one file or a set of shards, `resolve` finds every tensor that a model needs
under the names of its layout. Both directions are strict: a tensor that is missing, left over or
of another shape raises a one-line ValueError that names it. Only safetensors files are read.
"""

from __future__ import annotations

import io
import itertools
import mmap
import os
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, NoReturn

import torch

from internvl_rt.awq import awq_unpack
from internvl_rt.config import ExpertsConfig, ModelConfig, TextConfig, VisionConfig
from internvl_rt.json_file import open_regular, parse_json, read_json, show
from internvl_rt.models.families import FAMILIES, ExpertNames, Family
from internvl_rt.ops import mxfp4_unpack

MAX_HEADER_BYTES = 100_000_000  # the limit that the format's own library sets
_MAX_INDEX_BYTES = 64 << 20
_MAX_DIMS = 16
_MAX_ELEMENTS = (1 << 63) - 1

_DTYPES = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: bytes `begin` to `end` of its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Source:
    """The stored tensors whose rows, one after the other, make one tensor of the model.

    rows: the ranges of rows, begin and end, in the order in which the model wants them, where a
        family stores them in another one.
    expert: the entry of stored stacks that is meant.
    form: "plain"; "columns", stored transposed; "mxfp4", from blocks and scales; "awq", three
        stored tensors for each part: codes, zeros and scales.
    alternating: stored rows are those of two layers in turns; here the first's come first.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    rows: tuple[tuple[int, int], ...] = ()
    expert: int | None = None
    form: str = "plain"
    alternating: bool = False


def parse_header(data: bytes, file_size: int, name: str) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file of `file_size` bytes that begins with `data`.

    `data` holds at least the eight bytes of the length and the whole header, or as much as the
    file has. Accepts only what leaves no doubt: known dtypes, offsets that cover the payload
    without holes or overlaps, sizes that agree with the shapes. Anything else is a ValueError
    that begins with `name`.
    """

    def fail(reason: str) -> NoReturn:
        raise ValueError(f"{name}: {reason}")

    if file_size < 8 or len(data) < 8:
        fail(f"{file_size} bytes, too short for a safetensors file")
    length = int.from_bytes(data[:8], "little")
    if data.startswith(b"version "):  # no length of a header that is allowed
        fail("a pointer of Git LFS, expected the file that it stands for (git lfs pull)")
    if length > MAX_HEADER_BYTES:
        fail(f"the header claims {length} bytes, at most {MAX_HEADER_BYTES}")
    if 8 + length > file_size:
        fail(f"the header claims {length} bytes, the file has {file_size - 8} after its length")
    header = data[8 : 8 + length]
    if len(header) != length or header[:1] != b"{":
        fail("the header does not begin with {")
    entries = parse_json(header, f"{name}: header")
    payload = file_size - 8 - length

    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        fail("__metadata__ is not an object of strings")
    found: dict[str, TensorInfo] = {}
    for key, entry in entries.items():
        found[key] = _entry(name, key, entry, payload, 8 + length)
    try:
        "".join([*found, *metadata, *metadata.values()]).encode("utf-8")
    except UnicodeEncodeError:
        fail("the header has a lone surrogate")

    at = 8 + length
    for key, info in sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != at:
            kind = "overlaps the tensor before it" if info.begin < at else "leaves a hole before it"
            fail(f"tensor {show(key)} {kind} (begins at {info.begin - 8 - length})")
        at = info.end
    if at != file_size:
        fail(f"the tensors cover {at - 8 - length} of {payload} bytes of payload")
    return found


def _entry(name: str, key: str, entry: object, payload: int, base: int) -> TensorInfo:
    def fail(reason: str) -> NoReturn:
        raise ValueError(f"{name}: tensor {show(key)}: {reason}")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        fail("expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        fail(f"dtype is {show(dtype)}, supported: {', '.join(_DTYPES)}")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS:
        fail(f"shape is {show(shape)}, expected a list of at most {_MAX_DIMS} sizes")
    # A product over max(size, 1) bounds the strides too, which an empty tensor also has.
    elements, bound = 1, 1
    for size in shape:
        if type(size) is not int or not 0 <= size <= _MAX_ELEMENTS:
            fail(f"shape is {show(shape)}, expected sizes of 0 or more")
        elements *= size
        bound *= max(size, 1)
        if bound > _MAX_ELEMENTS:
            fail(f"shape is {show(shape)}, too large")
    if not isinstance(offsets, list) or [type(o) for o in offsets] != [int, int]:
        fail(f"data_offsets is {show(offsets)}, expected two integers")
    begin, end = offsets
    if not 0 <= begin <= end <= payload:
        fail(f"data_offsets is {show(offsets)}, the payload has {payload} bytes")
    expected = elements * _DTYPES[dtype].itemsize
    if end - begin != expected:
        fail(f"{end - begin} bytes stored, {dtype} of shape {show(shape)} needs {expected}")
    return TensorInfo(_DTYPES[dtype], tuple(shape), base + begin, base + end)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The checked header of one file; see `parse_header`. Raises OSError or ValueError."""
    with open_regular(path) as file:
        return _read_header(file, path.name)


def _read_header(file: BinaryIO, name: str) -> dict[str, TensorInfo]:
    size = os.fstat(file.fileno()).st_size
    reader = io.BufferedReader(file)
    data = reader.read(8)
    length = int.from_bytes(data, "little")
    if len(data) == 8 and length <= min(MAX_HEADER_BYTES, size - 8):
        data += reader.read(length)
    reader.detach()
    return parse_header(data, size, name)


class _Shard:
    """One mapped file. Tensors made from it keep the mapping alive."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_regular(path) as file:
            self.tensors = _read_header(file, path.name)
            # A private writable mapping, because torch warns about read-only memory; the file
            # itself cannot be changed through it.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        last = max((info.end for info in self.tensors.values()), default=0)
        if last > len(self._map):
            raise ValueError(f"{path.name}: truncated while it was read")

    def tensor(self, info: TensorInfo) -> torch.Tensor:
        count = (info.end - info.begin) // info.dtype.itemsize
        if count == 0:
            return torch.empty(info.shape, dtype=info.dtype)
        if info.begin % info.dtype.itemsize:  # a header of odd length: kernels need alignment
            data = bytearray(self._map[info.begin : info.end])
            return torch.frombuffer(data, dtype=info.dtype).view(info.shape)
        flat = torch.frombuffer(self._map, dtype=info.dtype, count=count, offset=info.begin)
        return flat.view(info.shape)

    def release(self, info: TensorInfo) -> None:
        page = mmap.PAGESIZE
        begin = -(-info.begin // page) * page
        end = info.end // page * page
        if end > begin and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)


class Checkpoint:
    """The tensors of a checkpoint folder, by their stored names.

    Reads model.safetensors, or the shards of model.safetensors.index.json, or the folder's only
    *.safetensors file. Payloads are memory-mapped: a tensor costs memory when it is touched, and
    `release` gives that back. Raises OSError for what is missing, ValueError for what lies.
    """

    def __init__(self, folder: Path) -> None:
        folder = Path(folder)
        if not folder.exists():
            raise FileNotFoundError(f"{folder}: no such folder")
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file, expected a checkpoint folder")
        self.folder = folder
        single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
        if index.exists():
            self._shards = self._indexed(index)
            if single.exists() and single.name not in {s.path.name for s in self._shards}:
                raise ValueError(f"{folder} has both {single.name} and {index.name}")
        else:
            self._shards = [_Shard(single if single.exists() else _only_file(folder))]
        self._where = {name: shard for shard in self._shards for name in shard.tensors}
        self.names = tuple(self._where)

    def _indexed(self, index: Path) -> list[_Shard]:
        weight_map = read_json(index, _MAX_INDEX_BYTES).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index.name}: weight_map is {show(weight_map)}, expected an object")
        expected: dict[str, set[str]] = {}
        for name, file in weight_map.items():
            if not isinstance(file, str) or not _is_plain_name(file):
                raise ValueError(
                    f"{index.name}: {show(name)} is in {show(file)}, expected a plain file name"
                )
            expected.setdefault(file, set()).add(name)
        shards = []
        for file, names in expected.items():
            path = self.folder / file
            if not path.exists():
                raise FileNotFoundError(f"{path}: no such file ({index.name} names it)")
            shard = _Shard(path)
            missing = [name for name in names if name not in shard.tensors]
            if missing:
                raise ValueError(f"{file}: {_some(missing)} of {index.name} not in the file")
            extra = [name for name in shard.tensors if name not in names]
            if extra:
                raise ValueError(f"{file}: {_some(extra)} not in {index.name}")
            shards.append(shard)
        return shards

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of a tensor, without touching its payload."""
        return self._shard(name).tensors[name]

    def adopt(self, other: Checkpoint, prefix: str) -> None:
        """Takes the tensors of another checkpoint in, under names with a prefix."""
        for shard in other._shards:
            shard.tensors = {prefix + name: info for name, info in shard.tensors.items()}
            self._where |= dict.fromkeys(shard.tensors, shard)
        self._shards += other._shards
        self.names = tuple(self._where)

    @property
    def dtype(self) -> torch.dtype:
        """What the first tensor is stored in; the weights of a checkpoint share their dtype."""
        return self.info(self.names[0]).dtype

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor, a view of the mapped file. Do not write to it."""
        shard = self._shard(name)
        return shard.tensor(shard.tensors[name])

    def load(self, source: Source) -> torch.Tensor:
        """One tensor of the model: a view of the file, or a copy where rows are joined."""
        parts = self.parts(source)
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole.view(source.shape)

    def parts(self, source: Source) -> list[torch.Tensor]:
        """What makes one tensor of the model when it is joined by rows: views where that can be."""
        tensors = [self._stored(name, source.expert) for name in source.names]
        if source.form == "columns":
            tensors = [t.T.contiguous() for t in tensors]
        elif source.form == "mxfp4":
            tensors = [mxfp4_unpack(*tensors)]
        elif source.form == "awq":
            tensors = [awq_unpack(*tensors[i : i + 3]) for i in range(0, len(tensors), 3)]
        if source.alternating:
            return [t[i::2] for t in tensors for i in (0, 1)]
        return [t[begin:end] for t in tensors for begin, end in source.rows] or tensors

    def _stored(self, name: str, expert: int | None) -> torch.Tensor:
        shard = self._shard(name)
        return shard.tensor(_entry_of(shard.tensors[name], expert))

    def release(self, source: Source | str) -> None:
        """Gives the memory of a tensor's pages back; a later use reads the file again."""
        if isinstance(source, str):
            source = Source((source,), self.info(source).shape)
        for name in source.names:
            shard = self._shard(name)
            shard.release(_entry_of(shard.tensors[name], source.expert))

    @property
    def payload_bytes(self) -> int:
        return sum(i.end - i.begin for shard in self._shards for i in shard.tensors.values())

    def _shard(self, name: str) -> _Shard:
        shard = self._where.get(name)
        if shard is None:
            raise KeyError(f"{self.folder}: no tensor {show(name)}")
        return shard


def _entry_of(info: TensorInfo, index: int | None) -> TensorInfo:
    """One entry of a stack of tensors, or the tensor itself."""
    if index is None:
        return info
    size = (info.end - info.begin) // info.shape[0]
    begin = info.begin + index * size
    return TensorInfo(info.dtype, info.shape[1:], begin, begin + size)


def open_checkpoint(folder: Path, config: ModelConfig) -> Checkpoint:
    """The checkpoint in `folder`; Chat V1.0's with its vision tower, which may lie beside it.

    Raises what Checkpoint raises, and FileNotFoundError for a tower that is in neither place.
    """
    checkpoint = Checkpoint(folder)
    if config.tower is None or f"{_LLAVA.vision}embeddings.class_embedding" in checkpoint:
        return checkpoint
    beside = Path(folder).absolute().parent / config.tower
    if not beside.is_dir():
        raise FileNotFoundError(
            f"{folder}: no tensors {_LLAVA.vision}*; the vision tower {config.tower} is then a "
            f"checkpoint of its own, expected in {beside}"
        )
    checkpoint.adopt(Checkpoint(beside), _LLAVA.vision)
    return checkpoint


def resolve(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, Source]:
    """Where every tensor of the chat model lies, by internal name.

    Vision: vit.cls, vit.pos, vit.patch.{weight,bias}, vit.{i}.{norm1,qkv,q_norm,k_norm,proj,ls1,
    norm2,fc1,fc2,ls2}. Projector: proj.{ln,fc1,fc2}. Language model: llm.embed.weight,
    llm.{i}.{norm1,qkv,q_norm,k_norm,sinks,o,norm2,gate_up,down}, llm.norm.weight,
    llm.head.weight; in place of gate_up and down of a mixture llm.{i}.router and
    llm.{i}.experts.{e}.{gate_up,down}. Everything but cls, pos, ls1, ls2 and sinks ends in .weight
    or .bias. The head is the embedding's
    tensor where the checkpoint stores none. Vision layers behind the selected one are known,
    checked and left out. Raises ValueError naming what is missing, left over, misshaped or of
    another dtype.
    """
    names = _ORIGINAL
    vision, buffers = config.vision, []
    if config.layout == "hf":
        newer = f"{_NATIVE_B.vision}embeddings.cls_token" in checkpoint
        names = _NATIVE_B if newer else _NATIVE_A
    elif config.layout == "llava":
        names = _LLAVA
        vision = _with_stored_grid(config, checkpoint)
        buffers = _llava_buffers(config.text)
    rows = [
        *buffers,
        *_vision_rows(vision, names, config.vision_layers_used),
        *_projector_rows(config, names),
        *_text_rows(config.text, names, checkpoint),
    ]
    head = _head_row(config.text, names)
    if head.source.names[0] in checkpoint:
        rows.append(head)
    found = _match(checkpoint, rows, ignored=())
    found.setdefault(head.name, found["llm.embed.weight"])
    return found


def _with_stored_grid(config: ModelConfig, checkpoint: Checkpoint) -> VisionConfig:
    """Chat V1.0's code of one time stored the position embedding resized to its pictures."""
    name = f"{_LLAVA.vision}embeddings.position_embedding"
    resized = replace(config.vision, image_size=config.image_size)
    shape = (1, resized.grid**2 + 1, resized.hidden_size)
    stored = name in checkpoint and checkpoint.info(name).shape == shape
    return resized if stored else config.vision


def _llava_buffers(config: TextConfig) -> list[_Row]:
    """What LLaMA's code of that time stored and computes anew."""
    names = (f"{_LLAVA.decoder}layers.{i}.self_attn.rotary_emb" for i in range(config.num_layers))
    shape = (config.head_dim // 2,)
    return [replace(_row(n, ((f"{n}.inv_freq", shape),)), used=False) for n in names]


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that `resolve` finds, by internal name; the head as if it were tied."""
    rows = [
        *_vision_rows(config.vision, _ORIGINAL, config.vision_layers_used),
        *_projector_rows(config, _ORIGINAL),
        *_text_rows(config.text, _ORIGINAL, ()),
    ]
    return {row.name: row.source.shape for row in rows if row.used}


def resolve_vision(checkpoint: Checkpoint, config: VisionConfig) -> dict[str, Source]:
    """The vit.* names of `resolve`, all layers, from a standalone InternViT or a chat model.

    In a chat model the tensors of its other parts are left alone.
    """
    for names in (_ORIGINAL, _STANDALONE, _NATIVE_A, _NATIVE_B, _NATIVE_STANDALONE):
        rows = list(_vision_rows(config, names, config.num_layers))
        if rows[0].source.names[0] in checkpoint:
            return _match(checkpoint, rows, ignored=names.others)
    raise ValueError(f"{checkpoint.folder}: no tensor of a vision encoder's class token")


@dataclass(frozen=True, slots=True)
class _Names:
    """Prefixes and names of one layout; `others` are the prefixes of a chat model's other parts."""

    layout: str
    vision: str
    native_vision: bool
    projector: Mapping[str, str]
    decoder: str
    head: str
    others: tuple[str, ...]


_ORIGINAL_PROJECTOR = {"ln": "mlp1.0", "fc1": "mlp1.1", "fc2": "mlp1.3"}


def _native_projector(prefix: str) -> dict[str, str]:
    names = {"ln": "layer_norm", "fc1": "linear_1", "fc2": "linear_2"}
    return {key: f"{prefix}multi_modal_projector.{name}" for key, name in names.items()}


# Of InternVL-14B-224px, whose tower has the names of the original layout.
_CONTRASTIVE_OTHERS = (
    "qllama.",
    "query_tokens",
    "text_projection",
    "logit_scale",
    "clip_projector.",
    "clip_projector2.",
    "itm_head.",
)
_ORIGINAL = _Names(
    layout="original",
    vision="vision_model.",
    native_vision=False,
    projector=_ORIGINAL_PROJECTOR,
    decoder="language_model.model.",
    head="language_model.",
    others=("language_model.", "mlp1.", *_CONTRASTIVE_OTHERS),
)
# Written by Transformers 4.52 to 4.57, and by later ones.
_NATIVE_A = _Names(
    layout="Hugging Face-native",
    vision="vision_tower.",
    native_vision=True,
    projector=_native_projector(""),
    decoder="language_model.model.",
    head="language_model.",
    others=("language_model.", "multi_modal_projector."),
)
_NATIVE_B = _Names(
    layout="Hugging Face-native",
    vision="model.vision_tower.",
    native_vision=True,
    projector=_native_projector("model."),
    decoder="model.language_model.",
    head="",
    others=("model.language_model.", "model.multi_modal_projector.", "lm_head."),
)
# Chat V1.0's.
_LLAVA = _Names(
    layout="LLaVA",
    vision="model.vision_tower.vision_tower.",
    native_vision=False,
    projector={"fc1": "model.mm_projector.0", "fc2": "model.mm_projector.2"},
    decoder="model.",
    head="",
    others=(),
)
_STANDALONE = _Names("original", "", False, {}, "", "", ())
_NATIVE_STANDALONE = _Names("Hugging Face-native", "", True, {}, "", "", ())


@dataclass(frozen=True, slots=True)
class _Row:
    """One tensor of the model, and the shapes of the stored ones that it is made of."""

    name: str
    source: Source
    stored: tuple[tuple[int, ...], ...]
    used: bool = True  # False: known and checked where present, not loaded
    dtypes: tuple[tuple[torch.dtype, ...], ...] = ()  # of each; () for those of weights


def _row(
    name: str,
    stored: Sequence[tuple[str, tuple[int, ...]]],
    rows: tuple[tuple[int, int], ...] = (),
) -> _Row:
    """A tensor joined, by rows, of stored ones with these names and shapes."""
    names, shapes = zip(*stored, strict=True)
    shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    return _Row(name, Source(names, shape, rows), shapes)


@dataclass(frozen=True, slots=True)
class _Awq:
    """Projections of a decoder may be stored as int4 in groups; those that are have codes."""

    group: int
    present: Container[str]

    def stores(self, part: str) -> bool:
        return f"{part}.qweight" in self.present

    def row(
        self,
        name: str,
        stored: Sequence[tuple[str, int]],
        columns: int,
        rows: tuple[tuple[int, int], ...],
    ) -> _Row:
        uneven = [part for part, n in stored if n % 8 or columns % self.group]
        if uneven:
            raise ValueError(
                f"{uneven[0]}: AWQ stores multiples of 8 rows and of {self.group} columns, "
                f"the config has {columns} columns"
            )
        groups = columns // self.group
        names: list[str] = []
        shapes: list[tuple[int, ...]] = []
        for part, n in stored:
            names += [f"{part}.{kind}" for kind in ("qweight", "qzeros", "scales")]
            shapes += [(columns, n // 8), (groups, n // 8), (groups, n)]
        shape = (sum(n for _, n in stored), columns)
        source = Source(tuple(names), shape, rows, form="awq")
        dtypes = ((torch.int32,), (torch.int32,), (torch.float16,)) * len(stored)
        return _Row(name, source, tuple(shapes), dtypes=dtypes)


def _linear(
    name: str,
    stored: Sequence[tuple[str, int]],
    columns: int,
    *,
    bias: bool,
    rows: tuple[tuple[int, int], ...] = (),
    awq: _Awq | None = None,
) -> list[_Row]:
    """A linear layer; `stored` are the tensors, with their numbers of rows, that it is made of."""
    if awq is not None and awq.stores(stored[0][0]):
        weight = awq.row(f"{name}.weight", stored, columns, rows)
    else:
        parts = [(f"{part}.weight", (n, columns)) for part, n in stored]
        weight = _row(f"{name}.weight", parts, rows)
    if not bias:
        return [weight]
    return [weight, _row(f"{name}.bias", [(f"{part}.bias", (n,)) for part, n in stored], rows)]


def _norm(name: str, stored: str, width: int, *, bias: bool) -> list[_Row]:
    kinds = ("weight", "bias") if bias else ("weight",)
    return [_row(f"{name}.{kind}", ((f"{stored}.{kind}", (width,)),)) for kind in kinds]


def _vision_rows(config: VisionConfig, names: _Names, layers_used: int) -> Iterator[_Row]:
    width, patch = config.hidden_size, config.patch_size
    native = names.native_vision
    at = f"{names.vision}embeddings."
    stored = ("cls_token", "position_embeddings", "patch_embeddings.projection")
    if not native:
        stored = ("class_embedding", "position_embedding", "patch_embedding")
    cls, pos, conv = (at + name for name in stored)
    yield _row("vit.cls", ((cls, (1, 1, width)),))
    yield _row("vit.pos", ((pos, (1, config.grid**2 + 1, width)),))
    yield _row("vit.patch.weight", ((f"{conv}.weight", (width, 3, patch, patch)),))
    yield _row("vit.patch.bias", ((f"{conv}.bias", (width,)),))
    for i in range(config.num_layers):
        rows = _vision_layer(config, native, f"vit.{i}", f"{names.vision}encoder.layer", i)
        for row in rows:
            yield replace(row, used=i < layers_used)


def _vision_layer(
    config: VisionConfig, native: bool, name: str, prefix: str, index: int
) -> list[_Row]:
    width, inner = config.hidden_size, config.intermediate_size
    if native:
        at = f"{prefix}.{index}."
        attention = f"{at}attention."
        qkv = [(f"{attention}{x}_proj", width) for x in "qkv"]
        out = f"{attention}projection_layer"
        norm1, norm2, ls1, ls2 = "layernorm_before", "layernorm_after", "lambda_1", "lambda_2"
    else:
        at = f"{prefix}s.{index}."
        attention = f"{at}attn."
        qkv = [(f"{attention}qkv", 3 * width)]
        out = f"{attention}proj"
        norm1, norm2, ls1, ls2 = "norm1", "norm2", "ls1", "ls2"
    bias = config.norm_type == "layer_norm"
    rows = [
        *_norm(f"{name}.norm1", at + norm1, width, bias=bias),
        *_linear(f"{name}.qkv", qkv, width, bias=config.qkv_bias),
        *_linear(f"{name}.proj", [(out, width)], width, bias=True),
        _row(f"{name}.ls1", ((at + ls1, (width,)),)),
        *_norm(f"{name}.norm2", at + norm2, width, bias=bias),
        *_linear(f"{name}.fc1", [(f"{at}mlp.fc1", inner)], width, bias=True),
        *_linear(f"{name}.fc2", [(f"{at}mlp.fc2", width)], inner, bias=True),
        _row(f"{name}.ls2", ((at + ls2, (width,)),)),
    ]
    if config.qk_norm:
        for x in "qk":
            rows += _norm(f"{name}.{x}_norm", f"{attention}{x}_norm", width, bias=False)
    return rows


def _projector_rows(config: ModelConfig, names: _Names) -> list[_Row]:
    wide = config.vision.hidden_size * config.unshuffle**2
    width = config.text.hidden_size
    norm = _norm("proj.ln", names.projector["ln"], wide, bias=True) if config.projector_norm else []
    return [
        *norm,
        *_linear("proj.fc1", [(names.projector["fc1"], width)], wide, bias=True),
        *_linear("proj.fc2", [(names.projector["fc2"], width)], width, bias=True),
    ]


def _text_rows(config: TextConfig, names: _Names, present: Container[str]) -> Iterator[_Row]:
    """present: the names of a checkpoint, by which the way is found that it stores experts."""
    stored = FAMILIES[config.backbone].names
    root, width, D = names.decoder, config.hidden_size, config.head_dim
    awq = None if config.awq_group is None else _Awq(config.awq_group, present)
    embed = (f"{root}{stored.embed}.weight", (config.vocab_size, width))
    yield _row("llm.embed.weight", (embed,))
    for i in range(config.num_layers):
        name, at = f"llm.{i}", f"{root}layers.{i}."
        yield from _norm(f"{name}.norm1", at + stored.norm1, width, bias=False)
        yield from _qkv(config, f"{name}.qkv", [at + part for part in stored.qkv], awq)
        if config.qk_norm:
            yield from _norm(f"{name}.q_norm", at + stored.q_norm, D, bias=False)
            yield from _norm(f"{name}.k_norm", at + stored.k_norm, D, bias=False)
        o = [(at + stored.o, width)]
        yield from _linear(f"{name}.o", o, config.num_heads * D, bias=config.o_bias, awq=awq)
        yield from _norm(f"{name}.norm2", at + stored.norm2, width, bias=False)
        if config.sinks:
            yield _row(f"{name}.sinks", ((at + stored.sinks, (config.num_heads,)),))
        if config.experts is None or not config.mixtures[i]:
            yield from _mlp_rows(config, name, at, awq)
        else:
            yield from _expert_rows(config, config.experts, name, at, present, awq)
    yield from _norm("llm.norm", root + stored.norm, width, bias=False)


def _qkv(config: TextConfig, name: str, stored: Sequence[str], awq: _Awq | None) -> list[_Row]:
    """The joint projection: rows of all query heads, then of all keys, then of all values."""
    H, K, D = config.num_heads, config.num_kv_heads, config.head_dim
    parts = [(stored[0], (H + 2 * K) * D)]
    if len(stored) == 3:
        parts = list(zip(stored, (H * D, K * D, K * D), strict=True))
    rows: tuple[tuple[int, int], ...] = ()
    if FAMILIES[config.backbone].names.grouped_qkv:
        group = H // K
        heads = [(k * (group + 2), k * (group + 2) + group) for k in range(K)]
        keys = [(end, end + 1) for _, end in heads]
        values = [(end, end + 1) for _, end in keys]
        rows = tuple((begin * D, end * D) for begin, end in (*heads, *keys, *values))
    return _linear(name, parts, config.hidden_size, bias=config.qkv_bias, rows=rows, awq=awq)


def _mlp_rows(config: TextConfig, name: str, at: str, awq: _Awq | None) -> list[_Row]:
    stored = FAMILIES[config.backbone].names
    width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
    each = 2 * inner // len(stored.gate_up)
    gate_up = [(at + part, each) for part in stored.gate_up]
    return [
        *_linear(f"{name}.gate_up", gate_up, width, bias=bias, awq=awq),
        *_linear(f"{name}.down", [(at + stored.down, width)], inner, bias=bias, awq=awq),
    ]


def _expert_rows(
    config: TextConfig,
    experts: ExpertsConfig,
    name: str,
    at: str,
    present: Container[str],
    awq: _Awq | None,
) -> Iterator[_Row]:
    stored, width, bias = FAMILIES[config.backbone].names, config.hidden_size, config.mlp_bias
    yield from _linear(f"{name}.router", [(at + stored.router, experts.count)], width, bias=bias)

    def first(way: ExpertNames) -> str:
        return at + way.gate_up[0].format(e=0) + way.suffixes[0]

    way = next((way for way in stored.experts if first(way) in present), stored.experts[0])
    way_down = replace(way, alternating=False)
    for e in range(experts.count):
        each, inner, count = f"{name}.experts.{e}", experts.width, experts.count
        if way.suffixes == (".weight",):
            gate_up = [(at + part.format(e=e), inner) for part in way.gate_up]
            down = [(at + way.down.format(e=e), width)]
            yield from _linear(f"{each}.gate_up", gate_up, width, bias=bias, awq=awq)
            yield from _linear(f"{each}.down", down, inner, bias=bias, awq=awq)
            continue
        whole, shape = at + way.gate_up[0], (2 * inner, width)
        yield from _stacked(f"{each}.gate_up", whole, shape, e, count, way, bias=bias)
        whole, shape = at + way.down, (width, inner)
        yield from _stacked(f"{each}.down", whole, shape, e, count, way_down, bias=bias)


def _stacked(
    name: str,
    stored: str,
    shape: tuple[int, int],
    e: int,
    count: int,
    way: ExpertNames,
    *,
    bias: bool,
) -> list[_Row]:
    """One layer [N, K] of expert e, where a tensor holds those of all of them."""
    N, K = shape
    if way.form == "mxfp4" and K % 32:
        raise ValueError(f"{stored}: {K} columns, mxfp4 stores multiples of 32")
    shapes = {
        "plain": [(count, N, K)],
        "columns": [(count, K, N)],
        "mxfp4": [(count, N, K // 32, 16), (count, N, K // 32)],
    }[way.form]
    names = [stored + suffix for suffix in way.suffixes]
    dtypes = ((torch.uint8,),) * 2 if way.form == "mxfp4" else ()
    source = Source(tuple(names), shape, (), e, way.form, way.alternating)
    rows = [_Row(f"{name}.weight", source, tuple(shapes), dtypes=dtypes)]
    if bias:
        source = Source((f"{stored}_bias",), (N,), (), e, "plain", way.alternating)
        rows.append(_Row(f"{name}.bias", source, ((count, N),)))
    return rows


def _head_row(config: TextConfig, names: _Names) -> _Row:
    stored = f"{names.head}{FAMILIES[config.backbone].names.head}.weight"
    return _row("llm.head.weight", ((stored, (config.vocab_size, config.hidden_size)),))


def _nearest(checkpoint: Checkpoint) -> str:
    """What the stored names, but for the vision tower's, are most like; for messages."""
    scores: dict[str, float] = {}
    for names in (_ORIGINAL, _NATIVE_A, _NATIVE_B, _LLAVA):
        stored = {_without_numbers(n) for n in checkpoint.names if not n.startswith(names.vision)}
        families = (FAMILIES["llama"],) if names is _LLAVA else FAMILIES.values()
        for family in families:
            likeness = (
                len(expected & stored) / len(expected | stored)
                for expected in _decoder_names(family, names)
            )
            label = f"{family.model_type} in the {names.layout} layout"
            scores[label] = max(scores.get(label, 0.0), *likeness)
    best = max(scores.values())
    if not best:
        return "; no known family is near"
    return "; the nearest family is " + " or ".join(k for k, v in scores.items() if v == best)


def _decoder_names(family: Family, names: _Names) -> Iterator[set[str]]:
    """What a decoder and its projector may be stored as, by the biases that a config may choose.

    `#` stands for the number of a layer.
    """
    stored, root = family.names, names.decoder
    norms = (stored.norm1, stored.norm2, *((stored.q_norm, stored.k_norm) * family.qk_norm))
    outside = {f"{part}.{kind}" for part in names.projector.values() for kind in ("weight", "bias")}
    outside |= {f"{root}{stored.embed}.weight", f"{root}{stored.norm}.weight"}
    outside |= {f"{names.head}{stored.head}.weight", *(f"{root}layers.#.{n}.weight" for n in norms)}
    linears = [(stored.qkv, family.qkv_bias), ((stored.o,), family.o_bias)]
    if stored.experts:
        linears.append(((stored.router,), family.mlp_bias))
        outside |= {f"{root}layers.#.{n}" for n in _expert_names(family)}
    else:
        linears.append(((*stored.gate_up, stored.down), family.mlp_bias))
    if family.sinks:
        outside.add(f"{root}layers.#.{stored.sinks}")
    keys = sorted({bias.key for _, bias in linears if bias.key})
    for values in itertools.product((False, True), repeat=len(keys)):
        chosen = dict(zip(keys, values, strict=True))
        found = set(outside)
        for parts, bias in linears:
            has = chosen[bias.key] if bias.key else bias.default
            kinds = ("weight", "bias") if has else ("weight",)
            found |= {f"{root}layers.#.{part}.{kind}" for part in parts for kind in kinds}
        yield found


def _expert_names(family: Family) -> Iterator[str]:
    """As the family usually stores them."""
    way, bias = family.names.experts[0], family.mlp_bias.default
    for part in (*way.gate_up, way.down):
        yield from (part.format(e="#") + suffix for suffix in way.suffixes)
        if bias:
            yield f"{part}_bias"


def _without_numbers(name: str) -> str:
    return ".".join("#" if part.isdecimal() else part for part in name.split("."))


def _match(
    checkpoint: Checkpoint, rows: Iterable[_Row], ignored: tuple[str, ...]
) -> dict[str, Source]:
    known: set[str] = set()
    missing: list[str] = []
    misshaped: list[str] = []
    mistyped: list[str] = []
    result: dict[str, Source] = {}
    for row in rows:
        allowed = row.dtypes or (_WEIGHT_DTYPES,) * len(row.stored)
        for name, shape, kinds in zip(row.source.names, row.stored, allowed, strict=True):
            if name in known:  # a stack of experts: every one of them names it
                continue
            known.add(name)
            if name not in checkpoint:
                if row.used:
                    missing.append(name)
                continue
            info = checkpoint.info(name)
            if info.shape != shape:
                misshaped.append(f"{name} is {list(info.shape)}, expected {list(shape)}")
            if info.dtype not in kinds:
                mistyped.append(f"{name} is {_dtype_name(info.dtype)}")
        if not row.used:
            continue
        result[row.name] = row.source
        if row.dtypes:
            continue
        dtypes = {checkpoint.info(n).dtype for n in row.source.names if n in checkpoint}
        if len(dtypes) > 1:
            both = " and ".join(sorted(map(_dtype_name, dtypes)))
            mistyped.append(f"{row.source.names[0]} and the tensors joined to it are {both}")
    extra = [n for n in checkpoint.names if n not in known and not n.startswith(ignored)]
    where = checkpoint.folder
    if missing:
        unknown = f", {_some(extra)} unknown" if extra else ""
        raise ValueError(f"{where}: {_some(missing)} missing{unknown}{_nearest(checkpoint)}")
    if misshaped:
        raise ValueError(f"{where}: {_count(misshaped)} of another shape: {_first(misshaped)}")
    if mistyped:
        supported = ", ".join(map(_dtype_name, _WEIGHT_DTYPES))
        raise ValueError(
            f"{where}: {_count(mistyped)} of another dtype: {_first(mistyped)}; "
            f"supported: one of {supported}"
        )
    if extra:
        raise ValueError(
            f"{where}: {_some(extra)} left over, not part of this model{_nearest(checkpoint)}"
        )
    return result


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'s' * (len(names) > 1)}"


def _first(names: Sequence[str]) -> str:
    return "; ".join(n if n.isprintable() else show(n) for n in names[:3]) + (
        "; ..." if len(names) > 3 else ""
    )


def _some(names: Sequence[str]) -> str:
    return f"{_count(names)} ({_first(sorted(names))})"


def _is_plain_name(name: str) -> bool:
    return (
        name not in ("", ".", "..")
        and name.isprintable()
        and not any(c in name for c in "/\\\0:")
        and name.endswith(".safetensors")
    )


def _only_file(folder: Path) -> Path:
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if files:
        raise ValueError(
            f"{folder} has {len(files)} .safetensors files and no model.safetensors: "
            f"{', '.join(f.name for f in files[:3])}"
        )
    other = sorted(f.name for pattern in ("*.bin", "*.pt", "*.pth") for f in folder.glob(pattern))
    if other:
        raise FileNotFoundError(f"{folder}: only safetensors is read, found {other[0]}")
    raise FileNotFoundError(f"{folder}: no model.safetensors or model.safetensors.index.json")
