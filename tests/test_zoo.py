"""The published checkpoints: their plans, and the documents made of them."""

from pathlib import Path

import pytest

from internvl_rt import zoo
from internvl_rt.__main__ import main
from internvl_rt.config import load_config
from internvl_rt.prompt import TEMPLATES
from internvl_rt.runtime.memory import available_memory
from internvl_rt.runtime.plan import GIB

ROOT = Path(__file__).parent.parent


def test_docs_are_those_of_the_code():
    text = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    assert text == zoo.as_markdown(), (
        "run: python -m internvl_rt models --markdown > docs/models.md"
    )


def _runs(row):
    try:
        return zoo.load_published(row)
    except ValueError:
        return None


def test_every_row_runs_or_says_why():
    names = [row.name for row in zoo.ZOO]
    assert len(set(names)) == len(names)
    for row, line in zip(zoo.ZOO, zoo.as_text().splitlines()[1:], strict=True):
        assert row.template in TEMPLATES
        assert ("does not run" in line) == (_runs(row) is None)
        assert row.name in line


@pytest.mark.parametrize("part", zoo.VERIFIED)
def test_verified_means_that_there_is_a_case_of_that_part(part):
    case = ROOT / "tests/golden" / zoo.VERIFIED[part]
    assert (case / "golden.safetensors").exists()
    config = load_config(case)
    assert part in (config.text.backbone, {False: "300M", True: "6B"}[config.vision.qk_norm])


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        # Parameters as published: those of the language model, and of the vision tower beside it.
        ("InternVL3-1B", 0.494 + 0.136 + 0.304),
        ("InternVL3-8B", 7.62 + 0.304),
        ("InternVL2-26B", 19.9 + 5.54),
        ("InternVL2-4B", 3.82 + 0.304),
        ("InternVL3_5-38B", 32.8 + 5.54),
    ],
)
def test_plan_counts_every_parameter(name, billions, capsys):
    assert main(["info", "--plan", name, "--dtype", "bfloat16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = {line[:33].strip(): line[33:].split() for line in lines[1:]}
    assert found[""] == ["bfloat16"]
    total = sum(
        float(found[key][0]) for key in ("weights, packed", "embedding, mapped from the file")
    )
    assert total * GIB / 2 / 1e9 == pytest.approx(billions, rel=0.02)


def test_plan_in_both_dtypes(capsys):
    assert main(["info", "--plan", "InternVL3-1B"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["bfloat16", "float32"]
    half, _, whole, _ = lines[2].removeprefix("weights, packed").split()
    assert float(whole) == pytest.approx(2 * float(half), rel=1e-2)
    assert lines[-1].split()[0] == "fits"
    assert main(["info", "--plan", "InternVL9-1B"]) == 2
    assert "InternVL9-1B: no such folder" in capsys.readouterr().err


def test_available_memory_counts_what_the_kernel_lets_go_of(tmp_path):
    """Reading a checkpoint fills a container's limit with pages that cost nothing to take back."""
    assert available_memory(tmp_path) == 4 << 30

    def put(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    put("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable: 5000 kB\n")
    assert available_memory(tmp_path) == 5000 * 1024
    put("sys/fs/cgroup/memory.max", "max\n")
    put("sys/fs/cgroup/memory.current", "1000000\n")
    assert available_memory(tmp_path) == 5000 * 1024
    put("sys/fs/cgroup/memory.max", "1500000\n")
    assert available_memory(tmp_path) == 500_000
    put("sys/fs/cgroup/memory.stat", "anon 100\ninactive_file 300000\nactive_file 200000\n")
    assert available_memory(tmp_path) == 1_000_000
    put("sys/fs/cgroup/memory/memory.limit_in_bytes", "200000\n")  # cgroup v1
    put("sys/fs/cgroup/memory/memory.usage_in_bytes", "190000\n")
    put("sys/fs/cgroup/memory/memory.stat", "inactive_file 7000\ntotal_inactive_file 7000\n")
    assert available_memory(tmp_path) == 17_000
