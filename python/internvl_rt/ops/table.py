"""The op catalogue as text: for the terminal, and as docs/ops.md."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from internvl_rt.ops.registry import Op, Tolerance, catalogue

_WIDTH = 88
_HEAD = """# The ops

Generated from the catalogue: `python -m internvl_rt ops --markdown > docs/ops.md`.

Every op is called as `internvl_rt.ops.<op>(inputs..., params..., out=None, backend=None)`. Outputs
that are not given as `out` are allocated; `backend=None` means "native", the C++ extension, and
"reference" is plain torch. A tolerance bounds the distance to the float64 truth, as a multiple of
the largest error of plain torch in the same dtype plus a share of the element (or of the root mean
square, where that is more).

No op computes gradients. Tensors are read as they lie in memory: a negation that torch has put off
(`Tensor.is_neg`, as of `x.conj().imag`) must be resolved first.
"""


def as_text() -> str:
    """One line per op: name, backends, summary."""
    rows = [(op.name, ", ".join(op.backends), summary(op)) for op in _sorted()]
    if not rows:
        return ""
    name = max(len(r[0]) for r in rows)
    backends = max(len(r[1]) for r in rows)
    return "".join(f"{n:<{name}}  {b:<{backends}}  {s}\n" for n, b, s in rows)


def as_markdown() -> str:
    """The text of docs/ops.md."""
    parts = [_HEAD, "| op | backends | what it is |\n|---|---|---|\n"]
    parts[1] += "".join(
        f"| [{op.name}](#{op.name}) | {', '.join(op.backends)} | {_cell(summary(op))} |\n"
        for op in _sorted()
    )
    parts += [_section(op) for op in _sorted()]
    return "\n".join(parts)


def summary(op: Op) -> str:
    """The first sentence of the op's documentation."""
    first = _docstring(op).split("\n\n")[0]
    return " ".join(first.split())


def _section(op: Op) -> str:
    real = [c.name for c in op.cases if c.bench]
    facts = [
        ("dimensions", op.dims),
        ("backends", ", ".join(op.backends)),
        ("updates in place", ", ".join(op.mutates) or "nothing"),
        ("tolerance", _tolerance(op.tolerance)),
        ("test cases", f"{len(op.cases)}, of which real shapes: {', '.join(real) or 'none'}"),
        ("bench shape", f"`--shape {op.shape_help}`" if op.shaped else "the real shapes only"),
    ]
    table = "".join(f"| {name} | {_cell(text)} |\n" for name, text in facts)
    return (
        f"## {op.name}\n\n```python\n{_signature(op.name, op.function)}\n```\n\n"
        f"```text\n{_docstring(op)}\n```\n\n| | |\n|---|---|\n{table}"
    )


def _sorted() -> list[Op]:
    return [op for _, op in sorted(catalogue().items())]


def _docstring(op: Op) -> str:
    return inspect.cleandoc(op.function.__doc__ or "")


def _signature(name: str, function: Callable[..., Any]) -> str:
    """`name(parameters) -> result`, one parameter a line where one line is too short."""
    signature = inspect.signature(function)
    pieces: list[str] = []
    keyword_only = False
    for p in signature.parameters.values():
        if p.kind is p.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            pieces.append("*")
        piece = f"{p.name}: {p.annotation}"
        pieces.append(piece if p.default is p.empty else f"{piece} = {p.default!r}")
    end = f") -> {signature.return_annotation}"
    line = f"{name}({', '.join(pieces)}{end}"
    if len(line) <= _WIDTH:
        return line
    return f"{name}(\n" + "".join(f"    {piece},\n" for piece in pieces) + end


def _tolerance(law: Tolerance) -> str:
    if law.exact:
        return "exact: bit-equal to the reference"
    shares = ", ".join(
        f"{share:g} ({str(dtype).removeprefix('torch.')})" for dtype, share in law.relative.items()
    )
    return f"{law.factor:g} x torch's error + {shares}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
