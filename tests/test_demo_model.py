"""The model in the package answers, and `selftest` tells a right installation from a wrong one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import internvl_rt as ivr
from internvl_rt import selftest
from internvl_rt.__main__ import DEMO_NOTE, main
from internvl_rt.model import DEMO_MODEL

EXAMPLES = Path(__file__).parents[1] / "examples"
ANSWERS = json.loads((EXAMPLES / "answers.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model():
    return ivr.load()


@pytest.mark.parametrize("entry", ANSWERS, ids=lambda e: e["picture"])
def test_examples_are_answered_truly(model, entry):
    assert model.chat(entry["question"], images=EXAMPLES / entry["picture"]) == entry["answer"]


@pytest.mark.parametrize(
    ("dtype", "backend"), [("float32", "reference"), ("float32", "native"), ("bfloat16", "native")]
)
def test_every_backend_answers_as_recorded(dtype, backend):
    report = selftest.run(dtype=dtype, backend=backend)
    assert report.ok, report.text()
    if dtype == "float32":
        assert report.different == 0
    if backend == "native":
        assert any(name.startswith("paged_attention/") for name in report.kernels)
    assert report.tokens_per_second > 0


def test_single_and_batched_answers_are_equal(model):
    asked = [(image, entry["question"]) for image, entry in selftest.questions()[::5]]
    batched = model.batch_chat([{"question": q, "images": image} for image, q in asked])
    assert batched == [model.chat(q, images=image) for image, q in asked]


def test_the_recorded_accuracy_is_what_is_claimed():
    entries = [entry for _, entry in selftest.questions()]
    right = sum(e["answer"] == e["recorded"] for e in entries)
    assert right >= 0.8 * len(entries)
    assert len({e["recorded"] for e in entries}) > len(entries) / 3


def test_selftest_command(capsys):
    assert main(["selftest"]) == 0
    out = capsys.readouterr().out
    assert "linear_codes/" not in out
    assert "answers as recorded" in out
    assert "tokens/s" in out
    assert "linear_bf16/" in out
    assert out.rstrip().endswith("ok")


def test_selftest_of_quantised_weights(capsys):
    assert main(["selftest", "--quant", "int8"]) == 0
    assert "linear_codes/" in capsys.readouterr().out


def test_selftest_finds_a_wrong_installation(monkeypatch, capsys):
    true = selftest.questions()
    wrong = [(image, e | {"recorded": e["recorded"] + "?"}) for image, e in true[:5]] + true[5:]
    monkeypatch.setattr(selftest, "questions", lambda: wrong)
    assert main(["selftest"]) == 1
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.parametrize("order", ["picture first", "question first"])
def test_chat_without_a_model(order):
    entry = ANSWERS[0]
    picture = ["-i", str(EXAMPLES / entry["picture"])]
    words = [*picture, entry["question"]] if order[0] == "p" else [entry["question"], *picture]
    command = [sys.executable, "-m", "internvl_rt", "chat", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == entry["answer"]
    assert done.stderr.strip() == DEMO_NOTE


def test_a_mistyped_model_is_no_question(capsys):
    assert main(["chat", "./no-such-model", "-i", "x.png", "What is it?"]) == 2
    assert "no-such-model" in capsys.readouterr().err
    assert main(["chat", "no/model/here"]) == 2


def test_a_question_may_be_longer_than_a_file_name(capsys):
    question = "Is it red? " * 30
    assert main(["chat", "--show-prompt", question]) == 0
    assert question in capsys.readouterr().out


def test_the_checkpoint_is_small_and_ordinary():
    files = {p.name for p in DEMO_MODEL.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= files
    assert (DEMO_MODEL / "model.safetensors").stat().st_size <= 16_000_000
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    assert config["template"] == "internvl2_5"
    assert config["llm_config"]["architectures"] == ["Qwen2ForCausalLM"]
