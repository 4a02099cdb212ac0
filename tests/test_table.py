"""The catalogue as text, and docs/ops.md, which is generated from it."""

import inspect
from pathlib import Path

from internvl_rt import ops
from internvl_rt.ops import table

DOCS = Path(__file__).parents[1] / "docs" / "ops.md"


def test_docs_are_up_to_date():
    assert DOCS.read_text(encoding="utf-8") == table.as_markdown(), (
        "docs/ops.md is not what the catalogue says; regenerate it with "
        "`python -m internvl_rt ops --markdown > docs/ops.md`"
    )


def test_every_op_is_described():
    text = table.as_markdown()
    for op in ops.catalogue().values():
        section = text.split(f"\n## {op.name}\n")[1].split("\n## ")[0]
        for name in inspect.signature(op.function).parameters:
            assert f"{name}: " in section
        assert op.dims.replace("|", "\\|") in section
        for backend in op.backends:
            assert backend in section


def test_one_line_per_op():
    lines = table.as_text().splitlines()
    assert [line.split()[0] for line in lines] == sorted(ops.catalogue())
    for line in lines:
        op = ops.catalogue()[line.split()[0]]
        assert ", ".join(op.backends) in line
        assert line.endswith(table.summary(op))
        assert "\n" not in table.summary(op)


def test_markdown_has_no_broken_tables():
    for line in table.as_markdown().splitlines():
        if line.startswith("|"):
            cells = line.replace("\\|", "").count("|") - 1
            assert cells in (2, 3), line
