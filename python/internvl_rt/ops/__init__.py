"""The ops: `internvl_rt.ops.<op>(inputs..., params..., out=None, backend=None)`.

Each is declared once (schema, reference, cases, cost) in the module of its name.
"""

from internvl_rt.ops.flash_attention import flash_attention
from internvl_rt.ops.paged_attention import paged_attention
from internvl_rt.ops.registry import Op, OpSet, catalogue
from internvl_rt.ops.rms_norm import rms_norm
from internvl_rt.ops.rope import rope

__all__ = ["Op", "OpSet", "catalogue", "flash_attention", "paged_attention", "rms_norm", "rope"]
