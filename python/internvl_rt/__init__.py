"""Custom-kernel inference runtime for the InternVL family of vision-language models."""

from internvl_rt import ops
from internvl_rt._C import num_threads, set_num_threads

__all__ = ["num_threads", "ops", "set_num_threads"]
