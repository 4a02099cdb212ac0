"""The engine on a GPU, without one: tests/fake_cuda.py, whose kernels are the emulated ones."""

import pytest

import fake_cuda
import internvl_rt as ivr
from fake_cuda import FakeCuda
from test_golden import assert_logits_close, fp32, golden

CASE = "internvl3-qwen2_5"
IMAGE = 595


@pytest.fixture
def device(monkeypatch, emulator):
    """Makes device="cuda" a fake one, and returns it."""
    fake_cuda.install(monkeypatch, emulator)
    platform = FakeCuda()
    monkeypatch.setattr("internvl_rt.model.platform_for", lambda name: platform)
    return platform


def test_first(device):
    g = golden(CASE)
    model = ivr.load(g.folder, device="cuda", dtype="float32", image_token_id=IMAGE)
    inputs = g.inputs("image1")
    assert_logits_close(model.forward(**inputs).cpu(), g, "image1", law=fp32)
    expected = g["image1.gen_ids"]
    ids = model.generate(**inputs, max_new_tokens=5, eos_token_id=-1)
    assert ids == expected[:, :5].tolist()
    m = device.machine
    print(m.waits, m.copies, m.captures, m.replays, len(m.launches))
