"""The instruction sets of the CPU kernels on this machine."""

from internvl_rt import _C


def stand_in(isa: str) -> str:
    """What runs a kernel that has no variant of its own for `isa`."""
    return "avx512" if isa.startswith(("avx512_", "amx")) else isa


def attention_of(isa: str) -> str:
    """What runs the attention kernels, which have a variant for dot products of bf16 pairs."""
    return isa if isa == "avx512_bf16" else stand_in(isa)


ISAS = _C.supported_isas()
PLAIN_ISAS = [isa for isa in ISAS if stand_in(isa) == isa]  # every kernel has their variants
