"""Generated from the op catalogue: every op, case, dtype, backend and instruction set."""

import pytest
import torch

from batches import TABLE, check_batches
from internvl_rt import _C, ops
from internvl_rt.ops.registry import Op, all_cases, check, missing, on_device, outputs_of
from isas import ISAS, stand_in


def _id(value: object) -> str | None:
    if isinstance(value, Op):
        return value.name
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return getattr(value, "name", None)


@pytest.fixture
def forced(isa):
    _C.force_isa(isa)
    _C.kernel_counts(reset=True)
    yield
    _C.force_isa("")


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("op", "case", "dtype"), all_cases(), ids=_id)
def test_native(op, case, dtype, isa):
    check(op, case, dtype, "native")
    for name in _C.kernel_counts(reset=True):
        assert name.split("/")[1] in (isa, stand_in(isa)), f"{name} ran, not {isa}"


def _lacks(backend):
    return missing(backend) if torch.cuda.is_available() else "there is no CUDA device"


ON_GPU = [
    pytest.param(
        op,
        backend,
        case,
        dtype,
        id="-".join((op.name, backend, case.name, str(dtype).removeprefix("torch."))),
        marks=pytest.mark.skipif(_lacks(backend) is not None, reason=str(_lacks(backend))),
    )
    for op in ops.catalogue().values()
    for case in op.gpu_cases
    for dtype in case.dtypes
    for backend in ("cuda", "triton")
    if backend in op.faces
]


@pytest.mark.parametrize(("op", "backend", "case", "dtype"), ON_GPU)
def test_on_gpu(op, backend, case, dtype):
    check(op, case, dtype, backend, "cuda")


BATCHES_ON_GPU = [
    pytest.param(
        op,
        backend,
        phase,
        dtype,
        id="-".join((op, backend, str(phase), str(dtype).removeprefix("torch."))),
        marks=pytest.mark.skipif(_lacks(backend) is not None, reason=str(_lacks(backend))),
    )
    for op, phase, dtype in TABLE
    for backend in ("cuda", "triton")
    if backend in ops.catalogue()[op].faces
]


@pytest.mark.parametrize(("op", "backend", "phase", "dtype"), BATCHES_ON_GPU)
def test_batches_on_gpu(op, backend, phase, dtype):
    check_batches(ops.catalogue()[op], phase, dtype, backend, "cuda")


def test_a_copy_on_a_device_keeps_strides_and_alignment():
    x = torch.arange(40.0).view(4, 10)[1:, 3:8]
    y = on_device(x, "cpu")
    assert torch.equal(x, y)
    assert (y.stride(), y.storage_offset()) == (x.stride(), x.storage_offset())
    assert y.data_ptr() != x.data_ptr()
    assert on_device(x, "meta").stride() == x.stride()
    assert on_device(torch.empty(0, 3), "cpu").shape == (0, 3)
    assert on_device(torch.float32, "cpu") is torch.float32


@pytest.mark.parametrize("op", ops.catalogue().values(), ids=_id)
def test_every_op_covers_empty_odd_and_real_sizes(op):
    names = [case.name for case in op.cases]
    assert len(set(names)) == len(names)
    for kind in ("empty", "odd"):
        assert any(n.startswith(kind) for n in names), f"{op.name} has no case named {kind}*"
    assert any(case.bench for case in op.cases), f"{op.name} has no real-model case"
    assert "native" in op.backends


@pytest.mark.parametrize("op", ops.catalogue().values(), ids=_id)
def test_unknown_backend_is_refused(op):
    case = op.cases[0]
    arguments = case.arguments(op.name, case.dtypes[0])
    with pytest.raises(ValueError, match=f"{op.name}: backend is 'cudnn', available: native"):
        op.function(**arguments, backend="cudnn")


DTYPES = (torch.float16, torch.float64, torch.int8, torch.int16, torch.bool, torch.complex64)


@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
def test_a_dtype_that_no_op_takes_is_named(dtype):
    name = str(dtype).removeprefix("torch.")
    x, weight = torch.ones(2, 8), torch.ones(8)
    with pytest.raises(ValueError, match=f"^rms_norm: x is {name}, expected float32 or bfloat16$"):
        ops.rms_norm(x.to(dtype), weight, eps=1e-6)
    with pytest.raises(ValueError, match=f"^rms_norm: weight is {name}, expected float32$"):
        ops.rms_norm(x, weight.to(dtype), eps=1e-6)
    with pytest.raises(ValueError, match=f"^linear: x is {name}, expected float32 or bfloat16$"):
        ops.linear(x.to(dtype), torch.ones(4, 8))


@pytest.mark.parametrize("op", ops.catalogue().values(), ids=_id)
def test_an_output_of_another_shape_is_called_out(op):
    case = next(c for c in op.cases if not c.name.startswith("empty") and not c.slow)
    arguments = case.arguments(op.name, case.dtypes[0])
    results = outputs_of(op.reference(**arguments))
    if len(results) - len(op.mutates) == 1:
        wrong = results[0].new_empty(1, 2, 3, 4, 5)
        with pytest.raises(ValueError, match=r"^\w+: out has shape \[1, 2, 3, 4, 5\]"):
            op.function(**arguments, out=wrong)


def test_tensors_without_memory_are_refused_in_one_line():
    x, weight = torch.ones(2, 8), torch.ones(8)
    for wrong in (weight.to("meta"), weight.to_sparse()):
        with pytest.raises(TypeError, match=r"^tensor cannot be read: [^\n]*$"):
            ops.rms_norm(x, wrong, eps=1e-6)


@pytest.mark.parametrize("backend", ["", 0])
def test_only_none_is_the_usual_backend(backend):
    with pytest.raises(ValueError, match=f"rms_norm: backend is {backend!r}, available"):
        ops.rms_norm(torch.ones(2, 8), torch.ones(8), eps=1e-6, backend=backend)


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("op", ops.catalogue().values(), ids=_id)
def test_a_gpu_backend_without_a_gpu_is_one_line(op, backend, built, monkeypatch):
    monkeypatch.setattr(_C, "has_cuda", built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    case = op.cases[0]
    arguments = case.arguments(op.name, case.dtypes[0])
    why = "there is no CUDA device|the package triton is not installed"
    if backend == "cuda" and not built:
        why = "this build has no CUDA kernels"
    why = f" but ({why});" if backend in op.faces else ""
    there = f"^{op.name}: backend is '{backend}',{why} available: native, reference$"
    with pytest.raises(ValueError, match=there):
        op.function(**arguments, backend=backend)
    with pytest.raises(ValueError, match=f": backend is '{backend}',.* available: native, ref"):
        ops.OpSet(backend)


def test_the_cuda_backend_never_runs_on_the_cpu(monkeypatch):
    monkeypatch.setattr(_C, "has_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    x = torch.ones(2, 8)
    with pytest.raises(ValueError, match="rms_norm: backend is 'cuda', but a tensor is on cpu"):
        ops.rms_norm(x, torch.ones(8), eps=1e-6, backend="cuda")
