"""The instruction sets of the CPU kernels on this machine."""

import torch

from internvl_rt import _C


def stand_in(isa: str) -> str:
    """What runs a kernel that has no variant of its own for `isa`."""
    return "avx512" if isa.startswith(("avx512_", "amx")) else isa


def runs(isa: str, dtype: torch.dtype) -> str:
    """What runs a kernel that has every variant in bfloat16 (linear, attention)."""
    return isa if dtype == torch.bfloat16 else stand_in(isa)


def reads_rows(isa: str, dtype: torch.dtype) -> bool:
    """Whether `ops.hold` leaves weights of this dtype where they are."""
    return dtype == torch.bfloat16 and isa.startswith(("avx512_", "amx"))


ISAS = _C.supported_isas()
PLAIN_ISAS = [isa for isa in ISAS if stand_in(isa) == isa]  # every kernel has their variants
