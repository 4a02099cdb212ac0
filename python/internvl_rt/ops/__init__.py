"""The ops: `internvl_rt.ops.<op>(inputs..., params..., out=None, backend=None)`.

Each is declared once (schema, reference, cases, cost) in the module of its name.
"""

from internvl_rt.ops.embed_scatter import embed_scatter
from internvl_rt.ops.flash_attention import flash_attention
from internvl_rt.ops.gated_activation import gated_activation
from internvl_rt.ops.gated_linear import gated_linear
from internvl_rt.ops.grouped_gated_linear import grouped_gated_linear
from internvl_rt.ops.grouped_linear import PackedExperts, grouped_linear, pack_experts
from internvl_rt.ops.layer_norm import layer_norm
from internvl_rt.ops.linear import PackedWeight, WeightRows, hold, linear, pack, unpack
from internvl_rt.ops.moe_combine import moe_combine
from internvl_rt.ops.moe_route import Routing, moe_route
from internvl_rt.ops.mxfp4_unpack import mxfp4_unpack
from internvl_rt.ops.paged_attention import paged_attention
from internvl_rt.ops.pixel_unshuffle_mlp import pixel_unshuffle_mlp
from internvl_rt.ops.preprocess import preprocess
from internvl_rt.ops.registry import Op, OpSet, catalogue
from internvl_rt.ops.rms_norm import rms_norm
from internvl_rt.ops.rope import rope
from internvl_rt.ops.sample import sample

__all__ = [
    "Op",
    "OpSet",
    "PackedExperts",
    "PackedWeight",
    "Routing",
    "WeightRows",
    "catalogue",
    "embed_scatter",
    "flash_attention",
    "gated_activation",
    "gated_linear",
    "grouped_gated_linear",
    "grouped_linear",
    "hold",
    "layer_norm",
    "linear",
    "moe_combine",
    "moe_route",
    "mxfp4_unpack",
    "pack",
    "pack_experts",
    "paged_attention",
    "pixel_unshuffle_mlp",
    "preprocess",
    "rms_norm",
    "rope",
    "sample",
    "unpack",
]
