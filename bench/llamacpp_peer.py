"""llama.cpp as a peer of bench/cpu.py, where it is installed: `pip install xllamacpp gguf`.

The language model alone, written as GGUF from the same checkpoint in the bench's dtype; int8 and
int4 are q8_0 and q4_0, with the vocabulary's matrices in q8_0 under both. No vision tower:
llama.cpp's is a library of its own, which wants pictures and not pixels.

The package's interface is a server. Its library exports llama.h, which is called here instead: a
call is one step, or one prefill on an empty cache, and its logits are compared. Keys and values are
in float16, llama.cpp's default. The wheel from PyPI uses AVX2 at most, whatever the machine has
(`version` says what); only a build from source uses more.
"""

from __future__ import annotations

import ctypes
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from ctypes import c_char_p, c_int, c_int32, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import xllamacpp
from gguf import GGMLQuantizationType as Kind
from safetensors import safe_open
from torch import Tensor

KINDS = {"int8": Kind.Q8_0, "int4": Kind.Q4_0, torch.bfloat16: Kind.BF16, torch.float32: Kind.F32}
VOCABULARY = ("token_embd.weight", "output.weight")
CONTEXT = 2304  # positions of a sequence: 2048 and the steps of a row, in llama.cpp's 256s


class _Params(ctypes.Structure):
    """llama_context_params, or llama_model_params with other names: both differ from version to
    version, so the library fills its defaults into more room than it needs."""

    _fields_ = (
        *((name, c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max")),
        ("rest", c_uint32 * 124),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", c_int32),
        *((name, c_void_p) for name in ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")),
    )


_Log = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
_ERROR = 4  # of ggml_log_level


@_Log
def _log(level: int, text: bytes, _: Any) -> None:
    if level == _ERROR:
        sys.stderr.write(text.decode(errors="replace"))


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    for name, result, *arguments in (
        ("backend_init", None),
        ("log_set", None, _Log, c_void_p),
        ("model_default_params", _Params),
        ("model_load_from_file", c_void_p, c_char_p, _Params),
        ("model_free", None, c_void_p),
        ("context_default_params", _Params),
        ("init_from_model", c_void_p, c_void_p, _Params),
        ("free", None, c_void_p),
        ("n_batch", c_uint32, c_void_p),
        ("n_seq_max", c_uint32, c_void_p),
        ("n_ctx_seq", c_uint32, c_void_p),
        ("set_n_threads", None, c_void_p, c_int32, c_int32),
        ("get_memory", c_void_p, c_void_p),
        ("memory_clear", None, c_void_p, ctypes.c_bool),
        ("memory_seq_cp", None, c_void_p, *[c_int32] * 4),
        ("decode", c_int32, c_void_p, _Batch),
        ("get_logits", ctypes.POINTER(ctypes.c_float), c_void_p),
    ):
        function = getattr(library, f"llama_{name}")
        function.restype, function.argtypes = result, arguments
    library.llama_log_set(_log, None)
    library.llama_backend_init()
    return library


def _language_model(folder: Path) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """GGUF's names of the checkpoint's tensors, and what reads them."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, 1000)
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118, it is no mapping
                name = names.get_name(key.replace("language_model.", ""), (".weight", ".bias"))
                if name is not None:
                    yield name, lambda file=file, key=key: file.get_tensor(key)


def write_gguf(
    file: Path, folder: Path, dtype: torch.dtype, quant: str | None = None
) -> dict[str, Any]:
    """Writes the language model of a checkpoint in the hf layout; vectors stay in float32.

    Returns the checkpoint's text_config. Tensors are read and written one by one.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["text_config"]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.QWEN2])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])

    def kind(name: str, tensor: Tensor) -> Kind:
        if tensor.ndim == 1:
            return Kind.F32
        return Kind.Q8_0 if quant and name in VOCABULARY else KINDS[quant or dtype]

    for name, read in _language_model(folder):
        tensor = read()
        to = kind(name, tensor)
        size = math.prod(gguf.quant_shape_to_byte_shape(tensor.shape, to))
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), size, to)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, read in _language_model(folder):
        tensor = read()
        writer.write_tensor_data(gguf.quantize(tensor.float().numpy(), kind(name, tensor)))
    writer.close()
    return config


class LlamaCpp:
    version = f"{xllamacpp.__version__}, {xllamacpp.get_system_info().strip(' |')}"

    def __init__(self, file: Path, vocab: int, threads: int) -> None:
        """file: a GGUF; mapped, so that it need not stay."""
        self._llama, self._vocab, self._threads = _library(), vocab, threads
        self._contexts: dict[int, int] = {}
        params = self._llama.llama_model_default_params()
        self._model = self._llama.llama_model_load_from_file(str(file).encode(), params)
        if not self._model:
            raise ValueError(f"llama.cpp cannot load {file}")

    @classmethod
    def load(
        cls, folder: Path, dtype: torch.dtype, threads: int, quant: str | None = None
    ) -> LlamaCpp:
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "model.gguf"
            config = write_gguf(file, folder, dtype, quant)
            return cls(file, config["vocab_size"], threads)

    def __del__(self) -> None:
        for context in self._contexts.values():
            self._llama.llama_free(context)
        self._llama.llama_model_free(self._model)

    def logits(self, ids: Tensor) -> Tensor:
        return torch.from_numpy(self._run(self._context(len(ids)), ids)).clone()

    def prefill(self, ids: Tensor) -> list[int]:
        return self._run(self._context(len(ids)), ids).argmax(-1).tolist()

    def decoder(self, ids: Tensor, steps: int) -> Callable[[], Any]:
        context = self._context(len(ids))

        def run(ids: Tensor) -> Tensor:
            return torch.from_numpy(self._run(context, ids).argmax(-1))[:, None]

        # The rows are alike: the first one's cache serves for all.
        state = [run(ids[:1]).repeat(len(ids), 1)]
        for row in range(1, len(ids)):
            memory = self._llama.llama_get_memory(context)
            self._llama.llama_memory_seq_cp(memory, 0, row, -1, -1)

        def step() -> None:
            state[0] = run(state[0])

        return step

    def end_decoding(self) -> None:
        pass

    def _context(self, rows: int) -> int:
        """A context without a past, for so many rows."""
        if rows not in self._contexts:
            params = self._llama.llama_context_default_params()
            params.n_ctx, params.n_batch, params.n_seq_max = rows * CONTEXT, CONTEXT, rows
            context = self._llama.llama_init_from_model(self._model, params)
            if not context:
                raise RuntimeError(f"llama.cpp makes no context for {rows} x {CONTEXT} positions")
            self._contexts[rows] = context
            got = tuple(
                getattr(self._llama, f"llama_{name}")(context)
                for name in ("n_ctx_seq", "n_batch", "n_seq_max")
            )
            if got != (CONTEXT, CONTEXT, rows):
                raise RuntimeError(f"llama_context_params begins differently here: {got}")
            self._llama.llama_set_n_threads(context, self._threads, self._threads)
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._contexts[rows]), False)
        return self._contexts[rows]

    def _run(self, context: int, ids: Tensor) -> np.ndarray:
        """ids [B, T], row b after the past of sequence b -> logits of the last ones [B, V], until
        the next call."""
        rows, n = ids.shape
        ids = ids.to(torch.int32).contiguous()
        ones = torch.ones(rows * n, dtype=torch.int32)
        row = torch.arange(rows, dtype=torch.int32)
        rows_at = row.data_ptr() + row.itemsize * torch.arange(rows).repeat_interleave(n)
        last = torch.zeros(rows, n, dtype=torch.int8)
        last[:, -1] = 1
        at = [x.data_ptr() for x in (ones, rows_at, last)]
        batch = _Batch(rows * n, ids.data_ptr(), None, None, *at)
        if code := self._llama.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode of {rows} x {n} tokens: {code}")
        return np.ctypeslib.as_array(self._llama.llama_get_logits(context), (rows, self._vocab))
