"""Custom-kernel inference runtime for the InternVL family of vision-language models.

import internvl_rt as ivr
model = ivr.load("path/to/InternVL3-1B")
print(model.chat("What is in the picture?", images="photo.jpg"))
"""

from importlib.metadata import PackageNotFoundError, version

from internvl_rt import grounding, image, ops, prompt, video
from internvl_rt._C import num_threads, set_num_threads
from internvl_rt.model import Model, VisionModel, load, load_vision

try:
    __version__ = version("internvl-rt")
except PackageNotFoundError:
    # Run from a checkout that is not installed; the version stands in pyproject.toml alone.
    __version__ = "0+unknown"

__all__ = [
    "Model",
    "VisionModel",
    "grounding",
    "image",
    "load",
    "load_vision",
    "num_threads",
    "ops",
    "prompt",
    "set_num_threads",
    "video",
]
