"""Fixtures that several test files share."""

import shutil
from pathlib import Path

import pytest

import tiny_tokenizer
from emulator import UNITS, compile_units, link

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory):
    """A checkpoint that can chat: golden weights (vocabulary 600) and a tokenizer of our own."""
    folder = tmp_path_factory.mktemp("checkpoint")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copyfile(GOLDEN / "internvl3-qwen2_5" / name, folder / name)
    tiny_tokenizer.write_json(folder)
    return folder


@pytest.fixture(scope="session")
def objects(tmp_path_factory):
    """The emulator of kernels/cuda, compiled and not yet linked."""
    return compile_units(UNITS, tmp_path_factory.mktemp("emulator"))


@pytest.fixture(scope="session")
def emulator(objects):
    return link(objects, objects[0].parent / "emulator.so")
