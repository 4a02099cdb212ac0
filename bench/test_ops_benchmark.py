"""The catalogue's real-model cases under pytest-benchmark: `pytest bench --benchmark-only`.

Groups put our op beside its peer. Not collected by the default run (testpaths is tests/).
"""

import pytest
import torch

from internvl_rt.ops import bench, catalogue
from peers import PEERS

CASES = [
    pytest.param(op, case, dtype, id=f"{op.name}-{case.name}-{str(dtype).removeprefix('torch.')}")
    for op in catalogue().values()
    for case in op.cases
    if case.bench
    for dtype in case.dtypes
]


@pytest.fixture(autouse=True)
def threads():
    with bench.same_threads():
        yield


@pytest.mark.parametrize("side", ["ours", "peer"])
@pytest.mark.parametrize(("op", "case", "dtype"), CASES)
def test_op(benchmark, op, case, dtype: torch.dtype, side):
    benchmark.group = f"{op.name} {case.name} {dtype}"
    arguments = case.arguments(op.name, dtype)
    if side == "ours":
        out = op.function(**arguments)
        benchmark(lambda: op.function(**arguments, out=out))
        return
    label, prepare = PEERS.get(op.name, ("", None))
    call = prepare(**arguments) if prepare else None
    if call is None:
        pytest.skip("no peer does the same")
    benchmark.name = f"{label} {benchmark.name}"
    benchmark(call)
